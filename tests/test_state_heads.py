"""Heads that agree share an observed mask: over denoising steps in compiled code, in the graph, and within a budget."""

# ruff: noqa: E501  (a line of the text is a node, however long)

import copy
import logging

import pytest
import torch
from denoising_loops import OBSERVED, Guided, compare, compile_blocks, compile_whole, denoise, totals
from expecttest import TestCase
from torch._dynamo.utils import counters

import fg_inductor
from fg_inductor import state
from fg_inductor.passes import sdpa, variant
from fg_inductor.passes.printer import graph_text
from fg_inductor.passes.state import add_state
from fg_inductor.settings import Settings
from fg_inductor.testing_passes import SMALL
from fg_inductor.testing_steps import EagerSchedule
from fg_inductor.toy_models import Stack, tokens

SHARED = {**OBSERVED, "fgattn.heads_per_mask": 2}


def four_heads(layers=2):
    """Behind two layers all tokens are alike: attention is flat then, and all heads agree, to rounding."""
    return Guided(layers, heads=4, dim=32)


def with_twins(model):
    """Heads 0 and 3 of each layer, and 1 and 2, have the same queries and keys."""
    for block in model.blocks:
        for projection in (block.to_q, block.to_k):
            rows = projection.weight.data.unflatten(0, (4, -1))
            rows[2:] = rows[:2].flip(0)
    return model


def held_slots():
    return [entry.slots.tolist() for entry in state._entries.values()]


SCHEDULES = {
    "every-2": ({"fgattn.refresh": "every 2"}, 2, 3),
    "four-a-mask": ({"fgattn.refresh": "every 4", "fgattn.dense_first": 0.3}, 4, 1),
    "more-than-there-are": ({"fgattn.refresh": "every 3"}, 100, 2),
    "three-a-mask": ({"fgattn.refresh": []}, 3, 1),  # two masks of four heads
    "max-in-order": ({"fgattn.reduce": "max", "fgattn.token_grid": (2, 8, 8), "fgattn.refresh": "every 3"}, 2, 2),
    "density-by-steps": ({"fgattn.density": {0: 0.5, 0.5: 0.25}, "fgattn.refresh": []}, 2, 2),
    "top-p-tail": ({"fgattn.density": None, "fgattn.top_p": 0.6, "fgattn.tail": "pooled"}, 2, 1),
}


