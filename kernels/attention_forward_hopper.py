"""Attention over the kept keys of each query slice, forward, for Hopper (Gluon).

    out[i] = softmax over kept keys j of (scale * q[i] . k[j] + bias[j]) @ v        for every query i of a slice

q, out     [B, Hq, Sq, D]    k, v [B, Hkv, Sk, D]    bfloat16 or float16; any strides, contiguous last dimension
lists      [B, H, X, G]      int32, ascending ids of the groups that a tile keeps (``column_lists``)
work       [B * H * X + 1, 4] int32: the tiles in the order they are begun, and the keys of each (``work_order``); the
                              last row counts those that were drawn
bias       [B, Sk]           float32, -inf where a key is masked, or None
order      [Sq]              int32: row i of query order is token order[i]; out and lse are in token order; or None
tail_k, v  [B, Hkv, J, D]    summaries of the 128-key blocks, tail_bias [B, H, T, J] (base 2; -inf: none dropped)
lse        [B, Hq, Sq]       float32, natural log
Grid       as many CTAs as the GPU holds at once; each draws its next tile when it has room for it

A CTA attends for one tile of queries at a time: CONSUMERS x 64 rows of query order, X tiles a head. One of its
warpgroups, the producer, gathers the listed rows of K and V into swizzled shared memory (16-byte cp.async, STAGES tiles
of BLOCK_N keys) and never computes. Each of the others, a consumer, holds 64 queries and runs wgmma: the scores of a
tile of keys are computed beside the product of the tile before with V, so that the tensor cores work while the softmax
does. mbarriers hand the buffers over, also from one tile of queries to the next: the producer gathers for the next one
while the consumers finish. Only the first and the last, ragged tile of a list are masked; the tiles of the pooled tail
follow in the same softmax.

Where a slice is smaller than a tile (M = 32 and 16), the list is the union of what the tile's slices keep, every entry
carries one bit for each slice above its id, and each row masks what its own slice did not keep: exact for every slice.

Meaning: ``reference.attention``. Numbers: ``python -m fg_inductor bench attention``.
"""

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fg_inductor.kernels import column_lists, group_means, work_order
from fg_inductor.kernels.attention_forward import heads_at_once
from fg_inductor.kernels.mask import group_count
from fg_inductor.kernels.reference import SUMMARY, normalise_key_bias

# Triton renamed it.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

ID_BITS = gl.constexpr(24)  # of a list entry; above them, one bit for each slice of the tile
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _work(place, work_ptr):
    """The index of a tile of queries, the keys in its list, and those at its front that need no look at the bias."""
    return gl.load(work_ptr + 4 * place), gl.load(work_ptr + 4 * place + 1), gl.load(work_ptr + 4 * place + 2)


