"""Scores of key groups for query slices, from pooled queries and keys (portable Triton).

    score[t, g] = sum over the means p of slice t of softmax_g(scale * mean_q[t, p] . mean_k[g] + bias[g])

mean_q  [B, Hq, R, D]           R = T * P pooled queries (``group_means``), dtype of q
mean_k  [B, Hkv, G, D]          grouped keys (k itself for N = 1)
bias    [B, G]                  float32, base 2: log2(keys of g that are not masked / N) + mean key_bias; -inf: masked
lse     [splits, B * Hq, R]     float32, base 2: normaliser of each pooled query over a part of the groups, or None
score   [B * heads, T, W * 32]  of as many heads at once as fit SCORE_BYTES; -1 where masked, NaN where a score is NaN

Scores are float32 for float32 inputs, else 2048 * score in float16 (a score is P <= 16 at most): half the traffic, and
its rounding, 2^-11 from scores of 2^-25 up, lies below the error of products in the dtype of q.

Where a slice has one mean and groups are kept by number alone, their order is all that counts, and a logarithm will do:
scores are then steps of 2^-8 octaves about a pivot, 62 octaves above and below. Groups within a step (0.3%) are taken
by index, which costs 9e-6 of the kept mass at most (q and k of two layers of a trained model, 0.1 and 0.3 kept, logits
that deviate by 0.5 to 6.4 octaves). The pivot is the cut among 64 groups from all over the row, so that the search for
the cut begins near its end. That saves the first of:

Two passes over the products, because a score needs the normaliser of its row first. Each costs 2 R G D FLOP and R G
exponentials a head: at 128x8 with pool 16, 1/(2 * 16 * 8) = 0.4% of dense attention's FLOPs, and at 12 heads x 32,760
x D 128 26 GFLOP, 27 us of the exponential unit (16 a clock and SM). Writing the products out instead of forming them
twice would move 400 MB. So the inner loops are kept to that: a pivot per row (the maximum of its first block) in
place of a running maximum, checked at the end (``_row_lse``), and in ``_scores`` the groups as rows and the means as
columns, ordered so that the P means of a slice lie in one thread's registers and are summed without a shuffle.
Products are in the dtype of q, everything after them in float32. Meaning: ``reference_select.pooled_scores``.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels.group_means import masked_bias
from fg_inductor.kernels.sizes import cdiv, next_power_of_2

SCORE_BYTES = 1 << 28
MAX_SPLITS = 8
NARROW_SCALE = 11  # float16 scores are times 2 to this
PROGRAMS = 1024  # enough to fill a GPU several times over
LOG2_E = math.log2(math.e)
NARROW = tl.constexpr(float(NARROW_SCALE))
RANK_STEPS = 256  # of a ranked score in an octave
RANK_PIVOT = 15_872  # the ranked score of the pivot
RANK_SCALE = tl.constexpr(float(RANK_STEPS))
RANK_OCTAVES = tl.constexpr(RANK_PIVOT / RANK_STEPS)  # below the pivot
RANK_MOST = tl.constexpr(31_743.0)  # as float16 the largest finite number
SAMPLED = tl.constexpr(64)  # groups


@triton.jit
def _group_bias(
    bias_ptr, out_ptr, stride_bb, Sk, G,
    N: tl.constexpr, BLOCK: tl.constexpr, BOOL: tl.constexpr,
):  # fmt: skip
    """bias [B, G] from key_bias [B, Sk]."""
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = group[:, None] * N + tl.arange(0, N)[None, :]
    bias = masked_bias(tl.load(bias_ptr + b * stride_bb + key, mask=key < Sk, other=0), BOOL)
    valid = (key < Sk) & (bias != float("-inf"))
    count = tl.sum(valid.to(tl.float32), 1)
    mean = tl.sum(tl.where(valid, bias, 0.0), 1) / tl.maximum(count, 1.0)
    out = tl.where(count > 0, tl.log2(tl.maximum(count, 1.0) / N) + mean * 1.4426950408889634, float("-inf"))
    tl.store(out_ptr + b * G + group, out, mask=group < G)


@triton.jit
def _load_rows(x_ptr, row, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """x [rows, BLOCK_D] of a block that spans less than 2^31 elements; rows at ``limit`` and beyond are 0."""
    offs_d = tl.arange(0, BLOCK_D)
    pointers = x_ptr + (row[:, None] * stride + offs_d[None, :])
    if MASKED:
        x = tl.load(pointers, mask=(row < limit)[:, None] & (offs_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(offs_d < D)[None, :], other=0.0)
    return x


@triton.jit
def _load_block(
    k_ptr, first, stride, G, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, MASKED: tl.constexpr
):
    """Grouped keys [BLOCK_G, BLOCK_D] from ``first`` on: offsets inside a block are the same for all of them."""
    k_ptr += tl.cast(first, tl.int64) * stride
    return _load_rows(k_ptr, tl.arange(0, BLOCK_G), stride, G - first, D, BLOCK_D, MASKED)


@triton.jit
def _load_bias(bias_ptr, group, G, last_bias, HAS_BIAS: tl.constexpr):
    """bias [groups] of a block that may reach beyond the last group; -inf there."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + group, mask=group < G, other=float("-inf"))
    else:
        bias = tl.where(group < G - 1, 0.0, tl.where(group == G - 1, last_bias, float("-inf")))
    return bias


