"""The bytes of observed masks: the bound on them, and what the report says."""

import copy

import pytest
import torch
from denoising_loops import OBSERVED, Guided, compile_blocks, compile_whole, denoise, pooled, totals

import fg_inductor
from fg_inductor import state
from fg_inductor.settings import Settings
from fg_inductor.testing_steps import EagerSchedule
from fg_inductor.toy_models import tokens

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


def test_report_states_the_bytes():
    model = compile_blocks(Guided(3), OBSERVED)
    with torch.no_grad(), fg_inductor.denoising(model) as run:
        denoise([model], after=lambda i: run.step())
    (row,) = fg_inductor.report()
    assert row.held == state.Held(MASK * 3 * 2, n=8, refreshes=3 * 2, heads=2, masks=2)  # layers, branches
    assert row.to_dict()["held"] == {
        "bytes": row.held.bytes, "n": 8, "refreshes": 6, "heads": 2, "masks": 2, "in_host_memory": False,
    }  # fmt: skip
    assert "masks held: 0.00154 MB at 16x8, 6 refreshes" in str(fg_inductor.report())
    assert "observed 16x8, density 0.25, refreshed every 8" in str(fg_inductor.report())