@gluon.jit
def _tiles(keys, clean, J, BLOCK_N: gl.constexpr, TAIL: gl.constexpr):
    """Tiles of keys: those that need no mask, those of the list, and all, the tail's included."""
    full = clean // BLOCK_N
    listed = gl.maximum((keys + BLOCK_N - 1) // BLOCK_N, 1)  # one, all masked, where nothing is kept
    total = listed + (J + BLOCK_N - 1) // BLOCK_N if TAIL else listed
    return full, listed, total


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
    RAGGED: gl.constexpr, FIRST: gl.constexpr, layout: gl.constexpr, out_layout: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of tile j of keys, beside the product of tile j - 1 with V."""
    k_bufs, v_bufs, bits_bufs = buffers
    k_full, k_empty, v_full, v_empty = bars
    stage = tile % STAGES
    before = (tile + STAGES - 1) % STAGES  # that of the tile before
    mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
    # cp.async writes through the generic proxy, wgmma reads through the asynchronous one.
    fence_async_shared()
    s = gl.zeros([64, BLOCK_N], gl.float32, layout)
    s = warpgroup_mma(q, k_bufs.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    if not FIRST:
        mbarrier.wait(v_full.index(before), ((tile - 1) // STAGES) & 1)
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
def _consumer(
    wg: gl.constexpr, q_side, buffers, bars, tensors, sizes, out_strides, qk_scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SUB: gl.constexpr, CONSUMERS: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_ORDER: gl.constexpr, TAIL: gl.constexpr, NEGATIVE: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``wg``: 64 queries of each tile, from the scores to out and lse."""
    q_bufs, q_full, q_empty, place_buf, place_full = q_side
    work_ptr, lists_ptr, bias_ptr, tail_bias_ptr, order_ptr, out_ptr, lse_ptr = tensors
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
        index, keys, clean = _work(place, work_ptr)
        full, listed, total = _tiles(keys, clean, J, BLOCK_N, TAIL)
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
            N, M, BLOCK_N, STAGES, SUB, HAS_BIAS, TAIL, NEGATIVE, True, True, layout, out_layout,
        )  # fmt: skip
        for j in range(1, full):
            p, m_i, l_i, acc = _step(
                wg, q, buffers, bars, tile + j, j, p, m_i, l_i, acc,
                index, keys, listed, qk_scale, lists_ptr, entry_bias_ptr, tail_bias_ptr, G, J, T, X,
                N, M, BLOCK_N, STAGES, SUB, HAS_BIAS, TAIL, NEGATIVE, False, False, layout, out_layout,
            )  # fmt: skip
        for j in range(gl.maximum(full, 1), total):
            p, m_i, l_i, acc = _step(
                wg, q, buffers, bars, tile + j, j, p, m_i, l_i, acc,
                index, keys, listed, qk_scale, lists_ptr, entry_bias_ptr, tail_bias_ptr, G, J, T, X,
                N, M, BLOCK_N, STAGES, SUB, HAS_BIAS, TAIL, NEGATIVE, True, False, layout, out_layout,
            )  # fmt: skip
        mbarrier.arrive(q_empty, count=1)
        tile += total
        stage = (tile + STAGES - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((tile - 1) // STAGES) & 1)
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
        token = row
        if HAS_ORDER:
            token = gl.load(order_ptr + row, mask=row < Sq, other=0)
        column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, store))
        ptrs = out_ptr + b.to(gl.int64) * stride_ob + h.to(gl.int64) * stride_oh
        ptrs = ptrs + token.to(gl.int64)[:, None] * stride_os + column[None, :]
        out = gl.convert_layout(acc.to(dtype), store)
        gl.store(ptrs, out, mask=(row < Sq)[:, None] & (column < D)[None, :])
        row = first + gl.arange(0, 64, rows)
        token = row
        if HAS_ORDER:
            token = gl.load(order_ptr + row, mask=row < Sq, other=0)
        gl.store(lse_ptr + (b.to(gl.int64) * Hq + h) * Sq + token, lse, mask=row < Sq)
        i += 1
        place = _drawn(place_buf, place_full, i)


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
def _producer(
    q_side, buffers, bars, tensors, qkv, sizes, strides, k_strides, v_strides, WIDE: gl.constexpr, WARPS: gl.constexpr,
    D: gl.constexpr, BLOCK_D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SUB: gl.constexpr, CONSUMERS: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_ORDER: gl.constexpr, TAIL: gl.constexpr, NEGATIVE: gl.constexpr,
):  # fmt: skip
    """The producer warpgroup: every copy into shared memory."""
    q_bufs, q_full, q_empty, place_buf, place_full = q_side
    work_ptr, lists_ptr, bias_ptr, order_ptr, tail_k_ptr, tail_v_ptr = tensors
    q_ptr, k_ptr, v_ptr = qkv
    first_head, heads, SHARE, Hkv, Sq, X, G, J, ITEMS = sizes
    stride_qb, stride_qh, stride_qs, stride_bb = strides
    stride_kb, stride_kh, stride_ks = k_strides
    stride_vb, stride_vh, stride_vs = v_strides
    k_bufs, v_bufs, _ = buffers
    k_full, k_empty, v_full, v_empty = bars
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [WARPS, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    tile = 0
    i = 0
    place = gl.program_id(0)
    index, keys, clean = _work(place, work_ptr)
    entry = _entries(lists_ptr + index.to(gl.int64) * G, 0, keys, N, BLOCK_N, rows)
    while place < ITEMS:
        full, listed, total = _tiles(keys, clean, J, BLOCK_N, TAIL)
        h, b = first_head + index // X % heads, (index // X // heads).to(gl.int64)
        h_kv = (h // SHARE).to(gl.int64)
        k_base = k_ptr + b * stride_kb + h_kv * stride_kh
        v_base = v_ptr + b * stride_vb + h_kv * stride_vh
        list_ptr = lists_ptr + index.to(gl.int64) * G

        mbarrier.wait(q_empty, (i & 1) ^ 1)
        place_buf.store(gl.full([1], place, gl.int32, one))
        mbarrier.arrive(place_full, count=1)
        for wg in gl.static_range(CONSUMERS):
            row = index % X * (CONSUMERS * 64) + wg * 64 + gl.arange(0, 64, rows)
            inside = row < Sq
            token = row
            if HAS_ORDER:
                token = gl.load(order_ptr + row, mask=inside, other=0)
            base = q_ptr + b * stride_qb + h.to(gl.int64) * stride_qh
            _copy_rows(q_bufs.index(wg), base, token, stride_qs, inside, D, WIDE, True)
        async_copy.mbarrier_arrive(q_full, increment_count=False)

        # The tile to come: drawn now, so that its list is at hand when the last keys of this one are under way.
        place = gl.num_programs(0) + gl.atomic_add(work_ptr + 4 * ITEMS, 1, sem="relaxed")
        next_index, next_keys, next_clean = _work(gl.minimum(place, ITEMS - 1), work_ptr)
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
        index, keys, clean = next_index, next_keys, next_clean
        i += 1
    mbarrier.wait(q_empty, (i & 1) ^ 1)
    place_buf.store(gl.full([1], place, gl.int32, one))
    mbarrier.arrive(place_full, count=1)


@gluon.jit
def _attention_fwd_hopper(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    lists_ptr, work_ptr, bias_ptr, order_ptr, tail_k_ptr, tail_v_ptr, tail_bias_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    stride_bb,
    first_head, heads, Hq, Hkv, SHARE, Sq, T, X, G, J, ITEMS, qk_scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PRODUCER_WARPS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ORDER: gl.constexpr, TAIL: gl.constexpr, NEGATIVE: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    SUB: gl.constexpr = max(CONSUMERS * 64 // M, 1)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, BLOCK_D], swizzled)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], swizzled)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], swizzled)
    bits_bufs = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N if SUB > 1 else 1], plain)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    place_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    place_buf = gl.allocate_shared_memory(gl.int32, [1], plain)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=PRODUCER_WARPS * 32)
        mbarrier.init(v_full.index(stage), count=PRODUCER_WARPS * 32)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    mbarrier.init(q_full, count=PRODUCER_WARPS * 32)
    mbarrier.init(q_empty, count=CONSUMERS)
    mbarrier.init(place_full, count=1)

    q_side = (q_bufs, q_full, q_empty, place_buf, place_full)
    buffers = (k_bufs, v_bufs, bits_bufs)
    bars = (k_full, k_empty, v_full, v_empty)
    k_strides, v_strides = (stride_kb, stride_kh, stride_ks), (stride_vb, stride_vh, stride_vs)
    strides = (stride_qb, stride_qh, stride_qs, stride_bb)
    consumer_tensors = (work_ptr, lists_ptr, bias_ptr, tail_bias_ptr, order_ptr, out_ptr, lse_ptr)
    consumer_sizes = (first_head, heads, Hq, Sq, T, X, G, J, ITEMS, stride_bb)
    out_strides = (stride_ob, stride_oh, stride_os)
    producer_tensors = (work_ptr, lists_ptr, bias_ptr, order_ptr, tail_k_ptr, tail_v_ptr)
    producer_sizes = (first_head, heads, SHARE, Hkv, Sq, X, G, J, ITEMS)
    qkv = (q_ptr, k_ptr, v_ptr)
    # The arguments stand here as literals: assigned to a name, their constants would become run-time values.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (
                    gl.constexpr(0), q_side, buffers, bars, consumer_tensors, consumer_sizes, out_strides, qk_scale,
                    D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_BIAS, HAS_ORDER, TAIL, NEGATIVE,
                )),
                (_consumer, (
                    gl.constexpr(1), q_side, buffers, bars, consumer_tensors, consumer_sizes, out_strides, qk_scale,
                    D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_BIAS, HAS_ORDER, TAIL, NEGATIVE,
                )),
                (_producer, (
                    q_side, buffers, bars, producer_tensors, qkv, producer_sizes, strides, k_strides, v_strides,
                    WIDE, PRODUCER_WARPS,
                    D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_BIAS, HAS_ORDER, TAIL, NEGATIVE,
                )),
            ],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    gl.constexpr(0), q_side, buffers, bars, consumer_tensors, consumer_sizes, out_strides, qk_scale,
                    D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_BIAS, HAS_ORDER, TAIL, NEGATIVE,
                )),
                (_producer, (
                    q_side, buffers, bars, producer_tensors, qkv, producer_sizes, strides, k_strides, v_strides,
                    WIDE, PRODUCER_WARPS,
                    D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_BIAS, HAS_ORDER, TAIL, NEGATIVE,
                )),
            ],
            [PRODUCER_WARPS],
            [PRODUCER_REGISTERS],
        )  # fmt: skip


