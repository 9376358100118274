"""Observed block mask: the exact attention mass of a refresh step, and the best groups by it (portable Triton).

    mass[t, g] = sum over the keys j of group g of the sum (or max) over the queries i of slice t of
                 2^(logit[i, j] - lse[i]),  logit = log2(e) (scale * q[i] . k[j] + key_bias[j])
    mask[t]    = the best groups by mass, as ``select_pooled`` chooses them by its estimate

q      [B, Hq, Sq, D]     any strides, contiguous last dimension; k [B, Hkv, Sk, D] likewise
lse    [B, Hq, Sq]        float32, natural log: what dense attention of this step returned
order  [Sq]               int32, or None
bias   [B, Sk]            float32, base 2, -inf where the key is masked; or None
mass   [B * heads, T, W * 32]   float32 workspace for as many heads at once as fit MASS_BYTES; -1 where masked
mask   [B, Hq, T, W]      int32, written in place
due    bool scalar        where it is False every program ends at once, and the mask stays as it is

A refresh step attends densely, with every bit of the mask set (``_open``): its result is exact, and with its lse one
pass over the products is enough for the masses, half of what dense attention computes. Two launches for each part of
the heads: masses, then ``select_cut``. Nothing waits for the device, which on most steps does no more than read the
flag.

The loop is kept to a multiply-add, an exponential and an addition for each pair. Keys are rows and queries columns: the
queries of a slice then lie in the registers of four threads, and their sum takes two shuffles. Products are in the
dtype of q, the rest is float32. Meaning: ``reference_observed.update_observed``. Measured by
``python -m fg_inductor bench resources``.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels import reference, select_cut
from fg_inductor.kernels.mask import group_count, word_count
from fg_inductor.kernels.select_scores import larger
from fg_inductor.kernels.sizes import cdiv, next_power_of_2

MASS_BYTES = 1 << 28
ROWS = 128  # queries of a program
LOG2_E = math.log2(math.e)


@triton.jit
def _open(refresh_ptr, due_ptr, mask_ptr, stride_mb, stride_mh, stride_mt, H, T, W, G, BLOCK: tl.constexpr):
    """Set every bit of the mask rows that this program has, where ``refresh`` says so; and say so to those behind."""
    row = tl.program_id(0)
    due = tl.load(refresh_ptr)
    if row == 0:
        tl.store(due_ptr, due)
    if due == 0:
        return
    b, h, t = (row // (H * T)).to(tl.int64), (row // T % H).to(tl.int64), row % T
    mask_ptr += b * stride_mb + h * stride_mh + t.to(tl.int64) * stride_mt
    for first in range(0, W, BLOCK):
        word = first + tl.arange(0, BLOCK)
        bits = tl.minimum(tl.maximum(G - word * 32, 0), 32)  # groups of the word
        full = tl.where(bits == 32, -1, (1 << bits) - 1)
        tl.store(mask_ptr + word, full, mask=word < W)


@triton.jit
def load_keys(
    k_ptr, bias_ptr, first, stride_ks, Sk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Keys [KEYS, BLOCK_D] from ``first`` on, and their bias [KEYS], base 2; -inf where masked or beyond the last."""
    offs_d = tl.arange(0, BLOCK_D)
    key = tl.arange(0, KEYS)
    inside = key < Sk - first
    pointers = k_ptr + tl.cast(first, tl.int64) * stride_ks + (key[:, None] * stride_ks + offs_d[None, :])
    if MASKED:
        k = tl.load(pointers, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        k = tl.load(pointers)
    else:
        k = tl.load(pointers, mask=(offs_d < D)[None, :], other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first + key, mask=inside, other=float("-inf"))
    else:
        bias = tl.where(inside, 0.0, float("-inf"))
    return k, bias


@triton.jit
def load_queries(
    q_ptr, order_ptr, b, h, place, stride_qb, stride_qh, stride_qs, Sq,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Queries [ROWS, BLOCK_D] at the places ``place`` of the query order, and their rows; the last one again beyond."""
    row = tl.minimum(place, Sq - 1)
    if HAS_ORDER:
        row = tl.load(order_ptr + row)
    offs_d = tl.arange(0, BLOCK_D)
    pointers = q_ptr + b * stride_qb + h * stride_qh + (row.to(tl.int64)[:, None] * stride_qs + offs_d[None, :])
    return tl.load(pointers, mask=(offs_d < D)[None, :], other=0.0), row


@triton.jit
def _store_masses(
    qt, lse, k_ptr, bias_ptr, mass_ptr, first, stored, qk_scale, stride_ks, stride_mt, Sk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SLICES: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, MAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Masses of the groups of the keys from ``first`` on for SLICES slices, whose queries are the columns of qt."""
    GROUPS: tl.constexpr = KEYS // N
    k, bias = load_keys(k_ptr, bias_ptr, first, stride_ks, Sk, D, BLOCK_D, KEYS, MASKED, HAS_BIAS)
    x = tl.dot(k, qt, input_precision=PRECISION) * qk_scale - lse[None, :]
    if HAS_BIAS:
        x += bias[:, None]
    p = tl.exp2(x)  # NaN where the score is NaN or +inf
    p = tl.reshape(p, [KEYS, SLICES, M])
    mass = tl.reduce(p, 2, larger) if MAX else tl.sum(p, 2)
    if MASKED or HAS_BIAS:
        there = bias > float("-inf")
        mass = tl.where(there[:, None], mass, 0.0)
    mass = tl.sum(tl.reshape(mass, [GROUPS, N, SLICES]), 1)
    if MASKED or HAS_BIAS:
        held = tl.max(tl.reshape(there.to(tl.int32), [GROUPS, N]), 1)
        mass = tl.where((held > 0)[:, None], mass, -1.0)
    group = first // N + tl.arange(0, GROUPS)
    slices = tl.arange(0, SLICES)
    place = mass_ptr + (slices[None, :] * stride_mt + group[:, None])
    tl.store(place, mass, mask=stored[None, :] & (group < stride_mt)[:, None])


@triton.jit
def _column_mass(
    due_ptr, q_ptr, k_ptr, lse_ptr, order_ptr, bias_ptr, mass_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_bb, stride_mt,
    first_head, heads, first_block, step, Hq, SHARE, Sq, Sk, T, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, MAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = ROWS // M
    if tl.load(due_ptr) == 0:
        return
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (first_head + tl.program_id(1) % heads).to(tl.int64)
    place = (first_block + tl.program_id(0) * step) * ROWS + tl.arange(0, ROWS)
    q, row = load_queries(q_ptr, order_ptr, b, h, place, stride_qb, stride_qh, stride_qs, Sq, D, BLOCK_D, HAS_ORDER)
    lse = tl.load(lse_ptr + (b * Hq + h) * Sq + row) * 1.4426950408889634
    # A row without keys has no mass; one behind the last query repeats that, and has no say.
    lse = tl.where((place < Sq) & (lse != float("-inf")), lse, float("inf"))
    k_ptr += b * stride_kb + (h // SHARE) * stride_kh
    if HAS_BIAS:
        bias_ptr += b * stride_bb

    qt = tl.trans(q)
    t = tl.program_id(0) * SLICES
    stored = t + tl.arange(0, SLICES) < T
    mass_ptr += (tl.program_id(1).to(tl.int64) * T + t) * stride_mt
    whole = Sk // KEYS * KEYS
    for first in range(0, whole, KEYS):
        _store_masses(qt, lse, k_ptr, bias_ptr, mass_ptr, first, stored, qk_scale, stride_ks, stride_mt, Sk,
                      D, BLOCK_D, M, N, SLICES, KEYS, False, HAS_BIAS, MAX, PRECISION)  # fmt: skip
    # Up to the padding of the mask words, which is masked.
    for first in tl.range(whole, stride_mt * N, KEYS, num_stages=1):
        _store_masses(qt, lse, k_ptr, bias_ptr, mass_ptr, first, stored, qk_scale, stride_ks, stride_mt, Sk,
                      D, BLOCK_D, M, N, SLICES, KEYS, True, HAS_BIAS, MAX, PRECISION)  # fmt: skip


def configuration(dtype: torch.dtype, dim: int, n: int) -> dict:
    """Queries of a program, keys of a step (whole groups), warps and stages of ``_column_mass``.

    For head dims up to 128 two programs share a multiprocessor, so that products of one run beside exponentials of the
    other: 82 KB. Four warps instead of eight take 6.4 instead of 8.1 ms (12 x 32,760 x 128, 128x8, H100): the scores of
    128 queries are twice as many rows a warp, and its products as much longer.
    """
    large = dim * dtype.itemsize > 256
    warps = 8 if large or n >= 128 else 4
    return {"ROWS": ROWS, "KEYS": max(64, n), "num_warps": warps, "num_stages": 1 if large else 3 if n < 128 else 2}


def bias_of_keys(key_bias: Tensor | None) -> Tensor | None:
    """float32 [B, Sk], base 2, -inf where the key is masked."""
    bias = reference.normalise_key_bias(key_bias, torch.float32)
    return None if bias is None else bias * LOG2_E


def launch_begin(mask: Tensor, keys: int, n: int, refresh: Tensor) -> Tensor:
    """``refresh`` as a new tensor; where it is True every bit of the mask is set."""
    B, H, T, W = mask.shape
    due = torch.empty((), dtype=torch.bool, device=mask.device)
    block = min(1024, next_power_of_2(W))
    _open[(B * H * T,)](refresh, due, mask, *mask.stride()[:3], H, T, W, group_count(keys, n), BLOCK=block)
    return due


def launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    reduce: str,
    top_p: float,
    density: float | list[float] | None,
    max_density: float,
    dense_keys: list[int],
    dense_queries: list[int],
    due: Tensor,
) -> None:
    """Writes ``mask`` where ``due`` says so; arguments as in ``kernels.ops``."""
    B, Hq, T, W = mask.shape
    Sq, Sk = q.shape[2], k.shape[2]
    heads = max(1, min(Hq, MASS_BYTES // (128 * B * T * W)))
    mass = torch.empty(B * heads, T, W * 32, dtype=torch.float32, device=q.device)
    column_mass = prepare(q, k, lse, key_bias, order, scale, m, n, reduce, due)
    for first in range(0, Hq, heads):
        part = min(heads, Hq - first)
        column_mass(mass, range(cdiv(Sq, ROWS)), first, part, T)
        select_cut.launch(
            mass, mask, first, part, group_count(Sk, n), m, n, Sq, Sk, order,
            top_p if density is None and top_p < 1 else None, max_density if density is None else density,
            None, 1, key_bias is not None, dense_keys, dense_queries, due,
        )  # fmt: skip


def prepare(q, k, lse, key_bias, order, scale, m, n, reduce, due) -> Callable[[Tensor, range, int, int, int], None]:
    """``column_mass(mass, blocks, first, heads, slices)``: the masses of ``heads`` heads from ``first`` on, of the
    slices in these blocks of ROWS queries, packed; the first ``slices`` of them are stored. Arguments as of ``launch``.
    """
    B, Hq, Sq, D = q.shape
    Sk = k.shape[2]
    bias = bias_of_keys(key_bias)
    config = configuration(q.dtype, D, n)
    lse = lse.contiguous()

    def column_mass(mass: Tensor, blocks: range, first: int, heads: int, slices: int) -> None:
        _column_mass[(len(blocks), B * heads)](
            due, q, k, lse, order, bias, mass,
            *q.stride()[:3], *k.stride()[:3], 0 if bias is None else bias.stride(0), word_count(Sk, n) * 32,
            first, heads, blocks.start, blocks.step, Hq, Hq // k.shape[1], Sq, Sk, slices, scale * LOG2_E,
            D=D, BLOCK_D=next_power_of_2(D), M=m, N=n, HAS_ORDER=order is not None, HAS_BIAS=bias is not None,
            MAX=reduce == "max", PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            **config,
        )  # fmt: skip

    return column_mass
