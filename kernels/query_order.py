"""Query order: the video's tokens in such an order that each slice of M, and each run of 16 in it, is compact.

Queries near in space and time agree on their keys. Cubes would be best, but grids such as 21x30x52 divide by no cube:
the cubes at the edges are smaller, every slice behind one straddles two, and many hold tokens from opposite edges. Rods
have few edges. Time and height are cut into blocks of nearly equal size (7 or 8 for an edge of 8, never a rest of 2); a
rod is one block of each by the whole width, walked column by column. Rods follow each other in a snake, each walked in
the opposite direction of the one before, so that a slice that holds the end of one and the beginning of the next is
compact too. Slices are walked again along rods of all their frames, but of few rows: 16 queries in a row, whose mean is
scored, are then one or two places in the picture over all frames of the slice, and so are 16 keys, kept or dropped
together. With a step in time as half a step in space, mean squared distances from the centre on 21x30x52 are 4.3 in
slices of 128 (in cubes of 8x4x4 36.7, alone 3.8).

Why: PSNR to dense of whole videos of two small trained models on one H100 (mini 17x32x32 tokens, tiny 17x24x24; a token
is 8x8 pixels of one frame). Runs of 16 by frames and rows, in rods of 9x4, means of 4 videos at 0.3 / 0.15 kept: 4x2
mini 32.6 / 27.6, tiny 45.2 / 34.5; **9x2 mini 32.8 / 28.4, tiny 46.1 / 35.8**; 9x1 32.6 / 28.2, 45.1 / 35.5; and with 2
videos 1x4 before any of these (31.2 / 25.4 where 4x2 had 32.0 / 25.9).

How much motion a step in time holds differs from model to model, so what a step in time counts as is an option, and by
default the queries choose it (``choose_order``). In both models here it is little, and rods through all frames are
better still (17x2, counted as an eighth: mini 32.7 / 29.0, tiny 48.1 / 38.8; as a whole step: 32.4 / 27.7, 43.5 /
33.8). Latent models such as Wan compress time 4 times and space 16, so that their step holds about ten times the motion
of these, in tokens. They are not measured; half a step gives them rods of 7x4.

Slices of 32 and 16 lie within a frame and are put in another sequence: those of one place in the frames follow each
other through time. Attention for Hopper loads the union of what the slices of 128 queries keep, and slices agree most
on their keys where they lie at the same place in different frames. On masks of a trained video model that keep 0.3 (M
= 16; layers 1 and 3, two heads each) the union is 1.29 times a slice's own keys on a grid of 17x32x32 and 1.49 on
13x30x26; along the rods it is 2.22 and 2.31, in cubes of 2x8x8 1.74. Matching slices by their masks after this
sequence gains nothing more; without any order it does nearly as much (``alike_slices``).
"""

import functools

import torch
from torch import Tensor

TIME = 0.5  # steps in height or width that a step in time counts as
ROWS = 2  # of the thinner rods within a slice
FLAT_ROWS = 4  # the same where a slice lies within a frame
ALONE = 64  # queries of the smallest slice that has a tile of attention to itself


