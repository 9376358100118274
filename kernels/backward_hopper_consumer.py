"""The consumers of the Hopper backward kernel (Gluon): wgmma. ``attention_backward_hopper`` says how."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fg_inductor.kernels.backward_hopper_sums import LANES_PIECE, PIECE, add, add_bulk, finish_reads
from fg_inductor.kernels.hopper_consumer import LOG2_E, _drawn
from fg_inductor.kernels.hopper_work import count_tiles, load_work


@gluon.jit
def _keys(
    wg: gl.constexpr, entry_buf, j, index, keys, listed, bias_ptr, tail_bias_ptr, J,
    N: gl.constexpr, BLOCK_N: gl.constexpr, HAS_BIAS: gl.constexpr, TAIL: gl.constexpr, MASKED: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Of this warpgroup's 64 keys of tile j: which they are, what is added to their scores (base 2), are they in use?

    Keys of the tail's tiles are numbers of summaries.
    """
    place = j * BLOCK_N + wg * 64 + gl.arange(0, 64, layout)
    shift = gl.full([64], 0.0, gl.float32, layout)
    used = place < keys
    safe = place
    if MASKED:
        safe = gl.minimum(place, gl.maximum(keys - 1, 0))
    key = entry_buf.load(layout)
    if N > 1:
        key = key * N + safe % N
    if MASKED and HAS_BIAS:
        bias = gl.load(bias_ptr + key, mask=used, other=float("-inf"))
        used = bias > float("-inf")
        shift = gl.where(used, bias * LOG2_E, 0.0)
    if MASKED and TAIL:
        block = place - listed * BLOCK_N
        inside = (block >= 0) & (block < J)
        of_tail = gl.load(tail_bias_ptr + index.to(gl.int64) * J + block, mask=inside, other=float("-inf"))
        key = gl.where(j >= listed, block, key)
        shift = gl.where(of_tail > float("-inf"), of_tail, shift)
        used = used | (of_tail > float("-inf"))
    return key, shift, used


