"""Observed masks in compiled code: kept by layer, branch and shape, observed on schedule, never mixed up."""

import copy
import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import fg_inductor
from fg_inductor import backend, state
from fg_inductor.settings import Settings
from fg_inductor.testing_steps import EagerSchedule
from fg_inductor.toy_models import SHORT, Stack, count_calls, tokens

OBSERVED = {**SHORT, "fgattn.inner": "eager", "fgattn.mask": "observed", "fgattn.density": 0.25}
STEPS = 6


class Guided(Stack):
    """A Stack that is told what to show."""

    def forward(self, x, text):
        return super().forward(x + text)


def compile_whole(model, options):
    return torch.compile(model, backend="fgattn", options=options, fullgraph=True)


def compile_in_place(model, options):
    model.compile(backend="fgattn", options=options, fullgraph=True)
    return model


def compile_blocks(model, options):
    for block in model.blocks:
        block.compile(backend="fgattn", options=options, fullgraph=True)
    return model


def denoise(models, length=128, batch=1, steps=STEPS, branches=2, after=lambda i: None, mark=None, known=False):
    """A loop with guidance, always the same; the second half of the steps may have another model.

    Anything but the first call of a model in a branch must run without a compilation, and with ``known`` all of them.
    """
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randn(batch, 1, 128, generator=generator) for _ in range(branches)]
    x, results = torch.randn(batch, length, 128, generator=generator), []
    for i in range(steps):
        model = models[i * len(models) // steps]
        noise = 0
        for text in texts:
            given = x.clone()
            if mark is not None:
                torch._dynamo.mark_dynamic(given, mark)
            first = i * len(models) % steps == 0 and not known
            with torch.compiler.set_stance("default" if first else "fail_on_recompile"):
                noise = noise - 0.5 * noise + model(given, text)
        x = x - 0.3 * noise
        results.append(x)
        after(i)
    return torch.stack(results)


def compare(compiled, exact, options, **loop):
    """The compiled models give what the schedule gives in eager mode. Returns the number of masks observed there."""
    settings = Settings.parse(options)
    branches, steps = loop.get("branches", 2), loop.get("steps", STEPS)
    with EagerSchedule(*exact, settings=settings, steps=steps, branches=branches) as eager:
        expected = denoise(exact, **{k: v for k, v in loop.items() if k in ("length", "batch", "steps", "branches")})
    pipe = compiled[0] if len(compiled) == 1 else Pair(compiled)
    with fg_inductor.denoising(pipe, steps=steps) as run:
        after = loop.pop("after", lambda i: None)
        actual = denoise(compiled, after=lambda i: (run.step(), after(i)), **loop)
    torch.testing.assert_close(actual, expected)
    return eager.refreshes


class Pair:
    """A pipeline as far as two experts go."""

    def __init__(self, models):
        self.models = models
        self.scheduler = type("Scheduler", (), {"step": lambda self: None, "set_timesteps": lambda self: None})()

    @property
    def components(self):
        return dict(enumerate(self.models))


def totals():
    return {name.removeprefix("masks "): n for name, n in counters["fgattn"].items() if name.startswith("masks")}


# The schedule

SCHEDULES = {
    "every-2": ({"fgattn.refresh": "every 2"}, 3),
    "every-4-dense-first": ({"fgattn.refresh": "every 4", "fgattn.dense_first": 0.3}, 1),
    "listed": ({"fgattn.refresh": [3], "fgattn.dense_first": 0.2}, 2),
    "once": ({"fgattn.refresh": []}, 1),
    "max-in-order": ({"fgattn.reduce": "max", "fgattn.token_grid": (2, 8, 8), "fgattn.refresh": "every 3"}, 2),
    "density-by-steps": ({"fgattn.density": {0: 0.5, 0.5: 0.25}, "fgattn.refresh": []}, 2),
    "few-steps": ({"fgattn.dense_first": 0.2, "fgattn.refresh": "every 8"}, 1),
    "top-p-tail": ({"fgattn.density": None, "fgattn.top_p": 0.6, "fgattn.tail": "pooled"}, 1),
}


@pytest.mark.parametrize(("options", "refreshes"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedule(options, refreshes):
    exact, options = Guided(), {**OBSERVED, **options}
    with torch.no_grad():
        observed = compare([compile_whole(copy.deepcopy(exact), options)], [exact], options)
    assert observed == refreshes * 4  # 2 layers, 2 branches
    assert totals()["refreshed"] == observed and totals()["made"] == 4


@pytest.mark.parametrize(
    ("compiled", "inner", "grad"),
    [
        (compile_whole, "aot_eager", torch.no_grad),
        (compile_in_place, "aot_eager", torch.inference_mode),
        (compile_blocks, "aot_eager", torch.no_grad),
        (compile_whole, "inductor", torch.inference_mode),
        (compile_blocks, "inductor", torch.no_grad),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_compilers(compiled, inner, grad):
    """Layers that share one graph have masks of their own."""
    exact = Guided(3)
    options = {**OBSERVED, "fgattn.inner": inner, "fgattn.refresh": "every 2", "fgattn.dense_first": 0.1}
    options["fgattn.stats"] = True
    with grad():
        assert compare([compiled(copy.deepcopy(exact), options)], [exact], options) == 3 * 3 * 2
    assert counters["stats"]["unique_graphs"] == 1
    assert totals()["made"] == 6
    assert {row.density for row in fg_inductor.report()} == {0.25}


@pytest.mark.parametrize(("batch", "branches"), [(2, 1), (2, 2), (1, 1), (1, 3)])
def test_guidance_by_calls_and_by_batch(batch, branches):
    exact = Guided()
    options = {**OBSERVED, "fgattn.refresh": "every 4"}
    loop = {"batch": batch, "branches": branches}
    with torch.no_grad():
        compare([compile_whole(copy.deepcopy(exact), options)], [exact], options, **loop)
    assert totals()["made"] == 2 * branches


@pytest.mark.parametrize("compiled", [compile_whole, compile_blocks])
def test_two_experts(compiled):
    exact = [Guided(), Guided()]
    options = {**OBSERVED, "fgattn.refresh": "every 3"}
    with torch.no_grad():
        compare([compiled(m, options) for m in copy.deepcopy(exact)], exact, options, steps=6)
    assert totals()["made"] == 2 * 2 * 2


def test_the_text_tells_the_branch():
    """Reused masks differ from branch to branch, so that a mix-up would show."""
    model, options = Guided(1), {**OBSERVED, "fgattn.refresh": []}
    compiled = compile_whole(model, options)
    with torch.no_grad(), fg_inductor.denoising(compiled) as run:
        denoise([compiled], after=lambda i: run.step())
    masks = [entry.mask for entry in state._entries.values()]
    assert len(masks) == 2 and not torch.equal(*masks)


# Drift


@pytest.mark.parametrize("compiled", [compile_whole, compile_blocks])
@pytest.mark.parametrize(("bound", "most"), [(0.01, None), (0.9, 8)])
def test_drift(compiled, bound, most):
    """Each mask is observed anew where its own mass has fallen, and the report says how often."""
    exact, options = Guided(), {**OBSERVED, "fgattn.refresh": f"drift {bound}", "fgattn.dense_first": 0.1}
    model = compiled(copy.deepcopy(exact), options)
    with torch.no_grad():
        observed = compare([model], [exact], options, steps=8)
        assert observed == most // 2 if most else 4 < observed < 4 * 7
        again = compare([model], [exact], options, steps=8, known=True)
    assert sum(row.held.refreshes for row in fg_inductor.report()) == observed + again
    assert f"{observed + again} refreshes" in str(fg_inductor.report()) or compiled is compile_whole
    assert totals()["refreshed"] == 2 * 4  # what the host has said: the first of a video


# Bytes

MASK = 2 * 8 * 4 * 4  # heads, slices, words, bytes
LONG = 1120  # tokens: 140 groups of 8, 70 of 16: 8 and 4 words
LONG_MASK = 2 * 70 * 4 * 4  # by groups of 16


@pytest.mark.parametrize("compiled", [compile_whole, compile_blocks])
@pytest.mark.parametrize(
    ("budget", "n", "made"),
    [
        (8 * LONG_MASK, 8, 4),  # 2 layers, 2 branches, 2 x 4 words
        (6 * LONG_MASK, 16, 6),  # the second branch is too much: what the first one had is made anew
        (4 * LONG_MASK, 16, 6),  # just enough
    ],
)
def test_state_bytes(compiled, budget, n, made, caplog):
    exact, options = Guided(), {**OBSERVED, "fgattn.state_bytes": budget, "fgattn.refresh": []}
    model = compiled(copy.deepcopy(exact), options)
    with torch.no_grad(), fg_inductor.denoising(model) as run:
        denoise([model], length=LONG, steps=3, after=lambda i: run.step())
    held = [row.held for row in fg_inductor.report()]
    assert {h.n for h in held} == {n} and sum(h.bytes for h in held) <= budget
    assert sum(h.bytes for h in held) == 4 * LONG_MASK * (2 if n == 8 else 1)
    assert totals()["made"] == made
    assert ("for fgattn.state_bytes" in str(fg_inductor.report())) == (n != 8)


def test_coarser_masks_are_the_masks_of_that_slice():
    """Kept by groups of 16, the model does what it does with 16x16."""
    exact, options = Guided(), {**OBSERVED, "fgattn.refresh": "every 2"}
    model = compile_blocks(copy.deepcopy(exact), {**options, "fgattn.state_bytes": 2 * 2 * LONG_MASK - 1})
    loop = {"length": LONG, "branches": 1, "steps": 3}
    with torch.no_grad():
        with EagerSchedule(exact, settings=Settings.parse({**options, "fgattn.slice": "16x16"}), steps=3) as eager:
            expected = denoise([exact], **loop)
        with fg_inductor.denoising(model) as run:
            actual = denoise([model], after=lambda i: run.step(), **loop)
    assert eager.refreshes == 4
    torch.testing.assert_close(actual, expected)


def test_state_bytes_that_hold_nothing_are_stateless():
    model = Guided()
    compiled = compile_whole(model, {**OBSERVED, "fgattn.state_bytes": 100})
    x, text = tokens(), tokens(1)
    with torch.no_grad(), fg_inductor.denoising(compiled):
        assert torch.equal(compiled(x, text), pooled(model, x, text))
    assert not state._entries
    assert "fgattn.state_bytes does not hold the masks" in str(fg_inductor.report())


# What makes state anew


def test_other_lengths_and_batches():
    exact, options = Guided(), OBSERVED
    compiled = compile_whole(copy.deepcopy(exact), options)
    with torch.no_grad():
        for made, loop in enumerate(({}, {"length": 96}, {"batch": 2}, {}), 1):
            torch._dynamo.config.automatic_dynamic_shapes = False
            try:
                compare([compiled], [exact], options, **loop)
            finally:
                torch._dynamo.config.automatic_dynamic_shapes = True
            assert totals()["made"] == 4 * made
    assert len(state._entries) == 4


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_symbolic_length(inner):
    exact, options = Guided(), {**OBSERVED, "fgattn.inner": inner, "fgattn.dense_first": 0.2}
    compiled = compile_whole(copy.deepcopy(exact), options)
    with torch.no_grad():
        compare([compiled], [exact], options, length=160, mark=1)
        compare([compiled], [exact], options, length=112, mark=1, known=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert totals()["made"] == 8


def test_another_video_observes_anew_at_the_same_addresses():
    exact, options = Guided(), {**OBSERVED, "fgattn.refresh": []}
    compiled = compile_whole(copy.deepcopy(exact), options)
    with torch.no_grad():
        compare([compiled], [exact], options)
        addresses = {entry.mask.data_ptr() for entry in state._entries.values()}
        compare([compiled], [exact], options, known=True)
    assert totals() == {"made": 4, "refreshed": 8, "reused": 4 * 2 * (STEPS - 1)}
    assert {entry.mask.data_ptr() for entry in state._entries.values()} == addresses


@pytest.mark.parametrize("reset", [torch._dynamo.reset, lambda: fg_inductor.reset()], ids=["dynamo", "ours"])
def test_reset_in_the_middle(reset):
    exact, options = Guided(), {**OBSERVED, "fgattn.refresh": [3]}
    compiled = compile_whole(copy.deepcopy(exact), options)
    settings = Settings.parse(options)
    with torch.no_grad():
        with EagerSchedule(exact, settings=settings, steps=STEPS, branches=2):
            expected = denoise([exact])

        def after(i):
            run.step()
            if i == 2:
                reset()
                assert not state._entries and not fg_inductor.report().rewritten

        with torch.compiler.set_stance("default"), fg_inductor.denoising(compiled) as run:
            first = denoise([compiled], steps=3, after=after)
    torch.testing.assert_close(first, expected[:3])
    with torch.no_grad():  # and it works from then on
        compare([compiled], [exact], options)


def test_reset_of_one_model():
    models = [compile_whole(Guided(layers), OBSERVED) for layers in (2, 3)]
    with torch.no_grad():
        for model in models:
            with fg_inductor.denoising(model) as run:
                denoise([model], after=lambda i: run.step())
    assert len(state._entries) == 10
    fg_inductor.reset(models[0])
    weights = {id(p) for p in models[1].parameters()}
    assert len(state._entries) == 6 and all(id(e.weight()) in weights for e in state._entries.values())
    assert fg_inductor.report().rewritten == 5
    assert sum(row.held.bytes > 0 for row in fg_inductor.report()) == 3


def test_masks_go_with_their_model():
    """Those of a model that is gone make room when another one's are made."""
    model = compile_blocks(Guided(), OBSERVED)
    with torch.no_grad(), fg_inductor.denoising(model) as run:
        denoise([model], after=lambda i: run.step())
    gone = [entry.weight for entry in state._entries.values()]
    del model, run
    torch._dynamo.reset_code_caches()
    gc.collect()
    assert all(weight() is None for weight in gone)
    model = compile_blocks(Guided(), OBSERVED)
    with torch.no_grad(), fg_inductor.denoising(model) as run:
        denoise([model], after=lambda i: run.step())
    assert len(state._entries) == 4


def test_weights_that_move():
    """Offload gives parameters other memory; they stay the same objects."""
    exact, options = Guided(), {**OBSERVED, "fgattn.refresh": []}
    compiled = compile_whole(copy.deepcopy(exact), options)

    def after(i):
        for p in compiled.parameters():
            p.data = p.data.clone()

    with torch.no_grad():
        compare([compiled], [exact], options, after=after)
    assert totals()["made"] == 4 and totals()["refreshed"] == 4


def test_two_runs_at_once():
    """Two models of one class, which share their code, each in a run of its own."""
    exact = [Guided(), Guided()]
    options = {**OBSERVED, "fgattn.refresh": "every 3"}
    expected, settings = [], Settings.parse(options)
    compiled = [compile_blocks(m, options) for m in copy.deepcopy(exact)]
    with torch.no_grad():
        for model in exact:
            with EagerSchedule(model, settings=settings, steps=STEPS, branches=2):
                expected.append(denoise([model]))
        with fg_inductor.denoising(compiled[0]) as a, fg_inductor.denoising(compiled[1]) as b:
            first = denoise([compiled[0]], after=lambda i: a.step(), steps=STEPS)
            second = denoise([compiled[1]], after=lambda i: b.step(), steps=STEPS)
    torch.testing.assert_close([first, second], expected)


# Stateless calls


def pooled(model, x, text):
    options = {**OBSERVED, "fgattn.mask": "pooled"}
    return compile_whole(copy.deepcopy(model), options)(x, text)


def test_ambiguous_is_stateless(caplog):
    """Nothing lasts: the mask may belong to any branch."""
    model = Guided()
    compiled = compile_whole(model, {**OBSERVED, "fgattn.quiet": False})
    with torch.no_grad(), fg_inductor.denoising(compiled) as run:
        for i in range(4):
            x, text = tokens(), tokens(1)
            actual = compiled(x, text)
            assert torch.equal(actual, pooled(model, x, text)) == (i > 0)
            run.step()
    lines = [r.getMessage() for r in caplog.records if "can't be told" in r.getMessage()]
    assert len(lines) == 1 and "with run.branch(name):" in lines[0]
    assert {row.note for row in fg_inductor.report() if row.settings.mask == "observed"} == {
        "stateless: the branch of guidance can't be told"
    }


def test_declared_branches_are_believed():
    exact, options = Guided(), {**OBSERVED, "fgattn.refresh": "every 4"}
    compiled = compile_whole(copy.deepcopy(exact), options)
    texts = [tokens(1), tokens(1)]
    inputs = [tokens() for _ in range(STEPS)]
    with torch.no_grad():
        with EagerSchedule(exact, settings=Settings.parse(options), steps=STEPS, branches=2):
            expected = [exact(x, text) for x in inputs for text in texts]
        actual = []
        with fg_inductor.denoising(compiled) as run:
            for x in inputs:
                for name, text in zip("cu", texts, strict=True):
                    with run.branch(name):
                        actual.append(compiled(x, text.clone()))
                run.step()
    torch.testing.assert_close(actual, expected)


def test_a_layer_called_twice_is_stateless():
    block = Guided(1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x, text):
            return self.block(self.block(x, text), text)

    model = Twice()
    block.compile(backend="fgattn", options=OBSERVED, fullgraph=True)
    with torch.no_grad(), fg_inductor.denoising(model) as run:
        x, text = tokens(), tokens(1)
        for _ in range(2):
            model(x, text)
            run.step()
    assert totals() == {"made": 1, "refreshed": 1, "reused": 1}
    assert "several times in one call" in str(fg_inductor.report())


def test_outside_of_a_run_it_is_stateless(caplog):
    model, x, text = Guided(), tokens(), tokens(1)
    compiled = compile_whole(model, {**OBSERVED, "fgattn.quiet": False})
    with torch.no_grad():
        assert torch.equal(compiled(x, text), pooled(model, x, text))
        assert count_calls(lambda: compiled(x, text)) == {"select_pooled": 2, "attention": 2}
    assert not state._entries
    (line,) = [r.getMessage() for r in caplog.records if "steps are not counted" in r.getMessage()]
    assert "masks are selected anew in each call, as 'pooled' does" in line and "dense_first" not in line


REASONS = {
    "training": (lambda: Guided(), "gradients are computed, and observed masks are for inference"),
    "checkpoint": (
        lambda: Guided(call=lambda block, x: checkpoint(block, x, use_reentrant=False)).requires_grad_(False),
        "inside a checkpointed region",
    ),
}


@pytest.mark.parametrize(("make", "reason"), REASONS.values(), ids=REASONS)
def test_stateless_with_a_reason(make, reason, caplog):
    model = make()
    options = {**OBSERVED, "fgattn.inner": "aot_eager", "fgattn.quiet": False}
    compiled = compile_whole(model, options)
    x, text = tokens(), tokens(1)
    with fg_inductor.denoising(compiled) as run:
        for _ in range(2):
            actual = compiled(x, text)
            run.step()
    assert not state._entries
    torch.testing.assert_close(actual, pooled(model, x, text))
    report = fg_inductor.report()
    assert all(row.site.details["state"] == f"none: {reason}" for row in report if row.settings.mask == "observed")
    (line,) = [r.getMessage() for r in caplog.records if reason in r.getMessage()]
    assert "as 'pooled' does" in line
    if actual.requires_grad:
        grads = torch.autograd.grad(actual.sum(), list(model.parameters()))
        assert all(g.isfinite().all() for g in grads)


def test_an_error_of_the_pass_is_a_reason(monkeypatch, caplog):
    def fail(gm, example_inputs, bound):
        raise KeyError("a defect")

    monkeypatch.setattr(backend, "add_state", fail)
    model, x, text = Guided(), tokens(), tokens(1)
    compiled = compile_whole(model, OBSERVED)
    with torch.no_grad(), fg_inductor.denoising(compiled):
        torch.testing.assert_close(compiled(x, text), pooled(model, x, text))
    assert "none: error in the pass: 'a defect'" in str(fg_inductor.report())
    assert any("please report this" in record.message for record in caplog.records)


# What the graph and the inner compiler see


def test_state_has_static_addresses(monkeypatch):
    """As AOTAutograd tells CUDA graphs: inputs that are updated in place where they lie."""
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def spy(gm, inputs):
        context = torch._guards.TracingContext.get()
        seen.append([gm.graph.find_nodes(op="placeholder")[i].name for i in context.fw_metadata.static_input_indices])
        return gm

    compiler = aot_autograd(fw_compiler=spy)
    monkeypatch.setattr(backend, "_compile", lambda gm, inputs, inner, patches: compiler(gm, inputs))
    model = compile_whole(Guided(), OBSERVED)
    with torch.no_grad(), fg_inductor.denoising(model):
        model(tokens(), tokens(1))
    (names,) = seen
    assert len(names) >= 3 and len(names) == len(set(names))
    placeholders = 8 + 2 + 3  # weights; x and text; two masks and the flag
    assert names[-3:] == [f"arg{placeholders - 3 + i}_1" for i in range(3)]


def test_report_states_the_bytes():
    model = compile_blocks(Guided(3), OBSERVED)
    with torch.no_grad(), fg_inductor.denoising(model) as run:
        denoise([model], after=lambda i: run.step())
    (row,) = fg_inductor.report()
    assert row.held == state.Held(MASK * 3 * 2, n=8, refreshes=3 * 2)  # layers, branches
    assert row.to_dict()["held"] == {"bytes": row.held.bytes, "n": 8, "refreshes": 6}
    assert "masks held: 0.00154 MB at 16x8, 6 refreshes" in str(fg_inductor.report())
    assert "observed 16x8, density 0.25, refreshed every 8" in str(fg_inductor.report())


SCRIPT = """
import json, torch
from torch._dynamo.utils import counters
import fg_inductor
from fg_inductor.toy_models import SHORT, Stack, tokens

torch.manual_seed(0)
options = {**SHORT, "fgattn.mask": "observed", "fgattn.density": 0.25, "fgattn.dense_first": 0.3}
model, results = torch.compile(Stack(1), backend="fgattn", options=options, fullgraph=True), []
with torch.no_grad(), fg_inductor.denoising(model, steps=4) as run:
    for _ in range(4):
        with run.branch(0):
            results.append(model(tokens()).sum().item())
        run.step()
names = ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")
print(json.dumps([{name: counters["aot_autograd"][name] for name in names}, results]))
"""


def test_caches_hold_both_forms(tmp_path):
    """A second process takes the dense and the stateful form from AOTAutograd's cache, and does the same."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_VEC_ISA_OK": "1"}
    runs = []
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, env=env, check=False)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    (first, results), (second, again) = runs
    assert first == {"autograd_cache_hit": 0, "autograd_cache_miss": 2, "autograd_cache_bypass": 0}
    assert second == {"autograd_cache_hit": 2, "autograd_cache_miss": 0, "autograd_cache_bypass": 0}
    assert again == results
