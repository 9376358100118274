"""Calibration: densities that meet the budget and no larger ones, gains over one density, files, what is refused."""

import json
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fg_inductor
from fg_inductor import cost
from fg_inductor.__main__ import main
from fg_inductor.calibration import LADDER, calibrate
from fg_inductor.passes.site import Forecast
from fg_inductor.toy_models import SHORT, SelfAttention, Stack, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {**SHORT, "fgattn.inner": "eager"}
REACH = (8, 40, 200, 800)  # tokens: how far the heads of ``Banded`` look


class Banded(SelfAttention):
    """Heads that attend to the neighbourhood of a token, each to one of another width: they need other densities.

    Tokens hold random Fourier features of their place for each head, so that its scores fall as a Gaussian does.
    """

    def __init__(self):
        super().__init__(heads=len(REACH))
        with torch.no_grad():
            for projection in (self.to_q, self.to_k):
                projection.weight.copy_(2 * torch.eye(64 * len(REACH)))

    def tokens(self, length: int = 512, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        frequencies = torch.randn(len(REACH), 32, generator=generator) / torch.tensor(REACH)[:, None]
        place = torch.arange(length)[:, None, None] * frequencies
        return torch.cat([place.sin(), place.cos()], -1).flatten(1)[None]


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Banded()

    def forward(self, x):
        return self.attn(x)


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="fgattn", options={**OPTIONS, **options})


@torch.no_grad()
def error_of(model, x, **options) -> float:
    run, dense = compiled(model, **options), model(x)
    with fg_inductor.denoising(run) as steps:
        for _ in range(2):  # a step that observes the mask, and one that attends by it
            with steps.branch("only"):
                out = run(x)
            steps.step()
    assert fg_inductor.report().rewritten
    return ((out - dense).norm() / dense.norm()).item()


@pytest.fixture(scope="module")
def banded():
    model = Wrapped()
    return model, calibrate(model, [(model.attn.tokens(),)], 0.1, options=OPTIONS, progress=False)


def test_heads_get_what_they_need(banded):
    _, found = banded
    densities = found.sites["attn"]["density"]
    assert densities == sorted(densities) and densities[0] < 0.1 and densities[-1] > 0.6
    relative = found.curves["attn"].relative()
    for head, density in enumerate(densities):
        rung = LADDER.index(density)
        assert (relative[: rung + 1, head] <= 0.1).all() and (relative[rung + 1 : rung + 2, head] > 0.1).all()


def test_densities_by_head_beat_one_for_all(banded):
    """At the same total, on another input than the one measured."""
    model, found = banded
    x = model.attn.tokens(seed=1)
    by_head = error_of(model, x, **{"fgattn.sites": found.sites, "fgattn.stats": True})
    kept = fg_inductor.report()[0].density
    densities = found.sites["attn"]["density"]
    assert kept == pytest.approx(sum(densities) / 4, abs=0.01)
    assert by_head < 0.6 * error_of(model, x, **{"fgattn.density": kept})


def test_file_is_read_by_the_backend(banded, tmp_path):
    model, found = banded
    file = tmp_path / "settings.json"
    found.save(file)
    assert json.loads(file.read_text()) == found.to_dict()
    x = model.attn.tokens()
    assert error_of(model, x, **{"fgattn.sites": str(file)}) == error_of(model, x, **{"fgattn.sites": found.sites})
    with pytest.raises(Exception, match=r"measured with fgattn.tail='none', and this is compiled with 'pooled'"):
        error_of(model, x, **{"fgattn.sites": file, "fgattn.tail": "pooled"})


def test_inputs_in_any_form_and_compiled_blocks_give_the_same():
    model, x = Stack(2), tokens()
    plain = calibrate(model, [(x,), (x,), (x,)], 0.5, options=OPTIONS, progress=False)
    assert set(plain.sites) == {"blocks.0", "blocks.1"} and plain.inputs == 3
    mixed = iter([(x,), {"x": x}, ((x,), {})])
    assert calibrate(model, mixed, 0.5, options=OPTIONS, progress=False).to_dict() == plain.to_dict()
    for block in model.blocks:
        block.compile(backend="eager")
    assert calibrate(model, [(x,)], 0.5, options=OPTIONS, progress=False).sites == plain.sites
    once = calibrate(torch.compile(model), [(x,)], 0.5, options=OPTIONS, progress=False)
    assert once.sites == plain.sites


def test_an_error_on_any_input_counts():
    model, easy, hard = Stack(1), torch.ones(1, 128, 128), tokens()  # equal keys: everything may be dropped
    alone = calibrate(model, [(easy,)], 0.1, options=OPTIONS, progress=False)
    both = calibrate(model, [(easy,), (hard,)], 0.1, options=OPTIONS, progress=False)
    assert alone.sites["blocks.0"] == {"density": [LADDER[-1]] * 2}
    assert both.sites["blocks.0"] != alone.sites["blocks.0"]


def test_heads_that_need_all_stay_dense():
    found = calibrate(Stack(1), [(tokens(),)], 1e-6, options=OPTIONS, progress=False)
    assert found.sites == {"blocks.0": {"dense": True}}
    assert "dense" in str(found)