@gluon.jit
def _store(row_ptrs, inside, x, FIRST: gl.constexpr, D: gl.constexpr):
    """x [64, columns FIRST ..] to where its rows begin."""
    if x.shape[1] > 32:
        left, right = x.reshape([64, 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        _store(row_ptrs, inside, left, FIRST, D)
        _store(row_ptrs, inside, right, FIRST + x.shape[1] // 2, D)
    elif FIRST < D:
        layout: gl.constexpr = row_ptrs.type.layout.parent
        column = FIRST + gl.arange(0, 32, gl.SliceLayout(0, layout))
        x = gl.convert_layout(x, layout).to(row_ptrs.dtype.element_ty)
        gl.store(row_ptrs[:, None] + column[None, :], x, mask=inside[:, None])


@gluon.jit
def _scores(
    wg: gl.constexpr, k_bufs, k_full, q_buf, statistics_buf, tile, CONSUMERS: gl.constexpr, K_STAGES: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """The product of this warpgroup's keys of a tile with the queries, less lse, begun."""
    stage = tile % K_STAGES * CONSUMERS + wg
    mbarrier.wait(k_full.index(stage), (tile // K_STAGES) & 1)
    # cp.async writes through the generic proxy, wgmma reads through the asynchronous one.
    fence_async_shared()
    s = statistics_buf.index(0).load(gl.SliceLayout(0, layout))[None, :]
    s = s + gl.zeros([64, 64 * CONSUMERS], gl.float32, layout)
    return warpgroup_mma(k_bufs.index(stage), q_buf.permute((1, 0)), s, is_async=True)


@gluon.jit
def _begin_dq(
    wg: gl.constexpr, k_bufs, k_full, ds_bufs, ds_full, tile, dq, CONSUMERS: gl.constexpr, K_STAGES: gl.constexpr,
    DS_STAGES: gl.constexpr,
):  # fmt: skip
    """dq [64, BLOCK_D] of this warpgroup's queries with what all keys of a tile add, begun: CONSUMERS products."""
    mbarrier.wait(ds_full, tile & 1)
    for part in gl.static_range(CONSUMERS):
        stage = tile % K_STAGES * CONSUMERS + part
        if part != wg:
            mbarrier.wait(k_full.index(stage), (tile // K_STAGES) & 1)
            fence_async_shared()
        ds = ds_bufs.index(tile % DS_STAGES * CONSUMERS + part)
        if CONSUMERS > 1:
            ds = ds.slice(wg * 64, 64, dim=1)
        dq = warpgroup_mma(ds.permute((1, 0)), k_bufs.index(stage), dq, is_async=True)
    return dq


@gluon.jit
def _free(
    k_empty, v_empty, ds_empty, tile, CONSUMERS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    DS: gl.constexpr, OVERLAY: gl.constexpr,
):  # fmt: skip
    """This warpgroup reads K and ds of a tile no more."""
    for part in gl.static_range(CONSUMERS):
        mbarrier.arrive(k_empty.index(tile % K_STAGES * CONSUMERS + part), count=1)
        if DS and OVERLAY:
            mbarrier.arrive(v_empty.index(tile % V_STAGES * CONSUMERS + part), count=1)
    if DS and not OVERLAY:
        mbarrier.arrive(ds_empty, count=1)


@gluon.jit
def _step(
    wg: gl.constexpr, q_side, buffers, bars, ds_side, tile, j, s, dq, index, keys, listed, total, qk_scale, level,
    bias_ptr, tail_bias_ptr, sums, tail_sums, bulk, J,
    D: gl.constexpr, N: gl.constexpr, CONSUMERS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr, TAIL: gl.constexpr, WANT_Q: gl.constexpr, WANT_K: gl.constexpr, WANT_V: gl.constexpr,
    EARLY: gl.constexpr, OVERLAY: gl.constexpr, SLOTS: gl.constexpr, LANES: gl.constexpr,
    MASKED: gl.constexpr,
    layout: gl.constexpr, out_layout: gl.constexpr,
):  # fmt: skip
    """Tile j of keys, whose scores are s. Returns the scores of the tile to come and dq."""
    q_bufs, dout_bufs, statistics_buf, _, _, _, _, _ = q_side
    k_bufs, v_bufs, entry_bufs, ds_bufs = buffers
    k_full, k_empty, v_full, v_empty = bars
    ds_full, ds_empty = ds_side
    # A number that the compiler can't know to be 0: matrix descriptors that are the same for all tiles would be
    # computed before the loop and cost registers that it does not have.
    zero = j >> 24
    q_buf, dout_buf = q_bufs.index(zero), dout_bufs.index(zero)
    BLOCK_N: gl.constexpr = 64 * CONSUMERS
    BLOCK_D: gl.constexpr = q_buf.shape[1]
    DS: gl.constexpr = WANT_Q or WANT_K
    DS_STAGES: gl.constexpr = V_STAGES if OVERLAY else 1
    piece: gl.constexpr = LANES_PIECE if LANES else PIECE
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    dtype: gl.constexpr = q_buf.dtype
    stage = tile % V_STAGES * CONSUMERS + wg
    entry_buf = entry_bufs.index(tile % K_STAGES * CONSUMERS + wg)
    ds_buf = ds_bufs.index(tile % DS_STAGES * CONSUMERS + wg)
    if DS:
        if not OVERLAY:
            # Long past, in general. Waited for where ds is stored, it would cost registers: p is not packed across it.
            mbarrier.wait(ds_empty, (tile & 1) ^ 1)
        mbarrier.wait(v_full.index(stage), (tile // V_STAGES) & 1)
        fence_async_shared()
        dp = statistics_buf.index(1).load(columns)[None, :] + gl.zeros([64, BLOCK_N], gl.float32, layout)
        dp = warpgroup_mma(v_bufs.index(stage), dout_buf.permute((1, 0)), dp, is_async=True)

    if MASKED:
        _, shift, used = _keys(
            wg, entry_buf, j, index, keys, listed, bias_ptr, tail_bias_ptr, J, N, BLOCK_N, HAS_BIAS, TAIL, True,
            gl.SliceLayout(1, layout),
        )  # fmt: skip
        if HAS_BIAS:
            shift -= level
        p = gl.exp2(s * qk_scale + shift[:, None])
        p = gl.where(used[:, None], p, 0.0)
    elif HAS_BIAS:
        p = gl.exp2(s * qk_scale - level)
    else:
        p = gl.exp2(s * qk_scale)
    if DS:
        dp = warpgroup_mma_wait(0, deps=(dp,))
        ds_buf.store((p * dp).to(dtype))
        # Stores go through the generic proxy, too.
        fence_async_shared()
        mbarrier.arrive(ds_full, count=1)
        if not OVERLAY:
            mbarrier.arrive(v_empty.index(stage), count=1)
    p_operand = gl.convert_layout(p.to(dtype), operand)

    dk_ptr, dv_ptr = sums
    if MASKED and TAIL:  # noqa: SIM102 (decided when it is compiled)
        if j >= listed:
            dk_ptr, dv_ptr = tail_sums
    dk_desc, dv_desc, staging, first_row = bulk
    if SLOTS > 0 and not MASKED:
        # The keys of a unit are neighbours.
        entry = gl.sum(entry_buf.slice(0, 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        row = first_row + entry * N + (j * BLOCK_N + wg * 64) % N
    else:
        key, _, used = _keys(
            wg, entry_buf, j, index, keys, listed, bias_ptr, tail_bias_ptr, J, N, BLOCK_N, HAS_BIAS, TAIL, MASKED,
            gl.SliceLayout(1, piece),
        )  # fmt: skip
    DQ: gl.constexpr = CONSUMERS if WANT_Q else 0  # products that make dq
    if WANT_V:
        dv = gl.zeros([64, BLOCK_D], gl.float32, out_layout)
        dv = warpgroup_mma(p_operand, dout_buf, dv, use_acc=False, is_async=True)
    if WANT_Q and EARLY:
        dq = _begin_dq(wg, k_bufs, k_full, ds_bufs, ds_full, tile, dq, CONSUMERS, K_STAGES, DS_STAGES)
    if WANT_V:
        # The operand stays where it is while the product reads it.
        dv, _ = warpgroup_mma_wait(DQ if EARLY else 0, deps=(dv, p_operand))
        if SLOTS > 0 and not MASKED:
            add_bulk(wg, dv_desc, row, staging, dv, 0, D, SLOTS, LANES, piece)
        else:
            add(dv_ptr, key, used, dv, 0, D, LANES, MASKED)
    if WANT_K:
        dk = gl.zeros([64, BLOCK_D], gl.float32, out_layout)
        dk = warpgroup_mma(ds_buf, q_buf, dk, use_acc=False, is_async=True)
    if WANT_Q and not EARLY:
        dq = _begin_dq(wg, k_bufs, k_full, ds_bufs, ds_full, tile, dq, CONSUMERS, K_STAGES, DS_STAGES)
    if WANT_K:
        dk = warpgroup_mma_wait(0 if EARLY else DQ, deps=(dk,))
    if EARLY:
        if WANT_Q:
            dq = warpgroup_mma_wait(0, deps=(dq,))
        _free(k_empty, v_empty, ds_empty, tile, CONSUMERS, K_STAGES, V_STAGES, DS, OVERLAY)
    if not MASKED:
        # Not before: with its operand alive there would be no registers for the scores.
        s = _scores(wg, k_bufs, k_full, q_buf, statistics_buf, tile + 1, CONSUMERS, K_STAGES, layout)
    if WANT_K:
        if SLOTS > 0 and not MASKED:
            add_bulk(wg, dk_desc, row, staging, dk, 0, D, SLOTS, LANES, piece)
        else:
            add(dk_ptr, key, used, dk, 0, D, LANES, MASKED)
    if not EARLY:
        if WANT_Q:
            dq = warpgroup_mma_wait(0 if MASKED else 1, deps=(dq,))
        _free(k_empty, v_empty, ds_empty, tile, CONSUMERS, K_STAGES, V_STAGES, DS, OVERLAY)
    if not MASKED:
        s = warpgroup_mma_wait(0, deps=(s,))
    elif j + 1 < total:
        s = _scores(wg, k_bufs, k_full, q_buf, statistics_buf, tile + 1, CONSUMERS, K_STAGES, layout)
        s = warpgroup_mma_wait(0, deps=(s,))
    return s, dq


@gluon.jit
def consumer(
    wg: gl.constexpr, q_side, buffers, bars, ds_side, tensors, results, sizes, dq_strides, scale, qk_scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, N: gl.constexpr, CONSUMERS: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ORDER: gl.constexpr, TAIL: gl.constexpr,
    WANT_Q: gl.constexpr, WANT_K: gl.constexpr, WANT_V: gl.constexpr, EARLY: gl.constexpr, OVERLAY: gl.constexpr,
    SLOTS: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``wg``: 64 keys of each tile for their dk and dv, 64 queries for their dq."""
    q_bufs, _, statistics_buf, level_buf, q_full, q_empty, place_buf, place_full = q_side
    k_bufs, _, _, _ = buffers
    k_full, _, _, _ = bars
    work_ptr, bias_ptr, order_ptr, tail_bias_ptr = tensors
    dq_ptr, dk_sum_ptr, dv_sum_ptr, dtail_k_ptr, dtail_v_ptr, dk_desc, dv_desc, staging = results
    first_head, heads, SHARE, Hkv, Sq, Sk, X, J, ITEMS, stride_bb = sizes
    stride_gb, stride_gh, stride_gs = dq_strides
    BLOCK_N: gl.constexpr = 64 * CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    tile = 0
    i = 0
    place = _drawn(place_buf, place_full, i)
    while place < ITEMS:
        index, keys, clean = load_work(place, work_ptr)
        full, listed, total = count_tiles(keys, clean, J, BLOCK_N, TAIL)
        h, b = first_head + index // X % heads, (index // X // heads).to(gl.int64)
        head = b * Hkv + h // SHARE
        entry_bias_ptr = bias_ptr
        if HAS_BIAS:
            entry_bias_ptr += b * stride_bb
        dk_ptr, dv_ptr, tail_dk_ptr, tail_dv_ptr = dk_sum_ptr, dv_sum_ptr, dtail_k_ptr, dtail_v_ptr
        if WANT_K:
            dk_ptr += head * Sk * D
        if WANT_V:
            dv_ptr += head * Sk * D
        if TAIL and WANT_K:
            tail_dk_ptr += head * J * D
        if TAIL and WANT_V:
            tail_dv_ptr += head * J * D
        sums, tail_sums = (dk_ptr, dv_ptr), (tail_dk_ptr, tail_dv_ptr)
        bulk = (dk_desc, dv_desc, staging, head.to(gl.int32) * Sk)
        level = 0.0
        if HAS_BIAS:
            level = gl.sum(level_buf.load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        dq = gl.zeros([64, BLOCK_D], gl.float32, out_layout)
        mbarrier.wait(q_full, i & 1)
        s = _scores(wg, k_bufs, k_full, q_bufs.index(0), statistics_buf, tile, CONSUMERS, K_STAGES, layout)
        s = warpgroup_mma_wait(0, deps=(s,))
        full = gl.minimum(full, total - 1)
        for j in range(0, full):
            s, dq = _step(
                wg, q_side, buffers, bars, ds_side, tile + j, j, s, dq, index, keys, listed, total, qk_scale, level,
                entry_bias_ptr, tail_bias_ptr, sums, tail_sums, bulk, J,
                D, N, CONSUMERS, K_STAGES, V_STAGES, HAS_BIAS, TAIL, WANT_Q, WANT_K, WANT_V, EARLY, OVERLAY,
                SLOTS, LANES, False,
                layout, out_layout,
            )  # fmt: skip
        for j in range(full, total):
            s, dq = _step(
                wg, q_side, buffers, bars, ds_side, tile + j, j, s, dq, index, keys, listed, total, qk_scale, level,
                entry_bias_ptr, tail_bias_ptr, sums, tail_sums, bulk, J,
                D, N, CONSUMERS, K_STAGES, V_STAGES, HAS_BIAS, TAIL, WANT_Q, WANT_K, WANT_V, False, OVERLAY,
                SLOTS, LANES, True,
                layout, out_layout,
            )  # fmt: skip
        mbarrier.arrive(q_empty, count=1)
        tile += total

        if WANT_Q:
            row = index % X * BLOCK_N + wg * 64 + gl.arange(0, 64, gl.SliceLayout(1, PIECE))
            token = row
            if HAS_ORDER:
                token = gl.load(order_ptr + row, mask=row < Sq, other=0)
            ptrs = dq_ptr + b * stride_gb + h.to(gl.int64) * stride_gh + token.to(gl.int64) * stride_gs
            _store(ptrs, row < Sq, dq * scale, 0, D)
        i += 1
        place = _drawn(place_buf, place_full, i)
    if SLOTS > 0:
        finish_reads(0)  # before this CTA's shared memory is another's
