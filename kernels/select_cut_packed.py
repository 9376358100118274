"""The best groups of each slice by number: ``select_cut`` for float16 scores and a density (portable Triton).

    mask[t] = the ``limit`` groups with the best scores, equal ones by index

score  [B * heads, T, W * 16]  int32, two float16 (``select_scores``) in each: 0 or more, -1 where masked, NaN
mask   [B, Hq, T, W]           int32, ``kernels.mask``
Grid   (T, B * heads)          one program a slice

Two scores are counted at once: their bits lie below a guard bit each, and after one subtraction of the cut from both
the guard is set where a score is the cut or more. A pass costs 7 instructions for four groups (two each of subtract,
shift, mask; one addition of three terms) and 75 to 90 for the sum over warps, its barrier and the step: 314 a warp at 8
warps and 32,760 groups. Forced groups (NaN, ``dense_keys``) are the largest integers, masked ones never count, so
nothing is known of the row before the search but where it begins: at the mean of the scores, whose sum is the number of
query means, or at the pivot of ranked ones. It goes on as in ``select_cut``, 5 to 7 passes (lognormal rows of sigma 0.3
to 3, densities 0.02 to 0.8) where shares of the count need 9.6, and stops where exactly ``limit`` are held. All is
integers: the way the search goes does not change the mask. A thread holds 64 pairs, within 128 registers: two programs
of 8 warps share an SM at 32,760 groups. Meaning: ``reference_select.best_groups``; resources: ``python -m fg_inductor
bench resources``.
"""

import functools
import struct

import triton
import triton.language as tl

from fg_inductor.kernels.bits import popcount
from fg_inductor.kernels.sizes import next_power_of_2

MASKED_PAIR = tl.constexpr(-0x43FF4400)  # 0xBC00BC00, two float16 of -1
GUARD = tl.constexpr(-0x7FFF8000)  # 0x80008000, the bit above each of two values
ONES = tl.constexpr(0x00010001)
MOST = 2048  # words of the first tile
PATIENCE = tl.constexpr(12)
REACH = tl.constexpr(1 / (1.66e-3 * 2.0**23))  # bits of a cut over ``odds``, for a lognormal of sigma 1
FORCED = tl.constexpr(0x7C01)  # bits of NaN are these or more; those of all other scores are less


