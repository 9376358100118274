"""Counting steps, telling branches, dense first steps: from outside compiled code, without a recompile."""

import copy
import gc
import weakref

import pytest
import torch
from denoising_loops import compile_blocks, compile_forward, compile_in_place, compile_whole
from torch import nn
from torch.utils.checkpoint import checkpoint

import fg_inductor
from fg_inductor.denoising import MOST_BRANCHES, Branches, Run, current_call
from fg_inductor.toy_models import SHORT, Stack, count_calls, tokens

EAGER = {**SHORT, "fgattn.inner": "eager", "fgattn.density": 0.1}


# Branches of guidance. A call is "step: inputs", equal names are one tensor; behind ->: the number of the branch.

BRANCHES = {
    "one": "0: l0 c -> 0, 1: l1 c -> 0, 2: l2 c -> 0",
    "two": "0: l0 t0 c -> 0, 0: l0 t0 u -> 1, 1: l1 t1 c -> 0, 1: l1 t1 u -> 1",
    "latents-in-place": "0: l t c -> 0, 0: l t u -> 1, 1: l t c -> 0, 1: l t u -> 1, 2: l t u -> 1, 2: l t c -> 0",
    "skipped-once": "0: l0 c -> 0, 0: l0 u -> 1, 1: l1 u -> 1, 2: l2 c -> 0, 2: l2 u -> 1",
    "image-in-common": "0: l0 i c -> 0, 0: l0 i u -> 1, 1: l1 i u -> 1, 1: l1 i c -> 0",
    "other-text-same-image": "0: l0 i c -> 0, 1: l1 i c -> 0, 2: l2 i d -> None",
    "nothing-lasts": "0: a -> 0, 1: b -> None, 2: c -> None, 3: d -> None",
    "begins-late": "0: l0 c -> 0, 1: l1 c -> 0, 1: l1 u -> None, 2: l2 c -> 0, 2: l2 u -> 1",
    "alike": "0: l0 i -> 0, 0: l0 i -> 1, 1: l1 i -> None",
    "other-arity": "0: l0 c -> 0, 1: l1 c i -> None",
    "steps-not-counted": ", ".join(f"0: l{i} c -> {i if i < MOST_BRANCHES else None}" for i in range(10)),
}


@pytest.mark.parametrize("calls", BRANCHES.values(), ids=BRANCHES)
def test_branches(calls):
    branches, named = Branches(), {}
    for number, call in enumerate(calls.split(", ")):
        step, _, rest = call.partition(": ")
        names, _, expected = rest.partition(" -> ")
        inputs = [named.setdefault(name, torch.zeros(1)) for name in names.split()]
        assert str(branches.identify(inputs, int(step))) == expected, (number, call)


def test_branches_hold_the_tensors_of_one_call():
    branches = Branches()
    text = torch.zeros(1)
    latents = [torch.zeros(1) for _ in range(3)]
    alive = [weakref.ref(x) for x in latents]
    for step, x in enumerate(latents):
        branches.identify([x, text], step)
    del x, latents
    gc.collect()
    assert [ref() is not None for ref in alive] == [False, False, True]


# Steps


@pytest.mark.parametrize(
    ("share", "total", "dense"), [(0.0, 8, 0), (0.2, 50, 10), (0.2, 4, 1), (0.01, 4, 1), (0.5, 3, 2), (1.0, 6, 6)]
)
def test_dense_steps(share, total, dense):
    assert Run(total).dense_steps(share) == dense


class Scheduler:
    """What a pipeline needs of one of diffusers'."""

    def __init__(self):
        self.taken = 0

    def set_timesteps(self, steps):
        self.timesteps = torch.arange(steps)

    def step(self, x):
        """Where it is."""
        self.taken += 1
        return x


class Pipeline:
    def __init__(self, model):
        self.scheduler, self.model = Scheduler(), model

    @property
    def components(self):
        return {"scheduler": self.scheduler, "model": self.model, "tokenizer": None}

    def __call__(self, steps, extra=False):
        self.scheduler.set_timesteps(steps)
        text, other = torch.zeros(1), copy.deepcopy(self.scheduler)
        for i in range(steps):
            self.model(tokens(), text)
            if extra:
                other.step(i)
            self.scheduler.step(i)
        return other.taken


