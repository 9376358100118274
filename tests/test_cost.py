"""The cost model with constants of a made-up card: its numbers, its decision, and what the pass does with it."""

import dataclasses
import re

import pytest
import torch

import fg_inductor
from fg_inductor import calibration, cost, device_constants
from fg_inductor.cost import Constants, Shape, expected_ms, forecast
from fg_inductor.passes.site import Forecast
from fg_inductor.settings import Settings
from fg_inductor.testing_passes import run_pass
from fg_inductor.toy_models import Stack, tokens

# 600 and 500 TFLOP/s, and round numbers for the rest.
CARD = Constants(
    dense_rate=6e11, ragged_rate=5e11, dense_row=1e-7, dense_host=0.02, kept_rate=5e11, slice=1e-5, list=1e-9,
    score=4e-9, mean=1e-8, sparse_host=0.2,
)  # fmt: skip
SHAPE = Shape(B=2, H=3, Sq=40_000, Sk=60_000, D=128, M=128, N=8, density=0.3, tail=0)


# Numbers


def test_expected_ms_by_hand():
    work = 4 * 2 * 3 * 40_000 * 60_000 * 128
    slices = 2 * 3 * 40_000 / 128
    groups = slices * 60_000 / 8
    dense = work / 5e11 + 1e-7 * 2 * 3 * 40_000  # neither length is a multiple of 128
    sparse = 0.3 * work / 5e11 + 1e-5 * slices + (1e-9 + 4e-9) * groups + 1e-8 * 2 * 3 * 100_000
    assert expected_ms(SHAPE, CARD) == pytest.approx((dense, sparse))


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"density": 0.4}, True),
        ({"tail": 1}, True),
        ({"M": 64}, True),  # twice the slices and mask bits
        ({"N": 16}, False),  # half the mask bits
        ({"Sk": 70_000}, True),
    ],
    ids=str,
)
def test_sparse_grows_with(change, grows):
    before, after = (expected_ms(shape, CARD)[1] for shape in (SHAPE, dataclasses.replace(SHAPE, **change)))
    assert (after > before) == grows


@pytest.mark.parametrize(
    ("queries", "keys", "ragged"), [(256, 384, 0), (256, 383, 1), (255, 384, 1), (1, 1, 1)], ids=str
)
def test_ragged_lengths_have_a_rate_of_their_own(queries, keys, ragged):
    shape = dataclasses.replace(SHAPE, Sq=queries, Sk=keys)
    work = 4 * 2 * 3 * queries * keys * 128
    free = dataclasses.replace(CARD, dense_host=0.0)
    assert shape.ragged == ragged
    assert expected_ms(shape, free)[0] == pytest.approx(work / (5e11 if ragged else 6e11) + 1e-7 * 6 * queries)


def test_python_bounds_what_is_small():
    small = dataclasses.replace(SHAPE, B=1, H=1, Sq=512, Sk=512)
    assert expected_ms(small, CARD) == (0.02, 0.2)


def test_density_where_it_pays():
    """The decision turns where the gain is 3%, and not elsewhere."""

    def at(thousandths):
        return dataclasses.replace(SHAPE, density=thousandths / 1000)

    decided = [forecast(at(x), CARD).worth for x in range(1, 1001)]
    turn = sum(decided)
    assert decided == [True] * turn + [False] * (1000 - turn) and 0 < turn < 1000
    last, next_ = (expected_ms(at(x), CARD) for x in (turn, turn + 1))
    assert last[0] / last[1] >= 1.03 > next_[0] / next_[1] > 1.02


@pytest.mark.parametrize(
    ("options", "density"),
    [
        ({}, 0.3),
        ({"top_p": 0.9, "max_density": 0.2}, 0.2),
        ({"density": 0.7}, 0.7),
        ({"alpha": 0.5}, 0.3),
        ({"density": (0.2, 0.4)}, 0.3),
    ],
    ids=str,
)
def test_expected_density(options, density):
    assert cost.expected_density(Settings(**options)) == pytest.approx(density)


# Asking


@pytest.fixture
def card(monkeypatch):
    """Constants of CARD for every device; what was asked for."""
    asked = []
    monkeypatch.setattr(device_constants, "constants", lambda *what: asked.append(what) or CARD)
    return asked


