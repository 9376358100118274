"""The grid of the video tokens, read off the graph or given, and the query order made of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fg_inductor.kernels import ops
from fg_inductor.passes import sdpa
from fg_inductor.testing_passes import run_pass

HEADS, WIDTH, TEXT = 2, 64, 5
GRID = (3, 4, 6)  # 72 tokens; no size is another's, nor the batch's


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Patches [B, 4, T, 2H, 2W] -> tokens, two layers, and back; each step can be left to the caller."""

    def __init__(self, patch="conv3d", unpatch=True, text=None, wrap=None):
        super().__init__()
        self.patch, self.unpatch, self.text, self.wrap = patch, unpatch, text, wrap
        self.conv, self.out = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)), nn.Linear(WIDTH, 16)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x, text):
        t, h, w = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        if self.patch == "conv3d":
            x = self.conv(x).flatten(2).transpose(1, 2)
        else:
            x = F.linear(
                F.pixel_unshuffle(x.transpose(1, 2), 2).permute(0, 1, 3, 4, 2).flatten(1, 3), self.out.weight.t()
            )
        if self.text is not None:
            x = torch.cat([text, x] if self.text == "first" else [x, text], 1)
        for block in self.blocks:
            x = self.wrap(block, x) if self.wrap else block(x)
        if self.unpatch:
            start = text.shape[1] if self.text == "first" else 0
            x = self.out(x[:, start : start + t * h * w]).reshape(-1, t, h, w, 1, 2, 2, 4)
        return x


def inputs(grid=GRID, batch=2):
    t, h, w = grid
    return torch.randn(batch, 4, t, 2 * h, 2 * w), torch.randn(batch, TEXT, WIDTH)


def orders(done):
    """(t, h, w, before, after, m) of each query order, and how many sites use one."""
    used = [arguments["order"] for arguments in done.attention() if arguments["order"] is not None]
    return [node.args[:6] for node in done.calls(torch.ops.fgattn.query_order.default)], len(used)


def checkpointed(block, x):
    return checkpoint(block, x, use_reentrant=False)


@pytest.mark.parametrize(
    "model, before, after",
    [
        (Model(), 0, 0),
        (Model(unpatch=False), 0, 0),  # the convolution alone shows it
        (Model(patch="linear"), 0, 0),  # the reshape at the end alone shows it
        (Model(text="first"), TEXT, 0),
        (Model(text="last"), 0, TEXT),
        (Model(patch="linear", text="last"), 0, TEXT),
    ],
    ids=["convolution and reshape", "convolution", "reshape", "text first", "text last", "reshape, text last"],
)
def test_grid_is_read_off_the_graph(model, before, after):
    x, text = inputs()
    done = run_pass(model, (x, text), density=1.0)
    assert orders(done) == ([(*GRID, before, after, 16)], 2)  # one order, two sites
    assert [site.details["token_grid"] for site in done.sites] == ["3x4x6"] * 2
    torch.testing.assert_close(done.result, model(x, text))


def test_order_follows_its_first_use():
    done = run_pass(Model(text="last"), inputs())
    (order,) = done.calls(torch.ops.fgattn.query_order.default)
    assert order.meta["example_value"].shape == (72 + TEXT,) and order.meta["example_value"].dtype == torch.int32
    assert [node.args[3] for node in done.calls(ops.select_pooled)] == [order] * 2
    assert [node.args[5] for node in done.calls(ops.attention)] == [order] * 2


def test_what_a_step_in_time_counts_as_reaches_the_order():
    x = inputs()
    (order,) = run_pass(Model(), x, time_step=0.125).calls(ops.query_order)
    assert order.args[-2:] == ("rods", 0.125)
    (order,) = run_pass(Model(), x, time_step=0.5).calls(ops.query_order)
    assert order.args[-1] == torch.device("cpu")
    (order,) = run_pass(Model(), x, mask="dfs", time_step=0.125).calls(ops.query_order)
    assert order.args[-2:] == ("hilbert", 0.125)


def two_grids(x, a, b):
    return F.scaled_dot_product_attention(x, x, x) + a.view(3, 4, 6, 1).sum() + b.view(4, 3, 6, 1).sum()


def frames_of_one_batch(x, a, b):
    """(1, 3, 24) has the product of a grid, and is none."""
    return F.scaled_dot_product_attention(x, x, x) + a.view(1, 3, 24, 1).sum() + b.view(3, 4, 6, 1).sum()


def one_frame(x, a, b):
    return F.scaled_dot_product_attention(x, x, x) + a.view(1, 8, 9, 1).sum()


def grids_of_others(x, a, b):
    return F.scaled_dot_product_attention(x, x, x) + a.view(3, 4, 3, 2).sum() + b.view(72, 1, 1, 1).sum()


