"""Selectors besides the pooled one: by rule, DFSAttn's, a user's own, and text that stays dense under each."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fg_inductor
from fg_inductor import selectors
from fg_inductor.kernels import ops, select_dfs
from fg_inductor.kernels.mask import group_count, pack, slice_count, unpack, word_count
from fg_inductor.kernels.query_order import hilbert_index, query_order
from fg_inductor.option_values import StaticMask
from fg_inductor.settings import Settings
from fg_inductor.testing import make_key_bias, make_qkv, random_mask
from fg_inductor.testing_passes import SMALL, PassBackend, run_pass
from fg_inductor.toy_models import SHORT, SelfAttention, count_calls, tokens

CPU = torch.device("cpu")
DOCS = Path(__file__).resolve().parent.parent / "docs" / "selectors.md"


# keep_dense


@pytest.mark.parametrize("ordered", [False, True], ids=["in place", "ordered"])
@pytest.mark.parametrize("m, n", [(16, 1), (32, 8), (64, 128)])
def test_keep_dense(m, n, ordered):
    """The ranges are added, rounded outward to groups and slices; what was kept stays, and unused bits stay 0."""
    queries, keys, dense_keys, dense_queries = 150, 300, [3, 5, 290, 300], [0, 1, 149, 150]
    q, k, _ = make_qkv(2, 3, 3, queries, keys)
    mask = random_mask(q, k, m, n, 0.2)
    order = torch.randperm(queries, generator=torch.Generator().manual_seed(0)).int() if ordered else None
    actual = ops.keep_dense(mask, order, queries, keys, m, n, dense_keys, dense_queries)
    expected = unpack(mask, group_count(keys, n))
    for j in (3, 4, *range(290, 300)):
        expected[..., j // n] = True
    for i in (0, 149):
        place = i if order is None else order.tolist().index(i)
        expected[:, :, place // m] = True
    assert torch.equal(actual, pack(expected, word_count(keys, n)))
    assert torch.equal(ops.keep_dense(mask, order, queries, keys, m, n, [], []), mask)


# static


def kept_by_rule(i, j, grid, before, tile, window, radius, ranges):
    """Whether query token i attends to key token j."""
    t, h, w = grid
    if not all(before <= x < before + t * h * w for x in (i, j)):
        return True
    if any(a <= j < b for a, b in zip(ranges[::2], ranges[1::2], strict=True)):
        return True
    places = [((x - before) // (h * w), (x - before) // w % h, (x - before) % w) for x in (i, j)]
    a, b = ([axis // edge for axis, edge in zip(place, tile, strict=True)] for place in places)
    if a == b:
        return True
    if window:
        inside = True
        for x, y, size, edge, width in zip(a, b, grid, tile, window, strict=True):
            last, half = math.ceil(size / edge) - 1, width // 2
            first = max(0, min(x - half, last - 2 * half))
            inside &= first <= y <= first + 2 * half
        if inside:
            return True
    if radius:
        ends = [[(x * e, min(x * e + e, s) - 1) for x, e, s in zip(c, tile, grid, strict=True)] for c in (a, b)]
        time, *space = (abs(sum(p) - sum(q)) / 2 for p, q in zip(*ends, strict=True))
        return math.hypot(*space) <= radius / 2 ** math.floor(math.log2(max(1, time)))
    return False


STATIC = {  # grid, before, after, m, n, rule
    "window": ((4, 6, 8), 0, 0, 16, 8, {"tile": [2, 2, 2], "window": [1, 3, 3]}),
    "window-ragged": ((5, 7, 9), 0, 0, 32, 1, {"tile": [2, 3, 4], "window": [3, 1, 3]}),
    "window-beyond-grid": ((2, 7, 9), 0, 0, 16, 8, {"tile": [1, 3, 4], "window": [5, 1, 1]}),
    "radius": ((9, 6, 8), 0, 0, 16, 1, {"tile": [1, 2, 2], "radius": 4.0}),
    "radius-and-window": ((5, 7, 9), 3, 6, 16, 1, {"tile": [1, 3, 3], "radius": 3.5, "window": [1, 1, 3]}),
    "first-frame": ((3, 6, 8), 5, 0, 16, 16, {"tile": [1, 2, 2], "ranges": [5, 53]}),
    "text": ((3, 6, 8), 5, 11, 16, 8, {"tile": [1, 2, 2], "window": [1, 1, 1]}),
}


@pytest.mark.parametrize("case", STATIC.values(), ids=STATIC)
def test_static_mask_is_what_its_rules_say(case):
    grid, before, after, m, n, changes = case
    rule = {"tile": [2, 8, 8], "window": [], "radius": 0.0, "ranges": []} | changes
    length = before + math.prod(grid) + after
    order = query_order(*grid, before, after, m, CPU)
    q, k, _ = make_qkv(2, 4, 2, length, dim=32)
    mask = ops.select_static(q, k, order, m, n, list(grid), before, *rule.values())
    pairs = torch.tensor([[kept_by_rule(i, j, grid, before, **rule) for j in range(length)] for i in range(length)])
    slices, groups = slice_count(length, m), group_count(length, n)
    rows = F.pad(pairs[order.long()], (0, groups * n - length, 0, slices * m - length))
    expected = rows.view(slices, m, groups, n).any(3).any(1)
    assert not expected.all(), "the rule keeps everything"
    assert torch.equal(mask, pack(expected, word_count(length, n)).expand(2, 4, -1, -1))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grid": [2, 4, 9]}, r"a grid of \[2, 4, 9\] behind 0 tokens does not fit into 64 tokens"),
        ({"before": 1}, "behind 1 tokens does not fit"),
        ({"tile": [2, 0, 4]}, r"tile=\[2, 0, 4\]; give three positive sizes"),
        ({"window": [1, 2, 1]}, r"window=\[1, 2, 1\] tiles; give three odd numbers"),
        ({"radius": -1.0}, r"radius=-1.0 tokens"),
        ({"ranges": [3]}, r"ranges must hold \[start, end\) pairs, got 1"),
        ({"k": torch.zeros(1, 2, 65, 32)}, "64 queries and 65 keys"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_static_errors(changes, message):
    q, k, _ = make_qkv(1, 2, 2, 64, dim=32)
    usual = dict(q=q, k=k, order=torch.arange(64).int(), m=16, n=8, grid=[2, 4, 8], before=0, tile=[1, 2, 2])
    usual |= dict(window=[1, 1, 1], radius=0.0, ranges=[])
    with pytest.raises(ValueError, match=f"fgattn::select_static: .*{message}"):
        ops.select_static(**usual | changes)


# DFSAttn


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_hilbert_curve_goes_step_by_step(bits):
    side = torch.arange(2**bits)
    index = hilbert_index(side.view(-1, 1, 1), side.view(-1, 1), side, bits)
    assert torch.equal(index.flatten().sort().values, torch.arange(8**bits))
    walk = torch.stack(torch.unravel_index(index.flatten().argsort(), index.shape), 1)
    assert (walk.diff(dim=0).abs().sum(1) == 1).all()


def test_hilbert_order_of_a_grid():
    order = query_order(3, 5, 7, 2, 4, 16, CPU, "hilbert")
    assert order[105:].tolist() == [0, 1, 107, 108, 109, 110]
    assert torch.equal(order[:105].sort().values, torch.arange(2, 107).int())
    with pytest.raises(ValueError, match="fgattn::query_order: curve='peano'; choose one of"):
        ops.query_order(3, 5, 7, 2, 4, 16, CPU, "peano")


def dfs_by_loops(q, k, bias, order, scale, m, density):
    """Kept keys [B, Hq, T, Sk]."""
    batch, heads, length, _ = q.shape
    order = order.tolist()
    visible = torch.ones(batch, length, dtype=torch.bool) if bias is None else bias
    keep = torch.zeros(batch, heads, math.ceil(length / m), length, dtype=torch.bool)
    for b, h in itertools.product(range(batch), range(heads)):
        tiles = [[j for j in order[x : x + 16] if visible[b, j]] for x in range(0, length, 16)]
        for t in range(keep.shape[2]):
            blocks = {}
            for x in range(t * m, min(length, t * m + m), 16):
                mean = q[b, h, order[x : min(x + 16, t * m + m)]].mean(0)
                weight = {
                    i: len(tile) * math.exp(scale * (mean @ k[b, h * k.shape[1] // heads, tile].mean(0)).item())
                    for i, tile in enumerate(tiles)
                    if tile
                }
                for i, x_weight in weight.items():
                    blocks[i // 8] = blocks.get(i // 8, 0.0) + x_weight / sum(weight.values())
            best = sorted(blocks, key=lambda i: (-blocks[i], i))[: max(1, math.floor(len(blocks) * density + 0.5))]
            for i in best:
                keep[b, h, t, order[i * 128 : i * 128 + 128]] = True
    return keep


@pytest.mark.parametrize(
    "m, n, density, masked", [(128, 1, 0.4, False), (32, 8, 0.3, False), (64, 1, 0.5, True), (16, 1, 0.01, False)]
)
def test_dfs_keeps_the_best_blocks(m, n, density, masked):
    length = 450
    q, k, _ = make_qkv(2, 4, 2, length, dim=32, dtype=torch.float64, spread=3.0)
    bias = make_key_bias("padding", 2, length, torch.float64) if masked else None
    order = query_order(7, 8, 8, 2, 0, m, CPU, "hilbert")
    mask = ops.select_dfs(q, k, bias, order, 0.2, m, n, density)
    keep = dfs_by_loops(q, k, bias, order, 0.2, m, density)
    groups = group_count(length, n)
    expected = F.pad(keep, (0, groups * n - length)).unflatten(-1, (groups, n)).any(-1)
    assert not expected.all() and torch.equal(mask, pack(expected, word_count(length, n)))


def test_dfs_keeps_what_it_cannot_score():
    q, k, _ = make_qkv(1, 2, 1, 400, dim=32)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).int()
    k[0, 0, 77, 3] = math.nan
    keep = unpack(ops.select_dfs(q, k, None, order, 0.2, 64, 1, 0.1), 400)
    assert keep[..., 77].all() and not keep.all()
    q[0, 1, 10, 3] = math.nan
    keep = unpack(ops.select_dfs(q, k, None, order, 0.2, 64, 1, 0.1), 400)
    at = order.tolist().index(10) // 64
    assert keep[0, 1, at].all() and not keep[0, 0].all(-1).any()


def test_dfs_errors():
    q, k, _ = make_qkv(1, 2, 1, 64, dim=32)
    order = torch.arange(64).int()
    for changes, message in (
        ({"density": 0.0}, r"density=0.0 must lie in \(0, 1\]"),
        ({"k": k[:, :, :60]}, "64 queries and 60 keys; it places both by one order"),
        ({"m": 8}, "m=8 queries a slice"),
    ):
        usual = dict(q=q, k=k, key_bias=None, order=order, scale=0.1, m=16, n=1, density=0.3)
        with pytest.raises(ValueError, match=f"fgattn::select_dfs: .*{message}"):
            ops.select_dfs(**usual | changes)
    assert select_dfs.BLOCK % select_dfs.TILE == 0


# Joint attention: text stays dense under every selector

GRID, TEXT, HEADS, WIDTH = (3, 8, 12), 10, 2, 128


class Joint(nn.Module):
    """Video [B, 4, T, 2H, 2W] and text [B, TEXT, WIDTH] in one attention, as in MMDiT."""

    def __init__(self, first: bool):
        super().__init__()
        self.first, self.patch = first, nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.video, self.text = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def parts(self, x, text):
        heads = [
            f(y).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            for f, y in ((self.video, self.patch(x).flatten(2).transpose(1, 2)), (self.text, text))
        ]
        return torch.cat(heads[::-1] if self.first else heads, 3).unbind(0)

    def forward(self, x, text):
        q, k, v = self.parts(x, text)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def lowest(q, k, key_bias, order, scale, m, n):
    """The first group alone: with text behind the video, all that is kept of it was added by the pass."""
    keep = torch.zeros(*q.shape[:2], slice_count(q.shape[2], m), group_count(k.shape[2], n), dtype=torch.bool)
    keep[..., 0] = True
    return pack(keep, word_count(k.shape[2], n))


class Recording(PassBackend):
    """Keeps the value of every node of the last call."""

    def __call__(self, gm, example_inputs):
        super().__call__(gm, example_inputs)

        def run(*args):
            interpreter = torch.fx.Interpreter(gm, garbage_collect_values=False)
            result = interpreter.run(*args)
            self.values = interpreter.env
            return result

        return run


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(selectors, "_registered", {})
    with torch.library._scoped_library("fgtest", "FRAGMENT") as library:
        library.define(
            "lowest(Tensor q, Tensor k, Tensor? key_bias, Tensor? order, float scale, int m, int n) -> Tensor"
        )
        library.impl("lowest", lowest, "CPU")
        library.impl(
            "lowest",
            lambda q, k, b, o, s, m, n: q.new_empty(
                *q.shape[:2], slice_count(q.shape[2], m), word_count(k.shape[2], n), dtype=torch.int32
            ),
            "Meta",
        )
        fg_inductor.register_selector("lowest", torch.ops.fgtest.lowest)
        yield


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.1},
        {"alpha": 3.0},
        {"mask": "dfs", "density": 0.01},
        {"mask": "static", "static": StaticMask(tile=(1, 2, 2))},
        {"mask": "lowest"},
    ],
    ids=lambda x: x.get("mask", f"pooled-{next(iter(x))}"),
)
@pytest.mark.parametrize("first", [False, True], ids=["text last", "text first"])
def test_text_stays_dense(first, settings, registry):
    """Text queries get exactly what dense attention gives them; every video query sees all of the text."""
    model, (t, h, w) = Joint(first), GRID
    x, text = torch.randn(2, 4, t, 2 * h, 2 * w), torch.randn(2, TEXT, WIDTH)
    backend = Recording(Settings(**{**SMALL, "slice": "16x1", **settings}))
    out = torch.compile(model, backend=backend, fullgraph=True)(x, text)
    (site,) = backend.sites
    assert site.rewritten and site.kind == "joint", site
    video = t * h * w
    is_text = torch.zeros(video + TEXT, dtype=torch.bool)
    is_text[:TEXT] = first
    is_text[video:] |= not first

    (attention,) = backend.calls(ops.attention)
    mask, order = backend.values[attention.args[3]], backend.values[attention.args[5]]
    keep = unpack(mask, video + TEXT)
    assert keep[..., is_text].all(), "text keys were dropped"
    rows = torch.zeros(keep.shape[2], dtype=torch.bool)
    rows[is_text[order.long()].nonzero()[:, 0] // 16] = True
    assert keep[:, :, rows].all(), "text queries do not see everything"
    assert not keep[:, :, ~rows][..., ~is_text].all(), "nothing was dropped"
    exact = model(x, text)
    torch.testing.assert_close(out[:, is_text], exact[:, is_text])
    assert not torch.allclose(out[:, ~is_text], exact[:, ~is_text])


# What the pass emits


def test_options_reach_the_operators():
    x = torch.randn(1, 2, 72, 32)
    done = run_pass(lambda x: F.scaled_dot_product_attention(x, x, x), (x,), reduce="max", gamma=0.2, alpha=0.7)
    (arguments,) = done.attention()
    assert (arguments["reduce"], arguments["gamma"], arguments["alpha"]) == ("max", 0.2, 0.7)
    rule = Settings.parse(
        {"fgattn.mask": "static", "fgattn.static": {"tile": (1, 2, 2), "window": (1, 3, 3), "ranges": [0, 24]}}
    ).static
    model, inputs = Joint(True), (torch.randn(1, 4, 3, 8, 12), torch.randn(1, TEXT, WIDTH))
    (node,) = run_pass(model, inputs, mask="static", static=rule).calls(ops.select_static)
    assert node.args[3:] == (16, 8, [3, 4, 6], TEXT, (1, 2, 2), (1, 3, 3), 0.0, (0, 24))
    done = run_pass(model, inputs, mask="dfs")
    (node,) = done.calls(ops.select_dfs)
    assert node.args[4:] == (0.125, 16, 8, 0.3, None)
    (order,) = done.calls(ops.query_order)
    assert order is node.args[3] and order.args == (3, 4, 6, TEXT, 0, 16, CPU, "hilbert")


class Mixed(nn.Module):
    """Queries are a part of what the keys are: more keys than queries."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x, memory):
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(torch.cat([x, memory], 1)).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("mask", ["dfs", "static"])
def test_sites_without_a_grid_stay_dense(mask):
    settings = {"mask": mask, "static": StaticMask() if mask == "static" else None}
    x = torch.randn(2, 72, WIDTH)
    done = run_pass(SelfAttention(), (x,), **settings)
    assert [(s.reason, s.detail, s.video) for s in done.sites] == [
        ("no token grid", f"fgattn.mask={mask!r} needs fgattn.token_grid", True)
    ]
    assert done.counts()[1:] == (0, 0, 0)
    done = run_pass(SelfAttention(), (x,), token_grid=(3, 4, 6), **settings)
    assert done.sites[0].rewritten
    done = run_pass(Mixed(), (x, torch.randn(2, 9, WIDTH)), token_grid=(3, 4, 6), **settings)
    assert done.sites[0].reason == "queries and keys differ in number" and done.counts()[1:] == (0, 0, 0)


