"""Query order by what the queries say: of a few orders the one in whose slices they differ least.

    spread[c] = sum over heads of the squared distances of queries from the mean of their slice, in sampled slices of
                order c, over the same of all orders
    order     = orders[argmin(spread[c] * (1 if c is the usual one, else MARGIN))]

How far slices should reach in time is a matter of how much moves in a step of time, which no graph shows; the queries
do. On q and k of two trained models (noise level 0.6, slices of 128) the spread falls with ``time``, from 4 over 1 and
0.5 to 0.125, in all layers of both but one, where it hardly changes. So does what 15% of the groups miss of the exact
mass in all 4 layers of tiny (17x24x24 tokens; 0.15, 0.07, 0.07 and 0.06 on average); in mini (17x32x32) four of six
layers hold most at 1 or 0.5, by 0.01 at most. PSNR at 0.125 was the best of both models at 0.15 kept, and of tiny at
0.3 (``query_order``), and chosen so, 8 videos of mini and tiny at 0.15 kept came 0.6 and 2.2 dB closer to dense than by
a half in every call (28.9 and 38.7 dB). Not measured on a latent model, where a step in time holds about ten times the
motion.

Only SLICES slices of each order are looked at, and the choice is a value on the device, that nobody waits for. One
order serves a whole call: all heads, all entries of a batch, and the keys. This is the meaning, and what runs on CPU;
on a GPU ``order_spread`` does it.
"""

import functools

import torch
from torch import Tensor

from fg_inductor.kernels.query_order import ALONE, TIME, cross_section, kept

TIMES = (TIME, 0.125, 2.0)  # the usual one first
SLICES = 32  # sampled slices of each order
MARGIN = 1.02  # what is gained by less is left to chance


@functools.lru_cache(maxsize=64)
def candidates(t: int, h: int, w: int, m: int) -> tuple[float, ...]:
    """Those of TIMES that make different rods of this grid."""
    if m < ALONE:
        return TIMES[:1]  # slices within a frame have no time
    found = {cross_section(t, h, w, m, time): time for time in reversed(TIMES)}
    return tuple(time for time in TIMES if time in found.values())


def sampled_slices(t: int, h: int, w: int, m: int) -> range:
    """The slices of an order that are looked at; none where there is nothing to choose."""
    whole = t * h * w // m
    if not whole or len(candidates(t, h, w, m)) == 1:
        return range(0)
    step = -(-whole // SLICES)
    return range(step // 2, whole, step)


def all_orders(q: Tensor, t: int, h: int, w: int, before: int, after: int, m: int) -> Tensor:
    """int32 [C, Sq]: the candidates, on the device of q [B, H, Sq, D]."""
    return kept(t, h, w, before, after, m, q.device, "rods", candidates(t, h, w, m))


def choose_order(q: Tensor, t: int, h: int, w: int, before: int, after: int, m: int) -> Tensor:
    """int32 [before + t*h*w + after]: the chosen order, as ``query_order`` makes it. q [B, H, Sq, D]; no gradients."""
    orders, slices = all_orders(q, t, h, w, before, after, m), sampled_slices(t, h, w, m)
    if not slices:
        return orders[0].clone()
    return orders.index_select(0, usual_or_least(spread(q, orders, slices, m), MARGIN)[None])[0]


def spread(q: Tensor, orders: Tensor, slices: range, m: int) -> Tensor:
    """[B, H, C, slices], float32 at least: squared distances of the queries of a slice from their mean, summed."""
    sample = torch.stack([orders[:, i * m : (i + 1) * m] for i in slices], 1)
    rows = q.detach().index_select(2, sample.flatten()).unflatten(2, sample.shape)
    return rows.to(torch.promote_types(q.dtype, torch.float32)).var(4, correction=0).sum(-1) * m


def usual_or_least(parts: Tensor, margin: float) -> Tensor:
    """int64 scalar: the order with the least spread; every head has the same say, the first order an advantage."""
    by_head = parts.sum((0, 3))  # [H, C]
    shares = (by_head / by_head.sum(1, keepdim=True)).nan_to_num(1.0).sum(0)
    shares[1:] *= margin
    return shares.argmin()
