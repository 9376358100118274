"""Means over consecutive rows (portable Triton).

    out[g] = mean of x[order[g*N .. g*N+N-1]] over the rows that are not masked        0 for a group without rows
             NaN for a group, or a slice of several, that is less similar to itself than gamma

x      [B, H, S, D]   any strides, contiguous last dimension
order  [S]            int32, or None
bias   [B, S]         key_bias as the operators take it, or None
out    [B, H, G, D]   contiguous, dtype of x
Grid   (blocks of q and of k, one after the other)

Accumulates in float32. Serves the pooled queries and grouped keys of ``select_pooled``, both in one launch, and the
summaries of the pooled tail. It reads q and k once: 201 MB at 12 heads x 32,760 x D 128, 67 us at 3 TB/s.
Meaning: ``reference.group_means`` and ``reference_select.pool_queries``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels import reference
from fg_inductor.kernels.sizes import cdiv, next_power_of_2

MASKED_BELOW = tl.constexpr(reference.MASKED_BELOW)


@triton.jit
def masked_bias(x, BOOL: tl.constexpr):
    """A loaded key_bias as float32, -inf where the key is masked (``reference.normalise_key_bias``)."""
    if BOOL:
        bias = tl.where(x != 0, 0.0, float("-inf"))
    else:
        bias = x.to(tl.float32)
        bias = tl.where(bias < MASKED_BELOW, float("-inf"), bias)
    return bias


@triton.jit
def _rows(
    x_ptr, order_ptr, bias_ptr, row, stride_xs, S, offs_d,
    D: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, BOOL: tl.constexpr,
):  # fmt: skip
    """Rows of x as float32, 0 where they are masked or beyond the end; and which are neither."""
    valid = row < S
    index = row
    if HAS_ORDER:
        index = tl.load(order_ptr + row, mask=valid, other=0)
    if HAS_BIAS:
        bias = masked_bias(tl.load(bias_ptr + index, mask=valid, other=0), BOOL)
        valid = valid & (bias > float("-inf"))
    pointers = x_ptr + index.to(tl.int64)[:, None] * stride_xs + offs_d[None, :]
    x = tl.load(pointers, mask=valid[:, None] & (offs_d < D)[None, :], other=0.0)
    return x.to(tl.float32), valid


@triton.jit
def _means(
    x_ptr, order_ptr, bias_ptr, out_ptr, stride_xs, block, S, G,
    gamma, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, BLOCK_G: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, BOOL: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """The means of BLOCK_G groups of one head; with JOINED > 0, NaN where the rows of JOINED groups in a row have a
    mean cosine with their means below ``gamma``."""
    UNROLL: tl.constexpr = N if N < 16 else 16  # loads in flight
    group = block * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, N, UNROLL):
        for i in tl.static_range(UNROLL):
            row = group * N + start + i
            x, valid = _rows(x_ptr, order_ptr, bias_ptr, row, stride_xs, S, offs_d, D, HAS_ORDER, HAS_BIAS, BOOL)
            total += x
            count += valid.to(tl.float32)
    mean = total / tl.maximum(count, 1.0)[:, None]
    if JOINED > 0:
        length = tl.sqrt(tl.sum(mean * mean, 1))
        cosine = tl.zeros([BLOCK_G], tl.float32)
        for i in range(N):  # the rows are in a cache now
            row = group * N + i
            x, valid = _rows(x_ptr, order_ptr, bias_ptr, row, stride_xs, S, offs_d, D, HAS_ORDER, HAS_BIAS, BOOL)
            size = tl.maximum(tl.sqrt(tl.sum(x * x, 1)) * length, 1.1754944e-38)
            cosine += tl.where(valid, tl.sum(x * mean, 1) / size, 0.0)
        cosine = tl.sum(tl.reshape(cosine, [BLOCK_G // JOINED, JOINED]), 1)
        rows = tl.sum(tl.reshape(count, [BLOCK_G // JOINED, JOINED]), 1)
        blurred = (cosine < gamma * rows)[:, None] & (tl.arange(0, JOINED) >= 0)[None, :]
        mean = tl.where(tl.reshape(blurred, [BLOCK_G])[:, None], float("nan"), mean)
    out = out_ptr + group.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=(group < G)[:, None] & (offs_d < D)[None, :])


@triton.jit
def _group_means(
    q_ptr, k_ptr, order_ptr, bias_ptr, mean_q_ptr, mean_k_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_bb,
    q_programs, q_blocks, Hq, Sq, R, k_blocks, Hkv, Sk, G, gamma,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    POOL: tl.constexpr, BLOCK_R: tl.constexpr, N: tl.constexpr, BLOCK_G: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, BOOL: tl.constexpr, Q_JOINED: tl.constexpr, K_JOINED: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) < q_programs:
        pid = tl.program_id(0)
        bh = (pid // q_blocks).to(tl.int64)
        q_ptr += bh // Hq * stride_qb + bh % Hq * stride_qh
        _means(q_ptr, order_ptr, bias_ptr, mean_q_ptr + bh * R * D, stride_qs, pid % q_blocks, Sq, R, gamma,
               D, BLOCK_D, POOL, BLOCK_R, HAS_ORDER, False, BOOL, Q_JOINED)  # fmt: skip
    else:
        pid = tl.program_id(0) - q_programs
        bh = (pid // k_blocks).to(tl.int64)
        k_ptr += bh // Hkv * stride_kb + bh % Hkv * stride_kh
        if HAS_BIAS:
            bias_ptr += bh // Hkv * stride_bb
        _means(k_ptr, order_ptr, bias_ptr, mean_k_ptr + bh * G * D, stride_ks, pid % k_blocks, Sk, G, gamma,
               D, BLOCK_D, N, BLOCK_G, False, HAS_BIAS, BOOL, K_JOINED)  # fmt: skip


def block_of(n: int) -> int:
    """Groups of n rows that one program averages: few long ones, so that there are programs enough to fill a GPU."""
    return max(4, 128 // n)


def bias_pointer(bias: Tensor | None) -> Tensor | None:
    """A key_bias as kernels read it: contiguous rows, bool as bytes."""
    if bias is None:
        return None
    bias = bias if bias.stride(1) == 1 else bias.contiguous()
    return bias.view(torch.int8) if bias.dtype == torch.bool else bias


def launch_both(
    q: Tensor | None, pool: int, means: int, order: Tensor | None,
    k: Tensor | None, n: int, groups: int, bias: Tensor | None, gamma: float | None = None, m: int = 0,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Means of ``pool`` queries in query order [B, Hq, means, D] and of n keys [B, Hkv, groups, D]; None for None.

    With ``gamma`` NaN where slices of m queries, or groups, have less self-similarity
    (``reference_select.pooled_scores``).
    """
    x = k if q is None else q
    mean_q, mean_k = (
        None if y is None else torch.empty(*y.shape[:2], size, y.shape[3], dtype=y.dtype, device=y.device)
        for y, size in ((q, means), (k, groups))
    )
    q_blocks, k_blocks = cdiv(means, block_of(pool)), cdiv(groups, block_of(n))
    q_programs = 0 if q is None else q.shape[0] * q.shape[1] * q_blocks
    k_programs = 0 if k is None else k.shape[0] * k.shape[1] * k_blocks
    q, k = x if q is None else q, x if k is None else k  # the absent one has no program
    bias = bias_pointer(bias)
    _group_means[(q_programs + k_programs,)](
        q, k, order, bias, x if mean_q is None else mean_q, x if mean_k is None else mean_k,
        *q.stride()[:3], *k.stride()[:3], 0 if bias is None else bias.stride(0),
        q_programs, max(q_blocks, 1), q.shape[1], q.shape[2], means, max(k_blocks, 1), k.shape[1], k.shape[2],
        groups, gamma or 0.0,
        D=x.shape[3], BLOCK_D=next_power_of_2(x.shape[3]),
        POOL=pool, BLOCK_R=block_of(pool), N=n, BLOCK_G=block_of(n),
        HAS_ORDER=order is not None, HAS_BIAS=bias is not None, BOOL=bias is not None and bias.dtype == torch.int8,
        Q_JOINED=0 if gamma is None else m // pool, K_JOINED=0 if gamma is None else 1,
        num_warps=4,
    )  # fmt: skip
    return mean_q, mean_k


def launch(x: Tensor, n: int, groups: int, bias: Tensor | None = None) -> Tensor:
    """Means of n keys: [B, H, S, D] -> [B, H, groups, D]; groups beyond the last row are 0."""
    return launch_both(None, n, 0, None, x, n, groups, bias)[1]
