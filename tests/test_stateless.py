"""Calls that keep no mask: each selects its masks as 'pooled' does, and has a reason."""

import copy

import pytest
import torch
from denoising_loops import OBSERVED, STEPS, Guided, compile_whole, pooled, totals
from torch import nn
from torch.utils.checkpoint import checkpoint

import fg_inductor
from fg_inductor import forms, state
from fg_inductor.settings import Settings
from fg_inductor.testing_steps import EagerSchedule
from fg_inductor.toy_models import count_calls, tokens


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
    def fail(*arguments):
        raise KeyError("a defect")

    monkeypatch.setattr(forms, "add_state", fail)
    model, x, text = Guided(), tokens(), tokens(1)
    compiled = compile_whole(model, OBSERVED)
    with torch.no_grad(), fg_inductor.denoising(compiled):
        torch.testing.assert_close(compiled(x, text), pooled(model, x, text))
    assert "none: error in the pass: 'a defect'" in str(fg_inductor.report())
    assert any("please report this" in record.message for record in caplog.records)
