"""What both roles of the Hopper kernels read: the work of a CTA, and its tiles of keys (Gluon)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def load_work(place, work_ptr):
    """The index of a tile of queries, the keys in its list, and those at its front that need no look at the bias."""
    return gl.load(work_ptr + 4 * place), gl.load(work_ptr + 4 * place + 1), gl.load(work_ptr + 4 * place + 2)


@gluon.jit
def count_tiles(keys, clean, J, BLOCK_N: gl.constexpr, TAIL: gl.constexpr):
    """Tiles of keys: those that need no mask, those of the list, and all, the tail's included."""
    full = clean // BLOCK_N
    listed = gl.maximum((keys + BLOCK_N - 1) // BLOCK_N, 1)  # one, all masked, where nothing is kept
    total = listed + (J + BLOCK_N - 1) // BLOCK_N if TAIL else listed
    return full, listed, total


@gluon.jit
def tokens_of(row, head, order_ptr, alike_ptr, Sq, T, M: gl.constexpr, HAS_ORDER: gl.constexpr, ALIKE: gl.constexpr):
    """The tokens at some rows of the tiles of a head (b * H + h), and which rows there are."""
    inside = row < Sq
    if ALIKE:  # the last, ragged slice stays in its place
        row = gl.load(alike_ptr + head.to(gl.int64) * T + row // M, mask=inside, other=0) * M + row % M
    if HAS_ORDER:
        row = gl.load(order_ptr + row, mask=inside, other=0)
    return row, inside
