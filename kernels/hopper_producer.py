"""The producer of the Hopper attention kernel (Gluon): it gathers. ``attention_forward_hopper`` says how."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fg_inductor.kernels.column_lists import ID_BITS
from fg_inductor.kernels.hopper_work import count_tiles, load_work, tokens_of

# Triton renamed it.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _copy_rows(buffer, base, row, stride, valid, D: gl.constexpr, WIDE: gl.constexpr, MASKED: gl.constexpr):
    """Rows of a [*, D] matrix into shared memory [rows, BLOCK_D]; zeros where a row is not valid."""
    layout: gl.constexpr = row.type.layout.parent
    BLOCK_D: gl.constexpr = buffer.shape[1]
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout))
    if WIDE:  # a row's offset may exceed 2**31 elements
        row = row.to(gl.int64)
    ptrs = base + row[:, None] * stride + column[None, :]
    if MASKED:
        copy_async(buffer, ptrs, mask=valid[:, None] & (column < D)[None, :])
    elif D < BLOCK_D:
        copy_async(buffer, ptrs, mask=(column < D)[None, :])
    else:
        copy_async(buffer, ptrs)


@gluon.jit
def _entries(list_ptr, first, keys, N: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """The list entries of keys ``first`` .. ``first + BLOCK_N - 1``; places past the end give the last one."""
    place = gl.minimum(first + gl.arange(0, BLOCK_N, layout), gl.maximum(keys - 1, 0))
    return gl.load(list_ptr + place // N)


@gluon.jit
def _copy_tile(
    buffers, bars, tile, j, entry, list_ptr, keys, next_list_ptr, next_keys, listed, k_base, v_base, bias_ptr,
    stride_ks, stride_vs, N: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    SUB: gl.constexpr, HAS_BIAS: gl.constexpr, WIDE: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """Tile j of a list, whose entries were loaded before, into its stage. Returns the entries of the tile to come."""
    k_bufs, v_bufs, bits_bufs = buffers
    k_full, k_empty, v_full, v_empty = bars
    rows: gl.constexpr = entry.type.layout
    stage = tile % STAGES
    phase = ((tile // STAGES) & 1) ^ 1
    place = j * BLOCK_N + gl.arange(0, BLOCK_N, rows)
    key = entry
    if SUB > 1:
        key = entry & ((1 << ID_BITS) - 1)
    valid = place < keys
    if N > 1:
        if RAGGED:
            place = gl.minimum(place, gl.maximum(keys - 1, 0))
        key = key * N + place % N
    if RAGGED:
        entry = _entries(next_list_ptr, 0, next_keys, N, BLOCK_N, rows)
        if HAS_BIAS:
            if j + 1 < listed:
                entry = _entries(list_ptr, (j + 1) * BLOCK_N, keys, N, BLOCK_N, rows)
            valid = gl.load(bias_ptr + key, mask=valid, other=float("-inf")) > float("-inf")
    elif j + 1 < listed:
        entry = _entries(list_ptr, (j + 1) * BLOCK_N, keys, N, BLOCK_N, rows)
    else:
        entry = _entries(next_list_ptr, 0, next_keys, N, BLOCK_N, rows)
    mbarrier.wait(k_empty.index(stage), phase)
    if SUB > 1:
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        spot = gl.minimum(j * BLOCK_N + gl.arange(0, BLOCK_N, flat), gl.maximum(keys - 1, 0))
        copy_async(bits_bufs.index(stage), list_ptr + spot // N)
    _copy_rows(k_bufs.index(stage), k_base, key, stride_ks, valid, D, WIDE, RAGGED)
    async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
    mbarrier.wait(v_empty.index(stage), phase)
    _copy_rows(v_bufs.index(stage), v_base, key, stride_vs, valid, D, WIDE, RAGGED)
    async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
    return entry


@gluon.jit
def hand_over(q_side, i, place, WARPS: gl.constexpr):
    """Tell the consumers which tile of queries is the i-th, once they are done with the one before."""
    _, _, q_empty, place_buf, place_full = q_side
    one: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(q_empty, (i & 1) ^ 1)
    place_buf.store(gl.full([1], place, gl.int32, one))
    mbarrier.arrive(place_full, count=1)


@gluon.jit
def copy_queries(
    q_side, base, stride, order_ptr, alike_ptr, head, x, Sq, T, D: gl.constexpr, M: gl.constexpr, WIDE: gl.constexpr,
    HAS_ORDER: gl.constexpr, ALIKE: gl.constexpr, CONSUMERS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Gather the queries of tile x of a head: 64 rows of query order for each consumer."""
    q_bufs, q_full, _, _, _ = q_side
    for wg in gl.static_range(CONSUMERS):
        row = x * (CONSUMERS * 64) + wg * 64 + gl.arange(0, 64, layout)
        token, inside = tokens_of(row, head, order_ptr, alike_ptr, Sq, T, M, HAS_ORDER, ALIKE)
        _copy_rows(q_bufs.index(wg), base, token, stride, inside, D, WIDE, True)
    async_copy.mbarrier_arrive(q_full, increment_count=False)