@triton.jit
def _row_logits(
    q, k_ptr, bias_ptr, first, qk_scale, stride_ks, G, last_bias,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the pooled queries q [BLOCK_R, BLOCK_D] against the groups from ``first`` on, base 2; -inf: masked."""
    k = _load_block(k_ptr, first, stride_ks, G, D, BLOCK_D, BLOCK_G, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
    if MASKED or HAS_BIAS:
        bias = _load_bias(bias_ptr, first + tl.arange(0, BLOCK_G), G, last_bias, HAS_BIAS)
        s = tl.where((bias > float("-inf"))[None, :], s + bias[None, :], float("-inf"))
    return s


@triton.jit
def _row_lse(
    q_ptr, k_ptr, bias_ptr, lse_ptr,
    stride_kb, stride_kh, stride_ks, stride_bb,
    Hq, SHARE, R, G, blocks, qk_scale, last_bias,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // Hq, bh % Hq
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    q_ptr += (bh * R + tl.program_id(0) * BLOCK_R) * D
    q = _load_rows(q_ptr, tl.arange(0, BLOCK_R), D, R - tl.program_id(0) * BLOCK_R, D, BLOCK_D, True)
    k_ptr += b * stride_kb + (h // SHARE) * stride_kh
    if HAS_BIAS:
        bias_ptr += b * stride_bb
    start = tl.program_id(1) * blocks * BLOCK_G
    stop = tl.minimum(start + blocks * BLOCK_G, G)
    whole = tl.minimum(stop, G - 1) // BLOCK_G * BLOCK_G  # blocks below need no mask

    s = _row_logits(q, k_ptr, bias_ptr, start, qk_scale, stride_ks, G, last_bias,
                    D, BLOCK_D, BLOCK_G, True, HAS_BIAS, PRECISION)  # fmt: skip
    pivot = tl.max(s, 1)
    pivot = tl.where(pivot == float("-inf"), 0.0, pivot)
    l_i = tl.sum(tl.exp2(s - pivot[:, None]), 1)
    for first in range(start + BLOCK_G, whole, BLOCK_G):
        s = _row_logits(q, k_ptr, bias_ptr, first, qk_scale, stride_ks, G, last_bias,
                        D, BLOCK_D, BLOCK_G, False, HAS_BIAS, PRECISION)  # fmt: skip
        l_i += tl.sum(tl.exp2(s - pivot[:, None]), 1)
    for first in range(tl.maximum(whole, start + BLOCK_G), stop, BLOCK_G):
        s = _row_logits(q, k_ptr, bias_ptr, first, qk_scale, stride_ks, G, last_bias,
                        D, BLOCK_D, BLOCK_G, True, HAS_BIAS, PRECISION)  # fmt: skip
        l_i += tl.sum(tl.exp2(s - pivot[:, None]), 1)
    lse = pivot + tl.log2(l_i)

    # NaN, infinity, or a row whose scores lie 127 and more above the pivot or 149 below it: again, with a running
    # maximum. A NaN takes no part in the normaliser.
    fits = (l_i > 0.0) & (l_i < float("inf"))
    if tl.sum((fits == 0).to(tl.int32)) > 0:
        m_i = tl.full([BLOCK_R], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_R], tl.float32)
        for first in tl.range(start, stop, BLOCK_G, num_stages=1):
            s = _row_logits(q, k_ptr, bias_ptr, first, qk_scale, stride_ks, G, last_bias,
                            D, BLOCK_D, BLOCK_G, True, HAS_BIAS, PRECISION)  # fmt: skip
            s = tl.where(s == s, s, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - m_safe[:, None])
            p = tl.where(p == p, p, 0.0)  # +inf - +inf
            l_i = l_i * tl.where(m_i == m_new, 1.0, tl.exp2(m_i - m_safe)) + tl.sum(p, 1)
            m_i = m_new
        lse = m_i + tl.log2(tl.maximum(l_i, 1.1754944e-38))
    lse_ptr += (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + bh) * R
    tl.store(lse_ptr + row, lse, mask=row < R)


@triton.jit
def larger(a, b):
    """The maximum; NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pivot(
    q, k_ptr, bias_ptr, qk_scale, stride_ks, G, last_bias, density,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """For each column of q what about a share ``density`` of the logits (base 2) is above, of groups from all over the
    row. Any number will do that is the same for all groups of a row."""
    group = tl.minimum(tl.arange(0, SAMPLED) * tl.cdiv(G, SAMPLED), G - 1)
    k = _load_rows(k_ptr, group.to(tl.int64), stride_ks, G, D, BLOCK_D, True)
    x = tl.dot(k, q, input_precision=PRECISION) * qk_scale
    x += _load_bias(bias_ptr, group, G, last_bias, HAS_BIAS)[:, None]
    finite = tl.abs(x) < float("inf")
    low = tl.min(tl.where(finite, x, float("inf")), 0)
    high = tl.max(tl.where(finite, x, float("-inf")), 0)
    low = tl.minimum(low, high)
    wanted = tl.sum(finite.to(tl.float32), 0) * density
    for _ in range(8):
        middle = (low + high) * 0.5
        above = tl.sum((finite & (x > middle[None, :])).to(tl.float32), 0)
        low = tl.where(above > wanted, middle, low)
        high = tl.where(above > wanted, high, middle)
    return tl.where(tl.abs(high) < float("inf"), high, 0.0)


@triton.jit
def _rank(octaves):
    """A ranked score: float16 whose bits are the steps; NaN stays NaN."""
    steps = tl.minimum(tl.maximum(octaves * RANK_SCALE, 0.0), RANK_MOST)
    bits = (steps + 8388608.0).to(tl.int32, bitcast=True)  # whose low bits are the nearest integer
    bits = tl.where(octaves == octaves, bits & 0x7FFF, 0x7FFF)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _score_block(
    q, lse, k_ptr, bias_ptr, place, first, stored, qk_scale, stride_ks, G, last_bias,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, P: tl.constexpr, SLICES: tl.constexpr,
    MAX: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """Scores of the groups from ``first`` on for SLICES slices, whose P means are the columns p * SLICES + t of q."""
    k = _load_block(k_ptr, first, stride_ks, G, D, BLOCK_D, BLOCK_G, MASKED)
    x = tl.dot(k, q, input_precision=PRECISION) * qk_scale - lse[None, :]
    if MASKED or HAS_BIAS:
        bias = _load_bias(bias_ptr, first + tl.arange(0, BLOCK_G), G, last_bias, HAS_BIAS)
        x += bias[:, None]
    score = _rank(x) if RANKED else tl.exp2(x)  # NaN where the score is NaN or, but for ranked ones, +inf
    if P > 1:
        score = tl.reshape(score, [BLOCK_G, P, SLICES])
        score = tl.reduce(score, 1, larger) if MAX else tl.sum(score, 1)
    if MASKED or HAS_BIAS:
        score = tl.where((bias > float("-inf"))[:, None], score, -1.0)
    tl.store(place, score.to(place.dtype.element_ty), mask=stored)


@triton.jit
def _scores(
    q_ptr, k_ptr, bias_ptr, lse_ptr, score_ptr,
    stride_kb, stride_kh, stride_ks, stride_bb, stride_st, stride_split,
    first_head, heads, Hq, SHARE, R, T, G, means, blocks, qk_scale, last_bias, density,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, P: tl.constexpr,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, MAX: tl.constexpr,
    RANKED: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = BLOCK_R // P
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = first_head + tl.program_id(2) % heads
    bh = b * Hq + h
    t = tl.program_id(0) * SLICES + tl.arange(0, SLICES)
    column = tl.arange(0, BLOCK_R)
    mean = (tl.program_id(0) * SLICES + column % SLICES) * P + column // SLICES
    row = tl.minimum(mean, means - 1).to(tl.int64)
    q = tl.trans(_load_rows(q_ptr + bh * R * D, row, D, R, D, BLOCK_D, False))
    k_ptr += b * stride_kb + (h // SHARE).to(tl.int64) * stride_kh
    if HAS_BIAS:
        bias_ptr += b * stride_bb
    if RANKED:
        lse = _pivot(
            q, k_ptr, bias_ptr, qk_scale, stride_ks, G, last_bias, density,
            D, BLOCK_D, HAS_BIAS, PRECISION, SAMPLED,
        )  # fmt: skip
        lse -= RANK_OCTAVES
    else:
        lse_ptr += bh * R + row
        lse = tl.load(lse_ptr)
        if SPLITS > 1:
            top = lse
            for i in tl.static_range(1, SPLITS):
                top = tl.maximum(top, tl.load(lse_ptr + i * stride_split))
            top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
            total = tl.exp2(lse - top)
            for i in tl.static_range(1, SPLITS):
                total += tl.exp2(tl.load(lse_ptr + i * stride_split) - top)
            lse = top + tl.log2(total)
        if not WIDE:
            lse -= NARROW
        # A mean without a query stands for its neighbour, and has no say.
        lse = tl.where(mean < means, lse, float("inf"))
    start = tl.program_id(1) * blocks * BLOCK_G
    stop = tl.minimum(start + blocks * BLOCK_G, stride_st)  # up to the padding of the mask words, which is masked
    whole = tl.maximum(start, tl.minimum(stop, G - 1) // BLOCK_G * BLOCK_G)  # blocks below need no mask
    row = tl.program_id(2).to(tl.int64) * T + t
    place = score_ptr + row[None, :] * stride_st + tl.arange(0, BLOCK_G)[:, None]
    stored = (t < T)[None, :]
    for first in range(start, whole, BLOCK_G):
        _score_block(q, lse, k_ptr, bias_ptr, place + first, first, stored, qk_scale, stride_ks, G, last_bias,
                     D, BLOCK_D, BLOCK_G, P, SLICES, MAX, False, HAS_BIAS, PRECISION, RANKED)  # fmt: skip
    for first in range(whole, stop, BLOCK_G):
        _score_block(q, lse, k_ptr, bias_ptr, place + first, first, stored, qk_scale, stride_ks, G, last_bias,
                     D, BLOCK_D, BLOCK_G, P, SLICES, MAX, True, HAS_BIAS, PRECISION, RANKED)  # fmt: skip


def row_lse_configuration(dtype: torch.dtype, d: int) -> dict:
    """Tile of ``_row_lse``: one warp group and room for more programs an SM; their products hide each other's exp."""
    if dtype == torch.float32 or d > 128:
        return {"BLOCK_R": 64, "BLOCK_G": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_R": 64, "BLOCK_G": 128, "num_warps": 4, "num_stages": 3}


def scores_configuration(dtype: torch.dtype, d: int, p: int) -> dict:
    """Tile of ``_scores``; BLOCK_R holds the means of whole slices, BLOCK_G divides the 128 groups of four words."""
    if p == 1 and dtype != torch.float32 and d <= 128:  # each score is stored: fewer registers, more programs an SM
        tile = {"BLOCK_R": 64, "BLOCK_G": 64, "num_warps": 4, "num_stages": 2}
        return tile if torch.version.hip else tile | {"maxnreg": 128}  # which Triton knows for NVIDIA alone
    if dtype == torch.float32 or d > 128:
        return {"BLOCK_R": 64, "BLOCK_G": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_R": 128, "BLOCK_G": 64, "num_warps": 4, "num_stages": 2}


def _blocks(programs: int, groups: int, block: int, most: int) -> int:
    """Blocks of groups that one program handles: 8 at least, in at most ``most`` parts of a row."""
    parts = max(1, min(most, cdiv(PROGRAMS, programs), groups // (8 * block)))
    return cdiv(cdiv(groups, block), parts)


class Scores:
    """What is computed once for all heads; ``of_heads`` then scores a few heads at a time."""

    def __init__(
        self, mean_q: Tensor, mean_k: Tensor, key_bias, scale: float, n: int, keys: int, means: int, p: int,
        density: float | None = None,
    ):  # fmt: skip
        """mean_q, mean_k: above; key_bias: ``group_means.bias_pointer``; means: pooled queries that hold a query;
        density: where groups are kept by number alone, about how many, as a share."""
        self.q, self.k, self.p, self.means = mean_q, mean_k, p, means
        B, self.Hq, self.R, D = mean_q.shape
        self.share, self.G = self.Hq // mean_k.shape[1], mean_k.shape[2]
        self.T, self.row = self.R // p, cdiv(self.G, 128) * 128
        self.dtype = torch.float32 if mean_q.dtype == torch.float32 else torch.float16
        self.bias = None
        if key_bias is not None:
            self.bias = torch.empty(B, self.G, dtype=torch.float32, device=mean_q.device)
            block = max(1, 1024 // n)
            _group_bias[(cdiv(self.G, block), B)](
                key_bias, self.bias, key_bias.stride(0), keys, self.G,
                N=n, BLOCK=block, BOOL=key_bias.dtype == torch.int8,
            )  # fmt: skip
        self.strides = (*mean_k.stride()[:3], 0 if self.bias is None else self.bias.stride(0))
        self.numbers = (scale * LOG2_E, math.log2((keys - (self.G - 1) * n) / n))
        self.flags = dict(D=D, BLOCK_D=next_power_of_2(D), HAS_BIAS=self.bias is not None)
        self.flags["PRECISION"] = "ieee" if mean_q.dtype == torch.float32 else "tf32"
        self.ranked = density is not None and p == 1 and self.dtype == torch.float16
        self.lse, self.density = None, density or 0.0
        if self.ranked:
            return
        config = row_lse_configuration(mean_q.dtype, D)
        programs = cdiv(self.R, config["BLOCK_R"]) * B * self.Hq
        blocks = _blocks(programs, self.G, config["BLOCK_G"], MAX_SPLITS)
        splits = cdiv(self.G, blocks * config["BLOCK_G"])
        self.lse = torch.empty(splits, B * self.Hq, self.R, dtype=torch.float32, device=mean_q.device)
        _row_lse[(cdiv(self.R, config["BLOCK_R"]), splits, B * self.Hq)](
            mean_q, mean_k, self.bias, self.lse, *self.strides,
            self.Hq, self.share, self.R, self.G, blocks, *self.numbers,
            **self.flags, **config,
        )  # fmt: skip

    def workspace(self) -> Tensor:
        """score [B * heads, T, W * 32], uninitialised, for as many heads as fit."""
        B = self.q.shape[0]
        heads = max(1, min(self.Hq, SCORE_BYTES // (self.dtype.itemsize * B * self.T * self.row)))
        return torch.empty(B * heads, self.T, self.row, dtype=self.dtype, device=self.q.device)

    def of_heads(self, first: int, heads: int, score: Tensor, reduce: str = "sum") -> None:
        """Scores of the query heads first .. first + heads - 1 of each entry; ``reduce`` joins the means of a slice."""
        B, D = self.q.shape[0], self.q.shape[3]
        config = scores_configuration(self.q.dtype, D, self.p)
        slices = config["BLOCK_R"] // self.p
        programs = cdiv(self.T, slices) * B * heads
        blocks = _blocks(programs, self.row, config["BLOCK_G"], self.row)
        splits, stride = (1, 0) if self.ranked else (self.lse.shape[0], self.lse.stride(0))
        _scores[(cdiv(self.T, slices), cdiv(self.row, blocks * config["BLOCK_G"]), B * heads)](
            self.q, self.k, self.bias, self.lse, score, *self.strides, self.row, stride,
            first, heads, self.Hq, self.share, self.R, self.T, self.G, self.means, blocks, *self.numbers, self.density,
            **self.flags, P=self.p, MAX=reduce == "max", SPLITS=splits,
            WIDE=self.dtype == torch.float32, RANKED=self.ranked, **config,
        )  # fmt: skip
