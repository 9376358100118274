"""How the Hopper backward kernel adds dk and dv of 64 keys to their sums (Gluon): by threads, or by the copy engine.

x         [64, D]      float32, an accumulator
sums      [rows, D]    float32, contiguous; each 16 columns in their own order or in that of ``_in_order_of_lanes``

``add`` makes atomics of 16 bytes, for any keys. ``add_bulk`` is for 64 neighbouring rows, as groups of 64 keys and more
have them (``attention_backward_hopper.bulk``): 32 columns at a time go to shared memory, and TMA (PTX:
cp.reduce.async.bulk.tensor) adds them behind the back of the threads, which wait only for the slot that they write
next. Both add in L2, in no fixed order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

# Of 32 columns of an accumulator, by an exchange between neighbouring lanes: 4 columns a lane, 16 of a row together.
PIECE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16]], [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 32]
    )
)
# The same without an exchange, in the order of columns of ``_in_order_of_lanes``.
LANES_PIECE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 32]
    )
)

# Rows of 64 bytes: eight lanes, which write 16 bytes each of two rows, meet no bank twice.
PIECE_SHARED = gl.constexpr(gl.NVMMASharedLayout(64, 32, 2))


@gluon.jit
def _in_order_of_lanes(x):
    """Columns of an accumulator, of each 16 in the order 0 1 8 9 2 3 10 11 ..: a lane has four neighbours."""
    x = x.reshape([x.shape[0], x.shape[1] // 16, 2, 4, 2]).permute(0, 1, 3, 2, 4)
    return x.reshape([x.shape[0], x.shape[1] * 16])


@gluon.jit
def _piece(x, layout: gl.constexpr, LANES: gl.constexpr):
    """x [64, 32] of an accumulator, so that a lane holds 16 bytes of a row."""
    if LANES:
        x = _in_order_of_lanes(x)
    return gl.convert_layout(x, layout)


@_core.builtin
def _add_tile(desc, coord, src, _semantic=None):
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(_core.ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


# Triton 3.6 can do it and has no name for it.
add_tile = getattr(tma, "async_atomic_add", _add_tile)
finish_reads = tma.store_wait


@gluon.jit
def add(sum_ptr, key, used, x, FIRST: gl.constexpr, D: gl.constexpr, LANES: gl.constexpr, MASKED: gl.constexpr):
    """x [64, columns FIRST ..] added to rows of a contiguous float32 tensor, 16 bytes at a time."""
    if x.shape[1] > 32:
        # Piece by piece, so that the exchange between lanes takes few registers.
        left, right = x.reshape([64, 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        add(sum_ptr, key, used, left, FIRST, D, LANES, MASKED)
        add(sum_ptr, key, used, right, FIRST + x.shape[1] // 2, D, LANES, MASKED)
    elif FIRST < D:
        layout: gl.constexpr = key.type.layout.parent
        column = FIRST + gl.arange(0, 32, gl.SliceLayout(0, layout))
        ptrs = sum_ptr + key.to(gl.int64)[:, None] * D + column[None, :]
        if MASKED:
            gl.atomic_add(ptrs, _piece(x, layout, LANES), mask=used[:, None], sem="relaxed")
        else:
            gl.atomic_add(ptrs, _piece(x, layout, LANES), sem="relaxed")


@gluon.jit
def add_bulk(
    wg: gl.constexpr, desc, row, staging, x, FIRST: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
    LANES: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """x [64, columns FIRST ..] added to rows ``row`` .. of a float32 tensor, by way of this warpgroup's slots."""
    if x.shape[1] > 32:
        left, right = x.reshape([64, 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        add_bulk(wg, desc, row, staging, left, FIRST, D, SLOTS, LANES, layout)
        add_bulk(wg, desc, row, staging, right, FIRST + x.shape[1] // 2, D, SLOTS, LANES, layout)
    elif FIRST < D:
        TURNS: gl.constexpr = D % (32 * SLOTS) == 0  # else a tensor's first piece follows one in the same slot
        slot = staging.index(wg * SLOTS + FIRST // 32 % SLOTS)
        finish_reads(SLOTS - 1 if TURNS else 0)
        slot.store(_piece(x, layout, LANES))
        fence_async_shared()
        add_tile(desc, [row, FIRST], slot)
