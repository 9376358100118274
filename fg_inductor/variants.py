"""The compiled forms of one graph, and the choice among them at each call: on the host, without a guard."""

import logging
from collections.abc import Callable

from fg_inductor.denoising import current_call
from fg_inductor.passes.variant import Lazy
from fg_inductor.settings import Settings
from fg_inductor.state import Keeper

log = logging.getLogger(__name__)

_said: set[Settings] = set()


def forget() -> None:
    """Say again what has been said once."""
    _said.clear()


class Variants:
    """A compiled graph that attends densely in the first denoising steps, and sparsely after them.

    dense, sparse  compile a form; each is called once, when the form first runs
    observed       compiles the form with state, if there is one, and ``keeper`` has its masks
    now            compile all at once: where sizes are symbolic, a form may add guards, which Dynamo no longer collects
                   when it first runs
    """

    def __init__(
        self,
        settings: Settings,
        dense: Callable,
        sparse: Callable,
        now: bool,
        observed: Callable | None = None,
        keeper: Keeper | None = None,
    ):
        self.settings, self.keeper = settings, keeper
        self.dense, self.sparse = Lazy(dense), Lazy(sparse)
        self.observed = observed and Lazy(observed)
        for form in filter(None, (self.dense, self.sparse, self.observed) if now else (self._likely(),)):
            form.compile()  # while errors still belong to the compilation

    def __call__(self, *args):
        call = current_call()
        if call is None:
            say_stateless(self.settings)
        elif call.run.index < call.run.dense_steps(self.settings.dense_first):
            return self.dense(*args)
        elif self.keeper and (state := self.keeper.arguments(call, args)):
            return self.observed(*args, *state)
        return self.sparse(*args)

    def _likely(self) -> Lazy:
        """The form that the call which is compiled for will run, but for what its arguments decide."""
        call = current_call()
        if call and call.run.index < call.run.dense_steps(self.settings.dense_first):
            return self.dense
        return self.observed if self.observed and call and call.branch is not None else self.sparse


def say_stateless(settings: Settings) -> None:
    """Say once which options are without effect because nobody counts the steps."""
    if settings.quiet or settings in _said:
        return
    _said.add(settings)
    effects = []
    if settings.dense_first:
        effects.append("'fgattn.dense_first' has no effect")
    if settings.mask == "observed":
        effects.append("masks are selected anew in each call, as 'pooled' does, not 'observed'")
    log.warning(
        "fgattn: denoising steps are not counted, so %s: call the model inside `with fg_inductor.denoising(pipe):`, or "
        "`denoising(model, steps=...)` and run.step() in a loop of your own.", " and ".join(effects),
    )  # fmt: skip
