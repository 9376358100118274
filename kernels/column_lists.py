"""Block mask -> column lists (portable Triton): the kept groups of each tile of queries as ascending ids.

    lists[x, 0 ..] = ids of the groups that a slice of tile x keeps

mask       [B, H, T, W]   int32
clean      [B, W]         int32, the groups without a masked key (a mask row's bits), and
mixed      [B, W]         int32, those with masked and other keys; neither where there is no key_bias
lists      [B, H, X, G]   int32; entries beyond the kept groups are never written. Clean groups first, then mixed ones;
                          those whose keys are all masked are left out. A tile is SUB slices in a row, X = ceil(T /
                          SUB); with SUB > 1 bit 24 + s of an entry says whether the tile's slice s keeps the group
alike      [B, H, T]      int32, which slices follow each other (``alike_slices``), or None: as they are
keys       [B, H, X]      int32, keys in the listed groups, and those of them in clean groups
tail_bias  [B, H, T, J]   float32, for the pooled tail: log2(keys of the 128-key block j that t dropped) + bias[j],
                          -inf where none was; t is a place in ``alike``, as in the tiles
Grid       (X, ceil(G / BLOCK), B * H)

A program expands BLOCK groups of one tile. It finds its place in the list by counting the bits before them, so that no
program waits for another. There is no capacity below G, so no mask is ever cut, and nothing depends on data but the
values written.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels.bits import popcount
from fg_inductor.kernels.mask import group_count, pack
from fg_inductor.kernels.reference import SUMMARY, group_statistics
from fg_inductor.kernels.sizes import cdiv, next_power_of_2

BLOCK = 4096
ID_BITS = tl.constexpr(24)  # of a list entry; above them, one bit for each slice of the tile


@triton.jit
def _words(tile, s, word):
    """Words of the tile's slice s; 0 where there is none. ``tile``: what ``_column_lists`` makes for it."""
    mask_ptr, alike_ptr, first, slices, stride_mt, W = tile
    place = first + tl.minimum(s, slices - 1)
    t = place
    if alike_ptr is not None:
        t = tl.load(alike_ptr + place)
    return tl.load(mask_ptr + t * stride_mt + word, mask=word < tl.where(slices > s, W, 0), other=0)


@triton.jit
def _union(tile, word, SUB: tl.constexpr):
    """The words of a tile: the bits that any of its slices sets."""
    words = _words(tile, 0, word)
    for s in tl.static_range(1, SUB):
        words |= _words(tile, s, word)
    return words


