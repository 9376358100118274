"""The block mask: one bit for each (batch, query head, query slice, key group).

    int32 [B, Hq, T, W]     T = ceil(Sq / m) slices in query order
                            W = ceil(ceil(Sk / n) / 32) words, rounded up to a multiple of 4 (16 bytes)

Group g is bit ``g % 32`` (least significant first) of word ``g // 32``; unused bits are 0. Four lines rebuild the
dense mask of one slice::

    words = mask[b, h, t]
    groups = (words[:, None] >> torch.arange(32)) & 1
    keys = groups.flatten()[: ceil(Sk / n)].repeat_interleave(n)[:Sk].bool()
    # query rows t*m .. t*m + m - 1 (in query order) attend to exactly these keys
"""

import torch
from torch import Tensor

SLICES = (16, 32, 64, 128)
GROUPS = (1, 8, 16, 32, 64, 128)


def slice_count(queries, m: int):
    """Query slices of m rows that cover ``queries`` rows; works on SymInts without a guard."""
    return (queries + m - 1) // m


def group_count(keys, n: int):
    """Key groups of n keys that cover ``keys`` keys; works on SymInts without a guard."""
    return (keys + n - 1) // n


def word_count(keys, n: int):
    """int32 words of a mask row, a multiple of four."""
    return (group_count(keys, n) + 127) // 128 * 4


def pack(keep: Tensor, words: int) -> Tensor:
    """bool [..., G] -> int32 [..., words]."""
    bits = torch.nn.functional.pad(keep, (0, words * 32 - keep.shape[-1])).unflatten(-1, (words, 32))
    weights = torch.ones(32, dtype=torch.int64, device=keep.device) << torch.arange(32, device=keep.device)
    packed = (bits * weights).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack(mask: Tensor, groups: int) -> Tensor:
    """int32 [..., W] -> bool [..., groups]."""
    bits = (mask.unsqueeze(-1) >> torch.arange(32, device=mask.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :groups].bool()
