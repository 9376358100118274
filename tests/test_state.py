"""Observed masks in compiled code: kept by layer, branch and shape, observed on schedule, never mixed up."""

import copy

import pytest
import torch
from denoising_loops import OBSERVED, Guided, compare, compile_blocks, compile_in_place, compile_whole, denoise, totals
from torch._dynamo.utils import counters

import fg_inductor
from fg_inductor import state

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
