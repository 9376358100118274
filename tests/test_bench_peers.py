"""The comparison with other kernels: what each keeps, errors, failures, equal error; computed on CPU."""

import json
import math
import sys
import types
from importlib import metadata

import expecttest
import pytest
import torch
import torch.nn.functional as F

from fg_inductor.bench import peer_kernels, peers
from fg_inductor.bench.common import Timing
from fg_inductor.bench.peer_kernels import Kind, Peer
from fg_inductor.kernels.query_order import query_order

SMALL = ["--grid", "2", "8", "16", "--heads", "2", "--dim", "64", "--rows", "64"]


@pytest.fixture
def timed(monkeypatch):
    """Each measurement takes 1 ms more than the one before."""
    taken = []

    def measure(calls):
        for call in calls:
            call()
        taken.append(1)
        return Timing(float(len(taken)), 0.5, 99.5)

    def measure_graph(calls, turns):
        if len(taken) % 2:
            raise RuntimeError("operation not permitted\nwhen the stream is capturing")
        return Timing(0.25, 0.2, 0.3)

    monkeypatch.setattr(peers, "measure", measure)
    monkeypatch.setattr(peers, "measure_graph", measure_graph)
    monkeypatch.setattr(peers, "environment", lambda: {"card": "a card", "torch": "2", "triton": "3", "commit": "abc"})

    def fails(heads, tokens, dim):
        raise RuntimeError("no such\ncard")

    dense = Peer(lambda *x: x, None, lambda x, _: F.scaled_dot_product_attention(*x))
    monkeypatch.setitem(peers.PEERS, "dense", Kind(lambda *_: dense))
    monkeypatch.setitem(peers.PEERS, "missing", Kind(fails, 64, 64, "a_module_that_nobody_has"))
    monkeypatch.setitem(peers.PEERS, "broken", Kind(fails, 64, 64))
    wrong = Kind(lambda *_: Peer(lambda *x: x, lambda keep: keep, lambda x, _: x[0].transpose(1, 2)), 64, 64)
    monkeypatch.setitem(peers.PEERS, "wrong shape", wrong)


