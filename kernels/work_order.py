"""The order in which the slices of an attention call are begun (portable Triton).

keys   [B, H, X]            int32, kept keys of each tile of queries, and those in clean groups (``column_lists``)
work   [B * H * X + 1, 4]   int32: index (b * H + h) * X + x of a tile, its keys, its clean keys, nothing; the last row
                            holds a counter, 0, from which those who work draw their next place
Grid   (ceil(X / BLOCK), B * H)

Heads stay together, since the K and V of one head fit the L2 cache; the head that keeps most comes first, and in a head
the tile that keeps most: what is begun last is small, so that no processor works long after the others have finished.
Ties go by index: the order is a function of the mask alone. A tile's place is the number of tiles before it, so nothing
is sorted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels.sizes import cdiv, next_power_of_2

BLOCK = 32


@triton.jit
def _work_order(
    keys_ptr, clean_keys_ptr, work_ptr, HEADS, X, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_X: tl.constexpr
):
    head = tl.program_id(1)
    mine = 0
    for start in range(0, X, BLOCK_X):
        x = start + tl.arange(0, BLOCK_X)
        mine += tl.sum(tl.load(keys_ptr + head * X + x, mask=x < X, other=0))
    heads_before = 0
    for first in range(0, HEADS, BLOCK_H):
        other = first + tl.arange(0, BLOCK_H)
        total = tl.zeros([BLOCK_H], tl.int32)
        for start in range(0, X, BLOCK_X):
            x = start + tl.arange(0, BLOCK_X)
            inside = (other < HEADS)[:, None] & (x < X)[None, :]
            total += tl.sum(tl.load(keys_ptr + other[:, None] * X + x[None, :], mask=inside, other=0), 1)
        ahead = (total > mine) | ((total == mine) & (other < head))
        heads_before += tl.sum((ahead & (other < HEADS)).to(tl.int32))
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + head * X + x, mask=x < X, other=0)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, X, BLOCK_X):
        other = start + tl.arange(0, BLOCK_X)
        theirs = tl.load(keys_ptr + head * X + other, mask=other < X, other=-1)
        ahead = (theirs[None, :] > keys[:, None]) | ((theirs[None, :] == keys[:, None]) & (other[None, :] < x[:, None]))
        before += tl.sum((ahead & (other < X)[None, :]).to(tl.int32), 1)
    place = work_ptr + 4 * (heads_before * X + before)
    tl.store(place, head * X + x, mask=x < X)
    tl.store(place + 1, keys, mask=x < X)
    tl.store(place + 2, tl.load(clean_keys_ptr + head * X + x, mask=x < X, other=0), mask=x < X)
    if (tl.program_id(0) == 0) & (head == 0):
        tl.store(work_ptr + 4 * HEADS * X, 0)


def launch(keys: Tensor, clean_keys: Tensor) -> Tensor:
    """int32 [B, H, X] twice -> int32 [B * H * X + 1, 4]."""
    B, H, X = keys.shape
    work = torch.empty(B * H * X + 1, 4, dtype=torch.int32, device=keys.device)
    block_x = min(256, next_power_of_2(X))
    _work_order[(cdiv(X, BLOCK), B * H)](
        keys,
        clean_keys,
        work,
        B * H,
        X,
        BLOCK=BLOCK,
        BLOCK_H=min(16, next_power_of_2(B * H)),
        BLOCK_X=block_x,
        num_warps=4,
    )
    return work
