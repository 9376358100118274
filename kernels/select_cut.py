"""The block mask from codes of scores: the best groups of each slice, without sorting (portable Triton).

    mask[t] = the shortest prefix of the groups, best score first, that holds top_p of the mass, at most ``limit``

code  [B * heads, T, W * 32]  int16 or int32 (``select_scores``)
mask  [B, Hq, T, W]           int32, ``kernels.mask``
Grid  (T, B * heads)          one program a slice; a row of up to BLOCK_W words stays in registers

The cut is the largest code whose prefix is long enough. It is bracketed, low enough and high not, and found by regula
falsi with the Illinois rule on the share of the target that is held, which needs 9 passes over the row where halving
needs 14 (mean over lognormal rows of 4,095 and 32,760 groups); from pass 12 on it halves. Equal scores are taken by
index: bits of the groups at the cut are packed like those above it, and only words are ranked. So the mask is a
function of the codes alone. A pass is three instructions a group (compare, select, add), five where ``limit`` counts
too: at 12 heads x 256 slices x 4,095 groups 12.6 million groups a pass, 1.4 us of an H100's ALUs. Forced groups
(NaN scores, ``dense_keys``) come before all others and count with their mass. Meaning: ``reference.select_pooled``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels.select_scores import NARROW_FORCED, WIDE_FORCED, decode, encode

MAX_WORDS = 1024  # mask words of a row that one program can hold: 64 groups a thread of 16 warps
MASKED = tl.constexpr(-1.0)
FORCED = tl.constexpr(-2.0)
PATIENCE = tl.constexpr(12)


@triton.jit
def _in_ranges(index, size, ranges):
    """Whether index .. index + size - 1 meets one of the half-open ranges (start0, end0, start1, end1, ...)."""
    inside = index < 0
    for i in tl.static_range(len(ranges) // 2):
        inside = inside | ((index < ranges[2 * i + 1]) & (index + size > ranges[2 * i]))
    return inside


@triton.jit
def _load(
    code_ptr, first, W, dense_keys,
    N: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr, HAS_FORCED: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_W, 32] of the words from ``first`` on, MASKED and FORCED ones as such; number and mass of forced."""
    word = first + tl.arange(0, BLOCK_W)
    group = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    code = tl.load(code_ptr + group, mask=(word < W)[:, None], other=0).to(tl.int32)
    if WIDE:
        nan = code == WIDE_FORCED
    else:
        code = code & 0xFFFF
        nan = code == NARROW_FORCED
    score = tl.where(code == 0, MASKED, decode(code, WIDE))
    score = tl.where(nan, FORCED, score)
    mass = 0.0
    if HAS_FORCED:
        forced = _in_ranges(group * N, N, dense_keys) & (score >= 0.0)
        mass += tl.sum(tl.where(forced, score, 0.0))
        score = tl.where(forced, FORCED, score)
    return score, tl.sum((score == FORCED).to(tl.int32)), mass


@triton.jit
def _held(score, cut, COUNT: tl.constexpr, MASS: tl.constexpr):
    """Groups with a score of ``cut`` or more: how many, and their mass."""
    count = 0
    mass = 0.0
    if COUNT:
        count = tl.sum((score >= cut).to(tl.int32))
    if MASS:
        mass = tl.sum(tl.where(score >= cut, score, 0.0))
    return count, mass


