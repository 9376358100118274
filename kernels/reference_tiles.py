"""Which slices share a tile of attention, in plain PyTorch: those of like masks (FG-Attn, 2509.16518).

It belongs to the specification and is never tuned; letters as in ``kernels.mask``.
"""

import torch
from torch import Tensor

from fg_inductor.kernels.mask import unpack


def alike_slices(mask: Tensor, sub: int, window: int, step: int = 1) -> Tensor:
    """int32 [B, H, T]: the slice at each place, so that every ``sub`` places in a row are a tile of like slices.

    mask    int32 [B, H, T, W]
    window  neighbours among which like ones are sought, a multiple of ``sub``
    step    the distance of two slices is the number of groups that one of them keeps and the other does not (XOR), in
            every ``step``-th word of the mask

    The first slice of a window that has no tile yet begins one. The next is the one nearest to all that are in it so
    far (the sum of the distances), of equals the first. A window stays as it is unless this makes the unions of what
    its tiles keep smaller, in the same words. The slices of the last tile, which may not be full, stay.
    """
    batch, heads, slices, _ = mask.shape
    moved = (slices - 1) // sub * sub
    found = torch.arange(slices, dtype=torch.int32, device=mask.device).repeat(batch, heads, 1)
    words = mask[..., ::step]
    for b in range(batch):
        for h in range(heads):
            for first in range(0, moved, window):
                keep = unpack(words[b, h, first : min(first + window, moved)], 32 * words.shape[-1])
                order = _in_tiles(torch.cdist(keep.float(), keep.float(), p=1).round(), sub)
                if union_size(keep[order], sub) < union_size(keep, sub):
                    found[b, h, first : first + len(keep)] = first + order
    return found


def union_size(keep: Tensor, sub: int) -> int:
    """Groups in the unions of what ``sub`` slices in a row keep, bool [T, G], T a multiple of ``sub``."""
    return int(keep.unflatten(0, (-1, sub)).any(1).sum())


def _in_tiles(apart: Tensor, sub: int) -> Tensor:
    """The order of the slices of a window, from their distances [slices, slices]."""
    order: list[int] = []
    for place in range(len(apart)):
        tile = order[place // sub * sub :]
        far = apart[tile].sum(0)  # 0 for all, where a tile begins
        far[order] = torch.inf
        order.append(int(far.argmin()))
    return torch.tensor(order, device=apart.device)
