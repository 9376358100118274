"""Run-time block mask from pooled queries and keys (portable Triton).

    score[t, g] = sum over the means p of slice t of softmax_g(scale * mean_q[t, p] . mean_k[g] + bias[g])
    mask[t]     = the shortest prefix of the groups, best score first, that holds top_p of the mass (at most ``limit``)

mean_q  [B, Hq, R, D]       R = T * P pooled queries (``group_means``), dtype of q
mean_k  [B, Hkv, G, D]      grouped keys (k itself for N = 1)
bias    [B, G]              float32, base 2: log2(keys of g that are not masked) + mean key_bias; -inf: masked
score   [B, heads, T, G]    float32 workspace for as many heads at once as fit SCORE_BYTES; -1 where masked
mask    [B, Hq, T, W]       int32, ``kernels.mask``

Three kernels: ``_row_lse`` (normaliser of each pooled query), ``_scores``, and ``_select``, which finds the cut without
sorting: scores are not negative, so their bits order them, and 31 halvings of the bit range find the largest value
whose prefix is long enough. Equal scores are taken by index: the mask is a function of the inputs alone. Products are
in the dtype of q, everything after them in float32. Meaning: ``reference.select_pooled``.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels import group_means, reference
from fg_inductor.kernels.mask import group_count, slice_count, word_count

SCORE_BYTES = 1 << 28
LOG2_E = math.log2(math.e)
BLOCK_R = 64  # pooled queries a program scores; a multiple of the means of every slice
INFINITE = tl.constexpr(0x7F800000)  # the bits of +inf
FORCED = tl.constexpr(0x7F800001)  # just above
BLOCK = 32768  # scores that one program of ``_select`` can hold in registers


@triton.jit
def _logits(
    q_ptr, k_ptr, bias_ptr, group, qk_scale, stride_ks, G, last_bias,
    q, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the pooled queries q [BLOCK_R, BLOCK_D] against ``group`` [BLOCK_G], base 2; -inf where masked."""
    offs_d = tl.arange(0, BLOCK_D)
    inside = group < G
    k_ptrs = k_ptr + group.to(tl.int64)[None, :] * stride_ks + offs_d[:, None]
    kt = tl.load(k_ptrs, mask=inside[None, :] & (offs_d < D)[:, None], other=0.0)
    bias = tl.where(group == G - 1, last_bias, 0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + group, mask=inside, other=float("-inf"))
    s = tl.dot(q, kt, input_precision=PRECISION) * qk_scale + bias[None, :]
    return tl.where((inside & (bias > float("-inf")))[None, :], s, float("-inf"))


