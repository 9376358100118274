"""Observed block mask: the exact attention mass of a refresh step, and the best groups by it (portable Triton).

    lse[i]     = log2 of the sum over the keys j of 2^logit[i, j],  logit = log2(e) (scale * q[i] . k[j] + key_bias[j])
    mass[t, g] = sum over the keys j of group g of the sum (or max) over the queries i of slice t of
                 2^(logit[i, j] - lse[i])
    mask[t]    = the best groups by mass, as ``select_pooled`` chooses them by its estimate

q      [B, Hq, Sq, D]     any strides, contiguous last dimension; k [B, Hkv, Sk, D] likewise
order  [Sq]               int32, or None
bias   [B, Sk]            float32, base 2, -inf where the key is masked; or None
mass   [B * heads, T, W * 32]   float32 workspace for as many heads at once as fit MASS_BYTES; -1 where masked
mask   [B, Hq, T, W]      int32, written in place
refresh  bool scalar      where it is False every program ends at once, and the mask stays as it is

Two launches for each part of the heads. In the first a program holds ROWS queries and reads the keys twice, for lse and
for the masses: two products for each pair, as dense attention has. The second is ``select_cut``. Nothing
waits for the device, which on most steps does no more than read the flag. Products are in the dtype of q, the rest is
float32. Meaning: ``reference.observed_mask``. Measured by ``python -m fg_inductor bench resources``.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels import reference, select_cut
from fg_inductor.kernels.mask import group_count, slice_count, word_count

MASS_BYTES = 1 << 28
LOG2_E = math.log2(math.e)


@triton.jit
def _logits(
    q, k_ptr, bias_ptr, key, qk_scale, stride_ks, Sk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the queries q [ROWS, BLOCK_D] against ``key`` [KEYS], base 2; -inf where masked."""
    offs_d = tl.arange(0, BLOCK_D)
    inside = key < Sk
    k_ptrs = k_ptr + key.to(tl.int64)[None, :] * stride_ks + offs_d[:, None]
    kt = tl.load(k_ptrs, mask=inside[None, :] & (offs_d < D)[:, None], other=0.0)
    s = tl.dot(q, kt, input_precision=PRECISION) * qk_scale
    if HAS_BIAS:
        bias = tl.load(bias_ptr + key, mask=inside, other=float("-inf"))
        inside = bias > float("-inf")
        s += bias[None, :]
    return tl.where(inside[None, :], s, float("-inf")), inside


