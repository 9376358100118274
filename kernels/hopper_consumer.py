"""The consumers of the Hopper attention kernel (Gluon): wgmma and softmax. ``attention_forward_hopper`` says how."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fg_inductor.kernels.column_lists import ID_BITS
from fg_inductor.kernels.hopper_work import count_tiles, load_work, tokens_of

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _softmax(s, m_i, l_i, scale, GUARDED: gl.constexpr, NEGATIVE: gl.constexpr):
    """One tile of the online softmax in base 2: s [64, BLOCK_N]; in GUARDED tiles already scaled, -inf where masked."""
    if GUARDED:
        m_new = gl.maximum(m_i, gl.max(s, 1))
        # A row whose scores are all -inf so far must not become -inf - -inf.
        m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
        p = gl.exp2(s - m_safe[:, None])
    else:
        largest = gl.min(s, 1) if NEGATIVE else gl.max(s, 1)
        m_new = gl.maximum(m_i, largest * scale)
        m_safe = m_new
        p = gl.exp2(s * scale - m_new[:, None])
    alpha = gl.exp2(m_i - m_safe)
    return p, m_new, l_i * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _mask(
    s, wg: gl.constexpr, j, index, keys, listed, bits, scale,
    lists_ptr, bias_ptr, tail_bias_ptr, G, J, T, X,
    N: gl.constexpr, M: gl.constexpr, BLOCK_N: gl.constexpr, SUB: gl.constexpr,
    HAS_BIAS: gl.constexpr, TAIL: gl.constexpr, RAGGED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Scores in base 2, biased, and -inf where a row does not attend. ``bits``: the list entries, for SUB > 1."""
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    place = j * BLOCK_N + gl.arange(0, BLOCK_N, columns)
    s = s * scale
    if SUB > 1:
        sub = (wg * 64 + gl.arange(0, 64, rows)) // M
        mine = ((bits[None, :] >> (ID_BITS + sub)[:, None]) & 1) != 0
        if TAIL:
            mine = mine | (j >= listed)
        s = gl.where(mine, s, float("-inf"))
    if RAGGED:
        keep = place < keys
        if HAS_BIAS:
            safe = gl.maximum(gl.minimum(place, keys - 1), 0)
            entry = gl.load(lists_ptr + index.to(gl.int64) * G + safe // N, mask=keep, other=0)
            if SUB > 1:
                entry = entry & ((1 << ID_BITS) - 1)
            bias = gl.load(bias_ptr + entry * N + safe % N, mask=keep, other=float("-inf"))
            keep = bias > float("-inf")
            s += gl.where(keep, bias, 0.0)[None, :] * LOG2_E
        if TAIL:
            keep = keep | (j >= listed)
            block = place - listed * BLOCK_N
            inside = (block >= 0) & (block < J)
            if SUB > 1:
                head, tile = index // X, index % X
                t = gl.minimum(tile * SUB + sub, T - 1)
                ptrs = tail_bias_ptr + (head.to(gl.int64) * T + t)[:, None] * J + block[None, :]
                shift = gl.load(ptrs, mask=inside[None, :], other=float("-inf"))
                shift = gl.where(j < listed, 0.0, shift)
                s = gl.where(shift > float("-inf"), s + shift, float("-inf"))
            else:
                ptrs = tail_bias_ptr + index.to(gl.int64) * J + block
                shift = gl.load(ptrs, mask=inside, other=float("-inf"))
                shift = gl.where(j < listed, 0.0, shift)
                keep = keep & (shift > float("-inf"))
                s += gl.where(keep, shift, 0.0)[None, :]
        s = gl.where(keep[None, :], s, float("-inf"))
    return s


@gluon.jit
def _step(
    wg: gl.constexpr, q, buffers, bars, tile, j, p, m_i, l_i, acc,
    index, keys, listed, scale, lists_ptr, bias_ptr, tail_bias_ptr, G, J, T, X,
    N: gl.constexpr, M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SUB: gl.constexpr,
    HAS_BIAS: gl.constexpr, TAIL: gl.constexpr, NEGATIVE: gl.constexpr,
    RAGGED: gl.constexpr, FIRST: gl.constexpr, BOX: gl.constexpr, layout: gl.constexpr, out_layout: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of tile j of keys, beside the product of tile j - 1 with V.

    ptxas moves the wait for that product up in front of the exponentials, unless a branch lies between. What was tried
    for that, none faster: a branch (the wait for this tile's V) there, so that all of the softmax overlaps the product;
    turns for the two consumers, so that one computes its softmax beside the other's products; maxima and sums with
    shorter chains and fewer shuffles (``examples/benchmarks/results/forward_versions.json``).
    """
    k_bufs, v_bufs, bits_bufs = buffers
    k_full, k_empty, v_full, v_empty = bars
    stage = tile % STAGES
    before = (tile + STAGES - 1) % STAGES  # that of the tile before
    mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
    if BOX == 0 or FIRST:  # q is always gathered
        # cp.async writes through the generic proxy, wgmma reads through the asynchronous one.
        fence_async_shared()
    s = gl.zeros([64, BLOCK_N], gl.float32, layout)
    s = warpgroup_mma(q, k_bufs.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    if not FIRST:
        mbarrier.wait(v_full.index(before), ((tile - 1) // STAGES) & 1)
        if BOX == 0:
            fence_async_shared()
        acc = warpgroup_mma(p, v_bufs.index(before), acc, is_async=True)
    bits = 0
    if SUB > 1:
        bits = bits_bufs.index(stage).load(gl.SliceLayout(0, layout))
    s = warpgroup_mma_wait(0 if FIRST else 1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    GUARDED: gl.constexpr = RAGGED or SUB > 1
    if GUARDED:
        s = _mask(
            s, wg, j, index, keys, listed, bits, scale, lists_ptr, bias_ptr, tail_bias_ptr, G, J, T, X,
            N, M, BLOCK_N, SUB, HAS_BIAS, TAIL, RAGGED, layout,
        )  # fmt: skip
    p32, m_i, l_i, alpha = _softmax(s, m_i, l_i, scale, GUARDED, NEGATIVE)
    if not FIRST:
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, out_layout))[:, None]
    p = gl.convert_layout(p32.to(k_bufs.dtype), gl.DotOperandLayout(0, out_layout, 2))
    return p, m_i, l_i, acc


@gluon.jit
def _drawn(place_buf, place_full, i):
    """What the producer drew as the i-th tile of this CTA: its place in ``work``."""
    mbarrier.wait(place_full, i & 1)
    return gl.sum(place_buf.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def consumer(
    wg: gl.constexpr, q_side, buffers, bars, tensors, sizes, out_strides, qk_scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SUB: gl.constexpr, CONSUMERS: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_ORDER: gl.constexpr, TAIL: gl.constexpr, NEGATIVE: gl.constexpr, BOX: gl.constexpr, ALIKE: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``wg``: 64 queries of each tile, from the scores to out and lse."""
    q_bufs, q_full, q_empty, place_buf, place_full = q_side
    work_ptr, lists_ptr, bias_ptr, tail_bias_ptr, order_ptr, alike_ptr, out_ptr, lse_ptr = tensors
    first_head, heads, Hq, Sq, T, X, G, J, ITEMS, stride_bb = sizes
    stride_ob, stride_oh, stride_os = out_strides
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    store: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    _, _, v_full, v_empty = bars
    dtype: gl.constexpr = q_bufs.dtype
    q = q_bufs.index(wg)
    tile = 0
    i = 0
    place = _drawn(place_buf, place_full, i)
    while place < ITEMS:
        index, keys, clean = load_work(place, work_ptr)
        full, listed, total = count_tiles(keys, clean, J, BLOCK_N, TAIL)
        entry_bias_ptr = bias_ptr
        if HAS_BIAS:
            entry_bias_ptr += (index // X // heads).to(gl.int64) * stride_bb
        m_i = gl.full([64], float("-inf"), gl.float32, rows)
        l_i = gl.full([64], 0.0, gl.float32, rows)
        acc = gl.zeros([64, BLOCK_D], gl.float32, out_layout)
        p = gl.zeros([64, BLOCK_N], dtype, gl.DotOperandLayout(0, out_layout, 2))
        mbarrier.wait(q_full, i & 1)
        p, m_i, l_i, acc = _step(
            wg, q, buffers, bars, tile, 0, p, m_i, l_i, acc,
            index, keys, listed, qk_scale, lists_ptr, entry_bias_ptr, tail_bias_ptr, G, J, T, X,
            N, M, BLOCK_N, STAGES, SUB, HAS_BIAS, TAIL, NEGATIVE, True, True, BOX, layout, out_layout,
        )  # fmt: skip
        for j in range(1, full):
            p, m_i, l_i, acc = _step(
                wg, q, buffers, bars, tile + j, j, p, m_i, l_i, acc,
                index, keys, listed, qk_scale, lists_ptr, entry_bias_ptr, tail_bias_ptr, G, J, T, X,
                N, M, BLOCK_N, STAGES, SUB, HAS_BIAS, TAIL, NEGATIVE, False, False, BOX, layout, out_layout,
            )  # fmt: skip
        for j in range(gl.maximum(full, 1), total):
            p, m_i, l_i, acc = _step(
                wg, q, buffers, bars, tile + j, j, p, m_i, l_i, acc,
                index, keys, listed, qk_scale, lists_ptr, entry_bias_ptr, tail_bias_ptr, G, J, T, X,
                N, M, BLOCK_N, STAGES, SUB, HAS_BIAS, TAIL, NEGATIVE, True, False, BOX, layout, out_layout,
            )  # fmt: skip
        mbarrier.arrive(q_empty, count=1)
        tile += total
        stage = (tile + STAGES - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((tile - 1) // STAGES) & 1)
        if BOX == 0:
            fence_async_shared()
        acc = warpgroup_mma(p, buffers[1].index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(stage), count=1)

        normaliser = gl.convert_layout(l_i, gl.SliceLayout(1, out_layout))
        acc = acc / gl.where(normaliser == 0.0, 1.0, normaliser)[:, None]
        lse = gl.where(l_i == 0.0, float("-inf"), (m_i + gl.log2(l_i)) / LOG2_E)
        h, b = first_head + index // X % heads, index // X // heads
        first = index % X * (CONSUMERS * 64) + wg * 64
        row = first + gl.arange(0, 64, gl.SliceLayout(1, store))
        token, inside = tokens_of(row, index // X, order_ptr, alike_ptr, Sq, T, M, HAS_ORDER, ALIKE)
        column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, store))
        ptrs = out_ptr + b.to(gl.int64) * stride_ob + h.to(gl.int64) * stride_oh
        ptrs = ptrs + token.to(gl.int64)[:, None] * stride_os + column[None, :]
        out = gl.convert_layout(acc.to(dtype), store)
        gl.store(ptrs, out, mask=inside[:, None] & (column < D)[None, :])
        row = first + gl.arange(0, 64, rows)
        token, inside = tokens_of(row, index // X, order_ptr, alike_ptr, Sq, T, M, HAS_ORDER, ALIKE)
        gl.store(lse_ptr + (b.to(gl.int64) * Hq + h) * Sq + token, lse, mask=inside)
        i += 1
        place = _drawn(place_buf, place_full, i)
