"""The block mask from scores: the best groups of each slice, without sorting (portable Triton).

    mask[t] = the shortest prefix of the groups, best score first, that holds top_p of the mass, at most ``limit``
              or those above alpha times the score of each if all had the same, at most ``limit``

score  [B * heads, T, W * 32]  float16 or float32 (``select_scores``): 0 or more, -1 where masked, NaN
mask   [B, Hq, T, W]           int32, ``kernels.mask``
Grid   (T, B * heads)          one program a slice

The bits of scores order them. The cut is the largest value whose prefix is long enough. It is bracketed, low enough
and high not. The search begins at 0.6 of the mean score and goes by regula falsi with the Illinois rule on the log of
the odds of what is held, which is close to linear in the bits: 7 passes over the row (mean over lognormal rows of sigma
0.3 to 3 and nearly equal ones, top_p 0.5 to 0.95) where shares of the target need 9 and halving 14; from pass 12 on it
halves. What is held falls with the cut, also as float32 rounds it, so the way there does not change the mask.
Equal scores are taken by index: groups at the cut are packed to bits like those above it, and only words are ranked. So
the mask is a function of the scores alone. The row stays in registers, float16 scores in pairs where a thread has many.
A pass of 16 warps over 32,760 groups is 269 instructions a warp: 5 for two groups (compare both, select and add each)
and 110 for sums, barriers and the step. Selection by number alone is another kernel (``select_cut_packed``), which
counts in integers. Forced groups (NaN scores, ``dense_keys``) come before all others and count with their mass.
Meaning: ``reference_select.best_groups``.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels import select_cut_packed
from fg_inductor.kernels.select_cut_packed import (
    FORCED,
    MASKED_PAIR,
    PATIENCE,
    REACH,
    first_ties,
    guarded,
    holds_any,
    in_ranges,
    odds,
    of_head,
    store,
)
from fg_inductor.kernels.select_scores import NARROW_SCALE, RANK_PIVOT, RANK_STEPS
from fg_inductor.kernels.sizes import next_power_of_2

MASKED = tl.constexpr(-1.0)
NAN = tl.constexpr(0x7E00)
NARROW_UNIT = tl.constexpr(2.0**NARROW_SCALE)  # a score of 1 in float16
TYPICAL = tl.constexpr(0.6)  # the search begins at this part of the mean score


@triton.jit
def _value(x, half: tl.constexpr, WIDE: tl.constexpr):
    """float32 scores of a tile: float32 itself, or one half of each pair."""
    if WIDE:
        return x
    else:
        return (x >> (16 * half)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _bits(score, WIDE: tl.constexpr):
    """The bits of a score, as int32, in the format that is stored."""
    if WIDE:
        return score.to(tl.int32, bitcast=True)
    else:
        return score.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _from_bits(bits, WIDE: tl.constexpr):
    if WIDE:
        return bits.to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load(
    row_ptr, first, W, dense_keys,
    N: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr, HAS_FORCED: tl.constexpr, AGAIN: tl.constexpr = False,
):  # fmt: skip
    """The scores of WORDS mask words from ``first`` on, forced ones as NaN, and the mass of those in ``dense_keys``.

    [WORDS, 32] float32, or [WORDS, 16] int32, a pair of float16 in each.
    """
    HALVES: tl.constexpr = 1 if WIDE else 2
    word = first + tl.arange(0, WORDS)
    place = tl.arange(0, 32 // HALVES)
    x = tl.load(
        row_ptr + (word[:, None] * (32 // HALVES) + place[None, :]),
        mask=(word < W)[:, None],
        other=MASKED if WIDE else MASKED_PAIR,
        cache_modifier=".cg" if AGAIN else "",
    )
    mass = 0.0
    if HAS_FORCED:
        group = word[:, None] * 32 + place[None, :] * HALVES
        for half in tl.static_range(HALVES):
            score = _value(x, half, WIDE)
            forced = in_ranges((group + half) * N, N, dense_keys) & (score != MASKED)
            mass += tl.sum(tl.where(forced & (score == score), score, 0.0))
            if WIDE:
                x = tl.where(forced, float("nan"), x)
            elif half == 0:
                x = tl.where(forced, (x & -0x10000) | NAN, x)
            else:
                x = tl.where(forced, (x & 0xFFFF) | (NAN << 16), x)
    return x, mass


@triton.jit
def _statistics(x, WIDE: tl.constexpr, MASS: tl.constexpr):
    """Of a tile: groups that are forced, groups that are not masked, the largest score, the mass."""
    HALVES: tl.constexpr = 1 if WIDE else 2
    forced = tl.zeros(x.shape, tl.int32)
    valid = tl.zeros(x.shape, tl.int32)
    top = tl.full(x.shape, -1.0, tl.float32)
    mass = tl.zeros(x.shape, tl.float32)
    for half in tl.static_range(HALVES):
        score = _value(x, half, WIDE)
        forced += (score != score).to(tl.int32)
        valid += (score != MASKED).to(tl.int32)
        score = tl.where(score == score, score, -1.0)
        top = tl.maximum(top, score)
        mass += tl.maximum(score, 0.0)
    total = 0.0
    if MASS:
        total = tl.sum(mass)
    return tl.sum(forced), tl.sum(valid), tl.max(top), total


@triton.jit
def _held(x, cut, WIDE: tl.constexpr, COUNT: tl.constexpr, MASS: tl.constexpr):
    """Groups of a tile with a score of ``cut`` or more, forced ones left out: how many, and their mass."""
    HALVES: tl.constexpr = 1 if WIDE else 2
    score = _value(x, 0, WIDE)
    counts = (score >= cut).to(tl.int32)
    masses = tl.where(score >= cut, score, 0.0)  # no 0 before it: the compiler would have to add that
    if HALVES == 2:
        score = _value(x, 1, WIDE)
        counts += (score >= cut).to(tl.int32)
        masses += tl.where(score >= cut, score, 0.0)
    count = 0
    mass = 0.0
    if COUNT:
        count = tl.sum(counts)
    if MASS:
        mass = tl.sum(masses)
    return count, mass


@triton.jit
def _excess(
    count, mass, groups, total, wanted_count, wanted_mass,
    COUNT: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """How far what is held is above what is wanted, the larger of the two; a guide for the search and no more."""
    excess = -1e30
    if COUNT:
        excess = tl.maximum(excess, odds(count.to(tl.float32), groups.to(tl.float32), 0.5) - wanted_count)
    if MASS:
        excess = tl.maximum(excess, odds(mass, total, total * 2.0**-20) - wanted_mass)
    return excess


@triton.jit
def _store_words(x, mask_ptr, first, W, cut, ties, everything, WIDE: tl.constexpr):
    """Store the mask words of a tile: groups above the cut, forced ones, and the first ``ties`` of those at the cut.
    Returns how many lie at the cut."""
    HALVES: tl.constexpr = 1 if WIDE else 2
    WORDS: tl.constexpr = x.shape[0]
    place = tl.arange(0, 32 // HALVES)[None, :] * HALVES
    above = tl.zeros(x.shape, tl.int32)
    at_cut = tl.zeros(x.shape, tl.int32)
    for half in tl.static_range(HALVES):
        score = _value(x, half, WIDE)
        keep = (score > cut) | (score != score) | (everything & (score != MASKED))
        above += keep.to(tl.int32) << (place + half)
        at_cut += (score == cut).to(tl.int32) << (place + half)
    above = tl.sum(above, 1)
    at_cut = tl.sum(at_cut, 1)
    tied, count = first_ties(at_cut, ties)
    word = first + tl.arange(0, WORDS)
    tl.store(mask_ptr + word, above | tied, mask=word < W)
    return count


@triton.jit(do_not_specialize=["groups", "limit"])  # 1 would be a Python int, without methods
def _cut(
    row_ptr, order_ptr, mask_ptr, refresh_ptr,
    stride_mb, stride_mh, stride_mt,
    first_head, heads, first_slice, T, W, Sq, groups, limit, shares, top_p, alpha, summed, dense_keys, dense_queries,
    M: tl.constexpr, N: tl.constexpr, WORDS: tl.constexpr, REST: tl.constexpr, LOOP: tl.constexpr, LEAN: tl.constexpr,
    WIDE: tl.constexpr, COUNT: tl.constexpr, MASS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_FORCED: tl.constexpr, HAS_DENSE: tl.constexpr, ALPHA: tl.constexpr, HAS_REFRESH: tl.constexpr,
    BY_HEAD: tl.constexpr,
):  # fmt: skip
    if HAS_REFRESH:  # noqa: SIM102 (decided when it is compiled)
        if tl.load(refresh_ptr) == 0:
            return
    t = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = first_head + tl.program_id(1) % heads
    row_ptr += (tl.program_id(1).to(tl.int64) * T + t) * W * (32 if WIDE else 16)
    t += first_slice
    mask_ptr += b * stride_mb + h.to(tl.int64) * stride_mh + t * stride_mt

    # The row: WORDS words and REST words in registers; what is beyond is read again in each pass.
    x, forced_mass = _load(row_ptr, 0, W, dense_keys, N, WORDS, WIDE, HAS_FORCED)
    forced, valid, top, mass = _statistics(x, WIDE, MASS)
    if REST > 0:
        y, y_mass = _load(row_ptr, WORDS, W, dense_keys, N, REST, WIDE, HAS_FORCED)
        y_forced, y_valid, y_top, y_total = _statistics(y, WIDE, MASS)
        forced_mass += y_mass
        forced += y_forced
        valid += y_valid
        top = tl.maximum(top, y_top)
        mass += y_total
    if LOOP:
        for first in range(WORDS + REST, W, REST):
            z, z_mass = _load(row_ptr, first, W, dense_keys, N, REST, WIDE, HAS_FORCED)
            z_forced, z_valid, z_top, z_total = _statistics(z, WIDE, MASS)
            forced_mass += z_mass
            forced += z_forced
            valid += z_valid
            top = tl.maximum(top, z_top)
            mass += z_total
    if HAS_BIAS:
        groups = valid
    if HAS_BIAS or BY_HEAD:  # the share of the groups that are not masked; float64 as in the reference
        limit = tl.maximum(groups.to(tl.float64) * of_head(shares, h) + 0.5, 1.0).to(tl.int32)
    total = mass + forced_mass
    target = total * top_p
    most = limit.to(tl.float32)

    # low is enough (or all there are), high is not; held: by what comes at high or above.
    low = 0
    high = _bits(tl.maximum(top, 0.0), WIDE) + 1
    held = forced
    held_mass = forced_mass
    done = top < 0.0
    mean = total / groups.to(tl.float32)
    if MASS:
        # Groups below this score lack, all together, less than may be dropped.
        small = _bits(total * (1 - top_p) / groups.to(tl.float32), WIDE) - 2
        low = tl.minimum(tl.maximum(low, small), high - 1)
        done = done | ((forced > 0) & (forced_mass >= target))
    if COUNT:
        done = done | (forced >= limit)
        if not MASS:  # where everything is wanted there is nothing to search
            high = tl.where(groups <= limit, low + 1, high)
    if not (COUNT or MASS):
        high = low + 1
    high = tl.where(done, low + 1, high)
    # The search may go any way: what is held falls with the cut, also as it is rounded.
    count_wanted = odds(most, groups.to(tl.float32), 0.5)
    mass_wanted = odds(target, total, total * 2.0**-20)
    at_low = _excess(groups, total, groups, total, count_wanted, mass_wanted, COUNT, MASS)
    at_high = _excess(groups - groups, total - total, groups, total, count_wanted, mass_wanted, COUNT, MASS)
    middle = _bits(mean * TYPICAL, WIDE)
    reach = REACH * 8192.0 if WIDE else REACH
    least = low
    greatest = high
    passes = 0
    side = 0
    while high - low > 1:
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        cut = _from_bits(middle, WIDE)
        # Zero, which the compiler can't know: else it converts the whole row before the loop, and spills.
        zero = tl.minimum(low, 0)
        count, mass = _held(x ^ zero if LEAN else x, cut, WIDE, COUNT, MASS)
        count += forced
        mass += forced_mass
        if REST > 0:
            y_count, y_total = _held(y ^ zero if LEAN else y, cut, WIDE, COUNT, MASS)
            count += y_count
            mass += y_total
        if LOOP:
            for first in range(WORDS + REST, W, REST):
                z, _mass = _load(row_ptr, first, W, dense_keys, N, REST, WIDE, HAS_FORCED)
                z_count, z_total = _held(z, cut, WIDE, COUNT, MASS)
                count += z_count
                mass += z_total
        enough = low < 0
        if COUNT:
            enough = enough | (count >= limit)
        if MASS:
            enough = enough | (mass - target >= 0.0)
        excess = _excess(count, mass, groups, total, count_wanted, mass_wanted, COUNT, MASS)
        excess = tl.where(enough, tl.maximum(excess, 0.0), tl.minimum(excess, 0.0))
        # Illinois: the end that stays twice in a row loses weight.
        at_high = tl.where(enough, tl.where(side == 1, at_high * 0.7, at_high), excess)
        at_low = tl.where(enough, excess, tl.where(side == -1, at_low * 0.7, at_low))
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        held = tl.where(enough, held, count)
        held_mass = tl.where(enough, held_mass, mass)
        side = tl.where(enough, 1, -1)
        passes += 1
        # Between the ends; by the slope alone, and twice as far each time, while one of them is as it was.
        width = (high - low).to(tl.float32)
        inside = width * (at_low / tl.maximum(at_low - at_high, 1e-30))
        open_ended = (low == least) | (high == greatest)
        step = tl.where(open_ended, excess * reach + 8.0 * side, inside)
        step = tl.minimum(tl.maximum(step, -width), width).to(tl.int32)
        reach *= 2
        middle = tl.where(open_ended & (low == least), high, low) + step
        middle = tl.where(passes < PATIENCE, middle, low + (high - low) // 2)

    cut = _from_bits(low, WIDE)
    ties = 0x3FFFFFFF  # groups at exactly the cut that are kept, by index
    if COUNT:
        ties = limit - held
    if MASS:
        needed = tl.ceil((target - held_mass) / tl.maximum(cut, 1.1754944e-38))
        ties = tl.minimum(ties, tl.minimum(tl.maximum(needed, 0.0), 1e9).to(tl.int32))
    cut = tl.where(done, float("inf"), cut)
    if ALPHA:  # nothing at or below alpha times the score that all groups would have if they were equal
        means = tl.cdiv(tl.minimum(Sq - t * M, M), summed)
        bound = alpha * means.to(tl.float32) / tl.maximum(groups, 1).to(tl.float32)
        if not WIDE:
            bound *= NARROW_UNIT
        best = (forced == 0) & (top >= 0.0) & (top <= bound)  # which is kept always
        ties = tl.where(cut > bound, ties, best.to(tl.int32))
        cut = tl.where(cut > bound, cut, tl.where(best, top, bound))

    everything = False
    if HAS_DENSE:
        everything = holds_any(t, order_ptr, Sq, dense_queries, M, HAS_ORDER)
    if WIDE or ALPHA or not LEAN:  # the last: with the float32 of the loop
        ties -= _store_words(x, mask_ptr, 0, W, cut, ties, everything, WIDE)
        if REST > 0:
            ties -= _store_words(y, mask_ptr, WORDS, W, cut, ties, everything, WIDE)
        if LOOP:
            for first in range(WORDS + REST, W, REST):
                z, _mass = _load(row_ptr, first, W, dense_keys, N, REST, WIDE, HAS_FORCED)
                ties -= _store_words(z, mask_ptr, first, W, cut, ties, everything, WIDE)
    else:
        low = tl.where(everything, 0, tl.where(done, FORCED, low))
        high = tl.where(everything, 0, tl.where(done, FORCED, low + 1))
        # Read again, from L2 (else the compiler takes it for the same load): fewer registers live through the loop.
        x, _mass = _load(row_ptr, 0, W, dense_keys, N, WORDS, WIDE, HAS_FORCED, True)
        ties -= store(guarded(x), mask_ptr, 0, W, high, low, ties)
        if REST > 0:
            y, _mass = _load(row_ptr, WORDS, W, dense_keys, N, REST, WIDE, HAS_FORCED, True)
            ties -= store(guarded(y), mask_ptr, WORDS, W, high, low, ties)
        if LOOP:
            for first in range(WORDS + REST, W, REST):
                z, _mass = _load(row_ptr, first, W, dense_keys, N, REST, WIDE, HAS_FORCED)
                ties -= store(guarded(z), mask_ptr, first, W, high, low, ties)


def configuration(words: int, wide: bool) -> dict:
    """How ``_cut`` holds a row of mask words: the first WORDS and the REST in registers, in pairs all the time (LEAN)
    where a thread has more than 64 groups; a row that is longer still is read in blocks of REST (LOOP)."""
    most = 1024 if wide else 2048
    head = 1 << (words.bit_length() - 1)  # the largest power of two that fits
    rest = next_power_of_2(words - head) if words > head else 0
    if head < 128 or rest > head // 2:  # one tile that covers it is no larger
        head, rest = next_power_of_2(words), 0
    if head > most:
        head, rest = most, most // 4
    warps = max(1, min(16, head // 64))
    return {"WORDS": head, "REST": rest, "LOOP": words > head + rest, "LEAN": head > 1024, "num_warps": warps}


@functools.lru_cache(maxsize=1024)
def _parts(shares: tuple[float, ...]) -> tuple[float, ...]:
    """Three numbers of float32 for each that sum to it: what a kernel takes of a float64."""
    parts, rest = [], torch.tensor(shares, dtype=torch.float64)
    for _ in range(3):
        parts.append(rest.float())
        rest = rest - parts[-1]
    return tuple(torch.stack(parts, 1).flatten().tolist())


def launch(
    score: Tensor, mask: Tensor, first: int, heads: int, groups: int, m: int, n: int, queries: int, keys: int,
    order: Tensor | None, top_p: float | None, share: float | list[float], alpha: float | None, summed: int,
    masked: bool, dense_keys: list[int], dense_queries: list[int], refresh: Tensor | None = None,
    first_slice: int = 0, slices: int | None = None, ranked: bool = False,
) -> None:  # fmt: skip
    """Write mask[:, first : first + heads] from the scores of these heads; or of ``slices`` slices alone.

    top_p   share of the mass to keep, or None
    share   share of the groups to keep at most; one for each of the mask's heads, or one for all
    alpha   drop groups that have no more than alpha times the probability of each if all had the same; or None
    summed  queries for each of the probabilities that a score is the sum of
    masked  whether a group may be masked, so that ``share`` is of those that are not
    refresh a bool scalar on the device, or None: where it is False the mask stays as it is
    ranked  whether the scores are steps of their logarithms (``select_scores``); not with top_p or alpha
    """
    B, _, T, W = mask.shape
    T = T if slices is None else slices
    # A range ends with the keys: it does not reach into the padding of the last group.
    dense_keys = tuple(min(x, keys) for x in dense_keys)
    shares = share if isinstance(share, list) else [share]
    wide = score.dtype == torch.float32
    count = min(shares) < 1 or (top_p is None and alpha is None)
    limit = max(1, int(groups * shares[0] + 0.5))
    place = (first, heads, first_slice, T, W, queries, groups, limit)
    flags = dict(
        M=m, N=n, HAS_BIAS=masked, HAS_ORDER=order is not None, HAS_FORCED=bool(dense_keys),
        HAS_DENSE=bool(dense_queries), HAS_REFRESH=refresh is not None, BY_HEAD=len(shares) > 1,
    )  # fmt: skip
    pointers = (score if wide else score.view(torch.int32), order, mask, refresh, *mask.stride()[:3])
    if count and not wide and top_p is None and alpha is None:
        typical, reach = select_cut_packed.typical_bits(2.0**NARROW_SCALE * (m // summed) / groups), REACH.value
        if ranked:
            typical, reach = RANK_PIVOT, reach * RANK_STEPS / 1024
        select_cut_packed._cut_packed[(T, B * heads)](
            *pointers, *place, typical, reach, _parts(tuple(shares)),
            dense_keys, tuple(dense_queries), **flags, **select_cut_packed.configuration(W),
        )  # fmt: skip
        return
    _cut[(T, B * heads)](
        *pointers, *place, _parts(tuple(shares)), 1.0 if top_p is None else top_p, alpha or 0.0, summed,
        dense_keys, tuple(dense_queries), **flags, WIDE=wide, COUNT=count, MASS=top_p is not None,
        ALPHA=alpha is not None, **configuration(W, wide),
    )  # fmt: skip