class Recorder(nn.Module):
    """Says in which run, step and branch it was called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, text):
        call = current_call()
        self.seen.append(call and (call.run.index, call.run.total, call.branch))


@pytest.mark.parametrize("extra", [False, True], ids=["alone", "copied-scheduler-beside"])
def test_a_pipeline_counts_itself(extra):
    model = Recorder()
    pipe = Pipeline(model)
    with fg_inductor.denoising(pipe) as run:
        assert type(pipe.scheduler).__name__ == "Scheduler"
        assert isinstance(pipe.scheduler, Scheduler)
        assert pipe.scheduler.step.__doc__ == "Where it is."
        assert pipe(3, extra) == 3 * extra
        assert pipe(2) == 0 or pipe.scheduler.taken == 5
        assert run.index == 2
    assert type(pipe.scheduler) is Scheduler
    assert pipe.scheduler.taken == 5
    assert model.seen == [(0, 3, 0), (1, 3, 0), (2, 3, 0), (0, 2, 0), (1, 2, 0)]
    pipe(1)
    assert model.seen[5:] == [None]


def test_a_given_number_of_steps_prevails():
    model = Recorder()
    with fg_inductor.denoising(Pipeline(model), steps=30) as run:
        run.begin(40)
        assert run.total == 30


def test_declared_branches():
    model = Recorder()
    with fg_inductor.denoising(model) as run:
        for _ in range(2):
            for name in ("cond", "uncond"):
                with run.branch(name):
                    model(tokens(), torch.zeros(1))
            run.step()
    assert [branch for _, _, branch in model.seen] == ["cond", "uncond"] * 2


def test_an_error_ends_the_call_and_the_run():
    model = Recorder()
    with pytest.raises(TypeError), fg_inductor.denoising(model):
        model(tokens(), text=1, unknown=2)
    assert current_call() is None
    assert not model._forward_hooks and not model._forward_pre_hooks
    model(tokens(), torch.zeros(1))
    assert model.seen == [None]


def test_runs_of_two_models_nest():
    outer, inner = Recorder(), Recorder()
    with fg_inductor.denoising(outer, steps=5) as run:
        run.step()
        with fg_inductor.denoising(inner, steps=7):
            outer(tokens(), torch.zeros(1))
            inner(tokens(), torch.zeros(1))
        inner(tokens(), torch.zeros(1))
        outer(tokens(), torch.zeros(1))
    assert (outer.seen, inner.seen) == ([(1, 5, 0), (1, 5, 1)], [(0, 7, 0), None])


REFUSED = {
    "function": (lambda: fg_inductor.denoising(len), TypeError, "builtin_function_or_method; give a diffusers"),
    "no-steps": (lambda: fg_inductor.denoising(nn.Linear(1, 1), steps=0), ValueError, "steps=0; give 1 or more"),
    "half-a-step": (lambda: fg_inductor.denoising(nn.Linear(1, 1), steps=1.5), TypeError, "steps=1.5"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message), make():
        pass


def test_refuses_a_model_in_two_runs():
    model = Recorder()
    with fg_inductor.denoising(model):
        with pytest.raises(RuntimeError, match="this Recorder is in a denoising run already"):
            fg_inductor.denoising(model).__enter__()
        model(tokens(), torch.zeros(1))
    assert model.seen == [(0, None, 0)]
    with fg_inductor.denoising(model):
        pass


def test_says_that_nobody_counts(caplog):
    model = Recorder()
    with fg_inductor.denoising(model):
        for _ in range(3):
            model(tokens(), torch.zeros(1))
    (record,) = [r for r in caplog.records if r.name == "fg_inductor.denoising"]
    assert "called 3 times in one step. Call run.step()" in record.getMessage()


# Dense first steps


def steps_that_are_dense(model, exact, options, steps=4, calls=1):
    """Which of the steps give what the dense model gives; a recompile fails, from the second step of a kind on."""
    dense = []
    with fg_inductor.denoising(model, steps=steps) as run:
        for i in range(steps):
            for _ in range(calls):
                x = tokens()
                with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
                    dense.append(torch.allclose(model(x), exact(x), atol=1e-5))
            run.step()
    return dense


@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place, compile_forward, compile_blocks])
def test_dense_first(compiled):
    exact = Stack()
    model = compiled(copy.deepcopy(exact), {**EAGER, "fgattn.dense_first": 0.5})
    with torch.no_grad():
        assert steps_that_are_dense(model, exact, EAGER, calls=2) == [True] * 4 + [False] * 4
        assert fg_inductor.report().rewritten in (1, 2)
        x = tokens()
        assert not torch.allclose(model(x), exact(x))  # outside: stateless


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("grad", [torch.enable_grad, torch.inference_mode], ids=lambda f: f.__name__)
def test_dense_first_with_other_compilers(inner, grad):
    exact = Stack()
    model = compile_whole(exact, {**EAGER, "fgattn.inner": inner, "fgattn.dense_first": 0.5, "fgattn.stats": True})
    with grad():
        assert steps_that_are_dense(model, exact, EAGER) == [True, True, False, False]
    densities = [row.density for row in fg_inductor.report()]
    assert densities == [0.125, 0.125]  # of the sparse steps: 2 of 16 groups


@pytest.mark.parametrize("mask", ["pooled", "dense"])
def test_dense_first_with_every_mask(mask):
    exact = Stack()
    model = compile_whole(exact, {**EAGER, "fgattn.mask": mask, "fgattn.dense_first": 0.5})
    with torch.no_grad():
        assert steps_that_are_dense(model, exact, EAGER) == [True, True, *[mask == "dense"] * 2]


def test_gradients_of_both_forms():
    exact = Stack()
    options = {**EAGER, "fgattn.inner": "aot_eager"}
    model = compile_whole(exact, {**options, "fgattn.dense_first": 0.5})
    sparse = compile_whole(exact, options)
    x = tokens(requires_grad=True)
    (of_sparse,) = torch.autograd.grad(sparse(x).sum(), x)
    (of_dense,) = torch.autograd.grad(exact(x).sum(), x)
    with fg_inductor.denoising(model, steps=2) as run:
        (first,) = torch.autograd.grad(model(x).sum(), x)
        run.step()
        (second,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(first, of_dense)
    torch.testing.assert_close(second, of_sparse)
    assert not torch.allclose(first, second)


def test_checkpointed_regions_are_dense_too():
    """Their graphs belong to one form each."""
    exact = Stack(call=lambda block, x: checkpoint(block, x, use_reentrant=False))
    model = compile_whole(exact, {**EAGER, "fgattn.dense_first": 0.5})
    assert steps_that_are_dense(model, exact, EAGER) == [True, True, False, False]
    assert fg_inductor.report().rewritten == 2


def test_symbolic_lengths():
    """Both forms are compiled at once, so that the guards of both join the frame's."""
    exact = Stack()
    model = compile_whole(exact, {**EAGER, "fgattn.inner": "aot_eager", "fgattn.dense_first": 0.5})
    with torch.no_grad(), fg_inductor.denoising(model, steps=2) as run:
        for step in range(2):
            for length in (96, 160):
                x = tokens(length)
                torch._dynamo.mark_dynamic(x, 1)
                with torch.compiler.set_stance("default" if (step, length) == (0, 96) else "fail_on_recompile"):
                    assert torch.allclose(model(x), exact(x), atol=1e-5) == (step == 0)
            run.step()


