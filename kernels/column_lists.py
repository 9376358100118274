"""Block mask -> column lists (portable Triton): the kept groups of each slice as ascending ids.

    lists[t, 0 .. counts[t]-1] = ids of the groups whose bit is set in mask[t]

mask       [B, H, T, W]   int32
lists      [B, H, T, G]   int32; entries beyond counts are never written
counts     [B, H, T]      int32
tail_bias  [B, H, T, J]   float32, for the pooled tail: log2(keys of the 128-key block j that t dropped) + bias[j],
                          -inf where none was
Grid       (T, B * H)     one program expands one slice, BLOCK groups at a time

There is no capacity below G, so no mask is ever cut, and nothing depends on data but the values written.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels.reference import SUMMARY, group_statistics

BLOCK = 1024


@triton.jit
def _column_lists(
    mask_ptr, lists_ptr, counts_ptr, tail_bias_ptr, group_keys_ptr, block_keys_ptr, block_bias_ptr,
    stride_mb, stride_mh, stride_mt,
    H, T, W, G, J,
    N: tl.constexpr, BLOCK: tl.constexpr, SUMMARY: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = BLOCK // 32
    BLOCKS: tl.constexpr = BLOCK * N // SUMMARY  # summary blocks in BLOCK groups
    t = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    words_ptr = mask_ptr + b * stride_mb + h * stride_mh + t * stride_mt
    slice_index = bh * T + t
    list_ptr = lists_ptr + slice_index * G
    kept = 0
    for first in range(0, G, BLOCK):
        word = first // 32 + tl.arange(0, WORDS)
        words = tl.load(words_ptr + word, mask=word < W, other=0)
        bits = tl.reshape((words[:, None] >> tl.arange(0, 32)[None, :]) & 1, [BLOCK])
        group = first + tl.arange(0, BLOCK)
        bits = tl.where(group < G, bits, 0)
        place = kept + tl.cumsum(bits, 0) - 1
        tl.store(list_ptr + place, group, mask=bits == 1)
        kept += tl.sum(bits)
        if TAIL:
            keys = tl.load(group_keys_ptr + b * G + group, mask=group < G, other=0.0)
            kept_keys = tl.sum(tl.reshape(keys * bits, [BLOCKS, SUMMARY // N]), 1)
            block = first * N // SUMMARY + tl.arange(0, BLOCKS)
            dropped = tl.load(block_keys_ptr + b * J + block, mask=block < J, other=0.0) - kept_keys
            bias = tl.load(block_bias_ptr + b * J + block, mask=block < J, other=0.0)
            bias = tl.where(dropped > 0.5, tl.log2(tl.maximum(dropped, 1.0)) + bias, float("-inf"))
            tl.store(tail_bias_ptr + slice_index * J + block, bias, mask=block < J)
    tl.store(counts_ptr + slice_index, kept)


def tail_statistics(bias: Tensor | None, keys: int, n: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that are not masked per group [B, G] and per summary block [B, J], and the blocks' mean bias in base 2."""
    group_keys, _ = group_statistics(bias, keys, n, like)
    block_keys, block_bias = group_statistics(bias, keys, SUMMARY, like)
    return group_keys, block_keys, block_bias * math.log2(math.e)


def launch(mask: Tensor, groups: int, n: int, tail: tuple[Tensor, Tensor, Tensor] | None = None):
    """(lists, counts, tail_bias or None) of the slices in ``mask``; ``tail`` comes from ``tail_statistics``."""
    B, H, T, W = mask.shape
    if mask.stride(3) != 1:
        raise ValueError("column_lists: the words of a mask row must be contiguous; call mask.contiguous().")
    lists = torch.empty(B, H, T, groups, dtype=torch.int32, device=mask.device)
    counts = torch.empty(B, H, T, dtype=torch.int32, device=mask.device)
    group_keys = block_keys = block_bias = tail_bias = None
    blocks = 0
    if tail is not None:
        group_keys, block_keys, block_bias = tail
        blocks = block_keys.shape[1]
        tail_bias = torch.empty(B, H, T, blocks, dtype=torch.float32, device=mask.device)
    _column_lists[(T, B * H)](
        mask, lists, counts, tail_bias, group_keys, block_keys, block_bias,
        *mask.stride()[:3],
        H, T, W, groups, blocks,
        N=n, BLOCK=BLOCK, SUMMARY=SUMMARY, TAIL=tail is not None,
        num_warps=4,
    )  # fmt: skip
    return lists, counts, tail_bias