@pytest.mark.parametrize(
    "attend, grid",
    [(two_grids, None), (frames_of_one_batch, (3, 4, 6)), (one_frame, (1, 8, 9)), (grids_of_others, None)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_doubt(attend, grid):
    done = run_pass(attend, (torch.randn(1, 2, 72, 32), torch.randn(72), torch.randn(72)))
    assert done.sites[0].rewritten
    assert orders(done) == (([(*grid, 0, 0, 16)], 1) if grid else ([], 0))


def test_grid_given_by_the_user():
    """As where a block is compiled alone."""
    x = torch.randn(2, 72, WIDTH)
    done = run_pass(Attention(), (x,))
    assert orders(done) == ([], 0) and "token_grid" not in done.sites[0].details
    done = run_pass(Attention(), (x,), token_grid=(4, 3, 6), slice="32x8")
    assert orders(done) == ([(4, 3, 6, 0, 0, 32)], 1)
    done = run_pass(Model(text="first"), inputs(), token_grid=(2, 6, 6))
    assert orders(done) == ([(2, 6, 6, TEXT, 0, 16)], 2)


def test_grid_that_does_not_fit():
    done = run_pass(Model(text="first"), inputs(), token_grid=(2, 6, 7))
    assert orders(done) == ([], 0) and all(site.rewritten for site in done.sites)
    assert done.sites[0].details["order"] == "none: fgattn.token_grid 2x6x7 has not the 72 tokens of the video"


def test_grid_switched_off():
    assert orders(run_pass(Model(), inputs(), token_grid=None)) == ([], 0)


def test_two_videos_have_two_orders():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Model(), Model(text="last")

        def forward(self, x, y, text):
            return self.a(x, text), self.b(y, text)

    (x, text), (y, _) = inputs(), inputs((2, 5, 7))
    assert orders(run_pass(Two(), (x, y, text))) == ([(3, 4, 6, 0, 0, 16), (2, 5, 7, 0, TEXT, 16)], 4)


def test_child_graphs_have_their_own_order():
    model, (x, text) = Model(text="first", wrap=checkpointed), inputs()
    done = run_pass(model, (x, text), density=1.0)
    assert orders(done) == ([(*GRID, TEXT, 0, 16)] * 2, 2)
    torch.testing.assert_close(done.result, model(x, text))


def mark(x, *dims):
    for dim in dims:
        torch._dynamo.mark_dynamic(x, dim)
    return x


@pytest.mark.parametrize("text", [None, "first", "last"])
def test_symbolic_grid(text):
    """Sizes are read from the convolution; one graph serves all of them."""
    model, done = Model(text=text), None
    for grid in ((3, 4, 6), (2, 5, 7), (5, 3, 4)):
        x, tokens = inputs(grid)
        mark(x, 2, 3, 4)
        if done is None:
            done = run_pass(model, (x, tokens), density=1.0)
            compiled = torch.compile(model, backend=done, fullgraph=True)
        torch.testing.assert_close(compiled(x, tokens), model(x, tokens))
    assert len(done.graphs) == 1
    ((*sizes, before, after, _),), sites = orders(done)
    assert all(isinstance(size, torch.fx.Node) for size in sizes) and sites == 2
    assert (before, after) == (TEXT if text == "first" else 0, TEXT if text == "last" else 0)


def test_an_error_takes_its_order_along(monkeypatch):
    """The first site made the order and failed: the second makes its own."""
    call, first = sdpa.call, []

    def fail(graph, target, args, origin, *rest, **kwargs):
        first.append(origin)
        if target is ops.attention and origin is first[0]:
            raise KeyError("a defect")
        return call(graph, target, args, origin, *rest, **kwargs)

    monkeypatch.setattr(sdpa, "call", fail)
    model, (x, text) = Model(), inputs()
    done = run_pass(model, (x, text), density=1.0)
    assert [site.reason for site in done.sites] == ["error in the pass", ""]
    torch.testing.assert_close(done.result, model(x, text))


def test_symbolic_grid_of_a_later_convolution():
    """Its sizes cannot be read before it runs."""
    conv = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
    t, h, w = GRID
    for later in (True, False):
        video = mark(torch.randn(1, 4, t, 2 * h, 2 * w), 2, 3, 4)

        def model(video, later=later):
            tokens = F.avg_pool3d(video, (1, 2, 2)).flatten(2).transpose(1, 2)[:, None].repeat(1, 2, 1, 8)
            y = 0 if later else conv(video).sum()
            x = F.scaled_dot_product_attention(tokens, tokens, tokens)
            return x + y + (conv(video).sum() if later else 0)

        done = run_pass(model, (video,))
        assert done.sites[0].rewritten and len(orders(done)[0]) == (not later)


def test_symbolic_grid_out_of_reach():
    """Without a convolution, or in a child graph, nothing in the graph can be read for it."""
    x, text = inputs()
    for model in (Model(patch="linear"), Model(wrap=checkpointed)):
        done = run_pass(model, (mark(x.clone(), 2, 3, 4), text), density=1.0)
        assert orders(done) == ([], 0) and all(site.rewritten for site in done.sites)
        torch.testing.assert_close(done.result, model(x, text))
