"""The compiled forms of one graph, and the choice among them at each call: on the host, without a guard."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from fg_inductor.denoising import current_call
from fg_inductor.passes.variant import Lazy
from fg_inductor.settings import Settings
from fg_inductor.state import Keeper

log = logging.getLogger(__name__)

_said: set[Settings] = set()


def forget() -> None:
    """Say again what has been said once."""
    _said.clear()


@dataclass
class Stage:
    """The forms of a graph in one stage of the density: without state, and with masks of each size that is kept."""

    sparse: Lazy
    observed: list[Lazy]


class Variants:
    """A compiled graph that attends densely in the first denoising steps, and sparsely after them.

    dense   compiles a form, as all callables here do; each is called once, when the form first runs
    stages  for each stage of the density: the form without state, and those with, which ``keeper`` has the masks for
    now     compile all at once: where sizes are symbolic, a form may add guards, which Dynamo no longer collects when
            it first runs
    """

    def __init__(
        self,
        settings: Settings,
        dense: Callable,
        stages: list[tuple[Callable, list[Callable]]],
        now: bool,
        keeper: Keeper | None = None,
    ):
        self.settings, self.keeper = settings, keeper
        self.starts = [start for start, _ in settings.stages]
        self.dense = Lazy(dense)
        self.stages = [Stage(Lazy(sparse), [Lazy(form) for form in observed]) for sparse, observed in stages]
        everything = [self.dense, *(form for stage in self.stages for form in (stage.sparse, *stage.observed))]
        for form in everything if now else [self._likely()]:
            form.compile()  # while errors still belong to the compilation

    def __call__(self, *args):
        call = current_call()
        if call is None:
            say_stateless(self.settings)
            return self.stages[0].sparse(*args)
        if call.run.index < call.run.dense_steps(self.settings.dense_first):
            return self.dense(*args)
        number = call.run.stage(self.starts)
        if self.keeper and (found := self.keeper.arguments(call, args, number)):
            level, state = found
            return self.stages[number].observed[level](*args, *state)
        return self.stages[number].sparse(*args)

    def _likely(self) -> Lazy:
        """The form that the call which is compiled for will run, but for what its arguments decide."""
        call = current_call()
        if call is None:
            return self.stages[0].sparse
        if call.run.index < call.run.dense_steps(self.settings.dense_first):
            return self.dense
        stage = self.stages[call.run.stage(self.starts)]
        return stage.observed[0] if self.keeper and call.branch is not None else stage.sparse


def say_stateless(settings: Settings) -> None:
    """Say once which options are without effect because nobody counts the steps."""
    if settings.quiet or settings in _said:
        return
    _said.add(settings)
    effects = []
    if settings.dense_first:
        effects.append("'fgattn.dense_first' has no effect")
    if len(settings.stages) > 1:
        effects.append(f"'fgattn.density' stays {settings.stages[0][1].density:g}")
    if settings.mask == "observed":
        effects.append("masks are selected anew in each call, as 'pooled' does, not 'observed'")
    log.warning(
        "fgattn: denoising steps are not counted, so %s: call the model inside `with fg_inductor.denoising(pipe):`, or "
        "`denoising(model, steps=...)` and run.step() in a loop of your own.", " and ".join(effects),
    )  # fmt: skip
