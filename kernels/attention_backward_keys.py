"""Gradients of attention with respect to k and v, one program a tile of keys, without atomics (portable Triton).

    dv_sum[j] = sum_i p[i, j] * dout[i]      dk_sum[j] = sum_i ds[i, j] * q[i]      over the queries i that keep key j

p, ds, and the tensors as in ``attention_backward_slices``; scores are held keys x queries here.
tiles       [B, H, ceil(Sk / BLOCK_N), W]   int32: bit t of row j: slice t keeps a key of tile j (``_transpose``)
lists       [B, H, ceil(Sk / BLOCK_N), T]   int32: the slices whose bit is set, ascending, counts [B, H, tiles]
Grid        (tiles, KV heads of a chunk, B)

A program holds dk and dv of its keys in registers and walks the slices that keep any of them, BLOCK_M queries at a
time, for each query head that shares its KV head. Every key is summed by one program in a fixed order: the result is
the same in every run. Where N >= BLOCK_N a tile is kept or dropped as a whole; else each key's bit is read from the
block mask, and the work is that of all keys of the tile (for deterministic algorithms alone:
``attention_backward.by_keys``). SUMMARIES: the keys are the summaries of the pooled tail, which every slice has, each
with a bias of its own. Meaning: ``reference.attention_backward``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels import column_lists
from fg_inductor.kernels.attention_backward_slices import _load_rows
from fg_inductor.kernels.attention_forward import _tokens
from fg_inductor.kernels.sizes import cdiv


@triton.jit
def _transpose(
    mask_ptr, tiles_ptr,
    stride_mb, stride_mh, stride_mt,
    H, T, W, WORDS_OUT,
    N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which slices keep a key of each tile of BLOCK_N keys: [B, H, T, W] -> [B, H, tiles, WORDS_OUT]."""
    GROUPS: tl.constexpr = max(1, BLOCK_N // N)  # of a tile
    WORDS: tl.constexpr = max(1, GROUPS // 32)
    j = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    first = j * BLOCK_N // N
    words_ptr = mask_ptr + bh // H * stride_mb + bh % H * stride_mh
    word = first // 32 + tl.arange(0, WORDS)
    offs = tl.arange(0, 128)
    for start in range(0, T, 128):
        t = start + offs
        inside = (t < T)[:, None] & (word < W)[None, :]
        words = tl.load(words_ptr + t.to(tl.int64)[:, None] * stride_mt + word[None, :], mask=inside, other=0)
        if GROUPS < 32:
            words = (words >> (first % 32)) & ((1 << GROUPS) - 1)
        keeps = (tl.sum((words != 0).to(tl.int32), 1) > 0).to(tl.int32)
        bits = tl.sum(tl.reshape(keeps << (offs % 32), [4, 32]), 1)
        out = start // 32 + tl.arange(0, 4)
        tl.store(tiles_ptr + (bh * tl.num_programs(0) + j) * WORDS_OUT + out, bits, mask=out < WORDS_OUT)


@triton.jit
def _attention_bwd_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, statistics_ptr,
    mask_ptr, lists_ptr, counts_ptr, bias_ptr, order_ptr, tail_bias_ptr, dk_sum_ptr, dv_sum_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    stride_mb, stride_mh, stride_mt,
    stride_bb,
    first_head, Hq, SHARE, Sq, Sk, T, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, SUMMARIES: tl.constexpr,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LOG2_E: tl.constexpr = 1.4426950408889634
    PARTS: tl.constexpr = M // BLOCK_M  # of a slice
    BITS: tl.constexpr = N < BLOCK_N and not SUMMARIES
    j = tl.program_id(0)
    first = tl.program_id(1) * SHARE  # query head within the chunk
    b = tl.program_id(2).to(tl.int64)
    h_kv = (first_head // SHARE + tl.program_id(1)).to(tl.int64)
    heads = tl.num_programs(1) * SHARE

    key = j * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = key < Sk
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    k = _load_rows(k_ptr, key.to(tl.int64), stride_ks, exists, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = _load_rows(v_ptr, key.to(tl.int64), stride_vs, exists, D, BLOCK_D, True)
    shift = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        # What a masked key or one past the end computes reaches no other key and is not stored.
        shift = tl.load(bias_ptr + b * stride_bb + key, mask=exists, other=float("-inf")) * LOG2_E
        exists = exists & (shift > float("-inf"))
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for member in range(SHARE):
        h = first_head + first + member
        row_index = (b * heads + first + member) * tl.num_programs(0) + j  # of lists and counts
        q_head = q_ptr + b * stride_qb + h.to(tl.int64) * stride_qh
        dout_head = dout_ptr + b * stride_ob + h.to(tl.int64) * stride_oh
        statistics = statistics_ptr + (b * Hq + h) * Sq * 2
        slices = T
        if not SUMMARIES:
            slices = tl.load(counts_ptr + row_index)
        for place in tl.range(0, slices * PARTS, 1, num_stages=STAGES):
            t = place // PARTS
            if not SUMMARIES:
                t = tl.load(lists_ptr + row_index * T + t)
            token, inside = _tokens(order_ptr, t * M + place % PARTS * BLOCK_M, Sq, BLOCK_M, HAS_ORDER)
            q = _load_rows(q_head, token, stride_qs, inside, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
            dout = _load_rows(dout_head, token, stride_os, inside, D, BLOCK_D, True)
            # As two loads of a vector each they would be copied once for each lane that needs them.
            pair = statistics + token[:, None] * 2 + tl.arange(0, 2)[None, :]
            lse, delta = tl.split(tl.load(pair, mask=inside[:, None], other=0.0))
            lse = tl.where(inside, lse, float("inf"))  # rows past the end have weight 0
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            keep = exists
            if SUMMARIES:
                slice_index = (b * heads + first + member) * T + t
                shift = tl.load(tail_bias_ptr + slice_index * Sk + key, mask=exists, other=float("-inf"))
                keep = shift > float("-inf")
            if BITS:
                words_ptr = mask_ptr + b * stride_mb + (first + member).to(tl.int64) * stride_mh
                words_ptr += t.to(tl.int64) * stride_mt
                words = tl.load(words_ptr + key // N // 32, mask=exists, other=0)
                keep = ((words >> (key // N % 32)) & 1) != 0
            p = tl.exp2(s * qk_scale + shift[:, None] - lse[None, :])
            if BITS or SUMMARIES:
                p = tl.where(keep[:, None], p, 0.0)
            if WANT_V:
                dv = tl.dot(p.to(q.dtype), dout, dv, input_precision=PRECISION)
            if WANT_K:
                ds = p * (dp - delta[None, :])
                if BITS or SUMMARIES:
                    ds = tl.where(keep[:, None], ds, 0.0)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    offs_d = tl.arange(0, BLOCK_D)
    places = ((b * (Hq // SHARE) + h_kv) * Sk + key)[:, None] * D + offs_d[None, :]
    written = (key < Sk)[:, None] & (offs_d < D)[None, :]
    if WANT_K:
        tl.store(dk_sum_ptr + places, tl.where(exists[:, None], dk, 0.0), mask=written)
    if WANT_V:
        tl.store(dv_sum_ptr + places, tl.where(exists[:, None], dv, 0.0), mask=written)


def configuration(dtype: torch.dtype, d: int, m: int) -> dict:
    """BLOCK_N, BLOCK_M, STAGES and num_warps: a fixed table; nothing is autotuned inside an operator."""
    if dtype == torch.float32 or d > 128:
        return {"BLOCK_N": 32, "BLOCK_M": min(m, 32), "STAGES": 1, "num_warps": 4}
    return {"BLOCK_N": 64, "BLOCK_M": min(m, 64), "STAGES": 2, "num_warps": 4}


def lists_of_slices(mask: Tensor, keys: int, n: int, block_n: int) -> tuple[Tensor, Tensor]:
    """For each tile of ``block_n`` keys the slices that keep any of them: lists [B, H, tiles, T], counts."""
    B, H, T, W = mask.shape
    tiles = cdiv(keys, block_n)
    words = cdiv(T, 128) * 4
    transposed = torch.empty(B, H, tiles, words, dtype=torch.int32, device=mask.device)
    _transpose[(tiles, B * H)](
        mask, transposed, *mask.stride()[:3], H, T, W, words, N=n, BLOCK_N=block_n, num_warps=4
    )  # fmt: skip
    lists, counts, _, _ = column_lists.launch(transposed, T, 1)
    return lists, counts
