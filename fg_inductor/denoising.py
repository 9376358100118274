"""The denoising loop as seen from outside compiled code: which step it is, and which branch of guidance is computed.

    with fg_inductor.denoising(pipe):                    # a diffusers pipeline: its scheduler says when a step is over
        video = pipe(prompt, num_inference_steps=50)

    with fg_inductor.denoising(model, steps=50) as run:  # a loop of your own
        for t in timesteps:
            noise = model(latents, t, text)
            ...
            run.step()

A compiled graph can't know the step: a number that it read would be a guard, and a recompile a step. So steps are
counted here, in Python between the calls of the model, and nothing is read from a tensor. Compile the model before the
``with``: what is compiled whole inside it can't be seen from outside.
"""

import contextlib
import functools
import logging
import math
import threading
import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

log = logging.getLogger(__name__)

# More calls of a model in one step than any guidance makes: nobody counts the steps.
MOST_BRANCHES = 8


class _Branch:
    """One branch of guidance of a model: the inputs of its last call, and which of them stay from step to step."""

    def __init__(self, number: int, inputs: list[Any], step: int):
        self.number, self.inputs, self.step = number, inputs, step
        self.lasting: set[int] | None = None  # positions; None until its second step

    def shared(self, inputs: list[Any]) -> set[int]:
        """Positions of the tensors that its last call had too; none where the lasting ones are not among them."""
        if len(inputs) != len(self.inputs):
            return set()
        same = {i for i, (x, y) in enumerate(zip(inputs, self.inputs, strict=True)) if isinstance(x, Tensor) and x is y}
        return set() if self.lasting and not self.lasting <= same else same


class Branches:
    """Tells the branches of guidance of one model by the identity of its inputs.

    Latents are new in each step, the text of a branch is the same tensor in all of them. The tensors of the last call
    are held, so that an address can't come back as another tensor. A branch is called once a step.
    """

    def __init__(self):
        self._branches: list[_Branch] = []
        self._count = 0
        self._first_step: int | None = None

    def identify(self, inputs: list[Any], step: int) -> int | None:
        """The number of the branch, from 0 in the order of their first calls; None where it can't be told.

        A branch that first appears in a later step is believed from its second call on: until then it may as well be a
        known one whose inputs were made anew.
        """
        if self._first_step is None:
            self._first_step = step
        self._branches = [b for b in self._branches if b.lasting or b.step >= step - 1 or b.step == self._first_step]
        found = [(b.shared(inputs), b) for b in self._branches if b.step != step]
        found = sorted(((same, b) for same, b in found if same), key=lambda pair: -len(pair[0]))
        if len(found) > 1 and len(found[0][0]) == len(found[1][0]):
            return None
        if found:
            same, branch = found[0]
            branch.lasting, branch.inputs, branch.step = branch.lasting or same, inputs, step
            return branch.number
        if sum(b.step == step for b in self._branches) == MOST_BRANCHES:
            return None
        self._branches.append(_Branch(self._count, inputs, step))
        self._count += 1
        return self._count - 1 if step == self._first_step else None


class Run:
    """A denoising loop in progress; ``denoising`` makes one.

    index      the step, from 0
    total      steps in all; None where nobody has said so yet
    video      a token of the video that is made; another one for each
    ambiguous  steps in which the branch of a call could not be told, and somebody asked for it
    """

    def __init__(self, total: int | None):
        self.index = 0
        self.total = total
        self.video = object()
        self.ambiguous: set[int] = set()
        self._given = total is not None
        self._declared: Hashable = None
        self._branches: dict[nn.Module, Branches] = {}
        self._calls = 0

    def step(self) -> None:
        """A step is over. A pipeline's scheduler calls this."""
        self.index += 1

    @contextlib.contextmanager
    def branch(self, name: Hashable) -> Iterator[None]:
        """Calls of the model inside are of the branch ``name`` of guidance ("cond", "uncond").

        Needed only where the inputs don't tell: where text embeddings are made anew in each step.
        """
        before, self._declared = self._declared, name
        try:
            yield
        finally:
            self._declared = before

    def dense_steps(self, share: float) -> int:
        """The first steps that ``fgattn.dense_first`` = share makes dense: rounded, and one at least if it is not 0.

        Raises RuntimeError where the number of steps is not known.
        """
        if share == 0:
            return 0
        return max(1, math.floor(share * self._known_total("fgattn.dense_first") + 0.5))

    def stage(self, starts: Sequence[float]) -> int:
        """The number of the stage of the density that the step is in. starts: shares of the steps, from 0.

        Raises RuntimeError where there are several, and the number of steps is not known.
        """
        if len(starts) == 1:
            return 0
        total = self._known_total("fgattn.density")
        return sum(self.index >= math.floor(start * total + 0.5) for start in starts) - 1

    def _known_total(self, option: str) -> int:
        if self.total is None:
            raise RuntimeError(
                f"fg_inductor.denoising: '{option}' speaks of a share of the steps, and their number is not known: the "
                "scheduler's set_timesteps has not been called inside the 'with'. Pass steps=."
            )
        return self.total

    def begin(self, total: int) -> None:
        """A new video of ``total`` steps begins; the number given to ``denoising`` prevails."""
        self.index = 0
        self.total = self.total if self._given else total
        self.video = object()
        self.ambiguous.clear()
        self._branches.clear()

    def call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> "Call":
        """A call of the model, which begins now."""
        self._calls += 1
        branch = self._declared
        if branch is None:
            branches = self._branches.setdefault(model, Branches())
            branch = branches.identify(tree_leaves((args, kwargs)), self.index)
        return Call(self, model, branch)

    def end(self) -> None:
        """The loop is over; the tensors held are let go."""
        self._branches.clear()
        if self.index == 0 and self._calls > 1:
            log.warning(
                "fg_inductor.denoising: the model was called %d times in one step. Call run.step() after each step of "
                "your loop, or pass a pipeline, whose scheduler does.", self._calls,
            )  # fmt: skip


