"""The kernels that choose an order, against ``choose_order``; interpreted where there is no GPU."""

import pytest
import torch

from fg_inductor.kernels import choose_order as reference
from fg_inductor.kernels import order_spread
from fg_inductor.testing import assert_as_accurate

SIZES = {  # batch, heads, head dim, grid, text before and after, m, dtype
    "float32": (1, 2, 32, (16, 16, 16), 3, 40, 64, torch.float32),
    "batch-2": (2, 3, 128, (9, 10, 12), 0, 5, 128, torch.bfloat16),
    "many-heads": (1, 70, 80, (4, 8, 8), 0, 0, 64, torch.float16),
    "one-slice": (1, 1, 16, (4, 5, 4), 7, 0, 64, torch.float32),
}


def sampled(name, device):
    batch, heads, dim, grid, before, after, m, dtype = SIZES[name]
    tokens = before + grid[0] * grid[1] * grid[2] + after
    q = torch.randn(batch, tokens, heads, dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    q = q.transpose(1, 2) + 3  # far from 0: a mean of squares less the square of the mean would lose digits
    orders, slices = reference.all_orders(q, *grid, before, after, m), reference.sampled_slices(*grid, m)
    assert len(orders) > 1 and len(slices)
    return q, orders, slices, m


@pytest.mark.parametrize("name", SIZES)
def test_spread(name, device, poison):
    q, *which = sampled(name, device)
    assert_as_accurate(
        order_spread.spread(q, *which), reference.spread(q, *which), reference.spread(q.double(), *which)
    )


@pytest.mark.parametrize("name", SIZES)
def test_take(name, device, poison):
    """Every order by some spreads; a head that says nothing; the first one of equals."""
    q, orders, *which = sampled(name, device)
    parts = reference.spread(q, orders, *which)
    seen = set()
    for least in range(len(orders)):
        for margin in (1.02, 1e3):
            apart = parts.clone()
            apart[:, :, least] *= 0.5
            for bad in (None, 0.0, float("nan")):
                if bad is not None:
                    apart[:, 0] = bad
                chosen = reference.usual_or_least(apart, margin)
                assert torch.equal(order_spread.take(apart, orders, margin), orders[chosen])
                seen.add(chosen.item())
    assert seen == set(range(len(orders))) or q.shape[1] == 1
    # Just enough for the margin: a head more that says nothing would tip it.
    close = torch.full_like(parts, 100.0)
    close[:, :, 1] *= 0.96
    assert torch.equal(order_spread.take(close, orders, 1.02), orders[1])
    close[1:, :, 0] *= 0.5  # another entry of the batch outweighs that
    assert torch.equal(order_spread.take(close, orders, 1.02), orders[0 if len(parts) > 1 else 1])
    assert torch.equal(order_spread.take(torch.ones_like(parts), orders, 1.0), orders[0])


@pytest.mark.parametrize("name", SIZES)
def test_launch(name, device, poison):
    """The least spread by far, whatever text there is: that of the order whose slices hold nearly equal queries."""
    _, _, _, *sizes, m, _ = SIZES[name]
    grid, before, after = sizes
    q, orders, slices, _ = sampled(name, device)
    for least in range(len(orders)):
        if any(torch.equal(orders[least], other) for i, other in enumerate(orders) if i != least):
            continue
        alike = q.clone()
        for i in slices:
            alike[:, :, orders[least, i * m : (i + 1) * m].long()] = i
        assert torch.equal(order_spread.launch(alike, *grid, before, after, m), orders[least])