SITE = (1, 12, 32_760, 32_760, 128, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "device", "asks"),
    [
        ({"when": "always"}, "cuda", False),
        ({"when": "faster"}, "cuda", True),
        ({"when": "faster"}, "cpu", True),
        ({}, "cuda", True),
        ({}, "cpu", False),  # a CPU that others share measures anything
        ({"when": "faster", "mask": "observed"}, "cuda", True),
        ({"when": "faster", "mask": "dfs"}, "cuda", False),  # nobody has measured that selector
    ],
    ids=str,
)
def test_who_is_asked(options, device, asks, card):
    found = cost.forecaster()(Settings(**options), *SITE, torch.device(device))
    assert (found is not None, len(card)) == (asks, asks)


def test_a_replayed_graph_waits_for_no_python(card):
    small = (Settings(), 1, 2, 4096, 4096, 64, torch.bfloat16, torch.device("cuda"))
    assert not cost.forecaster(host_counts=True)(*small).worth
    assert cost.forecaster(host_counts=False)(*small).worth


def test_says_what_it_assumes(card):
    ask, cuda = cost.forecaster(), torch.device("cuda")
    text = ask(Settings(top_p=0.9), *SITE, cuda).text
    assert re.fullmatch(r"[\d.]+x at density 0\.3 \(assumed\): [\d.]+ ms for [\d.]+ ms dense", text)
    assert "(assumed)" not in ask(Settings(density=0.3), *SITE, cuda).text


def test_calibration_measures_every_site():
    """What pays depends on the density that it is about to find."""
    assert calibration._settings({"fgattn.when": "faster"}).when == "always"


# The pass


def test_a_site_that_gains_nothing_stays_dense():
    done = run_pass(Stack(1), (tokens(),), ask=lambda *_: Forecast(False, "0.90x at density 0.3"))
    (site,) = done.sites
    assert (site.decision, site.reason, site.detail) == (
        "dense",
        "not faster than dense",
        "expected 0.90x at density 0.3",
    )
    assert not site.video  # a choice, which `strict` has nothing against
    assert done.before == done.after


def test_a_site_that_gains_says_how_much():
    asked = []
    done = run_pass(Stack(1), (tokens(),), ask=lambda *what: asked.append(what) or Forecast(True, "2x"))
    assert done.sites[0].rewritten and done.sites[0].details["expected"] == "2x"
    batch, heads, queries, dim = done.attention()[0]["q"].meta["example_value"].shape
    assert asked[0][1:] == (batch, heads, queries, queries, dim, torch.float32, torch.device("cpu"))


def test_symbolic_lengths_are_asked_for_as_traced_and_add_no_guard():
    """``run_pass`` asserts that there are as many guards as before."""
    asked, x = [], tokens()
    torch._dynamo.mark_dynamic(x, 1)
    done = run_pass(Stack(1), (x,), dynamic=None, ask=lambda *what: asked.append(what) or Forecast(True, "2x"))
    assert "s" in done.sites[0].query and asked[0][3:5] == (x.shape[1], x.shape[1])


@pytest.mark.parametrize(("factor", "rewritten"), [(1.0, 2), (10.0, 0)], ids=["fast", "slow"])
def test_backend(factor, rewritten, monkeypatch):
    """End to end, with a card on which the decision is clear; the rows say why."""
    slow = dataclasses.replace(CARD, kept_rate=CARD.kept_rate / factor, dense_host=1.0)
    monkeypatch.setattr(device_constants, "constants", lambda *what: slow)
    small = {"fgattn.min_seq": 1, "fgattn.slice": "16x8", "fgattn.quiet": True, "fgattn.inner": "eager"}
    if factor > 1:
        monkeypatch.setattr(cost, "MIN_GAIN", 10.0)
    options = {**small, "fgattn.when": "faster", "fgattn.strict": True}
    with torch.no_grad():
        torch.compile(Stack(2), backend="fgattn", options=options)(tokens())
    report = fg_inductor.report()
    assert (report.rewritten, len(report)) == (rewritten, 2)
    assert ("expected" if rewritten else "not faster than dense (expected") in str(report)
