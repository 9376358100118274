"""What the benchmark of observed masks times: a refresh makes the mask anew, and nothing else touches it."""

import pytest
import torch

from fg_inductor.bench import observed
from fg_inductor.bench.common import Timing
from fg_inductor.kernels import ops

WORK = ["refresh", "of it, mask", "other step", "drift", "fetch", "put back"]


@pytest.fixture
def timed(monkeypatch):
    """Calls in place of timings, and the rows' shapes small."""
    monkeypatch.setattr(observed, "PRESETS", {"small": {"heads": 2, "tokens": 256, "dim": 16}})
    monkeypatch.setattr(observed, "sdpa_kernel", lambda _: torch.no_grad())

    def measure(calls):
        for call in calls:
            call()
        return Timing(2.0, 0, 0)

    graphs = []

    def measure_graph(calls, turns):
        graphs.append(turns)
        return measure(calls)

    monkeypatch.setattr(observed, "measure", measure)
    monkeypatch.setattr(observed, "measure_graph", measure_graph)
    return graphs


def test_what_each_step_does_to_the_mask():
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    mask = torch.zeros(1, 2, 2, 4, dtype=torch.int32)
    found = observed.steps((q, k, v), mask, 128, 8, 0.25)
    first = mask.clone()
    assert ops.kept_density(mask, None, 256, 256, 128, 8).item() == pytest.approx(0.25)
    for work in ("other step", "drift", "fetch", "put back"):
        found[work](-q, k, v)
        assert torch.equal(mask, first), work
    found["of it, mask"](-q, k, v)
    assert not torch.equal(mask, first)
    found["refresh"](q, k, v)
    assert torch.equal(mask, first)


def test_rows(timed):
    args = observed.parse(["--slice", "128x8", "64x1", "--density", "0.5"])
    args.preset = "small"
    found = list(observed.rows(args, "cpu"))
    assert [row["work"] for row in found] == [*WORK, *WORK]
    assert [row["slice"] for row in found] == ["128x8"] * 6 + ["64x1"] * 6
    assert timed == [observed.MANY] * 4  # the two short kinds of work of each slice, and nothing else
    assert all(row["of dense"] == 1.0 and row["shape"] == [1, 2, 256, 16] for row in found)


def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        observed.main([])