def configuration(d: int, m: int) -> dict:
    """Tiles, stages and registers: a fixed table, measured on an H100; nothing is autotuned inside an operator.

    The registers are those of a thread of the second consumer and of the producer; the first consumer has the rest.
    """
    if m == 64:  # two CTAs share a multiprocessor
        tile = {"CONSUMERS": 1, "BLOCK_N": 64, "STAGES": 2}
        return tile | {"PRODUCER_WARPS": 4, "CONSUMER_REGISTERS": 0, "PRODUCER_REGISTERS": 48, "maxnreg": 128}
    tile = {"CONSUMERS": 2, "BLOCK_N": 128, "STAGES": 2 if d > 64 else 4}
    return tile | {"PRODUCER_WARPS": 4, "CONSUMER_REGISTERS": 208, "PRODUCER_REGISTERS": 88, "maxnreg": 168}


def slices_of_a_tile(d: int, m: int) -> int:
    """Slices that share a list."""
    return max(1, configuration(d, m)["CONSUMERS"] * 64 // m)


def refusal(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, key_bias: Tensor | None, order: Tensor | None, scale: float,
    m: int, n: int, tail: str,
) -> str | None:  # fmt: skip
    """Why this kernel cannot take these arguments (metadata is all that is read), or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16, not in {q.dtype}"
    if q.shape[3] not in (64, 96, 128):
        return f"its head dims are 64, 96 and 128, not {q.shape[3]}"
    return None


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where 16-byte copies of its rows are not possible."""
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:3]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    tail: str,
    **override,
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, D] (BSHD storage) and lse; arguments as in ``kernels.ops``, ``override`` for the table's."""
    q, k, v = map(_aligned, (q, k, v))
    B, Hq, Sq, D = q.shape
    Hkv, Sk, T = k.shape[1], k.shape[2], mask.shape[2]
    G = group_count(Sk, n)
    out = q.new_empty(B, Sq, Hq, D).transpose(1, 2)
    lse = q.new_empty(B, Hq, Sq, dtype=torch.float32)
    bias = normalise_key_bias(key_bias, torch.float32)
    padding = key_bias is not None and key_bias.dtype == torch.bool
    tail_k = tail_v = None
    blocks = 0
    if tail == "pooled":
        blocks = group_count(Sk, SUMMARY)
        tail_k, tail_v = (group_means.launch(x, SUMMARY, blocks, bias=bias) for x in (k, v))
    wide = max(q.stride(2) * Sq, k.stride(2) * Sk, v.stride(2) * Sk) >= 1 << 31
    config = configuration(D, m) | {"WIDE": wide} | override
    sub = max(1, config["CONSUMERS"] * 64 // m)
    X = group_count(T, sub)
    ctas = torch.cuda.get_device_properties(q.device).multi_processor_count * (3 - config["CONSUMERS"])
    heads = heads_at_once(mask, Sk, n, sub)
    for first in range(0, Hq, heads):
        part = mask[:, first : first + heads]
        lists, keys, clean, tail_bias = column_lists.launch(part, Sk, n, sub, tail == "pooled", bias, padding)
        work = work_order.launch(keys, clean)
        items = work.shape[0] - 1
        _attention_fwd_hopper[(min(ctas, items),)](
            q, k, v, out, lse,
            lists, work, bias, order, tail_k, tail_v, tail_bias,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            0 if bias is None else bias.stride(0),
            first, part.shape[1], Hq, Hkv, Hq // Hkv, Sq, T, X, G, blocks, items, scale * math.log2(math.e),
            D=D, BLOCK_D=triton.next_power_of_2(D), M=m, N=n,
            HAS_BIAS=bias is not None, HAS_ORDER=order is not None, TAIL=tail == "pooled", NEGATIVE=scale < 0,
            num_warps=4,
            **config,
        )  # fmt: skip
    return out, lse
