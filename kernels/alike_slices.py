"""Slices of like masks share a tile (Triton): for Hopper's attention of M < 64, whose tiles load what any slice keeps.

    slices[t'] = the slice at place t' of a head; the SUB slices of a tile follow each other

mask    [B, H, T, W]   int32, ``kernels.mask``; any strides, contiguous words
slices  [B, H, T]      int32
Grid    (ceil(T / WINDOW), B * H), a window of neighbours

FG-Attn's distance (2509.16518): the groups that just one of two slices keeps, XOR of their masks. It follows from what
both keep, and that is a matrix product: the bits of 128 slices with themselves, in int8 on the tensor cores. Of a long
mask every STEP-th word is compared, 1,024 groups or more (544 of 1,088: unions 0.2 to 5% larger). The tiles are then
filled one slice at a time, each nearest to all of its tile so far; a row of the distances, which stay in registers, is
picked by selecting and adding. Where that makes the unions of a window no smaller, the window stays as it is.

Calls without a query order do so. With one, the slices of a tile are one place through time already (``query_order``)
and nothing is gained: the unions of 12 heads of a trained model, 0.3 kept, over what their slices keep, are 1.43 at
16x16 as they are and 1.42 matched, 1.22 and 1.21 at 32x16; in the order of the tokens 2.30 and 1.55, 1.86 and 1.17
(``attention_matched_slices*.json``, times too). Windows that agree could be left alone, but finding that out makes the
others half as slow again: registers.

The permutation differs from head to head. It lives inside an attention call: the masks, the order and the results stay
where they are. Meaning: ``reference_tiles.alike_slices``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels.bits import popcount
from fg_inductor.kernels.sizes import cdiv

WINDOW = 128
COMPARED = 32  # words of a mask row, at least where it has so many
WORDS = 2  # of them at a time: a tile of products
OPTIONS = {"num_warps": 8, "num_stages": 1, "maxnreg": 128}  # two programs share a multiprocessor


@triton.jit
def _union_size(
    rows_ptr, place, tiles, stride_mt, W,
    SUB: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """Groups in the unions of the tiles that the rows at ``place`` [WINDOW] make up, in every STEP-th word."""
    place = tl.reshape(place, [WINDOW // SUB, SUB])
    there = tl.arange(0, WINDOW // SUB) < tiles
    member = tl.arange(0, SUB)
    total = tl.zeros([WINDOW // SUB], tl.int32)
    for start in range(0, W, COMPARED * STEP):
        word = start + tl.arange(0, COMPARED) * STEP
        words = tl.zeros([WINDOW // SUB, COMPARED], tl.int32)
        for s in tl.static_range(SUB):
            row = tl.sum(tl.where(member[None, :] == s, place, 0), 1).to(tl.int64)
            words |= tl.load(
                rows_ptr + row[:, None] * stride_mt + word[None, :],
                mask=there[:, None] & (word < W)[None, :],
                other=0,
            )
        total += tl.sum(popcount(words), 1)
    return tl.sum(total)


@triton.jit
def _alike_slices(
    mask_ptr, slices_ptr, stride_mb, stride_mh, stride_mt, H, T, W,
    SUB: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr, WORDS: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * WINDOW
    bh = tl.program_id(1).to(tl.int64)
    moved = (T - 1) // SUB * SUB  # the slices of the last tile stay
    count = tl.maximum(tl.minimum(moved - first, WINDOW), 0)
    slot = tl.arange(0, WINDOW)
    rows_ptr = mask_ptr + bh // H * stride_mb + bh % H * stride_mh + first.to(tl.int64) * stride_mt
    both = tl.zeros([WINDOW, WINDOW], tl.int32)
    for start in range(0, W, WORDS * STEP):
        word = start + tl.arange(0, WORDS) * STEP
        words = tl.load(
            rows_ptr + slot.to(tl.int64)[:, None] * stride_mt + word[None, :],
            mask=(slot < count)[:, None] & (word < W)[None, :],
            other=0,
        )
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        bits = tl.reshape(bits.to(tl.int8), [WINDOW, WORDS * 32])
        both = tl.dot(bits, tl.trans(bits), both, out_dtype=tl.int32)
    own = tl.where(slot[:, None] == slot[None, :], both, 0)
    apart = (tl.sum(own, 1)[:, None] + tl.sum(own, 0)[None, :] - 2 * both).to(tl.float32)

    order = slot
    far = tl.where(slot < count, 0.0, float("inf"))
    for place in range(count):
        if place % SUB == 0:
            far = tl.where(far == float("inf"), far, 0.0)
        chosen = tl.argmin(far, 0)  # of equals the first
        order = tl.where(slot == place, chosen, order)
        far += tl.sum(tl.where(slot[None, :] == chosen, apart, 0.0), 1)  # they are symmetric; rows lie within a warp
        far = tl.where(slot == chosen, float("inf"), far)
    tiles = count // SUB
    before = _union_size(rows_ptr, slot, tiles, stride_mt, W, SUB, STEP, WINDOW, COMPARED)
    after = _union_size(rows_ptr, order, tiles, stride_mt, W, SUB, STEP, WINDOW, COMPARED)
    order = tl.where(after < before, order, slot)
    tl.store(slices_ptr + bh * T + first + slot, first + order, mask=first + slot < T)


def step_of(words: int) -> int:
    """Every how many words of a mask row two slices are compared."""
    return max(1, words // COMPARED)


def launch(mask: Tensor, sub: int) -> Tensor:
    """int32 [B, H, T] from int32 [B, H, T, W]: tiles of ``sub`` slices."""
    B, H, T, W = mask.shape
    slices = torch.empty(B, H, T, dtype=torch.int32, device=mask.device)
    _alike_slices[(cdiv(T, WINDOW), B * H)](
        mask, slices, *mask.stride()[:3], H, T, W,
        SUB=sub, STEP=step_of(W), WINDOW=WINDOW, WORDS=WORDS, COMPARED=COMPARED, **OPTIONS,
    )  # fmt: skip
    return slices