def test_another_model_inside_a_run_is_not_counted():
    exact, other = Stack(), Stack()
    model, beside = (compile_whole(m, {**EAGER, "fgattn.dense_first": 1.0}) for m in (exact, other))
    x = tokens()
    with torch.no_grad(), fg_inductor.denoising(model, steps=4):
        torch.testing.assert_close(model(x), exact(x))
        assert not torch.allclose(beside(x), other(x))


def test_dense_steps_run_no_operator_of_ours():
    model = compile_whole(Stack(), {**EAGER, "fgattn.dense_first": 0.5})
    counts = []
    with torch.no_grad(), fg_inductor.denoising(model, steps=2) as run:
        for _ in range(2):
            model(tokens())  # compiles the form
            counts.append(count_calls(lambda: model(tokens())))
            run.step()
    assert counts == [{}, {"select_pooled": 2, "attention": 2}]


def test_needs_the_number_of_steps():
    model = compile_blocks(Stack(), {**EAGER, "fgattn.dense_first": 0.5})
    with pytest.raises(Exception, match=r"their number is not known.*Pass steps="), fg_inductor.denoising(model):
        model(tokens())


@pytest.mark.parametrize("quiet", [True, False])
def test_says_once_that_it_has_no_effect(caplog, quiet):
    model = compile_whole(Stack(), {**EAGER, "fgattn.dense_first": 0.5, "fgattn.quiet": quiet})
    with torch.no_grad():
        for _ in range(2):
            model(tokens())
    lines = [r.getMessage() for r in caplog.records if "steps are not counted" in r.getMessage()]
    assert len(lines) == (0 if quiet else 1)
    assert all("'fgattn.dense_first' has no effect" in line and "fg_inductor.denoising(pipe)" in line for line in lines)


def test_hooks_of_a_model_compiled_inside_are_not_traced():
    """What is compiled whole inside the run can't be seen from outside: no graph break, and stateless."""
    exact = Stack()
    with torch.no_grad(), fg_inductor.denoising(exact, steps=2):
        model = compile_whole(exact, {**EAGER, "fgattn.dense_first": 1.0})
        x = tokens()
        sparse = model(x)
    assert not torch.allclose(sparse, exact(x))
