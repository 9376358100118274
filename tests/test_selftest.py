"""The check of a newcomer's machine: what passes on CPU, and that what is broken shows."""

import pytest
import torch

from fg_inductor import selftest
from fg_inductor.__main__ import main
from fg_inductor.kernels import ops
from fg_inductor.testing_cases import CASES


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without Inductor, and without the times that take longest."""
    compile_ = torch.compile

    def compile_eagerly(model, options, **how):
        return compile_(model, options={**options, "fgattn.inner": "eager"}, **how)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr(selftest, "TIMED", {"cpu": (1, (2, 4, 32), 16)})
    monkeypatch.setattr(selftest, "DENSITIES", (0.5,))


def test_passes(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["selftest", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and f"{len(selftest.CHOSEN) + 4} of {len(selftest.CHOSEN) + 4} checks passed" in printed
    assert "one attention call, 1 heads, 256 tokens" in printed


def test_chosen_cases_exist():
    assert set(selftest.CHOSEN) <= {case.id for case in CASES}


def wrong_attention(*arguments):
    out, lse = attention(*arguments)
    return out * 1.1, lse


def wrong_selection(*arguments):
    return select(*arguments).roll(1, 2)


def wrong_order(*arguments):
    return order(*arguments) * 0


attention, select, order = ops.attention, ops.select_pooled, ops.query_order


@pytest.mark.parametrize(
    ("name", "wrong", "failures"),
    [
        ("attention", wrong_attention, len(selftest.CHOSEN) + 1),  # and the gradients
        ("select_pooled", wrong_selection, 1),
        ("query_order", wrong_order, 1),
    ],
)
def test_shows_what_is_wrong(name, wrong, failures, monkeypatch, capsys):
    monkeypatch.setattr(selftest.ops, name, wrong)
    monkeypatch.setattr(selftest, "_compiled", lambda device: None)
    assert selftest.main("cpu") == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == failures and "AssertionError: " in printed
    assert "one attention call" not in printed  # no speed is claimed for wrong results


def test_a_module_that_was_not_rewritten_fails(monkeypatch):
    monkeypatch.setattr("fg_inductor.passes.sdpa.rewrite", lambda *_: [])
    (check,) = [c for c in selftest.checks("cpu") if c.name == "a compiled module"]
    assert "were not rewritten" in check.error
