"""What makes observed masks anew, what keeps them, and what ends them."""

import copy
import gc

import pytest
import torch
from denoising_loops import OBSERVED, STEPS, Guided, compare, compile_blocks, compile_whole, denoise, totals
from torch._dynamo.utils import counters

import fg_inductor
from fg_inductor import state
from fg_inductor.settings import Settings
from fg_inductor.testing_steps import EagerSchedule


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
