"""Keys in query order: the operator that puts them there, and the sites where the pass does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

import fg_inductor
from fg_inductor.kernels import ops, reference, reference_select
from fg_inductor.kernels.query_order import query_order
from fg_inductor.testing_passes import run_pass

GRID, TEXT, WIDTH, HEADS = (3, 4, 6), 5, 64, 2
CPU = torch.device("cpu")


class Joint(nn.Module):
    """Video [B, 4, T, 2H, 2W] and text [B, TEXT, WIDTH], before or behind it, in one attention under a key mask."""

    def __init__(self, first: bool):
        super().__init__()
        self.first, self.patch = first, nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.video, self.text = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def heads(self, x, text):
        parts = [
            f(y).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            for f, y in ((self.video, self.patch(x).flatten(2).transpose(1, 2)), (self.text, text))
        ]
        return torch.cat(parts[::-1] if self.first else parts, 3).unbind(0)

    def forward(self, x, text, valid=None):
        q, k, v = self.heads(x, text)
        mask = None if valid is None else valid[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def inputs(batch=2):
    t, h, w = GRID
    return torch.randn(batch, 4, t, 2 * h, 2 * w), torch.randn(batch, TEXT, WIDTH)


def test_rows_their_gradient_and_the_way_back():
    x = torch.randn(2, 3, 40, 8, requires_grad=True)
    order = torch.randperm(40).to(torch.int32)
    out = ops.reorder(x, order)
    assert torch.equal(out, x[:, :, order.long()]) and torch.equal(ops.reorder(out, order, True), x)
    grad = torch.randn_like(out)
    (mine,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(mine[:, :, order.long()], grad)


@pytest.mark.parametrize(
    "x, order, message",
    [
        (torch.ones(2, 3, 4), torch.arange(3).int(), r"x must be \[B, H, S, D\], got \(2, 3, 4\)"),
        (torch.ones(1, 2, 3, 4), torch.arange(3), r"order must be int32 \[S\] on cpu, got torch.int64"),
        (torch.ones(1, 2, 3, 4), torch.arange(2).int(), "order has 2 places and x 3 rows"),
    ],
    ids=["dimensions", "dtype", "length"],
)
def test_error(x, order, message):
    with pytest.raises(ValueError, match=f"fgattn::reorder: {message}"):
        ops.reorder(x, order)


def test_inductor_fuses_it():
    """It has no call of its own in the generated code, neither in forward nor in backward."""
    x, order = torch.randn(1, 2, 40, 8, requires_grad=True), torch.randperm(40).to(torch.int32)

    def backend(gm, example_inputs):
        return fg_inductor.inner.compile_graph(gm, example_inputs, "inductor", {})

    compiled = torch.compile(lambda x: ops.reorder(x.exp(), order) * 2, backend=backend)

    def run():
        out = compiled(x)
        return out, *torch.autograd.grad(out.sum(), x)

    (out, grad), code = run_and_get_code(run)
    torch.testing.assert_close(out, x.exp()[:, :, order.long()] * 2)
    torch.testing.assert_close(grad, 2 * x.exp())
    assert len(code) == 2 and not any("fgattn.reorder" in text for text in code)


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key mask"])
@pytest.mark.parametrize("first", [False, True], ids=["text last", "text first"])
def test_groups_are_runs_of_keys_in_query_order(first, masked):
    """By hand, in plain PyTorch, what the rewritten graph does."""
    model, (x, text) = Joint(first), inputs()
    tokens = 72 + TEXT
    valid = torch.arange(tokens) % 7 != 3 if masked else None
    valid = valid if valid is None else valid.expand(2, tokens)
    done = run_pass(model, (x, text, valid), density=0.25)
    assert [site.decision for site in done.sites] == ["rewritten"] and len(done.calls(ops.reorder)) == 2

    order = query_order(*GRID, *((TEXT, 0) if first else (0, TEXT)), 16, CPU)
    q, k, v = model.heads(x, text)
    k, v = (y[:, :, order.long()] for y in (k, v))
    bias = None if valid is None else valid[:, order.long()]
    shape = (bias, order, q.shape[3] ** -0.5, 16, 8)
    text_queries = [0, TEXT] if first else [72, tokens]
    mask = reference_select.select_pooled(q, k, *shape, 16, 1.0, 0.25, 1.0, [72, tokens], text_queries)
    expected, _ = reference.attention(q, k, v, mask, *shape, "none")
    torch.testing.assert_close(done.result, expected.transpose(1, 2).flatten(2))
    # It matters: groups of keys as they lie in memory give something else.
    q, k, v = model.heads(x, text)
    shape = (valid, *shape[1:])
    mask = reference_select.select_pooled(q, k, *shape, 16, 1.0, 0.25, 1.0, text_queries, text_queries)
    other, _ = reference.attention(q, k, v, mask, *shape, "none")
    assert not torch.allclose(done.result, other.transpose(1, 2).flatten(2))


class Alone(nn.Module):
    def forward(self, q, k):
        return F.scaled_dot_product_attention(q, k, k)


@pytest.mark.parametrize(
    "settings, reordered",
    [
        ({"token_grid": GRID}, 2),
        ({"token_grid": GRID, "mask": "observed"}, 2),
        ({"token_grid": GRID, "slice": "16x1"}, 0),  # single keys have no neighbours in their group
        ({"token_grid": None}, 0),
        ({"token_grid": GRID, "mask": "dfs"}, 0),  # places keys by itself
    ],
    ids=["pooled", "observed", "single keys", "no grid", "dfs"],
)
def test_where_keys_are_reordered(settings, reordered):
    q, k = torch.randn(1, 2, 72, 32), torch.randn(1, 2, 72, 32)
    done = run_pass(Alone(), (q, k), density=1.0, **settings)
    assert done.sites[0].rewritten and len(done.calls(ops.reorder)) == reordered
    torch.testing.assert_close(done.result, F.scaled_dot_product_attention(q, k, k))


@pytest.mark.parametrize("grid, slice_", [(GRID, "128x16"), (None, "128x8")], ids=["grid", "no grid"])
def test_automatic_slice(grid, slice_):
    q = torch.randn(1, 2, 72, 32)
    done = run_pass(Alone(), (q, q), slice="auto", token_grid=grid)
    (arguments,) = done.attention()
    assert done.sites[0].slice == slice_ == f"{arguments['m']}x{arguments['n']}"
