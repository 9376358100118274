"""The compiled forms of one graph, and the choice among them at each call: on the host, without a guard."""

import logging
from collections.abc import Callable

from fg_inductor.denoising import current_call
from fg_inductor.passes.variant import Lazy
from fg_inductor.settings import Settings

log = logging.getLogger(__name__)

_said: set[Settings] = set()


def forget() -> None:
    """Say again what has been said once."""
    _said.clear()


class Variants:
    """A compiled graph that attends densely in the first denoising steps and sparsely after them.

    dense, sparse  compile a form; each is called once, when the form first runs
    now            compile both at once: where sizes are symbolic, a form may add guards, which Dynamo no longer
                   collects when it first runs
    """

    def __init__(self, settings: Settings, dense: Callable, sparse: Callable, now: bool):
        self.settings = settings
        self.dense, self.sparse = Lazy(dense), Lazy(sparse)
        if now:
            self.dense.compile()
            self.sparse.compile()
        else:
            self._choose().compile()  # while errors still belong to the compilation

    def __call__(self, *args):
        return self._choose()(*args)

    def _choose(self) -> Lazy:
        call = current_call()
        if call is None:
            say_stateless(self.settings)
            return self.sparse
        return self.dense if call.run.index < call.run.dense_steps(self.settings.dense_first) else self.sparse


def say_stateless(settings: Settings) -> None:
    """Say once which options are without effect because nobody counts the steps."""
    if settings.quiet or settings in _said:
        return
    _said.add(settings)
    log.warning(
        "fgattn: denoising steps are not counted, so 'fgattn.dense_first' has no effect: call the model inside `with "
        "fg_inductor.denoising(pipe):`, or `denoising(model, steps=...)` and run.step() in a loop of your own."
    )