@pytest.mark.parametrize(
    "options",
    [
        {"fgattn.mask": "dfs", "fgattn.token_grid": (2, 8, 8)},
        {"fgattn.mask": "observed"},
        {"fgattn.tail": "pooled"},
        {"fgattn.token_grid": (2, 8, 8)},
    ],
    ids=["dfs", "observed", "tail", "grid"],
)
def test_measures_the_selector_and_tail_of_the_options(options):
    """The curve is what the backend gives at each density (an observed mask, a step after it was made)."""
    model, x = Stack(1, heads=1), tokens(width=64)
    found = calibrate(model, [(x,)], 0.3, options=OPTIONS | options, progress=False)
    model.blocks[0].to_out.weight.data = torch.eye(64)
    for rung in (2, 8):
        setting = options | {"fgattn.sites": {"blocks.0": {"density": [LADDER[rung]]}}}
        actual = error_of(model, x, **setting)
        assert actual == pytest.approx(found.curves["blocks.0"].relative()[rung, 0].item(), rel=1e-3)


def test_measures_sites_that_would_not_pay(monkeypatch):
    def ask(settings, *rest):
        return None if settings.when == "always" else Forecast(False, "0.5x")

    monkeypatch.setattr(cost, "forecaster", lambda *_: ask)
    options = OPTIONS | {"fgattn.when": "faster"}
    assert list(calibrate(Stack(1), [(tokens(),)], options=options, progress=False).sites) == ["blocks.0"]


def test_says_what_it_could_not_measure():
    def saved(block, x):
        return checkpoint(block, x, use_reentrant=False)

    with pytest.raises(ValueError, match=r"no attention site was measured, in 1 calls\.\nfgattn: 1 of 1"):
        calibrate(Stack(1, call=saved), [(tokens(),)], options=OPTIONS, progress=False)
    mixed = Stack(2, call=lambda block, x: saved(block, x) if block is mixed.blocks[0] else block(x))
    found = calibrate(mixed, [(tokens(),)], options=OPTIONS, progress=False)
    assert list(found.sites) == ["blocks.1"] and found.skipped == {
        "blocks.0": "inside a checkpointed region; calibrate with checkpointing off"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"error": 5}, "error=5 must be a number between 0 and 1"),
        ({"options": {"fgattn.density": 0.3}}, "finds how much to keep: leave out fgattn.density"),
        ({"options": {"fgattn.sites": {"*": {"dense": True}}}}, "leave out fgattn.sites"),
        (
            {"options": {"fgattn.mask": "dense"}},
            "'dense' has no density to find; there are 'pooled', 'observed', 'dfs'",
        ),
        ({"options": {"fgattn.min_seq": 999}}, r"no attention site was measured, in 1 calls.\n.*shorter than min_seq"),
        ({"inputs": []}, "no attention site was measured, in 0 calls"),
    ],
    ids=["error", "density", "sites", "mask", "short", "no inputs"],
)
def test_refuses(changes, message):
    usual = {"inputs": [(tokens(),)], "options": OPTIONS, "progress": False}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        calibrate(Stack(1), **usual | changes)


def test_refuses_inputs_that_are_no_call():
    with pytest.raises(TypeError, match=r"each of the inputs must be a tuple .*; got Tensor"):
        calibrate(Stack(1), [tokens()], options=OPTIONS, progress=False)


@pytest.mark.parametrize("bar", [True, False], ids=["tqdm", "plain"])
def test_progress(bar, capsys, monkeypatch):
    if not bar:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    else:
        pytest.importorskip("tqdm")
    calibrate(Stack(2), [(tokens(),)] * 2, options=OPTIONS)
    shown = capsys.readouterr().err
    assert ("4/4" in shown) if bar else shown == "calibrate: input 1 of 2, 2 sites\ncalibrate: input 2 of 2, 2 sites\n"


SCRIPT = """
from fg_inductor.toy_models import Stack, tokens

def calls():
    return Stack(2), [(tokens(),), {"x": tokens()}]

def nothing():
    return Stack(1), tokens()
"""


def test_command_line(script, tmp_path, capsys):
    file = tmp_path / "settings.json"
    options = ["--option", "fgattn.min_seq=1", "--option", "fgattn.slice=16x8"]
    main(["calibrate", f"{script}:calls", "--error", "0.4", "--out", str(file), *options])
    assert "2 sites within 0.4 of dense attention, on 2 inputs" in capsys.readouterr().out
    assert list(json.loads(file.read_text())["sites"]) == ["blocks.0", "blocks.1"]
    for target, message in (("nothing", "inputs a list of calls, a tuple or a dict"), ("none", "has no function")):
        with pytest.raises(SystemExit):
            main(["calibrate", f"{script}:{target}", "--out", str(file)])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["calibrate", f"{script}:calls", "--error", "2", "--out", str(file), *options])
    assert "error=2.0 must be a number between 0 and 1" in capsys.readouterr().err


def test_ladder_is_fine_and_ends_low():
    steps = [a / b for a, b in zip((1.0, *LADDER), LADDER, strict=False)]
    assert min(steps) > 1 and max(steps) < 1.21 and LADDER[-1] < 0.04