class Call:
    """One call of a model inside a run. branch: which one of guidance; None where that can't be told."""

    def __init__(self, run: Run, model: nn.Module, branch: Hashable):
        self.run, self.branch = run, branch
        self._model = weakref.ref(model)  # calls are kept for their identity

    @property
    def model(self) -> nn.Module:
        """The model that is called."""
        return self._model()


class _Calls(threading.local):
    def __init__(self):
        self.stack: list[Call] = []


_calls = _Calls()


def current_call() -> Call | None:
    """The call of a model in progress in this thread, the innermost one; None outside of any run."""
    return _calls.stack[-1] if _calls.stack else None


@contextlib.contextmanager
def denoising(pipe_or_model: Any, steps: int | None = None) -> Iterator[Run]:
    """Count the denoising steps of a diffusers pipeline, or of one model in a loop of your own.

    pipe_or_model  a pipeline (an object with a ``scheduler`` and ``components``), or an ``nn.Module``
    steps          denoising steps of a video. A pipeline says so itself; a bare model needs it for
                   ``fgattn.dense_first`` alone

    Yields a Run. Raises TypeError for anything else, ValueError for steps below 1, and RuntimeError where the model is
    in another run.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
        raise TypeError(f"fg_inductor.denoising: steps={steps!r}; give the number of denoising steps.")
    if steps is not None and steps < 1:
        raise ValueError(f"fg_inductor.denoising: steps={steps}; give 1 or more.")
    is_module = isinstance(pipe_or_model, nn.Module)
    scheduler = None if is_module else getattr(pipe_or_model, "scheduler", None)
    if not is_module and (not hasattr(scheduler, "step") or not hasattr(pipe_or_model, "components")):
        raise TypeError(
            f"fg_inductor.denoising: got {type(pipe_or_model).__name__}; give a diffusers pipeline, which has a "
            "scheduler and components, or the nn.Module that your loop calls."
        )
    models = [pipe_or_model] if is_module else pipe_or_model.components.values()
    run = Run(steps)
    with contextlib.ExitStack() as stack:
        for model in dict.fromkeys(x for x in models if isinstance(x, nn.Module)):
            stack.enter_context(_watch_model(run, model))
        if scheduler is not None:
            stack.enter_context(_watch_scheduler(run, scheduler))
        stack.callback(run.end)
        yield run


_watched: set[nn.Module] = set()  # the modules in a run


@contextlib.contextmanager
def _watch_model(run: Run, model: nn.Module) -> Iterator[None]:
    """Note each call of the model, outside of the code that is compiled for it."""
    if model in _watched:
        raise RuntimeError(
            f"fg_inductor.denoising: this {type(model).__name__} is in a denoising run already; end that one first."
        )
    _watched.add(model)
    compiled = model._compiled_call_impl  # by model.compile(): hooks would become part of what it traces
    try:
        if compiled is not None:
            model._compiled_call_impl = _noting(run, model, compiled)
            yield
        else:
            with _hooks(run, model):
                yield
    finally:
        _watched.discard(model)
        if compiled is not None:
            model._compiled_call_impl = compiled


def _noting(run: Run, model: nn.Module, compiled: Any) -> Any:
    @functools.wraps(compiled)
    def noted(*args, **kwargs):
        _calls.stack.append(run.call(model, args, kwargs))
        try:
            return compiled(*args, **kwargs)
        finally:
            _calls.stack.pop()

    return noted


@contextlib.contextmanager
def _hooks(run: Run, model: nn.Module) -> Iterator[None]:
    def before(_, args, kwargs):
        if not torch.compiler.is_compiling():  # traced: the call was compiled from outside
            _calls.stack.append(run.call(model, args, kwargs))

    def after(*_):
        if not torch.compiler.is_compiling():
            _calls.stack.pop()

    handles = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _watch_scheduler(run: Run, scheduler: Any) -> Iterator[None]:
    """Count the scheduler's steps. Its class is replaced, not its methods: copies of it then step themselves."""
    base = type(scheduler)

    class Counted(base):
        @functools.wraps(base.step)
        def step(self, *args, **kwargs):
            result = super().step(*args, **kwargs)
            if self is scheduler:
                run.step()
            return result

        @functools.wraps(base.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            result = super().set_timesteps(*args, **kwargs)
            if self is scheduler:
                run.begin(len(self.timesteps))
            return result

    # A scheduler is saved, and compared with those that a pipeline expects, by the name of its class.
    Counted.__name__, Counted.__qualname__, Counted.__module__ = base.__name__, base.__qualname__, base.__module__
    scheduler.__class__ = Counted
    try:
        yield
    finally:
        scheduler.__class__ = base
