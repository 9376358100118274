"""The attention benchmark: its arguments, the masks that it times with, and its rows, computed on CPU."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fg_inductor.bench import attention, tiles
from fg_inductor.bench.common import PRESETS, Timing, measure, measure_graph, peak_bytes
from fg_inductor.bench.masks import LISTS, make_mask
from fg_inductor.kernels import ops
from fg_inductor.kernels.mask import group_count, pack, unpack, word_count

# Arguments


def test_a_preset_is_the_default():
    args = attention.parse([])
    assert (args.preset, args.heads, args.seq, args.dim) == ("wan2.1-1.3b-480p", 12, 32_760, 128)
    assert (args.slice, args.density, args.lists, args.tail, args.kernel, args.baselines) == (
        [(128, 8)], [0.3], ["random"], ["none"], ["auto"], ["cudnn"],
    )  # fmt: skip


def test_several_of_everything():
    text = "--seq 100 --heads 2 --dim 64 --batch 3 --slice 128x1 16x128 --density 1 0.1 --lists skewed blocks"
    args = attention.parse([*text.split(), "--kernel", "hopper", "portable", "--tail", "pooled", "--baselines"])
    assert (args.preset, args.seq, args.heads, args.dim, args.batch) == (None, 100, 2, 64, 3)
    assert (args.slice, args.density) == ([(128, 1), (16, 128)], [1.0, 0.1])
    assert (args.lists, args.kernel) == (["skewed", "blocks"], ["hopper", "portable"])
    assert (args.tail, args.baselines) == (["pooled"], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--preset wan", "invalid choice: 'wan'"),
        ("--preset ltx-2b --seq 100", "--preset ltx-2b has its own --seq, --heads and --dim"),
        ("--seq 100 --heads 2", "--seq, --heads and --dim go together"),
        ("--seq 0 --heads 2 --dim 64", "'0' is not a whole number above 0"),
        ("--dim 80", "invalid choice: 80"),
        ("--slice 128x2", "'128x2' is not MxN"),
        ("--slice 1288", "'1288' is not MxN"),
        ("--density 0", "'0' is not a number in (0, 1]"),
        ("--density 30%", "'30%' is not a number in (0, 1]"),
        ("--density nan", "'nan' is not a number in (0, 1]"),
        ("--kernel triton", "invalid choice: 'triton'"),
        ("--qkv x.safetensors", "--qkv and --grid go together"),
        ("--qkv x.safetensors --grid 1 2 3 --baselines flex", "flex knows no query order"),
        ("--qkv x.safetensors --grid 1 2 3 --preset ltx-2b", "--qkv has its own sizes"),
        ("--top-p 0.9", "--top-p is timed with the phases"),
        ("--phases --top-p 90%", "'90%' is not a number in (0, 1]"),
        ("--phases --top-p 0.8 0.9", "unrecognized arguments: 0.9"),
        ("--baselines fa4", "invalid choice: 'fa4'"),
        ("--out x.json", "unrecognized arguments: --out"),
    ],
)
def test_refuses(text, message, capsys):
    with pytest.raises(SystemExit):
        attention.parse(text.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_their_video(name):
    t, h, w = PRESETS[name]["grid"]
    assert 0 <= PRESETS[name]["tokens"] - t * h * w <= 256  # the rest is text


# Masks


def _kept(lists, density=0.3, n=8, keys=1500, heads=6, seed=0):
    mask = make_mask(lists, 2, heads, 300, keys, 16, n, density, "cpu", seed)
    return unpack(mask, group_count(keys, n))


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.75, 0.95, 1.0])
@pytest.mark.parametrize("lists", LISTS)
def test_total_is_that_of_the_density(lists, density):
    keep = _kept(lists, density)
    assert keep.shape == (2, 6, 19, 188)
    assert keep.sum() == round(density * 188) * keep[..., 0].numel()
    if lists != "skewed":
        assert (keep.sum(-1) == round(density * 188)).all()


@pytest.mark.parametrize("lists", LISTS)
def test_seed_decides(lists):
    assert torch.equal(_kept(lists), _kept(lists)) and not torch.equal(_kept(lists), _kept(lists, seed=1))


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5])
def test_skewed_spans_its_range_and_heads_differ_most(density):
    share = _kept("skewed", density, n=1, heads=12).double().mean(-1)
    assert 0.079 < share.min() < density / 2 + 0.04 and 0.6 < share.max() < 0.801
    heads = share.mean(-1)
    assert heads.var() > share.var() / 4  # a random deal would leave heads of 19 slices 1/19 of it
    assert (share.amax(-1) - share.amin(-1)).max() > 0.4  # and slices of one head differ too


@pytest.mark.parametrize("n", [1, 8, 64, 128])
def test_blocks_are_runs(n):
    """One run of a slice may be cut short by the density, one by the end; runs may touch."""
    keys = 4096
    for row in _kept("blocks", n=n, keys=keys, heads=1).flatten(0, 2):
        edges = torch.nn.functional.pad(row.int(), (1, 1)).diff()
        lengths = ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten() * n
        assert (lengths < 64).sum() <= 2 and len(lengths) >= 3


def test_contiguous_is_one_run_around_the_end():
    keep = _kept("contiguous").int()
    assert ((keep - keep.roll(1, -1)).abs().sum(-1) == 2).all()
    assert len({tuple(row) for row in keep.flatten(0, 2).tolist()}) > 50  # not the same run for all


def test_random_differs_between_slices():
    keep = _kept("random", n=1)
    assert len({tuple(row) for row in keep.flatten(0, 2).tolist()}) == 2 * 6 * 19


# Times


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the calls move."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return now


@pytest.mark.parametrize(
    ("cost", "repeats", "expected"),
    [([40.0], 5, (40.0, 40.0, 40.0)), ([1.0, 3.0], 148, (2.0, 1.0, 3.0)), ([1e-3], 1000, (1e-3, 1e-3, 1e-3))],
    ids=["slow", "in-turns", "fast"],
)
def test_measure(cost, repeats, expected, clock):
    called = []

    def call(i):
        called.append(i)
        clock[0] += cost[i]

    timing = measure([lambda i=i: call(i) for i in range(len(cost))], warmup_ms=20, repeat_ms=148)
    assert timing == pytest.approx(expected)
    warmup = min(-(-20 // cost[0]), 1000)
    assert len(called) == len(cost) + 1 + warmup + repeats
    assert called == [i % len(cost) for i in range(len(called))]


def test_measure_graph(clock, monkeypatch):
    """Each call once before the graph, then in turns within it; what a replay takes is shared among them."""
    called, graphs = [], []

    class Graph:
        def replay(self):
            clock[0] += self.cost

    class Capture:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            graphs.append(len(called))
            self.began = clock[0]

        def __exit__(self, *failed):
            self.graph.cost, clock[0] = clock[0] - self.began, self.began

    def call(i):
        called.append(i)
        clock[0] += (1.0, 3.0)[i]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    assert measure_graph([lambda: call(0), lambda: call(1)], 3) == pytest.approx((2.0, 2.0, 2.0))
    assert graphs == [2] and called == [0, 1] * 4


# Rows


@pytest.fixture
def calls(monkeypatch):
    """``measure`` and ``measure_graph`` run each call once and take 1 ms, one more each time."""
    seen = []

    def measure(calls):
        seen.append(len(calls))
        for call in calls:
            call()
        return Timing(float(len(seen)), 0.5, 9.5)

    monkeypatch.setattr(attention, "measure", measure)
    monkeypatch.setattr(attention, "measure_graph", lambda calls, turns: measure(calls))
    monkeypatch.setattr(attention, "environment", lambda: {"card": "a card", "commit": "abc"})
    return seen


SMALL = "--seq 300 --heads 2 --dim 64 --slice 64x8 --baselines"


def test_rows(calls):
    args = attention.parse([*SMALL.split(), "--density", "0.5", "0.2", "--lists", "skewed", "--tail", "none", "pooled"])
    rows = list(attention.rows(args, "cpu"))
    assert [(r["density"], r["tail"]) for r in rows] == [(0.5, "none"), (0.5, "pooled"), (0.2, "none"), (0.2, "pooled")]
    for row, ms in zip(rows, (1.0, 2.0, 3.0, 4.0), strict=True):
        assert row["kept"] == pytest.approx(row["density"], abs=0.02)
        assert row["tflop"] == pytest.approx(4 * 2 * 300 * 300 * 64 * row["kept"] / 1e12)
        assert (row["median_ms"], row["p20_ms"], row["p80_ms"]) == (ms, 0.5, 9.5)
        assert row["tflops"] == pytest.approx(row["tflop"] / (ms / 1000))
        assert row["variant"] == "reference" and row["error"] < 0.01 and "ratio" not in row and "select_ms" not in row
        assert (row["slice"], row["lists"], row["shape"], row["preset"]) == ("64x8", "skewed", [1, 2, 300, 64], None)
        json.dumps(row)


def test_error_is_seen(calls, monkeypatch):
    """A kernel that is wrong in the last slice of the last head has a large error; only that head is looked at."""
    real = attention.ops.attention

    def wrong(*arguments):
        out, lse = real(*arguments)
        out[0, -1, -1] += 1
        return out, lse

    monkeypatch.setattr(attention.ops, "attention", wrong)
    (row,) = attention.rows(attention.parse(SMALL.split()), "cpu")
    assert row["error"] > 0.1


def test_ratio_is_to_cudnn(calls, monkeypatch):
    monkeypatch.setattr(attention, "_dense", lambda inputs, backend: Timing(8.0, 7.0, 9.0))
    (dense, row) = attention.rows(attention.parse([*SMALL.split(), "cudnn", "fa2", "flex"]), "cpu")
    assert (dense["variant"], dense["ratio"], dense["kept"]) == ("FlashAttention-2 dense", 1.0, 1.0)
    assert (row["baseline"], row["baseline_ms"], row["ratio"]) == ("cuDNN dense", 8.0, 8.0)
    assert row["rate"] == pytest.approx(row["kept"] * 8.0)
    assert row["baseline_tflops"] == pytest.approx(4 * 2 * 300 * 300 * 64 / 1e12 / 0.008)


def test_inputs_of_a_model(calls, tmp_path, monkeypatch):
    """Masks are selected, and right in query order: q and the result move, and keys too where they are in groups."""
    file = tmp_path / "qkv.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(1, 2, 5 * 6 * 7, 64, generator=generator) for name in "qkv"}, file)
    text = f"--qkv {file} --grid 5 6 7 --dtype float16 --slice 64x1 64x8 16x8 --density 0.4 --baselines --phases"
    rows = list(attention.rows(attention.parse(text.split()), "cpu"))
    assert [row["slice"] for row in rows] == ["64x1", "64x8", "16x8"]
    assert ["order_ms" in row for row in rows] == [True, True, False]  # made once for all calls: not a cost of each
    for row in rows:
        assert row["shape"] == [1, 2, 210, 64] and row["lists"] == "selected" and row["preset"] is None
        assert row["error"] < 0.01 and 0.35 < row["kept"] < 0.5
    with monkeypatch.context() as without:
        without.setattr(attention, "order_of_calls", None)  # which nobody may ask
        args = attention.parse([*text.replace("64x1 64x8 16x8", "64x8").split(), "--no-order"])
        (row,) = attention.rows(args, "cpu")
    assert [r["order"] for r in (*rows, row)] == ["query order"] * 3 + ["order of the tokens"]
    assert row["error"] < 0.01 and "order_ms" not in row and 0.35 < row["kept"] < 0.5
    with pytest.raises(SystemExit, match="self-attention over the 200 tokens"):
        next(attention.rows(attention.parse(f"--qkv {file} --grid 5 5 8".split()), "cpu"))


def test_phases(calls):
    (row,) = attention.rows(attention.parse([*SMALL.split(), "--tail", "pooled", "--phases"]), "cpu")
    assert len(calls) == 4  # selection, attention, attention without tail, both together
    assert (row["select_ms"], row["median_ms"], row["tail_ms"], row["together_ms"]) == (1.0, 2.0, 2.0 - 3.0, 4.0)
    assert row["mask_memory"] == 2 * 5 * 4 * 4 / (3 * 300 * 2 * 64 * 2) and row["select_memory"] is None
    assert not {"top_p", "select_share", "select_top_p_ms", "select_top_p_share"} & set(row)


@pytest.fixture
def selections(monkeypatch):
    """What ``select`` is given, and what it gives."""
    seen, real = [], attention.select

    def select(q, k, order, m, n, density, top_p=1.0):
        mask = real(q, k, order, m, n, density, top_p)
        kept = ops.kept_density(mask, None, q.shape[2], k.shape[2], m, n).item()
        seen.append((order, density, top_p, kept))
        return mask

    monkeypatch.setattr(attention, "select", select)
    return seen


def test_selection_by_density_and_by_mass(calls, selections, monkeypatch):
    """Once for each mask, whatever is timed behind it; shares are of the dense baseline, memory of q, k and v."""
    monkeypatch.setattr(attention, "_dense", lambda inputs, backend: Timing(8.0, 7.0, 9.0))
    monkeypatch.setattr(attention, "peak_bytes", lambda run, device: run().nbytes * 3)
    text = f"{SMALL} cudnn --tail none pooled --phases --top-p 0.5"
    rows = list(attention.rows(attention.parse(text.split()), "cpu"))
    for row in rows:
        assert (row["select_ms"], row["select_share"]) == (1.0, 1 / 8)
        assert (row["top_p"], row["select_top_p_ms"], row["select_top_p_share"]) == (0.5, 2.0, 2 / 8)
        assert row["select_memory"] == pytest.approx(3 * row["mask_memory"])
    assert [density for _, density, *_ in selections] == [0.3, None, 0.3, 0.3, 0.3]  # memory; together, twice
    kept = [kept for *_, kept in selections]
    assert kept[0] == pytest.approx(0.3, abs=0.02) and 0.35 < kept[1] < 0.55  # random scores are flat


@pytest.mark.parametrize("text", [0, 20], ids=["video", "text-last"])
def test_selection_is_in_the_query_order_of_a_preset(text, calls, selections, monkeypatch):
    preset = {"heads": 2, "tokens": 210 + text, "dim": 64, "grid": (5, 6, 7)}
    monkeypatch.setattr(attention, "PRESETS", {"small": preset})
    monkeypatch.setattr(attention, "peak_bytes", lambda run, device: run().nbytes)
    arguments = "--preset small --slice 64x8 --phases --top-p 0.9 --baselines"
    row = next(attention.rows(attention.parse(arguments.split()), "cpu"))
    assert row["order_ms"] == 1.0  # chosen in each call, before anything is selected
    expected = ops.query_order(5, 6, 7, 0, text, 64, "cpu")
    assert expected[:210].sort().values.tolist() == list(range(210)) and len(expected) == 210 + text
    *alone, together = [order for order, *_ in selections]
    assert len(alone) == 3 and all(torch.equal(order, expected) for order in alone) and together is None


def test_memory_is_counted_on_a_device_alone():
    assert peak_bytes(lambda: 1 / 0, torch.device("cpu")) is None


def test_a_kernel_that_cannot_run_is_named_and_skipped(calls, capsys):
    rows = list(attention.rows(attention.parse([*SMALL.split(), "--kernel", "hopper", "auto"]), "cpu"))
    assert [row["variant"] for row in rows] == ["reference"]
    assert "skipped: fgattn::attention: the hopper kernel can't run this call: q is on cpu" in capsys.readouterr().out


@pytest.mark.parametrize("n", [64, 128])
def test_flex_gets_the_same_blocks(n):
    """Also where the last slice and the last group are ragged."""
    mask = make_mask("random", 2, 3, 300, 420, 128, n, 0.5, "cpu")
    blocks = attention.flex_blocks(mask, 300, 420, n)
    assert blocks.shape == (2, 3, 300, 420) and tuple(blocks.BLOCK_SIZE) == (128, n)
    assert torch.equal(blocks.to_dense().bool(), unpack(mask, group_count(420, n)))


def test_says_that_it_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        attention.main([])


@pytest.mark.gpu
def test_runs(tmp_path, capsys):
    file = tmp_path / "rows.json"
    text = "--seq 1000 --heads 2 --dim 64 --slice 128x64 --tail pooled --phases --top-p 0.9 --baselines cudnn fa2 flex"
    attention.main([*text.split(), "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [row["variant"] for row in rows[:2]] == ["FlashAttention-2 dense", "FlexAttention"] and len(rows) == 3
    assert all(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["ratio"] > 0 for row in rows)
    assert rows[1]["error"] < 0.01 and rows[2]["error"] < 0.01 and "cuDNN dense" in capsys.readouterr().out
    assert 0 < rows[2]["mask_memory"] < rows[2]["select_memory"] and rows[2]["select_share"] > 0
    assert 0 < rows[2]["select_ms"] < rows[2]["together_ms"] and rows[2]["select_top_p_ms"] > 0


@pytest.mark.parametrize(
    ("rows", "expected"), [([0, 0, 0, 0, 1], 1.0), ([0, 1, 0, 1, 1], (2 * 60 + 2 * 60 + 30) / 150)]
)
def test_union_of_slices(rows, expected):
    """Two masks of 30 groups without a common one, in tiles of two slices, the last one of a single slice."""
    keep = torch.zeros(2, 60, dtype=torch.bool)
    keep[0, :30] = keep[1, 30:] = True
    mask = pack(keep[rows], word_count(480, 8)).expand(1, 3, -1, -1)
    assert tiles.union_of(mask, 480, 8, 2) == pytest.approx(expected)
    together = torch.tensor([0, 2, 1, 3, 4], dtype=torch.int32).expand(1, 3, -1)  # slices of one mask
    assert tiles.union_of(mask, 480, 8, 2, together) == 1


@pytest.mark.gpu
def test_matched_slices(tmp_path):
    """Slices of a tile, matched and as they are."""
    file = tmp_path / "rows.json"
    attention.main(f"--seq 3000 --heads 2 --dim 64 --slice 16x8 --kernel hopper --json {file}".split())
    (row,) = json.loads(file.read_text())
    assert 1 < row["union"] == row["union_matched"] <= row["union_as_is"] < 8
    assert 0 < row["alike_ms"] < row["matched_ms"] and row["as_is_ms"] > 0