def _lengths(size: int, edge: int) -> list[tuple[int, int]]:
    """(length, how often) of the blocks of nearly equal size, ``edge`` at most, that ``size`` is cut into."""
    blocks = -(-size // edge)
    length, longer = divmod(size, blocks)
    return [(length, blocks - longer), *([(length + 1, longer)] if longer else [])]


def _spread(t: int, h: int, w: int, m: int, edges: tuple[int, int], time: float) -> float:
    """Estimated mean squared distance of a query from the centre of its slice, times 12."""
    total = 0.0
    for thick, often in _lengths(t, edges[0]):
        for high, times in _lengths(h, edges[1]):
            columns = m / (thick * high)
            # Slices that hold the end of a rod reach into the next one; rods that are whole slices have none.
            ends = 2 * high**2 * columns / w if thick * high * w % m else 0.0
            if columns > w:
                columns, high, ends = w, high * columns / w, 0.0
            spread = time**2 * (thick**2 - 1) + high**2 - 1 + columns**2 - 1 + ends
            total += often * times * thick * high * spread
    return total / (t * h)


def rows_of_runs(m: int) -> int:
    """Rows of the rods that slices of m are walked again along."""
    return ROWS if m >= ALONE else FLAT_ROWS


@functools.lru_cache(maxsize=64)
def cross_section(t: int, h: int, w: int, m: int, time: float = TIME) -> tuple[int, int]:
    """The edges in time and height of the rods that keep slices of m queries of a t x h x w grid most compact."""
    thickest, step = min(t, m) if m >= ALONE else 1, rows_of_runs(m)
    edges = [(thick, high) for thick in range(1, thickest + 1) for high in range(step, m // thick + 1, step)]
    return min(edges, key=lambda pair: _spread(t, h, w, m, pair, time))


def _blocks(size: int, edge: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Per coordinate: the number of its block, where that starts and how long it is; and how many there are."""
    count = -(-size // edge)
    index = torch.arange(size, device=device) * count // size
    start, end = ((i * size + count - 1) // count for i in (index, index + 1))
    return index, start, end - start, count


def hilbert_index(t: Tensor, h: Tensor, w: Tensor, bits: int) -> Tensor:
    """The place of each token on the Hilbert curve through a cube of 2^bits a side (Skilling 2004)."""
    axes = list(torch.broadcast_tensors(t, h, w))
    for bit in range(bits - 1, 0, -1):  # undo what the curve does in each octant: a reflection, or an exchange of axes
        below = (1 << bit) - 1
        for i in range(3):
            reflected = (axes[i] >> bit) & 1 == 1
            exchanged = torch.where(reflected, 0, (axes[0] ^ axes[i]) & below)
            axes[0] = torch.where(reflected, axes[0] ^ below, axes[0] ^ exchanged)
            if i:
                axes[i] = axes[i] ^ exchanged
    axes[1] = axes[1] ^ axes[0]  # Gray code
    axes[2] = axes[2] ^ axes[1]
    flip = torch.zeros_like(axes[2])
    for bit in range(bits - 1, 0, -1):
        flip = torch.where((axes[2] >> bit) & 1 == 1, flip ^ ((1 << bit) - 1), flip)
    index = torch.zeros_like(flip)
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            index = index * 2 + (((axis ^ flip) >> bit) & 1)
    return index


def _hilbert_rank(t: int, h: int, w: int, device: torch.device) -> Tensor:
    sides = [torch.arange(size, device=device) for size in (t, h, w)]
    return hilbert_index(
        sides[0].view(-1, 1, 1), sides[1].view(-1, 1), sides[2], max(1, (max(t, h, w) - 1).bit_length())
    )


def _rod_rank(t: int, h: int, w: int, m: int, time: float, device: torch.device) -> Tensor:
    """[t, h, w] numbers that sort the tokens along the rods, and within each slice of m along thinner ones."""
    edges = cross_section(t, h, w, m, time)
    row = torch.arange(h, device=device)
    column = torch.arange(w, device=device)
    i, first, thick, _ = (x.view(-1, 1, 1) if isinstance(x, Tensor) else x for x in _blocks(t, edges[0], device))
    j, low, high, count = (x.view(1, -1, 1) if isinstance(x, Tensor) else x for x in _blocks(h, edges[1], device))
    inner_t = torch.arange(t, device=device).view(-1, 1, 1) - first
    inner_h = row.view(1, -1, 1) - low

    # Where each token comes in the walk along the rods, and so its slice.
    back = i % 2 == 1
    rod = i * count + torch.where(back, count - 1 - j, j)
    rods_before = first * h * w + thick * w * torch.where(back, h - low - high, low)
    along = torch.where(rod % 2 == 1, w - 1 - column, column)
    place = rods_before + along * thick * high + inner_t * high + inner_h

    # Within a slice the same again with thinner rods.
    rows = rows_of_runs(m)
    run = inner_h * ((high + rows - 1) // rows) // high
    along = torch.where(run % 2 == 1, w - 1 - column, column)
    rank = ((place // m * t * h + rod) * h + run) * w + along
    return (rank * t + inner_t) * h + inner_h


def _through_time(video: Tensor, t: int, h: int, w: int, m: int) -> Tensor:
    """The same slices of m tokens in another sequence: along the rods of one frame, and at each place through time."""
    device = video.device
    j, low, high, _ = (
        x.view(-1, 1) if isinstance(x, Tensor) else x for x in _blocks(h, cross_section(t, h, w, m)[1], device)
    )
    row, column = torch.arange(h, device=device).view(-1, 1), torch.arange(w, device=device)
    in_frame = low * w + torch.where(j % 2 == 1, w - 1 - column, column) * high + row - low  # [h, w]
    whole = len(video) // m * m
    slices = video[:whole].view(-1, m)
    middle = slices[:, m // 2]
    place = in_frame.flatten()[middle % (h * w)] // m
    frame = middle // (h * w)
    frame = torch.where(place % 2 == 1, t - 1 - frame, frame)
    slices = slices[(place * t + frame).argsort(stable=True)]
    return torch.cat([slices.flatten(), video[whole:]])


def query_order(
    t: int, h: int, w: int, before: int, after: int, m: int, device: torch.device, curve: str = "rods",
    time: float = TIME,
) -> Tensor:  # fmt: skip
    """int32 [before + t*h*w + after]: the token at each place of query order, for a video of t x h x w tokens.

    The video comes first; the ``before`` and ``after`` tokens (text) follow, so that they shift no slice. ``curve`` is
    "rods" (above) or "hilbert": the three-dimensional Hilbert curve through the smallest cube that holds the grid.
    ``time``: the steps in height or width that a step in time counts as.
    """
    rank = _rod_rank(t, h, w, m, time, device) if curve == "rods" else _hilbert_rank(t, h, w, device)
    video = rank.flatten().argsort()
    if curve == "rods" and m < ALONE:
        video = _through_time(video, t, h, w, m)
    video = video + before
    text = torch.arange(before + after, device=device)
    return torch.cat([video, torch.where(text < before, text, text + t * h * w)]).to(torch.int32)


_kept: dict[tuple, Tensor] = {}


def kept(
    t: int, h: int, w: int, before: int, after: int, m: int, device: torch.device, curve: str, times: tuple[float, ...]
) -> Tensor:
    """``query_order`` for each of ``times``, [times, tokens]: made once for each set of arguments, since every layer of
    every step asks for the same.

    What is kept lies in (pinned) host memory, 4 bytes a token, and a call is one copy. On the device it could not be
    kept: what is allocated while a CUDA graph is prepared belongs to that graph.
    """

    def made(on: torch.device) -> Tensor:
        return torch.stack([query_order(t, h, w, before, after, m, on, curve, time) for time in times])

    key = (t, h, w, before, after, m, curve, times, device.type)
    if key not in _kept:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return made(device)
        orders = made(torch.device("cpu"))
        _kept[key] = orders.pin_memory() if device.type == "cuda" else orders
    return _kept[key].to(device, non_blocking=True, copy=True)
