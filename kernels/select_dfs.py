"""DFSAttn's block mask: tiles of 16 tokens scored, summed to blocks of 128, the best blocks of each slice and head.

    score[t, b] = sum over the runs p of 16 queries of slice t, and the tiles g of block b, of
                  softmax_g(scale * mean_q[t, p] . mean_k[g])

Queries and keys both in the order of a three-dimensional Hilbert curve (``query_order`` with curve="hilbert"), in which
128 consecutive tokens are compact in space and time ("DFSAttn", 2026; its masks for later steps are not remade, ours
are made at every call). K is not moved for it: a block is a set of single keys, so the mask is exact with N = 1, and
with larger groups one is kept where it holds a key of a kept block.

Plain PyTorch on every device, one head at a time, so that the scores of one head are all that lives at once.
"""

import torch
from torch import Tensor

from fg_inductor.kernels import reference_select
from fg_inductor.kernels.mask import pack, slice_count, word_count

TILE = 16
BLOCK = 128


def block_scores(q: Tensor, k: Tensor, key_bias: Tensor | None, order: Tensor, scale: float, m: int):
    """score [B, Hq, T, blocks] of blocks of 128 keys in ``order``, NaN where one is NaN, and valid bool [B, blocks]."""
    index = order.long()
    bias = None if key_bias is None else key_bias[:, index]
    score, valid = reference_select.pooled_scores(q, k[:, :, index], bias, order, scale, m, TILE, TILE)
    tiles = BLOCK // TILE
    padding = -valid.shape[-1] % tiles
    score = torch.nn.functional.pad(score, (0, padding)).unflatten(-1, (-1, tiles)).sum(-1)
    return score, reference_select.any_in_chunks(valid, tiles)


def select_dfs(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    order: Tensor,
    scale: float,
    m: int,
    n: int,
    density: float | list[float],
) -> Tensor:
    """The block mask [B, Hq, T, W] of the best round(density * blocks) blocks, one at least; NaN scores first.

    density: one number, or one for each head.
    """
    heads, share = q.shape[1], q.shape[1] // k.shape[1]
    densities = density if isinstance(density, list) else [density] * heads
    place = torch.empty_like(order).scatter_(0, order.long(), torch.arange(len(order), device=q.device).int())
    block_of_key = place // BLOCK
    words = word_count(k.shape[2], n)
    mask = torch.empty(q.shape[0], heads, slice_count(q.shape[2], m), words, dtype=torch.int32, device=q.device)
    for h in range(heads):
        one = slice(h // share, h // share + 1)
        score, valid = block_scores(q[:, h : h + 1], k[:, one], key_bias, order, scale, m)
        valid, forced = valid[:, None, None], score.isnan()
        limit = (valid.sum(-1, keepdim=True).double() * densities[h] + 0.5).floor().clamp_min(1)
        ranked = reference_select.ranking(score.nan_to_num(0, 0, 0), forced, valid)
        kept = torch.arange(score.shape[-1], device=q.device) < limit
        keep = torch.zeros_like(forced).scatter(-1, ranked, kept.expand_as(ranked).contiguous())
        keep = (keep | forced) & valid
        mask[:, h : h + 1] = pack(reference_select.any_in_chunks(keep[..., block_of_key], n), words)
    return mask