@pytest.mark.parametrize(("options", "heads_per_mask", "refreshes"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedule(options, heads_per_mask, refreshes):
    exact, options = four_heads(), {**OBSERVED, **options, "fgattn.heads_per_mask": heads_per_mask}
    with torch.no_grad():
        observed = compare([compile_whole(copy.deepcopy(exact), options)], [exact], options)
    assert observed == refreshes * 4 == totals()["refreshed"] and totals()["made"] == 4  # 2 layers, 2 branches
    masks = 2 if heads_per_mask < 4 else 1
    assert {entry.mask.shape[1] for entry in state._entries.values()} == {masks}
    for (slots,) in held_slots():
        assert set(slots) == set(range(masks)) and len(slots) == 4
    assert {(row.held.heads, row.held.masks) for row in fg_inductor.report()} == {(4, masks)}
    assert f"4 heads share {masks} mask{'s' if masks > 1 else ','}" in str(fg_inductor.report())


@pytest.mark.parametrize(
    ("compiled", "inner"),
    [(compile_whole, "aot_eager"), (compile_whole, "inductor"), (compile_blocks, "inductor")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_compilers(compiled, inner):
    """Layers that share one graph have slots of their own; the density is that of every head."""
    exact = four_heads()
    options = {**SHARED, "fgattn.inner": inner, "fgattn.refresh": "every 2", "fgattn.dense_first": 0.1}
    options["fgattn.stats"] = True
    with torch.no_grad():
        assert compare([compiled(copy.deepcopy(exact), options)], [exact], options) == 3 * 2 * 2
    assert counters["stats"]["unique_graphs"] == 1 and totals()["made"] == 4
    assert {row.density for row in fg_inductor.report()} == {0.25}
    assert len({str(slots) for slots in held_slots()}) > 1


@pytest.mark.parametrize("batch", [1, 2])
def test_twins_share_and_lose_nothing(batch):
    """Two masks for heads that are equal in pairs do what four do."""
    exact, results = with_twins(four_heads()), []
    for heads_per_mask in (1, 2):
        torch._dynamo.reset()
        options = {**OBSERVED, "fgattn.refresh": "every 3", "fgattn.heads_per_mask": heads_per_mask}
        model = compile_whole(copy.deepcopy(exact), options)
        with torch.no_grad(), fg_inductor.denoising(model) as run:
            results.append(denoise([model], batch=batch, after=lambda i: run.step()))
    torch.testing.assert_close(*results)
    assert held_slots() == [[[0, 1, 1, 0]] * batch] * 4


def test_the_same_again():
    exact, results = four_heads(), []
    for _ in range(2):
        torch._dynamo.reset()
        model = compile_blocks(copy.deepcopy(exact), SHARED)
        with torch.no_grad(), fg_inductor.denoising(model) as run:
            results.append((denoise([model], after=lambda i: run.step()), held_slots()))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_one_head_shares_nothing():
    exact = Guided(1, heads=1, dim=128)
    with torch.no_grad():
        compare([compile_whole(copy.deepcopy(exact), SHARED)], [exact], SHARED)
    assert [entry.slots for entry in state._entries.values()] == [None, None]
    assert "share" not in str(fg_inductor.report())


@pytest.mark.parametrize(("bound", "more"), [(0.01, True), (0.9, False)])
def test_drift(bound, more):
    """The mass that is kept is what the mask of each head's slot keeps."""
    exact, options = four_heads(), {**SHARED, "fgattn.refresh": f"drift {bound}"}
    with torch.no_grad():
        observed = compare([compile_blocks(copy.deepcopy(exact), options)], [exact], options, steps=8)
    assert (observed > 4) == more and observed < 4 * 8
    assert sum(row.held.refreshes for row in fg_inductor.report()) == observed


def test_symbolic_length():
    exact, options = four_heads(), {**SHARED, "fgattn.inner": "aot_eager"}
    compiled = compile_whole(copy.deepcopy(exact), options)
    with torch.no_grad():
        compare([compiled], [exact], options, length=160, mark=1)
        compare([compiled], [exact], options, length=112, mark=1, known=True)
    assert counters["stats"]["unique_graphs"] == 1 and totals()["made"] == 8


@torch.no_grad()
def test_densities_by_head_keep_a_mask_each():
    sites = {"blocks.1": {"density": [0.25, 0.75, 0.5, 0.5]}}
    model = compile_whole(Stack(2, heads=4, dim=32), {**SHARED, "fgattn.sites": sites, "fgattn.stats": True})
    with fg_inductor.denoising(model, steps=2) as run, run.branch("only"):
        for _ in range(2):
            model(tokens())
            run.step()
    first, second = fg_inductor.report()
    assert (first.held.masks, second.held.masks) == (2, 4) and (first.density, second.density) == (0.25, 0.5)
    assert "masks" not in first.site.details
    reason = "fgattn.sites gives each of its heads a density of its own"
    assert second.site.details["masks"] == f"one for each head: {reason}"


# Within a budget

LONG = 1120  # tokens: 70 slices; 140 groups of 8 are 8 words, up to 128 of 16 and more are 4
MASK = 4 * 70 * 4 * 4  # heads, slices, words, bytes: by groups of 16, one for each head

BUDGETS = {  # for two layers
    "all": (2 * 2 * MASK, 8, 4),
    "larger groups": (2 * MASK, 16, 4),
    "two heads a mask": (2 * MASK - 1, 128, 2),
    "just enough": (MASK, 128, 2),
    "four heads a mask": (MASK - 1, 128, 1),
    "nothing": (MASK // 2 - 1, 0, 0),
}


@pytest.mark.parametrize("compiled", [compile_whole, compile_blocks])
@pytest.mark.parametrize(("budget", "n", "masks"), BUDGETS.values(), ids=BUDGETS)
def test_state_bytes(compiled, budget, n, masks, caplog):
    exact, options = four_heads(), {**OBSERVED, "fgattn.state_bytes": budget, "fgattn.refresh": "every 2"}
    loop = {"length": LONG, "branches": 1, "steps": 3}
    model = compiled(copy.deepcopy(exact), options)
    with torch.no_grad(), caplog.at_level(logging.INFO, "fg_inductor"), fg_inductor.denoising(model) as run:
        actual = denoise([model], after=lambda i: run.step(), **loop)
    held = [row.held for row in fg_inductor.report()]
    assert {(h.n, h.masks) for h in held} == {(n, masks)} and sum(h.bytes for h in held) <= budget
    text = str(fg_inductor.report())
    assert ("for fgattn.state_bytes" in text) == (n not in (0, 8))
    assert ("fgattn.state_bytes does not hold the masks" in text) == (n == 0)
    assert (f"4 heads share {masks} mask" in text) == (masks in (1, 2))
    if masks in (1, 2):
        assert f"kept by 16x128, {4 // masks} heads a mask" in caplog.text
    if n:
        settings = Settings.parse({**options, "fgattn.slice": f"16x{n}", "fgattn.heads_per_mask": 4 // masks})
        with torch.no_grad(), EagerSchedule(exact, settings=settings, steps=3) as eager:
            torch.testing.assert_close(actual, denoise([exact], **loop))
        assert eager.refreshes == 4


def test_a_branch_that_comes_late_makes_heads_share():
    """What the first one had is let go, and observed anew."""
    model = compile_whole(four_heads(), {**OBSERVED, "fgattn.state_bytes": 2 * MASK, "fgattn.refresh": []})
    with torch.no_grad(), fg_inductor.denoising(model) as run:
        denoise([model], length=LONG, steps=3, after=lambda i: run.step())
    assert totals() == {"made": 2 + 4, "refreshed": 6, "reused": 2 * 2 * 3 - 6}
    assert {(row.held.n, row.held.masks) for row in fg_inductor.report()} == {(128, 2)}
    assert sum(row.held.bytes for row in fg_inductor.report()) == 2 * MASK


def test_state_bytes_with_symbolic_sizes():
    """All forms are compiled at once, and another length finds the one that fits it."""
    small = 4 * 10 * 4 * 4 // 4  # one mask of 160 tokens for four heads
    exact, options = four_heads(), {**SHARED, "fgattn.state_bytes": 2 * small, "fgattn.refresh": "every 2"}
    compiled = compile_whole(copy.deepcopy(exact), options)
    kept = {**options, "fgattn.slice": "16x128", "fgattn.heads_per_mask": 4}
    with torch.no_grad():
        for length in (160, 112):
            compare([compiled], [exact], kept, length=length, mark=1, branches=1, known=length == 112)
    assert counters["stats"]["unique_graphs"] == 1 and totals()["made"] == 4
    assert {(row.held.n, row.held.masks) for row in fg_inductor.report()} == {(128, 1)}


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({}, ["auto 1"]),
        ({"heads_per_mask": 2}, ["auto 2"]),
        ({"state_bytes": 1}, ["auto 1", "128x32 1", "128x64 1", "128x128 1", "128x128 2", "128x128 4", "auto 1 host"]),
        ({"state_bytes": 1, "slice": "64x128", "heads_per_mask": 2}, ["64x128 2", "64x128 4", "64x128 2 host"]),
        ({"state_bytes": 1, "slice": "64x64", "heads_per_mask": 8}, ["64x64 8", "64x128 8", "64x64 8 host"]),
    ],
)
def test_levels(options, levels):
    settings = Settings(mask="observed", **options)
    found = [f"{x.slice} {x.heads_per_mask}{' host' * (x.state_memory == 'host')}" for x in settings.levels]
    assert found == levels
    assert settings.levels[0] is settings  # which the rewritten graph is of


# The graph


def test_slots_are_inputs_with_static_addresses(monkeypatch):
    from torch._dynamo.backends.common import aot_autograd

    from fg_inductor import backend

    seen = []

    def spy(gm, inputs):
        seen.append(len(torch._guards.TracingContext.get().fw_metadata.static_input_indices))
        return gm

    compiler = aot_autograd(fw_compiler=spy)
    monkeypatch.setattr(backend, "compile_graph", lambda gm, inputs, inner, patches: compiler(gm, inputs))
    with torch.no_grad():
        for options in (OBSERVED, SHARED):
            torch._dynamo.reset()
            model = compile_whole(four_heads(), options)
            with fg_inductor.denoising(model):
                model(tokens(), tokens(1))
    assert seen[1] == seen[0] + 2  # of two layers


class TestGraph(TestCase):
    def test_snapshot(self):
        def backend(gm, inputs):
            sdpa.rewrite(gm, Settings(**SMALL, density=0.25))
            stateful.append(add_state(variant.copy_graph(gm), inputs, 0.05, 2))
            return gm.forward

        stateful = []
        with torch.no_grad():
            torch.compile(Stack(1, heads=4, dim=32), backend=backend, fullgraph=True)(tokens(80))
        (found,) = stateful
        assert not found.reasons and not found.unshared
        assert [tuple(x.shape) for x in found.inputs] == [(1, 2, 5, 4), (1, 4), (3,), ()]
        self.assertExpectedInline(
            graph_text(found.gm),
            """\
%0 = linear(in0, in1, None)
%1 = .unflatten(%0, -1, (4, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in0, in2, None)
%4 = .unflatten(%3, -1, (4, -1))
%5 = .transpose(%4, 1, 2)
%6 = linear(in0, in3, None)
%7 = .unflatten(%6, -1, (4, -1))
%8 = .transpose(%7, 1, 2)
%9 = fgattn.begin_observed_.default(%2, %5, in5, None, None, 0.17677669529663687, 16, 8, 0, in8, in7, 0.05, in6)
%10 = fgattn.expand_heads.default(in5, in6)
%11 = fgattn.attention.default(%2, %5, %8, %10, None, None, 0.17677669529663687, 16, 8, 'none', 0, 'auto')
%12 = getitem(%11, 1)
%13 = fgattn.update_observed_.default(%2, %5, %12, in5, None, None, 0.17677669529663687, 16, 8, 'sum', 1.0, 0.25, 1.0, (), (), 0, %9, in7, None, in6)
%14 = getitem(%11, 0)
%15 = .transpose(%14, 1, 2)
%16 = .flatten(%15, 2)
%17 = linear(%16, in4, None)
return (%17)""",
        )


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("refresh", ["every 3", "drift 0.02"])
def test_on_a_gpu(mode, refresh, device):
    """Every step as by the reference, replayed CUDA graphs included; nothing is recompiled."""
    exact = with_twins(Stack(1, heads=4, dim=64)).to(device)
    queries = exact.blocks[0].to_q.weight.data  # of twins that differ by more than rounding, and by less than others
    queries += 0.02 * queries.std() * torch.randn_like(queries)
    queries *= 3
    options = {**SHARED, "fgattn.inner": "inductor", "fgattn.refresh": refresh, "mode": mode}
    settings = Settings.parse({name: x for name, x in options.items() if name != "mode"})
    start = torch.randn(1, 1000, 256, device=device)
    with torch.no_grad():
        with EagerSchedule(exact, settings=settings, steps=8) as eager:
            expected = [exact(start * (1 - 0.05 * i)) for i in range(8)]
        model, actual = torch.compile(copy.deepcopy(exact), backend="fgattn", options=options, fullgraph=True), []
        with fg_inductor.denoising(model, steps=8) as run:
            for i in range(8):
                torch.compiler.cudagraph_mark_step_begin()
                with run.branch("only"), torch.compiler.set_stance("default" if i < 3 else "fail_on_recompile"):
                    actual.append(model(start * (1 - 0.05 * i)).clone())
                run.step()
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert held_slots() == [[[0, 1, 1, 0]]]
    assert sum(row.held.refreshes for row in fg_inductor.report()) == eager.refreshes
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a - b).norm() / b.norm() < 0.02, i
