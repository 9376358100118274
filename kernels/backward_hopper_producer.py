"""The producer of the Hopper backward kernel (Gluon): it gathers. ``attention_backward_hopper`` says how."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fg_inductor.kernels.hopper_producer import _copy_rows, _entries, copy_async
from fg_inductor.kernels.hopper_work import count_tiles, load_work


@gluon.jit
def _copy_unit(
    buffers, bars, unit, row, valid, k_base, v_base, stride_ks, stride_vs,
    D: gl.constexpr, K_UNITS: gl.constexpr, V_UNITS: gl.constexpr, WANT_V_ROWS: gl.constexpr, WIDE: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """64 rows of K, whose buffer is free, and of V."""
    k_bufs, v_bufs, _, _ = buffers
    k_full, _, v_full, v_empty = bars
    stage = unit % K_UNITS
    _copy_rows(k_bufs.index(stage), k_base, row, stride_ks, valid, D, WIDE, MASKED)
    async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
    if WANT_V_ROWS:
        stage = unit % V_UNITS
        mbarrier.wait(v_empty.index(stage), ((unit // V_UNITS) & 1) ^ 1)
        _copy_rows(v_bufs.index(stage), v_base, row, stride_vs, valid, D, WIDE, MASKED)
        async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)


@gluon.jit
def _gather_unit(
    buffers, bars, unit, u, entry, list_ptr, keys, next_list_ptr, next_keys, units, k_base, v_base, bias_ptr,
    stride_ks, stride_vs,
    D: gl.constexpr, N: gl.constexpr, K_UNITS: gl.constexpr, V_UNITS: gl.constexpr, WANT_V_ROWS: gl.constexpr,
    HAS_BIAS: gl.constexpr, WIDE: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Keys 64 u .. 64 u + 63 of a list, whose entries were loaded before. Returns the entries of the unit to come."""
    _, _, entry_bufs, _ = buffers
    _, k_empty, _, _ = bars
    rows: gl.constexpr = entry.type.layout
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    place = u * 64 + gl.arange(0, 64, rows)
    spot = u * 64 + gl.arange(0, 64, flat)
    valid = place < keys
    if MASKED:
        place = gl.minimum(place, gl.maximum(keys - 1, 0))
        spot = gl.minimum(spot, gl.maximum(keys - 1, 0))
    key = entry
    if N > 1:
        key = key * N + place % N
    if MASKED and HAS_BIAS:
        valid = gl.load(bias_ptr + key, mask=valid, other=float("-inf")) > float("-inf")
    if u + 1 < units:
        entry = _entries(list_ptr, (u + 1) * 64, keys, N, 64, rows)
    else:
        entry = _entries(next_list_ptr, 0, next_keys, N, 64, rows)
    mbarrier.wait(k_empty.index(unit % K_UNITS), ((unit // K_UNITS) & 1) ^ 1)
    copy_async(entry_bufs.index(unit % K_UNITS), list_ptr + spot // N)
    _copy_unit(
        buffers, bars, unit, key, valid, k_base, v_base, stride_ks, stride_vs, D, K_UNITS, V_UNITS, WANT_V_ROWS, WIDE,
        MASKED,
    )  # fmt: skip
    return entry


@gluon.jit
def _level(statistics_ptr, order_ptr, first, HAS_ORDER: gl.constexpr):
    """lse of a slice's first query (base 2), 0 where it is not finite: about where those of the slice lie."""
    token = first
    if HAS_ORDER:
        token = gl.load(order_ptr + first)
    lse = gl.load(statistics_ptr + 2 * token)
    return gl.where(gl.abs(lse) < float("inf"), lse, 0.0)


@gluon.jit
def producer(
    q_side, buffers, bars, tensors, inputs, sizes, q_strides, k_strides, v_strides, dout_strides, qk_scale,
    WIDE: gl.constexpr, WARPS: gl.constexpr,
    D: gl.constexpr, BLOCK_D: gl.constexpr, N: gl.constexpr, CONSUMERS: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ORDER: gl.constexpr, TAIL: gl.constexpr,
    WANT_Q: gl.constexpr, WANT_K: gl.constexpr, WANT_V: gl.constexpr,
):  # fmt: skip
    """The producer warpgroup: every copy into shared memory."""
    q_bufs, dout_bufs, statistics_buf, level_buf, q_full, q_empty, place_buf, place_full = q_side
    work_ptr, lists_ptr, bias_ptr, order_ptr, tail_k_ptr, tail_v_ptr, statistics_ptr = tensors
    q_ptr, k_ptr, v_ptr, dout_ptr = inputs
    first_head, heads, SHARE, Hq, Hkv, Sq, X, G, J, ITEMS, stride_bb = sizes
    stride_qb, stride_qh, stride_qs = q_strides
    stride_kb, stride_kh, stride_ks = k_strides
    stride_vb, stride_vh, stride_vs = v_strides
    stride_ob, stride_oh, stride_os = dout_strides
    _, k_empty, _, _ = bars
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [WARPS, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    K_UNITS: gl.constexpr = K_STAGES * CONSUMERS
    V_UNITS: gl.constexpr = V_STAGES * CONSUMERS
    WANT_V_ROWS: gl.constexpr = WANT_Q or WANT_K
    unit = 0
    i = 0
    place = gl.program_id(0)
    index, keys, clean = load_work(place, work_ptr)
    entry = _entries(lists_ptr + index.to(gl.int64) * G, 0, keys, N, 64, rows)
    follower = place + gl.num_programs(0)
    while place < ITEMS:
        # Not carried over from the iteration before: Triton 3.6 keeps the first value as a bound of the loops below.
        full, listed, total = count_tiles(keys, clean, J, 64 * CONSUMERS, TAIL)
        h, b = first_head + index // X % heads, (index // X // heads).to(gl.int64)
        h_kv = (h // SHARE).to(gl.int64)
        k_base = k_ptr + b * stride_kb + h_kv * stride_kh
        v_base = v_ptr + b * stride_vb + h_kv * stride_vh
        list_ptr = lists_ptr + index.to(gl.int64) * G
        first = index % X * (64 * CONSUMERS)

        mbarrier.wait(q_empty, (i & 1) ^ 1)
        for part in gl.static_range(CONSUMERS):
            row = first + part * 64 + gl.arange(0, 64, rows)
            inside = row < Sq
            token = row
            if HAS_ORDER:
                token = gl.load(order_ptr + row, mask=inside, other=0)
            base = q_ptr + b * stride_qb + h.to(gl.int64) * stride_qh
            _copy_rows(q_bufs.index(0).slice(part * 64, 64), base, token, stride_qs, inside, D, WIDE, True)
            base = dout_ptr + b * stride_ob + h.to(gl.int64) * stride_oh
            _copy_rows(dout_bufs.index(0).slice(part * 64, 64), base, token, stride_os, inside, D, WIDE, True)
        async_copy.mbarrier_arrive(q_full, increment_count=False)
        row = first + gl.arange(0, 64 * CONSUMERS, flat)
        inside = row < Sq
        token = row
        if HAS_ORDER:
            token = gl.load(order_ptr + row, mask=inside, other=0)
        statistics = statistics_ptr + (b * Hq + h) * Sq * 2
        # What the products begin with. Rows past the end have weight 0.
        lse = gl.load(statistics + 2 * token, mask=inside, other=float("inf"))
        if HAS_BIAS:
            # What a large bias adds to scores and lse would cost digits in the product, which doesn't know the bias.
            level = _level(statistics, order_ptr, first, HAS_ORDER)
            lse -= level
            level_buf.store(gl.full([1], level, gl.float32, flat))
        statistics_buf.index(0).store(-lse / qk_scale)
        statistics_buf.index(1).store(-gl.load(statistics + 2 * token + 1, mask=inside, other=0.0))
        place_buf.store(gl.full([1], place, gl.int32, flat))
        mbarrier.arrive(place_full, count=1)

        # The tile to come: its list is at hand when the last keys of this one are under way.
        next_index, next_keys, next_clean = load_work(gl.minimum(follower, ITEMS - 1), work_ptr)
        next_list_ptr = lists_ptr + next_index.to(gl.int64) * G
        entry_bias_ptr = bias_ptr
        if HAS_BIAS:
            entry_bias_ptr += b * stride_bb
        for u in range(full * CONSUMERS):
            entry = _gather_unit(
                buffers, bars, unit, u, entry, list_ptr, keys, next_list_ptr, next_keys, listed * CONSUMERS, k_base,
                v_base, entry_bias_ptr, stride_ks, stride_vs,
                D, N, K_UNITS, V_UNITS, WANT_V_ROWS, HAS_BIAS, WIDE, False,
            )  # fmt: skip
            unit += 1
        for u in range(full * CONSUMERS, listed * CONSUMERS):
            entry = _gather_unit(
                buffers, bars, unit, u, entry, list_ptr, keys, next_list_ptr, next_keys, listed * CONSUMERS, k_base,
                v_base, entry_bias_ptr, stride_ks, stride_vs,
                D, N, K_UNITS, V_UNITS, WANT_V_ROWS, HAS_BIAS, WIDE, True,
            )  # fmt: skip
            unit += 1
        if TAIL:
            head = (b * Hkv + h_kv) * J * D
            for u in range((total - listed) * CONSUMERS):
                block = u * 64 + gl.arange(0, 64, rows)
                mbarrier.wait(k_empty.index(unit % K_UNITS), ((unit // K_UNITS) & 1) ^ 1)
                _copy_unit(
                    buffers, bars, unit, block, block < J, tail_k_ptr + head, tail_v_ptr + head, D, D,
                    D, K_UNITS, V_UNITS, WANT_V_ROWS, False, True,
                )  # fmt: skip
                unit += 1
        place, index, keys, clean = follower, next_index, next_keys, next_clean
        # Drawn two tiles ahead, here, where the producer would wait for the consumers anyway.
        follower = 2 * gl.num_programs(0) + gl.atomic_add(work_ptr + 4 * ITEMS, 1, sem="relaxed")
        i += 1
    mbarrier.wait(q_empty, (i & 1) ^ 1)
    place_buf.store(gl.full([1], place, gl.int32, flat))
    mbarrier.arrive(place_full, count=1)