@triton.jit
def _column_lists(
    mask_ptr, alike_ptr, clean_ptr, mixed_ptr, lists_ptr, keys_ptr, clean_keys_ptr, tail_bias_ptr,
    group_keys_ptr, block_keys_ptr, block_bias_ptr,
    stride_mb, stride_mh, stride_mt,
    H, T, X, W, G, J, Sk,
    N: tl.constexpr, SUB: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr, SUMMARY: tl.constexpr,
    TAIL: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = BLOCK // 32
    x = tl.program_id(0)
    chunk = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    slices = tl.minimum(T - x * SUB, SUB)
    if alike_ptr is not None:
        alike_ptr += bh * T
    tile = (mask_ptr + b * stride_mb + h * stride_mh, alike_ptr, x * SUB, slices, stride_mt, W)
    index = bh * X + x
    list_ptr = lists_ptr + index * G

    before = 0  # listed groups of earlier chunks
    mixed_before = 0
    all_clean = 0
    if HAS_BIAS or chunk > 0:
        word = tl.arange(0, BLOCK_W)
        words = _union(tile, word, SUB)
        earlier = word < chunk * WORDS
        if HAS_BIAS:
            mixed = words & tl.load(mixed_ptr + b * W + word, mask=word < W, other=0)
            mixed_before = tl.sum(tl.where(earlier, popcount(mixed), 0))
            words = words & tl.load(clean_ptr + b * W + word, mask=word < W, other=0)
            all_clean = tl.sum(popcount(words))
        before = tl.sum(tl.where(earlier, popcount(words), 0))

    word = chunk * WORDS + tl.arange(0, WORDS)
    words = _union(tile, word, SUB)
    mixed = words
    if HAS_BIAS:
        mixed = words & tl.load(mixed_ptr + b * W + word, mask=word < W, other=0)
        words = words & tl.load(clean_ptr + b * W + word, mask=word < W, other=0)
    counts = popcount(words)
    offset = tl.reshape(tl.broadcast_to((before + tl.cumsum(counts, 0) - counts)[:, None], [WORDS, 32]), [BLOCK])
    kept = before + tl.sum(counts)
    # One lane a group: a warp writes the list entries of one word, which are neighbours.
    group = chunk * BLOCK + tl.arange(0, BLOCK)
    bit = group % 32
    own_words = _union(tile, group // 32, SUB)
    entry = group
    if SUB > 1:
        for s in tl.static_range(SUB):
            entry |= ((_words(tile, s, group // 32) >> bit) & 1) << (ID_BITS + s)
    chosen = own_words
    if HAS_BIAS:
        chosen = own_words & tl.load(clean_ptr + b * W + group // 32, mask=group // 32 < W, other=0)
    tl.store(list_ptr + offset + popcount(chosen & ((1 << bit) - 1)), entry, mask=(chosen & (1 << bit)) != 0)
    clean_kept = kept
    if HAS_BIAS:
        counts = popcount(mixed)
        first = all_clean + mixed_before
        offset = tl.reshape(tl.broadcast_to((first + tl.cumsum(counts, 0) - counts)[:, None], [WORDS, 32]), [BLOCK])
        chosen = own_words & tl.load(mixed_ptr + b * W + group // 32, mask=group // 32 < W, other=0)
        tl.store(list_ptr + offset + popcount(chosen & ((1 << bit) - 1)), entry, mask=(chosen & (1 << bit)) != 0)
        clean_kept = all_clean
        kept = first + tl.sum(counts)

    if chunk == tl.num_programs(1) - 1:
        last = _union(tile, (G - 1) // 32, SUB)
        if HAS_BIAS:  # a ragged group is never clean
            last &= tl.load(mixed_ptr + b * W + (G - 1) // 32)
        ragged = ((last >> ((G - 1) % 32)) & 1) * (G * N - Sk)
        tl.store(keys_ptr + index, kept * N - ragged)
        tl.store(clean_keys_ptr + index, clean_kept * N - (0 if HAS_BIAS else ragged))

    if TAIL:
        BLOCKS: tl.constexpr = BLOCK * N // SUMMARY  # summary blocks in BLOCK groups
        block = chunk * BLOCKS + tl.arange(0, BLOCKS)
        if HAS_BIAS:
            held = tl.load(block_keys_ptr + b * J + block, mask=block < J, other=0.0)
            shift = tl.load(block_bias_ptr + b * J + block, mask=block < J, other=0.0)
            keys = tl.load(group_keys_ptr + b * G + group, mask=group < G, other=0.0)
        else:
            held = tl.maximum(tl.minimum(Sk - block * SUMMARY, SUMMARY), 0).to(tl.float32)
            shift = 0.0
            keys = tl.maximum(tl.minimum(Sk - group * N, N), 0).to(tl.float32)
        for s in tl.static_range(SUB):
            if N == 1 and not HAS_BIAS:
                own = popcount(_words(tile, s, word))
                dropped = held - tl.sum(tl.reshape(own, [BLOCKS, SUMMARY // 32]), 1)
            else:
                own = (_words(tile, s, group // 32) >> bit) & 1
                dropped = held - tl.sum(tl.reshape(keys * own, [BLOCKS, SUMMARY // N]), 1)
            bias = tl.where(dropped > 0.5, tl.log2(tl.maximum(dropped, 1.0)) + shift, float("-inf"))
            place = tail_bias_ptr + (bh * T + x * SUB + s) * J + block
            tl.store(place, bias, mask=block < tl.where(slices > s, J, 0))


def block_of(sub: int) -> int:
    """Groups that a program expands: fewer where every one carries the bits of several slices."""
    return BLOCK if sub == 1 else BLOCK // 4


def group_words(bias: Tensor | None, padding: bool, n: int, words: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The groups without a masked key, and the others with a key that is not masked: int32 [B, W] each.

    ``padding``: bias holds nothing but 0 and -inf. Otherwise its values matter, and every group counts as mixed.
    """
    if bias is None:
        return None, None
    keys = bias.shape[1]
    groups = group_count(keys, n)
    visible = torch.nn.functional.pad(bias > -math.inf, (0, groups * n - keys)).unflatten(1, (groups, n))
    some, every = visible.any(-1), visible.all(-1)
    if not padding:
        every = torch.zeros_like(every)
    return pack(every, words), pack(some & ~every, words)


class Lists(NamedTuple):
    """What ``launch`` makes; ``clean`` are the keys at the front of a list that need no look at the bias."""

    lists: Tensor
    keys: Tensor
    clean: Tensor
    tail_bias: Tensor | None


def launch(
    mask: Tensor, keys: int, n: int, sub: int = 1, tail: bool = False, bias: Tensor | None = None,
    padding: bool = False, alike: Tensor | None = None,
) -> Lists:  # fmt: skip
    """Lists of tiles of ``sub`` slices; bias [B, Sk] is from ``normalise_key_bias``, padding as in ``group_words``."""
    B, H, T, W = mask.shape
    if mask.stride(3) != 1:
        raise ValueError("column_lists: the words of a mask row must be contiguous; call mask.contiguous().")
    G, X = group_count(keys, n), (T + sub - 1) // sub
    lists = torch.empty(B, H, X, G, dtype=torch.int32, device=mask.device)
    kept = torch.empty(B, H, X, dtype=torch.int32, device=mask.device)
    clean_keys = torch.empty_like(kept)
    clean, mixed = group_words(bias, padding, n, W)
    group_keys = block_keys = block_bias = tail_bias = None
    blocks = group_count(keys, SUMMARY) if tail else 0
    if tail:
        tail_bias = torch.empty(B, H, T, blocks, dtype=torch.float32, device=mask.device)
        if bias is not None:
            group_keys, _ = group_statistics(bias, keys, n, bias)
            block_keys, block_bias = group_statistics(bias, keys, SUMMARY, bias)
            block_bias = block_bias * math.log2(math.e)
    block = min(block_of(sub), max(128, next_power_of_2(G)))
    _column_lists[(X, cdiv(G, block), B * H)](
        mask, alike, clean, mixed, lists, kept, clean_keys, tail_bias, group_keys, block_keys, block_bias,
        *mask.stride()[:3],
        H, T, X, W, G, blocks, keys,
        N=n, SUB=sub, BLOCK=block, BLOCK_W=next_power_of_2(W), SUMMARY=SUMMARY,
        TAIL=tail, HAS_BIAS=bias is not None,
        num_warps=4,
    )  # fmt: skip
    return Lists(lists, kept, clean_keys, tail_bias)
