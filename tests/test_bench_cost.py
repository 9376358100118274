"""The check of the cost model: when it calls a decision wrong."""

import pytest
import torch

from fg_inductor import device_constants
from fg_inductor.bench import cost
from fg_inductor.bench.common import Timing
from fg_inductor.cost import Constants

# Without any work but the pairs: dense takes 1/1e9 ms for each operation, sparse as much for each one kept.
EVEN = Constants(1e9, 1e9, 0.0, 0.0, 1e9, 0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("density", "ratio", "decision", "right"),
    [
        (0.5, 2.0, "sparse", True),
        (0.5, 0.9, "sparse", False),
        (0.5, 0.98, "sparse", True),  # either is
        (0.99, 0.9, "dense", True),
        (0.99, 1.2, "dense", False),
        (0.99, 1.02, "dense", True),  # either is
    ],
)
def test_right_and_wrong(density, ratio, decision, right, monkeypatch):
    monkeypatch.setattr(device_constants, "constants", lambda *_: EVEN)
    times = iter([Timing(ratio, 0, 0), Timing(1.0, 0, 0)])  # dense, sparse

    def in_a_row(call):
        call()
        return next(times)

    monkeypatch.setattr(cost, "_in_a_row", in_a_row)
    (row,) = cost.rows("cpu", [(2, (2, 4, 8), 16, density, {"slice": "16x8"})])
    assert (row["decision"], row["right"], row["ratio"]) == (decision, right, ratio)
    assert row["expected_ratio"] == pytest.approx(1 / density) and row["shape"] == [1, 2, 64, 16]


@pytest.mark.parametrize(("once", "count"), [(0.1, 16), (2.0, 5), (50.0, 1)])
def test_short_calls_follow_each_other(once, count, monkeypatch):
    called = []

    def measure(calls):
        before = len(called)
        calls[0]()
        return Timing(once * (len(called) - before), 0, 0)

    monkeypatch.setattr(cost, "measure", measure)
    assert cost._in_a_row(lambda: called.append(1)).median == pytest.approx(once)
    assert len(called) == 1 + count


def test_twelve_points_on_both_sides():
    assert len(cost.POINTS["cuda"]) == 12
    densities = [density for *_, density, _ in cost.POINTS["cuda"]]
    assert min(densities) <= 0.3 and max(densities) == 1.0


def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        cost.main([])