@gluon.jit
def producer(
    q_side, buffers, bars, tensors, qkv, sizes, strides, k_strides, v_strides, WIDE: gl.constexpr, WARPS: gl.constexpr,
    D: gl.constexpr, BLOCK_D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SUB: gl.constexpr, CONSUMERS: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_ORDER: gl.constexpr, TAIL: gl.constexpr, NEGATIVE: gl.constexpr, ALIKE: gl.constexpr,
):  # fmt: skip
    """The producer warpgroup: every copy into shared memory."""
    work_ptr, lists_ptr, bias_ptr, order_ptr, alike_ptr, tail_k_ptr, tail_v_ptr = tensors
    q_ptr, k_ptr, v_ptr = qkv
    first_head, heads, SHARE, Hkv, Sq, T, X, G, J, ITEMS = sizes
    stride_qb, stride_qh, stride_qs, stride_bb = strides
    stride_kb, stride_kh, stride_ks = k_strides
    stride_vb, stride_vh, stride_vs = v_strides
    k_bufs, v_bufs, _ = buffers
    k_full, k_empty, v_full, v_empty = bars
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [WARPS, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    tile = 0
    i = 0
    place = gl.program_id(0)
    index, keys, clean = load_work(place, work_ptr)
    entry = _entries(lists_ptr + index.to(gl.int64) * G, 0, keys, N, BLOCK_N, rows)
    follower = place + gl.num_programs(0)
    while place < ITEMS:
        # Not carried over from the iteration before: Triton 3.6 keeps the first value as a bound of the loops below.
        full, listed, total = count_tiles(keys, clean, J, BLOCK_N, TAIL)
        h, b = first_head + index // X % heads, (index // X // heads).to(gl.int64)
        h_kv = (h // SHARE).to(gl.int64)
        k_base = k_ptr + b * stride_kb + h_kv * stride_kh
        v_base = v_ptr + b * stride_vb + h_kv * stride_vh
        list_ptr = lists_ptr + index.to(gl.int64) * G

        hand_over(q_side, i, place, WARPS)
        base = q_ptr + b * stride_qb + h.to(gl.int64) * stride_qh
        copy_queries(
            q_side, base, stride_qs, order_ptr, alike_ptr, index // X, index % X, Sq, T, D, M, WIDE,
            HAS_ORDER, ALIKE, CONSUMERS, rows,
        )  # fmt: skip

        # The tile to come: its list is at hand when the last keys of this one are under way.
        next_index, next_keys, next_clean = load_work(gl.minimum(follower, ITEMS - 1), work_ptr)
        next_list_ptr = lists_ptr + next_index.to(gl.int64) * G
        entry_bias_ptr = bias_ptr
        if HAS_BIAS:
            entry_bias_ptr += b * stride_bb
        for j in range(full):
            entry = _copy_tile(
                buffers, bars, tile, j, entry, list_ptr, keys, next_list_ptr, next_keys, listed, k_base, v_base,
                entry_bias_ptr, stride_ks, stride_vs, N, BLOCK_N, D, STAGES, SUB, HAS_BIAS, WIDE, False,
            )  # fmt: skip
            tile += 1
        for j in range(full, listed):
            entry = _copy_tile(
                buffers, bars, tile, j, entry, list_ptr, keys, next_list_ptr, next_keys, listed, k_base, v_base,
                entry_bias_ptr, stride_ks, stride_vs, N, BLOCK_N, D, STAGES, SUB, HAS_BIAS, WIDE, True,
            )  # fmt: skip
            tile += 1
        if TAIL:
            head = (b * Hkv + h_kv) * J * D
            for j in range(listed, total):
                stage = tile % STAGES
                phase = ((tile // STAGES) & 1) ^ 1
                block = (j - listed) * BLOCK_N + gl.arange(0, BLOCK_N, rows)
                exists = block < J
                mbarrier.wait(k_empty.index(stage), phase)
                _copy_rows(k_bufs.index(stage), tail_k_ptr + head, block, D, exists, D, False, True)
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                mbarrier.wait(v_empty.index(stage), phase)
                _copy_rows(v_bufs.index(stage), tail_v_ptr + head, block, D, exists, D, False, True)
                async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                tile += 1
        place, index, keys, clean = follower, next_index, next_keys, next_clean
        # Drawn two tiles ahead, here, where the producer would wait for the consumers anyway.
        follower = 2 * gl.num_programs(0) + gl.atomic_add(work_ptr + 4 * ITEMS, 1, sem="relaxed")
        i += 1
    hand_over(q_side, i, place, WARPS)