@triton.jit
def _popcount(x):
    """Bits of each int32 that are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit
def _pack(keep):
    """bool [BLOCK_W, 32] -> int32 [BLOCK_W]."""
    return tl.sum(keep.to(tl.int32) << tl.arange(0, 32)[None, :], 1)


@triton.jit
def _words(score, cut, ties, everything):
    """Mask words [BLOCK_W]: groups above the cut, forced ones, and the first ``ties`` of those at the cut; how many
    lie at the cut."""
    above = _pack((score > cut) | (score == FORCED) | (everything & (score != MASKED)))
    at_cut = _pack(score == cut)
    count = _popcount(at_cut)
    taken = tl.minimum(tl.maximum(ties - (tl.cumsum(count, 0) - count), 0), count)
    part = tl.where(taken < count, taken, 0)  # in one word at most: its lowest bits
    rest = at_cut
    lowest = tl.zeros_like(at_cut)
    for i in range(tl.max(part)):
        lowest = lowest | tl.where(i < part, rest & -rest, 0)
        rest = rest & (rest - 1)
    return above | tl.where(taken == count, at_cut, lowest), tl.sum(count)


@triton.jit
def _cut(
    code_ptr, order_ptr, mask_ptr,
    stride_mb, stride_mh, stride_mt,
    first_head, heads, T, W, Sq, limit, share_high, share_low, top_p, dense_keys, dense_queries,
    M: tl.constexpr, N: tl.constexpr, BLOCK_W: tl.constexpr, SINGLE: tl.constexpr, WIDE: tl.constexpr,
    COUNT: tl.constexpr, MASS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_FORCED: tl.constexpr, HAS_DENSE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = first_head + tl.program_id(1) % heads
    code_ptr += (tl.program_id(1).to(tl.int64) * T + t) * W * 32
    mask_ptr += b * stride_mb + h.to(tl.int64) * stride_mh + t * stride_mt

    score, forced, forced_mass = _load(code_ptr, 0, W, dense_keys, N, BLOCK_W, WIDE, HAS_FORCED)
    top = tl.max(score)
    valid, mass = _held(score, 0.0, True, MASS)
    if not SINGLE:
        for first in range(BLOCK_W, W, BLOCK_W):
            more, n, m = _load(code_ptr, first, W, dense_keys, N, BLOCK_W, WIDE, HAS_FORCED)
            forced += n
            forced_mass += m
            top = tl.maximum(top, tl.max(more))
            n, m = _held(more, 0.0, True, MASS)
            valid += n
            mass += m
    if HAS_BIAS:  # the share of the groups that are not masked; float64 as in the reference
        share = tl.full([], share_high, tl.float64) + tl.full([], share_low, tl.float64)
        limit = tl.maximum((valid + forced).to(tl.float64) * share + 0.5, 1.0).to(tl.int32)
    target = (mass + forced_mass) * top_p

    # low is enough (or all there are), high is not; held: by what comes at high or above.
    low = 1
    high = encode(tl.maximum(top, 0.0), WIDE) + 1
    at_low = 0.0  # how far the target is exceeded, as a share of it
    at_high = -1.0
    held = forced
    held_mass = forced_mass
    if MASS:
        # Groups below this score lack, all together, less than may be dropped.
        small = encode((mass + forced_mass) * (1 - top_p) / tl.maximum(valid, 1).to(tl.float32), WIDE) - 2
        low = tl.minimum(tl.maximum(low, small), high - 1)
        at_low = 1 / top_p - 1
    if COUNT:
        at_low = tl.maximum(at_low, (valid + forced).to(tl.float32) / limit.to(tl.float32) - 1)
    done = top < 0.0
    if COUNT:
        done = done | (forced >= limit)
        if not MASS:
            # Everything is wanted: nothing to search.
            high = tl.where(valid + forced <= limit, low + 1, high)
    if MASS:
        done = done | ((forced > 0) & (forced_mass >= target))
    high = tl.where(done, low + 1, high)
    passes = 0
    side = 0
    while high - low > 1:
        step = (high - low).to(tl.float32) * (at_low / tl.maximum(at_low - at_high, 1e-30))
        middle = low + tl.minimum(tl.maximum(step, 0.0), 1e9).to(tl.int32)
        middle = tl.where(passes < PATIENCE, middle, low + (high - low) // 2)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        cut = decode(middle, WIDE)
        count, mass = _held(score, cut, COUNT, MASS)
        if not SINGLE:
            for first in range(BLOCK_W, W, BLOCK_W):
                more, _n, _m = _load(code_ptr, first, W, dense_keys, N, BLOCK_W, WIDE, HAS_FORCED)
                n, m = _held(more, cut, COUNT, MASS)
                count += n
                mass += m
        count += forced
        mass += forced_mass
        excess = -1.0
        if COUNT:
            excess = tl.maximum(excess, (count - limit).to(tl.float32) / limit.to(tl.float32))
        if MASS:
            excess = tl.maximum(excess, (mass - target) / tl.maximum(target, 1e-30))
        enough = excess >= 0.0
        # Illinois: the end that stays twice in a row loses half its weight.
        at_high = tl.where(enough, tl.where(side == 1, at_high * 0.5, at_high), excess)
        at_low = tl.where(enough, excess, tl.where(side == -1, at_low * 0.5, at_low))
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        held = tl.where(enough, held, count)
        held_mass = tl.where(enough, held_mass, mass)
        side = tl.where(enough, 1, -1)
        passes += 1

    cut = decode(low, WIDE)
    ties = 0x3FFFFFFF  # groups at exactly the cut that are kept, by index
    if COUNT:
        ties = limit - held
    if MASS:
        needed = tl.ceil((target - held_mass) / tl.maximum(cut, 1.1754944e-38))
        ties = tl.minimum(ties, tl.minimum(tl.maximum(needed, 0.0), 1e9).to(tl.int32))
    cut = tl.where(done, float("inf"), cut)

    everything = False
    if HAS_DENSE:
        row = t * M + tl.arange(0, M)
        token = row
        if HAS_ORDER:
            token = tl.load(order_ptr + row, mask=row < Sq, other=0)
        inside = _in_ranges(token, 1, dense_queries) & (row < Sq)
        everything = tl.max(inside.to(tl.int32)) > 0
    word = tl.arange(0, BLOCK_W)
    words, at_cut = _words(score, cut, ties, everything)
    tl.store(mask_ptr + word, words, mask=word < W)
    if not SINGLE:
        for first in range(BLOCK_W, W, BLOCK_W):
            ties -= at_cut
            more, _n, _m = _load(code_ptr, first, W, dense_keys, N, BLOCK_W, WIDE, HAS_FORCED)
            words, at_cut = _words(more, cut, ties, everything)
            tl.store(mask_ptr + first + word, words, mask=first + word < W)


def configuration(words: int) -> dict:
    """How ``_cut`` holds a row of mask words: 64 groups a thread."""
    block = min(MAX_WORDS, max(16, triton.next_power_of_2(words)))
    return {"BLOCK_W": block, "SINGLE": words <= block, "num_warps": max(1, min(16, block // 64))}


def launch(
    code: Tensor, mask: Tensor, first: int, heads: int, groups: int, m: int, n: int, queries: int, keys: int,
    order: Tensor | None, top_p: float | None, share: float, masked: bool,
    dense_keys: list[int], dense_queries: list[int],
) -> None:  # fmt: skip
    """Write mask[:, first : first + heads] from the codes of these heads.

    top_p   share of the mass to keep, or None
    share   share of the groups to keep at most
    masked  whether a group may be masked, so that ``share`` is of those that are not
    """
    B, _, T, W = mask.shape
    # A range ends with the keys: it does not reach into the padding of the last group.
    dense_keys = tuple(min(x, keys) for x in dense_keys)
    high = torch.tensor(share, dtype=torch.float32).item()
    _cut[(T, B * heads)](
        code, order, mask, *mask.stride()[:3],
        first, heads, T, W, queries, max(1, int(groups * share + 0.5)), high, share - high,
        1.0 if top_p is None else top_p, dense_keys, tuple(dense_queries),
        M=m, N=n, WIDE=code.dtype == torch.int32,
        COUNT=top_p is None or share < 1, MASS=top_p is not None, HAS_BIAS=masked, HAS_ORDER=order is not None,
        HAS_FORCED=bool(dense_keys), HAS_DENSE=bool(dense_queries),
        **configuration(W),
    )  # fmt: skip
