"""A block mask that depends on places alone: sliding tile windows, and a radius that decays over time.

The video is cut into tiles, and a tile of queries attends to whole tiles of keys:

    window  (t, h, w) tiles, odd: those around the query's own; at the edge of the grid the window moves inwards, so
            that every tile has as many (Sliding Tile Attention, Zhang et al. 2025)
    radius  tokens: tiles whose centres lie within it in height and width; it halves each time that the distance in time
            doubles (Radial Attention, Li et al. 2025)
    ranges  [start, end) of keys that everything attends to, such as the first frame

A pair is kept where one of the rules keeps it. Tokens outside the video (text) attend, and are attended to, densely. A
slice keeps what one of its queries does, a group is kept where one of its keys is. Plain PyTorch on every device: a few
small operations on [T, Sk] bool.
"""

import torch
from torch import Tensor

from fg_inductor.kernels.mask import pack, slice_count, word_count
from fg_inductor.kernels.reference_select import any_in_chunks, in_ranges


def tile_pairs(grid: list[int], tile: list[int], window: list[int], radius: float, device: torch.device) -> Tensor:
    """bool [X, X]: whether tile x of queries attends to tile y of keys; X tiles in raster order."""
    counts = [-(-size // edge) for size, edge in zip(grid, tile, strict=True)]
    place = torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts)).view(-1, 3)
    pairs = torch.eye(len(place), dtype=torch.bool, device=device)
    if window:
        inside = torch.ones_like(pairs)
        for axis, (count, edge) in enumerate(zip(counts, window, strict=True)):
            centre = place[:, axis].clamp(max=count - 1 - edge // 2).clamp(min=edge // 2)
            inside &= (place[:, axis] - centre[:, None]).abs() <= edge // 2
        pairs = pairs | inside
    if radius:
        distance = []
        for axis, (size, edge) in enumerate(zip(grid, tile, strict=True)):
            start = place[:, axis] * edge
            centre = (start + (start + edge).clamp(max=size) - 1) / 2
            distance.append((centre[:, None] - centre).abs())
        halvings = distance[0].clamp_min(1).log2().floor()
        pairs = pairs | (torch.hypot(distance[1], distance[2]) <= radius * 0.5**halvings)
    return pairs


def _tiles_of(grid: list[int], tile: list[int], device: torch.device) -> Tensor:
    """[t*h*w] the tile of each token."""
    index = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    for axis, (size, edge) in enumerate(zip(grid, tile, strict=True)):
        shape = [-1 if axis == i else 1 for i in range(3)]
        index = index * -(-size // edge) + (torch.arange(size, device=device) // edge).view(shape)
    return index.flatten()


def select_static(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    m: int,
    n: int,
    grid: list[int],
    before: int,
    tile: list[int],
    window: list[int],
    radius: float,
    ranges: list[int],
) -> Tensor:
    """The block mask [B, Hq, T, W]; ``before`` tokens lie before the video in the sequence, the rest behind it."""
    device, slices = q.device, slice_count(q.shape[2], m)
    pairs = tile_pairs(grid, tile, window, radius, device)
    other = len(pairs)  # one more tile, of what is outside the video: it attends to all, and all to it
    pairs = torch.nn.functional.pad(pairs, (0, 1, 0, 1), value=True)
    tiles = _tiles_of(grid, tile, device)
    after = q.shape[2] - before - len(tiles)
    tiles = torch.nn.functional.pad(tiles, (before, after), value=other)
    present = torch.zeros(slices * (other + 1), dtype=torch.float32, device=device)
    slice_of = torch.arange(q.shape[2], device=device) // m
    present[slice_of * (other + 1) + tiles[order.long()]] = 1
    keep = present.view(slices, other + 1) @ pairs.float() > 0  # [T, X + 1]
    of_keys = tiles.masked_fill(in_ranges(torch.arange(k.shape[2], device=device), ranges), other)
    row = pack(any_in_chunks(keep[:, of_keys], n), word_count(k.shape[2], n))
    return row.expand(q.shape[0], q.shape[1], -1, -1).contiguous()
