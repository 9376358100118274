"""Means over consecutive rows (portable Triton).

    out[g] = mean of x[order[g*N .. g*N+N-1]] over the rows that are not masked        0 for a group without rows

x      [B, H, S, D]   any strides, contiguous last dimension
order  [S]            int32, or None
bias   [B, S]         float32, -inf where the row is masked, or None
out    [B, H, G, D]   contiguous, dtype of x
Grid   (ceil(G / BLOCK_G), B * H)

Accumulates in float32. Serves the pooled queries and grouped keys of ``select_pooled`` and the summaries of the pooled
tail. Meaning: ``reference.group_means`` and ``reference.pool_queries``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _group_means(
    x_ptr, order_ptr, bias_ptr, out_ptr,
    stride_xb, stride_xh, stride_xs, stride_bb,
    H, S, G,
    D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, BLOCK_G: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    x_ptr += b * stride_xb + h * stride_xh
    total = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_G], tl.float32)
    for i in range(N):
        row = group * N + i
        valid = row < S
        index = row
        if HAS_ORDER:
            index = tl.load(order_ptr + row, mask=valid, other=0)
        if HAS_BIAS:
            valid = valid & (tl.load(bias_ptr + b * stride_bb + index, mask=valid, other=float("-inf")) > float("-inf"))
        rows = x_ptr + index.to(tl.int64)[:, None] * stride_xs + offs_d[None, :]
        total += tl.load(rows, mask=valid[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
        count += valid.to(tl.float32)
    mean = total / tl.maximum(count, 1.0)[:, None]
    out = out_ptr + (bh * G + group)[:, None] * D + offs_d[None, :]
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=(group < G)[:, None] & (offs_d < D)[None, :])


def launch(x: Tensor, n: int, groups: int, order: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Means of n rows: [B, H, S, D] -> [B, H, groups, D]; groups beyond the last row are 0."""
    B, H, S, D = x.shape
    out = torch.empty(B, H, groups, D, dtype=x.dtype, device=x.device)
    block = max(4, 256 // n)  # long groups in small blocks, so that there are programs enough to fill a GPU
    _group_means[(triton.cdiv(groups, block), B * H)](
        x, order, bias, out,
        *x.stride()[:3], 0 if bias is None else bias.stride(0),
        H, S, groups,
        D=D, BLOCK_D=triton.next_power_of_2(D), N=n, BLOCK_G=block,
        HAS_ORDER=order is not None, HAS_BIAS=bias is not None,
        num_warps=4,
    )  # fmt: skip
    return out