@triton.jit
def _column_mass(
    refresh_ptr, q_ptr, k_ptr, order_ptr, bias_ptr, mass_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_bb,
    first_head, heads, SHARE, Sq, Sk, T, G, W, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, MAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = ROWS // M
    GROUPS: tl.constexpr = KEYS // N
    if tl.load(refresh_ptr) == 0:
        return
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (first_head + tl.program_id(1) % heads).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = place < Sq
    row = place
    if HAS_ORDER:
        row = tl.load(order_ptr + place, mask=there, other=0)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + row.to(tl.int64)[:, None] * stride_qs + offs_d[None, :]
    q = tl.load(q_ptrs, mask=there[:, None] & (offs_d < D)[None, :], other=0.0)
    k_ptr += b * stride_kb + (h // SHARE) * stride_kh
    if HAS_BIAS:
        bias_ptr += b * stride_bb

    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    for first in range(0, Sk, KEYS):
        s, _inside = _logits(q, k_ptr, bias_ptr, first + tl.arange(0, KEYS), qk_scale, stride_ks, Sk,
                             D, BLOCK_D, HAS_BIAS, PRECISION)  # fmt: skip
        s = tl.where(s == s, s, float("-inf"))  # a NaN score takes no part in the normaliser
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
        p = tl.where(p == p, p, 0.0)  # +inf - +inf
        l_i = l_i * tl.where(m_i == m_new, 1.0, tl.exp2(m_i - m_safe)) + tl.sum(p, 1)
        m_i = m_new
    lse = m_i + tl.log2(tl.maximum(l_i, 1.1754944e-38))

    t = tl.program_id(0) * SLICES + tl.arange(0, SLICES)
    mass_ptr += (tl.program_id(1).to(tl.int64) * T + t)[:, None] * W * 32
    for first in range(0, Sk, KEYS):
        s, inside = _logits(q, k_ptr, bias_ptr, first + tl.arange(0, KEYS), qk_scale, stride_ks, Sk,
                            D, BLOCK_D, HAS_BIAS, PRECISION)  # fmt: skip
        p = tl.exp2(s - lse[:, None])  # NaN where the score is NaN or +inf
        p = tl.where((s > float("-inf")) | (s != s), p, 0.0)
        p = tl.where(there[:, None], p, 0.0)
        p = tl.reshape(p, [SLICES, M, KEYS])
        if MAX:
            mass = tl.max(p, 1)  # drops NaN
            mass = tl.where(tl.max((p != p).to(tl.int32), 1) > 0, float("nan"), mass)
        else:
            mass = tl.sum(p, 1)
        mass = tl.sum(tl.reshape(mass, [SLICES, GROUPS, N]), 2)
        if HAS_BIAS:
            held = tl.max(tl.reshape(inside.to(tl.int32), [GROUPS, N]), 1)
            mass = tl.where((held == 0)[None, :], -1.0, mass)
        group = first // N + tl.arange(0, GROUPS)
        mass = tl.where((group < G)[None, :], mass, -1.0)
        tl.store(mass_ptr + group[None, :], mass, mask=(t < T)[:, None] & (group < W * 32)[None, :])
    for first in range(tl.cdiv(Sk, KEYS) * GROUPS, W * 32, GROUPS):
        group = first + tl.arange(0, GROUPS)
        nothing = tl.full([SLICES, GROUPS], -1.0, tl.float32)
        tl.store(mass_ptr + group[None, :], nothing, mask=(t < T)[:, None] & (group < W * 32)[None, :])


def configuration(dtype: torch.dtype, dim: int) -> dict:
    """Queries of a program, keys of a step (at least the largest group, 128), warps and stages."""
    large = dim * dtype.itemsize > 256
    return {"ROWS": 128, "KEYS": 128, "num_warps": 8, "num_stages": 1 if large else 2}


def launch(
    q: Tensor,
    k: Tensor,
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
    refresh: Tensor,
) -> None:
    """Writes ``mask`` where ``refresh`` says so; arguments as in ``kernels.ops``."""
    B, Hq, Sq, D = q.shape
    Sk = k.shape[2]
    T, G, W = slice_count(Sq, m), group_count(Sk, n), word_count(Sk, n)
    if mask.stride(3) != 1:
        raise ValueError("update_observed_: the words of a mask row must be contiguous; call mask.contiguous().")
    bias = reference.normalise_key_bias(key_bias, torch.float32)
    bias = None if bias is None else bias * LOG2_E
    config = configuration(q.dtype, D)
    heads = max(1, min(Hq, MASS_BYTES // (128 * B * T * W)))
    mass = torch.empty(B * heads, T, W * 32, dtype=torch.float32, device=q.device)
    for first in range(0, Hq, heads):
        part = min(heads, Hq - first)
        _column_mass[(triton.cdiv(Sq, config["ROWS"]), B * part)](
            refresh, q, k, order, bias, mass,
            *q.stride()[:3], *k.stride()[:3], 0 if bias is None else bias.stride(0),
            first, part, Hq // k.shape[1], Sq, Sk, T, G, W, scale * LOG2_E,
            D=D, BLOCK_D=triton.next_power_of_2(D), M=m, N=n, HAS_ORDER=order is not None, HAS_BIAS=bias is not None,
            MAX=reduce == "max", PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            **config,
        )  # fmt: skip
        select_cut.launch(
            mass, mask, first, part, G, m, n, Sq, Sk, order,
            top_p if density is None and top_p < 1 else None, max_density if density is None else density,
            None, 1, bias is not None, dense_keys, dense_queries, refresh,
        )  # fmt: skip
