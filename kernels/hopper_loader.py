"""The producer of the Hopper attention kernel where groups are long enough for the copy engine (Gluon).

Groups of 8 keys and more are boxes of K and V: one thread asks for them, BOX keys of 64 columns at a time, and the
engine (TMA; PTX: cp.async.bulk.tensor) writes them swizzled and counts their bytes. Gathered in 16-byte pieces by 128
threads, as ``hopper_producer`` does for any keys, a tile of 128 keys takes that warpgroup two thirds of the time that
the consumers need for it (Nsight Compute, H200); a request takes one warp about ten instructions, and there are 4 to 64
for a tile. With four warps each request would wait for all of them, 87 clocks. Gained at density 0.3: 128x16 6%,
128x128 11%, 64x16 and 16x16 8%, 128x8 0 to 5%.

Places behind the end of a list and rows behind the last key are zeros, and the consumers mask them, so nothing is read
that was dropped. Masked keys may hold anything, NaN too, and here they would be read: with a key_bias
``hopper_producer`` gathers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from fg_inductor.kernels.column_lists import ID_BITS
from fg_inductor.kernels.hopper_producer import copy_async, copy_queries, hand_over
from fg_inductor.kernels.hopper_work import count_tiles, load_work

load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

# A box [1, 1, rows, 64 columns]: 8 rows repeat the swizzle, so boxes one after another are a tile.
BOX_SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 4))
BEYOND = gl.constexpr(1 << 30)  # a row that no tensor has: the engine writes zeros


@_core.builtin
def _as_boxes(tiles, shape, _semantic=None):
    """Shared memory seen as boxes [..., 1, 1, rows, 64]. (A method of it, whose name differs by version of Triton.)"""
    shape = [_core._unwrap_if_constexpr(size) for size in shape]
    return _semantic.memdesc_reinterpret(tiles, tiles.dtype, shape, BOX_SHARED.value)


@gluon.jit
def _load(bufs, full, stage, rows, desc, b, h, BOX: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    """Boxes at ``rows``, one after another, into a stage of bufs [STAGES, BLOCK_N, BLOCK_D]."""
    BOXES: gl.constexpr = BLOCK_N // BOX
    HALVES: gl.constexpr = BLOCK_D // 64
    boxes = _as_boxes(bufs, [bufs.shape[0] * HALVES * BOXES, 1, 1, BOX, 64])
    mbarrier.expect(full.index(stage), BLOCK_N * BLOCK_D * 2)
    for i in gl.static_range(BOXES):
        for half in gl.static_range(HALVES):
            slot = boxes.index((stage * HALVES + half) * BOXES + i)
            load_box(desc, [b, h, rows[i], half * 64], full.index(stage), slot)


@gluon.jit
def _rows_of(list_ptr, j, keys, N: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr, SUB: gl.constexpr):
    """The first rows of the boxes of tile j of a list; behind its end rows that no tensor has, which are zeros."""
    rows = ()
    for i in gl.static_range(BLOCK_N // BOX):
        place = j * BLOCK_N + i * BOX
        group = gl.load(list_ptr + gl.minimum(place, gl.maximum(keys - 1, 0)) // N)
        if SUB > 1:
            group = group & ((1 << ID_BITS) - 1)
        rows = rows + (gl.where(place < keys, group * N + place % N, BEYOND),)  # noqa: RUF005 (Triton knows no stars)
    return rows


@gluon.jit
def loader(
    q_side, buffers, bars, tensors, qkv, sizes, strides, descriptors, WIDE: gl.constexpr, WARPS: gl.constexpr,
    D: gl.constexpr, BLOCK_D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SUB: gl.constexpr, CONSUMERS: gl.constexpr, HAS_ORDER: gl.constexpr, TAIL: gl.constexpr,
    BOX: gl.constexpr, ALIKE: gl.constexpr,
):  # fmt: skip
    """The producer warp: every copy into shared memory."""
    work_ptr, lists_ptr, _, order_ptr, alike_ptr, _, _ = tensors
    q_ptr, _, _ = qkv
    k_desc, v_desc, tail_k_desc, tail_v_desc = descriptors
    first_head, heads, SHARE, _, Sq, T, X, G, J, ITEMS = sizes
    stride_qb, stride_qh, stride_qs, _ = strides
    k_bufs, v_bufs, bits_bufs = buffers
    k_full, k_empty, v_full, v_empty = bars
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [WARPS, 1], [1, 0])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    tile = 0
    i = 0
    place = gl.program_id(0)
    follower = place + gl.num_programs(0)
    while place < ITEMS:
        index, keys, clean = load_work(place, work_ptr)
        _, listed, total = count_tiles(keys, clean, J, BLOCK_N, TAIL)
        h, b = first_head + index // X % heads, index // X // heads
        list_ptr = lists_ptr + index.to(gl.int64) * G

        hand_over(q_side, i, place, WARPS)
        base = q_ptr + b.to(gl.int64) * stride_qb + h.to(gl.int64) * stride_qh
        copy_queries(
            q_side, base, stride_qs, order_ptr, alike_ptr, index // X, index % X, Sq, T, D, M, WIDE,
            HAS_ORDER, ALIKE, CONSUMERS, rows_layout,
        )  # fmt: skip

        for j in range(listed):
            stage = tile % STAGES
            phase = ((tile // STAGES) & 1) ^ 1
            rows = _rows_of(list_ptr, j, keys, N, BLOCK_N, BOX, SUB)
            mbarrier.wait(k_empty.index(stage), phase)
            if SUB > 1:
                spots = gl.minimum(j * BLOCK_N + gl.arange(0, BLOCK_N, one), gl.maximum(keys - 1, 0))
                copy_async(bits_bufs.index(stage), list_ptr + spots // N)
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
            _load(k_bufs, k_full, stage, rows, k_desc, b, h // SHARE, BOX, BLOCK_N, BLOCK_D)
            mbarrier.wait(v_empty.index(stage), phase)
            _load(v_bufs, v_full, stage, rows, v_desc, b, h // SHARE, BOX, BLOCK_N, BLOCK_D)
            tile += 1
        if TAIL:
            for j in range(listed, total):
                stage = tile % STAGES
                phase = ((tile // STAGES) & 1) ^ 1
                summaries = ((j - listed) * BLOCK_N,)
                mbarrier.wait(k_empty.index(stage), phase)
                if SUB > 1:
                    async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                _load(k_bufs, k_full, stage, summaries, tail_k_desc, b, h // SHARE, BLOCK_N, BLOCK_N, BLOCK_D)
                mbarrier.wait(v_empty.index(stage), phase)
                _load(v_bufs, v_full, stage, summaries, tail_v_desc, b, h // SHARE, BLOCK_N, BLOCK_N, BLOCK_D)
                tile += 1
        place = follower
        # Drawn two tiles ahead, here, where the producer would wait for the consumers anyway.
        follower = 2 * gl.num_programs(0) + gl.atomic_add(work_ptr + 4 * ITEMS, 1, sem="relaxed")
        i += 1
    hand_over(q_side, i, place, WARPS)