@pytest.mark.parametrize("mask", ["dfs", "static"])
def test_symbolic_sizes(mask):
    """One graph serves every size, and its masks are those of a graph for that size."""
    settings = {"mask": mask, "density": 0.3}
    if mask == "static":
        settings["static"] = StaticMask(tile=(1, 2, 2), window=(1, 1, 3))
    model, compiled, backend = Joint(True), None, None
    for t, h, w in ((3, 4, 6), (2, 5, 7)):
        inputs = torch.randn(2, 4, t, 2 * h, 2 * w), torch.randn(2, TEXT, WIDTH)
        exact = run_pass(model, inputs, dynamic=False, **settings).result
        for dim in (2, 3, 4):
            torch._dynamo.mark_dynamic(inputs[0], dim)
        if compiled is None:
            backend = PassBackend(Settings(**{**SMALL, **settings}))
            compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), exact)
    assert len(backend.graphs) == 1 and backend.sites[0].rewritten


# A user's own


def test_the_selector_in_the_docs(monkeypatch):
    """It is some 20 lines, runs as it stands, and trains; each step asks it once."""
    monkeypatch.setattr(selectors, "_registered", {})
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    body = code[code.index("@torch.library.custom_op") :].strip().splitlines()
    assert len(body) <= 22
    names = {"__name__": "docs"}
    exec(compile(code, str(DOCS), "exec"), names)
    model, x = SelfAttention(), tokens().requires_grad_()
    options = {**SHORT, "fgattn.mask": "fifth", "fgattn.inner": "aot_eager", "fgattn.stats": True}
    compiled = torch.compile(model, backend="fgattn", options=options, fullgraph=True)
    compiled(x)
    calls = count_calls(lambda: compiled(x).square().sum().backward())
    assert calls["attention"] == calls["attention_backward"] == 1 and "select_pooled" not in calls
    assert x.grad.isfinite().all()
    (row,) = fg_inductor.report().rows
    assert row.density == pytest.approx(4 / 16) and "fifth 16x8" in str(fg_inductor.report())


def no_operator(q, k, key_bias, order, scale, m, n):
    pass


def test_register_refuses(registry):
    register = fg_inductor.register_selector
    with pytest.raises(
        TypeError, match=r"register_selector\('mine'\): <function no_operator .*> is no operator; make it"
    ):
        register("mine", no_operator)
    with pytest.raises(TypeError, match=r"fgattn::query_order.* must take \(Tensor q, Tensor k, Tensor\? key_bias, "):
        register("mine", ops.query_order)
    with pytest.raises(ValueError, match="the name 'pooled' is taken; choose another"):
        register("pooled", torch.ops.fgtest.lowest)
    register("lowest", torch.ops.fgtest.lowest.default)  # the same again
    assert Settings.parse({"fgattn.mask": "lowest"}).selector is torch.ops.fgtest.lowest.default
    with pytest.raises(
        ValueError, match=r"must be one of 'pooled', 'observed', 'dfs', 'static', 'dense', 'lowest'; did you mean 'lo"
    ):
        Settings.parse({"fgattn.mask": "lowset"})