def test_rows(timed, tmp_path):
    names = ["dense", "fgattn 128x8", "fgattn 128x128", "missing", "broken", "wrong shape"]
    args = peers.parse(["--peers", *names, "--density", "0.25", "0.5", *SMALL])
    found = list(peers.rows(args, "cpu"))
    assert [(r["variant"], r.get("density")) for r in found] == [
        ("dense", 1.0), ("fgattn 128x8", 0.25), ("fgattn 128x8", 0.5), ("fgattn 128x128", 0.25),
        ("fgattn 128x128", 0.5),
        ("missing", None), ("broken", None), ("wrong shape", None),
    ]  # fmt: skip
    dense, fine, _, coarse, _, missing, broken, wrong = found
    assert dense["error"] < 0.01 and dense["kept"] == 1 and dense["mask_ms"] == 0
    assert fine["kept"] == 0.25 and coarse["kept"] == 0.5  # of two blocks one is the least
    assert dense["error"] < fine["error"] < 0.9 and fine["together_ms"] == fine["median_ms"] + fine["mask_ms"]
    assert (dense["graph_ms"], dense["graph_failed"]) == (None, "RuntimeError: operation not permitted")
    assert fine["graph_ms"] is None and coarse["graph_ms"] is None  # an odd number of measurements each time
    assert fine["baseline"] == "dense" and fine["ratio"] == 1 / fine["median_ms"]
    assert "a_module_that_nobody_has" in missing["failed"] and broken["failed"] == "RuntimeError: no such"
    assert "shape" in wrong["failed"]
    json.dumps(found)
    peers.draw(found, str(tmp_path / "peers.png"))
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_finer_groups_keep_more_mass_at_the_same_density():
    q, k, _ = peers.fields([2, 8, 16], 2, 64, "cpu")
    mass = peers.attention_mass(q, k)
    assert torch.allclose(mass.sum(), torch.tensor(2.0 * 256))  # every query gives 1
    kept = []
    for m, n in ((64, 1), (64, 8), (128, 32), (128, 128)):
        keep = peers.keep_most(mass, m, n, 0.5)
        assert keep.sum(-1).eq(round(0.5 * 256 / n)).all()
        whole = keep.repeat_interleave(m // 64, 1).repeat_interleave(n, 2)
        kept.append(mass[whole].sum())
    assert kept == sorted(kept, reverse=True)


def test_formats_say_the_same():
    """Counts and indices list what is kept, in order, and what a kernel reads beyond the count is a valid index."""
    keep = torch.rand(2, 3, 9) < 0.4
    counts, order = peer_kernels.listed(keep)
    for h in range(2):
        for t in range(3):
            assert order[0, h, t, : counts[0, h, t]].tolist() == keep[h, t].nonzero()[:, 0].tolist()
    assert order.sort(-1).values.eq(torch.arange(9)).all() and order.dtype == counts.dtype == torch.int32


@pytest.mark.parametrize("m", [64, 128])
def test_sla_is_given_the_kept_blocks(m, monkeypatch):
    """As many in every row; its kernel's arguments and what it makes of them, in PyTorch."""

    class Attention:
        @staticmethod
        def apply(q, k, v, kept, lists, count, rows, columns):
            assert (rows, columns) == (m, 64) and lists.is_contiguous() and lists.shape == (1, 2, 256 // m, count)
            keep = torch.zeros(1, 2, 256 // m, 4, dtype=torch.int8).scatter_(-1, lists.long(), 1)
            assert torch.equal(keep, kept)
            mask = keep.bool().repeat_interleave(m, 2).repeat_interleave(64, 3)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    module = types.ModuleType("sparse_linear_attention")
    module.kernel = types.SimpleNamespace(_attention=Attention)
    monkeypatch.setitem(sys.modules, "sparse_linear_attention", module)
    monkeypatch.setitem(sys.modules, "sparse_linear_attention.kernel", module.kernel)
    peer = peer_kernels.PEERS[f"SLA {m}x64"].make(2, 256, 64)
    q, k, v = torch.randn(3, 1, 2, 256, 64)
    keep = peers.keep_most(peers.attention_mass(q, k), m, 64, 0.5)
    out = peer.bhsd(peer.run(peer.layout(q, k, v), peer.prepare(keep)))
    mask = keep.repeat_interleave(m, 1).repeat_interleave(64, 2)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_interpolates_in_logarithms_and_nowhere_else():
    points = [(4.0, 0.01), (1.0, 0.1)]
    assert peers.interpolate(points, 2.0) == pytest.approx(math.sqrt(0.1 * 0.01))
    assert (peers.interpolate(points, 1.0), peers.interpolate(points, 4.0)) == (0.1, 0.01)
    assert peers.interpolate(points, 0.9) is None and peers.interpolate(points, 5.0) is None


def test_equal_error_and_equal_time():
    def row(variant, density, ms, error):
        return {"variant": variant, "density": density, "kept": density, "median_ms": ms, "error": error}

    records = [
        {"variant": "dense", "density": 1.0, "kept": 1.0, "median_ms": 9.0, "error": 0.001},
        row("a", 0.1, 1.0, 0.1), row("a", 0.3, 3.0, 0.04), row("b", 0.1, 2.0, 0.16), row("b", 0.3, 8.0, 0.01),
        {"variant": "c", "failed": "why"},
    ]  # fmt: skip
    first, second = peers.equal(records, 0.3)
    assert first == {
        "variant": "a", "ms at equal error": 3.0, "times the first": 1.0, "error at equal time": 0.04,
        "errors of the first": 1.0,
    }  # fmt: skip
    assert second["ms at equal error"] == pytest.approx(4.0) and second["times the first"] == pytest.approx(4 / 3)
    assert peers.equal(records[:1], 0.3) == []


def test_qkv_from_a_file(tmp_path):
    from safetensors.torch import save_file

    path = str(tmp_path / "qkv.safetensors")
    tensors = {name: torch.randn(1, 2, 256, 64) for name in "qkv"}
    save_file(tensors, path)
    q, _, v = peers.load(peers.parse(["--qkv", path]), "cpu")
    assert torch.equal(q, tensors["q"].bfloat16()) and torch.equal(v, tensors["v"].bfloat16())
    save_file({name: x[:, :, :200].contiguous() for name, x in tensors.items()}, path)
    with pytest.raises(SystemExit, match="S a multiple of 128"):
        peers.load(peers.parse(["--qkv", path]), "cpu")


def test_refuses_a_grid_that_some_peer_cannot_take(capsys):
    with pytest.raises(SystemExit):
        peers.parse(["--grid", "3", "5", "7"])
    assert "105 tokens are not a multiple of 128" in capsys.readouterr().err


def test_order_makes_blocks_compact():
    """With --order all peers see the tokens in query order: the same values, in another sequence."""
    torch.manual_seed(0)
    plain = peers.load(peers.parse(["--grid", "4", "8", "8", "--heads", "2", "--inputs", "random"]), "cpu")
    torch.manual_seed(0)
    moved = peers.load(peers.parse(["--grid", "4", "8", "8", "--heads", "2", "--inputs", "random", "--order"]), "cpu")
    order = query_order(4, 8, 8, 0, 0, 128, torch.device("cpu")).long()
    assert all(torch.equal(a[:, :, order], b) for a, b in zip(plain, moved, strict=True))


@pytest.mark.parametrize("own", [None, "0.0.0", "1.2"])
def test_version(own, monkeypatch):
    """Of the distribution, where the package does not know its own."""
    monkeypatch.setattr(expecttest, "__version__", own, raising=False)
    if own is None:
        monkeypatch.delattr(expecttest, "__version__")
    assert peer_kernels.version("expecttest") == (own if own == "1.2" else metadata.version("expecttest"))