@triton.jit
def in_ranges(index, size, ranges):
    """Whether index .. index + size - 1 meets one of the half-open ranges (start0, end0, start1, end1, ...)."""
    inside = index < 0
    for i in tl.static_range(len(ranges) // 2):
        meets = (index < ranges[2 * i + 1]) & (index + size > ranges[2 * i])
        inside = inside | (meets & (ranges[2 * i] < ranges[2 * i + 1]))
    return inside


@triton.jit
def holds_any(t, order_ptr, Sq, dense_queries, M: tl.constexpr, HAS_ORDER: tl.constexpr):
    """Whether slice t has a query in one of the ranges, which are of tokens."""
    row = t * M + tl.arange(0, M)
    token = row
    if HAS_ORDER:
        token = tl.load(order_ptr + row, mask=row < Sq, other=0)
    inside = in_ranges(token, 1, dense_queries) & (row < Sq)
    return tl.max(inside.to(tl.int32)) > 0


@triton.jit
def of_head(shares, h):
    """The share of head h in float64: three float32 parts for all heads, or three for each (``select_cut._parts``)."""
    high = shares[0]
    middle = shares[1]
    low = shares[2]
    for i in tl.static_range(1, len(shares) // 3):
        high = tl.where(h == i, shares[3 * i], high)
        middle = tl.where(h == i, shares[3 * i + 1], middle)
        low = tl.where(h == i, shares[3 * i + 2], low)
    return tl.full([], high, tl.float64) + tl.full([], middle, tl.float64) + tl.full([], low, tl.float64)


@triton.jit
def odds(held, total, little):
    """The logarithm of the odds held : total - held, times 2^23 and linear between powers of two: the bits of a
    float32. It is close to linear in the bits of the cut where scores are spread like a lognormal."""
    for_it = (held + little).to(tl.int32, bitcast=True)
    against = (tl.maximum(total - held, 0.0) + little).to(tl.int32, bitcast=True)
    return (for_it - against).to(tl.float32)


@triton.jit
def first_ties(at_cut, ties):
    """The first ``ties`` bits of mask words [WORDS], and how many bits they have in all."""
    count = popcount(at_cut)
    taken = tl.minimum(tl.maximum(ties - (tl.cumsum(count, 0) - count), 0), count)
    part = tl.where(taken < count, taken, 0)  # in one word at most: its lowest bits
    words = tl.where(taken == count, at_cut, 0)
    bits = tl.max(part)
    if bits > 0:
        rest = tl.sum(tl.where(part > 0, at_cut, 0))
        lowest = 0
        for _ in range(bits):
            lowest = lowest | (rest & -rest)
            rest = rest & (rest - 1)
        words = words | tl.where(part > 0, lowest, 0)
    return words, tl.sum(count)


@triton.jit
def guarded(x):
    """Pairs of float16 whose integers order them: the bits of a score below a guard bit, which is set. A masked group
    has it not, and the largest value below it, so that what is subtracted borrows nothing. NaN is above all others."""
    masked = (x >> 15) & ~(x >> 14) & ONES  # the sign without the highest bit of the exponent: -1, and no NaN
    return (x | GUARD) - masked * 0x3C01


@triton.jit
def _load(
    row_ptr, first, W, dense_keys,
    N: tl.constexpr, WORDS: tl.constexpr, HAS_FORCED: tl.constexpr,
):  # fmt: skip
    """The scores of WORDS mask words from ``first`` on, ``guarded``; groups in ``dense_keys`` are as large as NaN."""
    word = first + tl.arange(0, WORDS)
    place = tl.arange(0, 16)
    x = tl.load(row_ptr + (word[:, None] * 16 + place[None, :]), mask=(word < W)[:, None], other=MASKED_PAIR)
    x = guarded(x)
    if HAS_FORCED:
        group = word[:, None] * 32 + place[None, :] * 2
        for half in tl.static_range(2):
            forced = in_ranges((group + half) * N, N, dense_keys)
            x = tl.where(forced, x | (0x7FFF << (16 * half)), x)
    return x


@triton.jit
def _less(x, bits):
    """The pairs less these bits: the guard of a group is still set where it has them or more."""
    return x - (bits | (bits << 16))


@triton.jit
def _fold(x, bits, BASE: tl.constexpr):
    """Groups of a tile with these bits or more, in both halves, summed over blocks of BASE words: by each thread."""
    flags = (_less(x, bits) >> 15) & ONES
    return tl.sum(tl.reshape(flags, [flags.shape[0] // BASE, BASE, 16]), 0)


@triton.jit
def _held(
    x, y, bits, row_ptr, W, dense_keys,
    N: tl.constexpr, WORDS: tl.constexpr, REST: tl.constexpr, LOOP: tl.constexpr, BASE: tl.constexpr,
    HAS_FORCED: tl.constexpr,
):  # fmt: skip
    """Groups of the row with these bits or more. What is in registers is fewer than 65,536 pairs: no half overflows."""
    flags = _fold(x, bits, BASE)
    if REST > 0:
        flags += _fold(y, bits, BASE)
    if LOOP:
        flags = (flags & 0xFFFF) + (flags >> 16)
        for first in range(WORDS + REST, W, REST):
            z = _fold(_load(row_ptr, first, W, dense_keys, N, REST, HAS_FORCED), bits, BASE)
            flags += (z & 0xFFFF) + (z >> 16)
        return tl.sum(flags)
    else:
        flags = tl.sum(flags)
        return (flags & 0xFFFF) + ((flags >> 16) & 0xFFFF)


@triton.jit
def _words(pairs):
    """Mask words [WORDS] from the guards of a tile [WORDS, 16]; first the 8 bits of 4 neighbours: of one thread."""
    place = tl.arange(0, 4)
    pairs = tl.reshape((pairs & GUARD).to(tl.uint32, bitcast=True), [pairs.shape[0], 4, 4])
    pairs = tl.sum(pairs >> (6 - 2 * place)[None, None, :], 2)  # bits 9, 11, 13, 15 and 25, 27, 29, 31
    return tl.sum((((pairs >> 9) | (pairs >> 24)) & 0xFF).to(tl.int32) << (8 * place)[None, :], 1)


@triton.jit
def store(x, mask_ptr, first, W, high, low, ties):
    """Store the mask words of a tile: groups with the bits ``high`` or more, the first ``ties`` of the others that have
    ``low`` or more. Returns how many these are."""
    words = _words(_less(x, high))
    count = 0
    if high > low:
        tied, count = first_ties(_words(_less(x, low)) ^ words, ties)
        words = words | tied
    word = first + tl.arange(0, x.shape[0])
    tl.store(mask_ptr + word, words, mask=word < W)
    return count


@triton.jit(do_not_specialize=["groups", "limit", "typical"])  # 1 would be a Python int, without methods
def _cut_packed(
    row_ptr, order_ptr, mask_ptr, refresh_ptr,
    stride_mb, stride_mh, stride_mt,
    first_head, heads, first_slice, T, W, Sq, groups, limit, typical, reach, shares, dense_keys, dense_queries,
    M: tl.constexpr, N: tl.constexpr, WORDS: tl.constexpr, REST: tl.constexpr, LOOP: tl.constexpr, BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_FORCED: tl.constexpr, HAS_DENSE: tl.constexpr,
    HAS_REFRESH: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    if HAS_REFRESH:  # noqa: SIM102 (decided when it is compiled)
        if tl.load(refresh_ptr) == 0:
            return
    t = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = first_head + tl.program_id(1) % heads
    row_ptr += (tl.program_id(1).to(tl.int64) * T + t) * W * 16
    t += first_slice
    mask_ptr += b * stride_mb + h.to(tl.int64) * stride_mh + t * stride_mt

    # The row: WORDS words and REST words in registers; what is beyond is read again in each pass.
    x = _load(row_ptr, 0, W, dense_keys, N, WORDS, HAS_FORCED)
    y = x
    if REST > 0:
        y = _load(row_ptr, WORDS, W, dense_keys, N, REST, HAS_FORCED)
    if HAS_BIAS:
        groups = _held(x, y, 0, row_ptr, W, dense_keys, N, WORDS, REST, LOOP, BASE, HAS_FORCED)
    if HAS_BIAS or BY_HEAD:  # the share of the groups that are not masked; float64 as in the reference
        limit = tl.maximum(groups.to(tl.float64) * of_head(shares, h) + 0.5, 1.0).to(tl.int32)
    everything = groups <= limit
    if HAS_DENSE:
        everything = everything | holds_any(t, order_ptr, Sq, dense_queries, M, HAS_ORDER)

    # low is enough (or all there are), high is not, and that many are held at high or above.
    low = 0
    high = tl.where(everything, 0, FORCED + 1)
    held = 0
    all_groups = groups.to(tl.float32)
    wanted = odds(limit.to(tl.float32), all_groups, 0.5)
    at_low = odds(all_groups, all_groups, 0.5) - wanted
    at_high = odds(all_groups * 0.0, all_groups, 0.5) - wanted
    middle = typical
    passes = 0
    side = 0
    while high - low > 1:
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        count = _held(x, y, middle, row_ptr, W, dense_keys, N, WORDS, REST, LOOP, BASE, HAS_FORCED)
        enough = count >= limit
        excess = odds(count.to(tl.float32), all_groups, 0.5) - wanted
        # Illinois: the end that stays twice in a row loses weight.
        at_high = tl.where(enough, tl.where(side == 1, at_high * 0.7, at_high), excess)
        at_low = tl.where(enough, excess, tl.where(side == -1, at_low * 0.7, at_low))
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        held = tl.where(enough, held, count)
        side = tl.where(enough, 1, -1)
        passes += 1
        step = (high - low).to(tl.float32) * (at_low / tl.maximum(at_low - at_high, 1e-30))
        open_ended = (low == 0) | (high > FORCED)
        base = tl.where(open_ended & (low == 0), high, low)
        step = tl.where(open_ended, excess * reach + 8.0 * side, step)
        reach *= 2
        middle = base + tl.minimum(tl.maximum(step, -1e6), 1e6).to(tl.int32)
        middle = tl.where(passes < PATIENCE, middle, low + (high - low) // 2)
        if count == limit:  # these are the groups, whatever lies between low and high
            high = low
            held = limit
    # All there are: high is 0. All forced ones are kept, also where they are more than the limit.
    high = tl.minimum(high, FORCED)
    ties = limit - held
    ties -= store(x, mask_ptr, 0, W, high, low, ties)
    if REST > 0:
        ties -= store(y, mask_ptr, WORDS, W, high, low, ties)
    if LOOP:
        for first in range(WORDS + REST, W, REST):
            z = _load(row_ptr, first, W, dense_keys, N, REST, HAS_FORCED)
            ties -= store(z, mask_ptr, first, W, high, low, ties)


def configuration(words: int) -> dict:
    """How ``_cut_packed`` holds a row of mask words: the first WORDS and the REST in registers, a pair in each, 64 a
    thread; a row that is longer than 131,072 groups is read in blocks of REST (LOOP). BASE words are summed last."""
    head = 1 << (words.bit_length() - 1)  # the largest power of two that fits
    rest = next_power_of_2(words - head) if words > head else 0
    if head < 128 or rest > head // 2:  # one tile that covers it is no larger
        head, rest = next_power_of_2(words), 0
    if head > MOST:
        head, rest = MOST, MOST // 4
    warps = max(1, min(16, next_power_of_2(head + rest) // 128))
    base = min(head, rest or head, 8 * warps)
    return {"WORDS": head, "REST": rest, "LOOP": words > head + rest, "BASE": base, "num_warps": warps}


@functools.lru_cache(maxsize=1024)
def typical_bits(mass: float) -> int:
    """The bits of a score in float16: where the search begins."""
    return struct.unpack("<h", struct.pack("<e", min(mass, 65504.0)))[0]
