"""Which of a few query orders a call takes, by its queries: what ``choose_order`` does on a GPU (portable Triton).

    parts[b, h, c, s] = squared distances of the queries of a sampled slice s of order c from their mean, summed
    out               = orders[c], c as ``choose_order.usual_or_least`` takes it of the parts

q       [B, H, Sq, D]   any strides, contiguous last dimension
orders  [C, Sq]         int32, contiguous, the usual one first
parts   [B, H, C, S]    float32 workspace, for S sampled slices of each order
out     [Sq]            int32
Grids   (C * S, B * H), a slice of a head; (blocks of out), each of which makes the choice again

Reads C * S slices of each head once, and works in float32: 38 MB of bfloat16 at 12 heads of 128, 3 orders and 32 slices
of 128. The choice is a value on the device. Meaning: ``choose_order``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels.choose_order import MARGIN, all_orders, sampled_slices
from fg_inductor.kernels.sizes import cdiv, next_power_of_2

COLUMNS = 64  # of q at a time
COPIED = 4096  # tokens of the order that a program copies


@triton.jit
def _spread(
    q_ptr, orders_ptr, part_ptr, stride_qb, stride_qh, stride_qs, heads, tokens, slices, first_slice, step,
    D: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    rows_ptr = orders_ptr + place // slices * tokens + (first_slice + place % slices * step) * M + tl.arange(0, M)
    q_ptr += bh // heads * stride_qb + bh % heads * stride_qh
    rows = q_ptr + tl.load(rows_ptr).to(tl.int64)[:, None] * stride_qs
    total = tl.zeros([COLUMNS], tl.float32)
    for first in tl.static_range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(rows + column[None, :], mask=(column < D)[None, :], other=0.0).to(tl.float32)
        apart = x - tl.sum(x, 0)[None, :] / M
        total += tl.sum(apart * apart, 0)
    tl.store(part_ptr + bh * tl.num_programs(0) + place, tl.sum(total))


@triton.jit
def _take(
    part_ptr, orders_ptr, out_ptr, batch, heads, slices, tokens, margin,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, HEADS: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    order = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        spread = tl.zeros([HEADS, BLOCK_C], tl.float32)
        inside = (head < heads)[:, None, None] & (order < C)[None, :, None] & (s < slices)[None, None, :]
        place = (head[:, None, None] * C + order[None, :, None]) * slices + s[None, None, :]
        for b in range(batch):
            spread += tl.sum(tl.load(part_ptr + b * heads * C * slices + place, mask=inside, other=0.0), 2)
        share = spread / tl.sum(spread, 1)[:, None]
        share = tl.where(share == share, share, 1.0)  # a head that says nothing
        total += tl.sum(tl.where((head < heads)[:, None], share, 0.0), 0)
    total = tl.where(order == 0, total, total * margin)
    total = tl.where(order < C, total, float("inf"))
    chosen = tl.argmin(total, 0)  # of equals the first
    token = tl.program_id(0) * COPIED + tl.arange(0, COPIED)
    x = tl.load(orders_ptr + chosen * tokens + token, mask=token < tokens)
    tl.store(out_ptr + token, x, mask=token < tokens)


def launch(q: Tensor, t: int, h: int, w: int, before: int, after: int, m: int) -> Tensor:
    """int32 [before + t*h*w + after]: the order of this call, arguments as in ``choose_order``."""
    orders, slices = all_orders(q, t, h, w, before, after, m), sampled_slices(t, h, w, m)
    if not slices:
        return orders[0].clone()
    return take(spread(q, orders, slices, m), orders, MARGIN)


def spread(q: Tensor, orders: Tensor, slices: range, m: int) -> Tensor:
    """float32 [B, H, C, S]: the parts."""
    B, H, _, D = q.shape
    C, S = orders.shape[0], len(slices)
    parts = torch.empty(B, H, C, S, dtype=torch.float32, device=q.device)
    _spread[(C * S, B * H)](
        q, orders, parts, *q.stride()[:3], H, orders.shape[1], S, slices.start, slices.step,
        D=D, M=m, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return parts


def take(parts: Tensor, orders: Tensor, margin: float) -> Tensor:
    """The chosen one of the orders."""
    B, H, C, S = parts.shape
    tokens = orders.shape[1]
    out = torch.empty(tokens, dtype=torch.int32, device=parts.device)
    _take[(cdiv(tokens, COPIED),)](
        parts, orders, out, B, H, S, tokens, margin,
        C=C, BLOCK_C=next_power_of_2(C), BLOCK_S=next_power_of_2(S), HEADS=min(64, next_power_of_2(H)), COPIED=COPIED,
        num_warps=4,
    )  # fmt: skip
    return out