@triton.jit
def _load_q(q_ptr, row, R, D: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(
        q_ptr + row.to(tl.int64)[:, None] * D + offs_d[None, :],
        mask=(row < R)[:, None] & (offs_d < D)[None, :],
        other=0.0,
    )


@triton.jit
def _row_lse(
    q_ptr, k_ptr, bias_ptr, lse_ptr,
    stride_kb, stride_kh, stride_ks, stride_bb,
    Hq, SHARE, R, G, qk_scale, last_bias,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // Hq, bh % Hq
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    q = _load_q(q_ptr + bh * R * D, row, R, D, BLOCK_D)
    k_ptr += b * stride_kb + (h // SHARE) * stride_kh
    if HAS_BIAS:
        bias_ptr += b * stride_bb
    m_i = tl.full([BLOCK_R], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, G, BLOCK_G):
        s = _logits(q_ptr, k_ptr, bias_ptr, first + tl.arange(0, BLOCK_G), qk_scale, stride_ks, G, last_bias,
                    q, D, BLOCK_D, HAS_BIAS, PRECISION)  # fmt: skip
        s = tl.where(s == s, s, float("-inf"))  # a NaN score takes no part in the normaliser
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
        p = tl.where(p == p, p, 0.0)  # +inf - +inf
        l_i = l_i * tl.where(m_i == m_new, 1.0, tl.exp2(m_i - m_safe)) + tl.sum(p, 1)
        m_i = m_new
    tl.store(lse_ptr + bh * R + row, m_i + tl.log2(tl.maximum(l_i, 1.1754944e-38)), mask=row < R)


@triton.jit
def _scores(
    q_ptr, k_ptr, bias_ptr, lse_ptr, score_ptr,
    stride_kb, stride_kh, stride_ks, stride_bb,
    first_head, heads, Hq, SHARE, R, T, G, means, qk_scale, last_bias,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, P: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = BLOCK_R // P
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = first_head + tl.program_id(2) % heads
    bh = b * Hq + h
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    q = _load_q(q_ptr + bh * R * D, row, R, D, BLOCK_D)
    k_ptr += b * stride_kb + (h // SHARE).to(tl.int64) * stride_kh
    if HAS_BIAS:
        bias_ptr += b * stride_bb
    s = _logits(q_ptr, k_ptr, bias_ptr, group, qk_scale, stride_ks, G, last_bias,
                q, D, BLOCK_D, HAS_BIAS, PRECISION)  # fmt: skip
    lse = tl.load(lse_ptr + bh * R + row, mask=row < R, other=0.0)
    p = tl.exp2(s - lse[:, None])  # NaN where the score is NaN or +inf, 0 where masked
    p = tl.where(s == float("-inf"), 0.0, p)
    p = tl.where((row < means)[:, None], p, 0.0)  # means without a query have no say
    score = tl.sum(tl.reshape(p, [SLICES, P, BLOCK_G]), 1)
    if HAS_BIAS:
        masked = tl.load(bias_ptr + group, mask=group < G, other=0.0) == float("-inf")
        score = tl.where(masked[None, :], -1.0, score)
    t = tl.program_id(1) * SLICES + tl.arange(0, SLICES)
    place = score_ptr + (tl.program_id(2).to(tl.int64) * T + t)[:, None] * G + group[None, :]
    tl.store(place, score, mask=(t < T)[:, None] & (group < G)[None, :])


@triton.jit
def _load_bits(score_ptr, forced_ptr, group, G, HAS_FORCED: tl.constexpr):
    """Bits that rank the groups (-1: masked, FORCED: first of all), and the mass of the forced ones."""
    score = tl.load(score_ptr + group, mask=group < G, other=-1.0)
    forced = score != score
    if HAS_FORCED:
        forced = forced | ((tl.load(forced_ptr + group, mask=group < G, other=0) != 0) & (score >= 0.0))
    bits = tl.where(score >= 0.0, score, 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(forced, FORCED, tl.where(score < 0.0, -1, bits))
    return bits, tl.sum(tl.where(forced & (score > 0.0) & (score < float("inf")), score, 0.0))


@triton.jit
def _held(bits, lowest, USE_MASS: tl.constexpr):
    """Groups with bits >= lowest: how many, and the mass of those that are not forced."""
    mass = 0.0
    if USE_MASS:
        counted = (bits >= lowest) & (bits >= 0) & (bits < INFINITE)
        mass = tl.sum(tl.where(counted, bits.to(tl.float32, bitcast=True), 0.0))
    return tl.sum((bits >= lowest).to(tl.int32)), mass


@triton.jit
def _select(
    score_ptr, forced_ptr, dense_ptr, limit_ptr, mask_ptr,
    stride_mb, stride_mh, stride_mt,
    first_head, heads, T, W, G, top_p,
    BLOCK: tl.constexpr, PACK: tl.constexpr, SINGLE: tl.constexpr,
    HAS_FORCED: tl.constexpr, HAS_DENSE: tl.constexpr, USE_MASS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = first_head + tl.program_id(1) % heads
    score_ptr += (tl.program_id(1).to(tl.int64) * T + t) * G
    mask_ptr += b * stride_mb + h.to(tl.int64) * stride_mh + t * stride_mt
    offs = tl.arange(0, BLOCK)
    limit = tl.load(limit_ptr + b)
    # SINGLE: the row fits one block and stays in registers; else it is read again for each halving.
    bits, forced_mass = _load_bits(score_ptr, forced_ptr, offs, G, HAS_FORCED)
    target = 0.0
    if USE_MASS:
        count, total = _held(bits, 0, USE_MASS)
        if not SINGLE:
            for first in range(BLOCK, G, BLOCK):
                more, more_mass = _load_bits(score_ptr, forced_ptr, first + offs, G, HAS_FORCED)
                count, mass = _held(more, 0, USE_MASS)
                forced_mass += more_mass
                total += mass
        target = (total + forced_mass) * top_p

    # Invariant: the groups with bits >= low are enough (or all there are), those with bits >= high are not.
    low = 0
    high = FORCED + 1
    count_above = 0
    mass_above = forced_mass
    for _ in range(31):
        middle = low + (high - low) // 2
        count, mass = _held(bits, middle, USE_MASS)
        if not SINGLE:
            for first in range(BLOCK, G, BLOCK):
                more, more_mass = _load_bits(score_ptr, forced_ptr, first + offs, G, HAS_FORCED)
                more_count, more_mass = _held(more, middle, USE_MASS)
                count += more_count
                mass += more_mass
        mass += forced_mass
        enough = count >= limit
        if USE_MASS:
            enough = enough | (mass >= target)
        if high - low > 1:
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
            count_above = tl.where(enough, count_above, count)
            mass_above = tl.where(enough, mass_above, mass)

    ties = limit - count_above  # groups at exactly the cut that are kept, by index
    if USE_MASS:
        cut = tl.maximum(low.to(tl.float32, bitcast=True), 1.1754944e-38)
        needed = tl.minimum(tl.ceil((target - mass_above) / cut), 1e9)
        ties = tl.minimum(ties, tl.maximum(needed, 0.0).to(tl.int32))

    everything = False
    if HAS_DENSE:
        everything = tl.load(dense_ptr + t) != 0
    seen = 0
    for first in range(0, W * 32, PACK):
        rank_bits, _forced_mass = _load_bits(score_ptr, forced_ptr, first + tl.arange(0, PACK), G, HAS_FORCED)
        at_cut = (rank_bits == low).to(tl.int32)
        rank = seen + tl.cumsum(at_cut, 0)
        seen += tl.sum(at_cut)
        keep = (rank_bits > low) | ((at_cut == 1) & (rank <= ties)) | (rank_bits == FORCED)
        if HAS_DENSE:
            keep = keep | (everything & (rank_bits >= 0))
        shifted = tl.reshape(keep.to(tl.int32), [PACK // 32, 32]) << tl.arange(0, 32)[None, :]
        word = first // 32 + tl.arange(0, PACK // 32)
        tl.store(mask_ptr + word, tl.sum(shifted, 1), mask=word < W)


def configuration(groups: int) -> dict:
    """How ``_select`` reads a row of scores; at most 64 scores a thread."""
    single = groups <= BLOCK
    block = max(128, triton.next_power_of_2(groups)) if single else 8192
    return {"BLOCK": block, "PACK": min(block, 4096), "SINGLE": single, "num_warps": max(1, min(16, block // 1024))}


def launch(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    pool: int,
    top_p: float,
    density: float | None,
    max_density: float,
    dense_keys: list[int],
    dense_queries: list[int],
) -> Tensor:
    """The block mask [B, Hq, T, W]; arguments as in ``kernels.ops``."""
    B, Hq, Sq, D = q.shape
    Sk, share = k.shape[2], Hq // k.shape[1]
    T, G, W, P = slice_count(Sq, m), group_count(Sk, n), word_count(Sk, n), m // pool
    device = q.device
    bias = reference.normalise_key_bias(key_bias, torch.float32)
    mean_q = group_means.launch(q, pool, T * P, order=order)
    mean_k = k if n == 1 else group_means.launch(k, n, G, bias=bias)
    limit_share = max_density if density is None else density
    group_bias = None
    last_bias = math.log2((Sk - (G - 1) * n) / n)
    if bias is None:
        limit = torch.full((B,), max(1, int(G * limit_share + 0.5)), dtype=torch.int32, device=device)
    else:
        count, mean_bias = reference.group_statistics(bias, Sk, n, bias)
        group_bias = torch.where(count > 0, (count / n).log2() + mean_bias * LOG2_E, -math.inf)
        limit = ((count > 0).sum(-1).double() * limit_share + 0.5).floor().clamp_min(1).to(torch.int32)
    forced = dense = None
    if dense_keys:
        inside = reference.in_ranges(torch.arange(Sk, device=device), dense_keys)
        forced = reference.any_in_chunks(inside, n).to(torch.int8)
    if dense_queries:
        tokens = torch.arange(Sq, device=device) if order is None else order
        dense = reference.any_in_chunks(reference.in_ranges(tokens, dense_queries), m).to(torch.int8)

    R, means = T * P, group_count(Sq, pool)
    shapes = dict(D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK_R=BLOCK_R, BLOCK_G=64)
    flags = dict(HAS_BIAS=bias is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4)
    strides = (*mean_k.stride()[:3], 0 if bias is None else group_bias.stride(0))
    lse = torch.empty(B, Hq, R, dtype=torch.float32, device=device)
    _row_lse[(triton.cdiv(R, BLOCK_R), B * Hq)](
        mean_q, mean_k, group_bias, lse, *strides,
        Hq, share, R, G, scale * LOG2_E, last_bias,
        **shapes, **flags,
    )  # fmt: skip
    mask = torch.empty(B, Hq, T, W, dtype=torch.int32, device=device)
    heads = max(1, min(Hq, SCORE_BYTES // (4 * B * T * G)))
    score = torch.empty(B, heads, T, G, dtype=torch.float32, device=device)
    for first in range(0, Hq, heads):
        part = min(heads, Hq - first)
        _scores[(triton.cdiv(G, 64), triton.cdiv(R, BLOCK_R), B * part)](
            mean_q, mean_k, group_bias, lse, score, *strides,
            first, part, Hq, share, R, T, G, means, scale * LOG2_E, last_bias,
            **shapes, P=P, **flags,
        )  # fmt: skip
        _select[(T, B * part)](
            score, forced, dense, limit, mask,
            *mask.stride()[:3],
            first, part, T, W, G, top_p,
            HAS_FORCED=forced is not None, HAS_DENSE=dense is not None,
            USE_MASS=density is None and top_p < 1,
            **configuration(G),
        )  # fmt: skip
    return mask
