"""Gradients of attention, one program a query slice (portable Triton).

    p[i, j]  = exp(scale * q[i] . k[j] + bias[j] - lse[i])              for the kept keys j of the slice of query i
    ds[i, j] = p[i, j] * (dout[i] . v[j] - delta[i])                    delta[i] = dout[i] . out[i]
    dv_sum[j] += sum_i p[i, j] * dout[i]    dk_sum[j] += sum_i ds[i, j] * q[i]    dq[i] = scale * sum_j ds[i, j] * k[j]

q, dout, dq        [B, Hq, Sq, D]    k, v [B, Hkv, Sk, D]   any strides, contiguous last dimension
lists, keys        as in ``attention_forward``; bias, order, tail_k, tail_v, tail_bias too
statistics         [B, Hq, Sq, 2]    float32, contiguous: lse in base 2, delta
dk_sum, dv_sum     [B, Hkv, Sk, D]   float32, contiguous, zeroed by the caller; dtail_k, dtail_v [B, Hkv, J, D]
Grid               (T * M / BLOCK_M, heads of a chunk, B)

dq stays in registers while a program walks its slice's list. What a tile of keys receives is added to the sums by
float32 atomics, whose order is not fixed: results differ in their last bits from run to run.
Formula: Dao, FlashAttention-2, algorithm 2. Meaning: ``reference.attention_backward``.
"""

import torch
import triton
import triton.language as tl

from fg_inductor.kernels.attention_forward import _tokens


@triton.jit
def _load_rows(x_ptr, row, stride, used, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows [R, BLOCK_D] of x; MASKED: zeros where not ``used``, whatever they hold (0 times NaN is NaN)."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x_ptr + row[:, None] * stride + offs_d[None, :]
    if MASKED:
        return tl.load(ptrs, mask=used[:, None] & (offs_d < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def _add_rows(x_ptr, row, used, x, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """x [R, BLOCK_D] added to rows of a contiguous float32 tensor."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x_ptr + row[:, None] * D + offs_d[None, :]
    if MASKED:
        tl.atomic_add(ptrs, x, mask=used[:, None] & (offs_d < D)[None, :], sem="relaxed")
    elif D != BLOCK_D:
        tl.atomic_add(ptrs, x, mask=(offs_d < D)[None, :], sem="relaxed")
    else:
        tl.atomic_add(ptrs, x, sem="relaxed")


@triton.jit
def _tile(
    q, dout, lse, delta, dq, k_ptr, v_ptr, dk_ptr, dv_ptr, key, shift, used, stride_ks, stride_vs, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    WANT_Q: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
):  # fmt: skip
    """dq [BLOCK_M, BLOCK_D] with what one tile of keys adds; its dk and dv go to memory. lse, shift in base 2."""
    row = key
    if WIDE:  # a key's offset may exceed 2**31 elements
        row = key.to(tl.int64)
    k = _load_rows(k_ptr, row, stride_ks, used, D, BLOCK_D, MASKED)
    v = _load_rows(v_ptr, row, stride_vs, used, D, BLOCK_D, MASKED)
    # Products stand before what waits for earlier ones: the tensor cores then run beside exp2 and the atomics.
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if MASKED:
        p = tl.where(used[None, :], tl.exp2(s * qk_scale + shift[None, :] - lse[:, None]), 0.0)
    else:
        p = tl.exp2(s * qk_scale - lse[:, None])
    if WANT_V:
        dv = tl.dot(tl.trans(p.to(q.dtype)), dout, input_precision=PRECISION)
    if WANT_K or WANT_Q:
        ds = (p * (dp - delta[:, None])).to(q.dtype)  # without the factor ``scale``
    if WANT_K:
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    if WANT_Q:
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    if WANT_V:
        _add_rows(dv_ptr, key, used, dv, D, BLOCK_D, MASKED)
    if WANT_K:
        _add_rows(dk_ptr, key, used, dk, D, BLOCK_D, MASKED)
    return dq


@triton.jit
def _attention_bwd_slices(
    q_ptr, k_ptr, v_ptr, dout_ptr, statistics_ptr,
    lists_ptr, keys_ptr, bias_ptr, order_ptr, tail_k_ptr, tail_v_ptr, tail_bias_ptr,
    dq_ptr, dk_sum_ptr, dv_sum_ptr, dtail_k_ptr, dtail_v_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    stride_gb, stride_gh, stride_gs,
    stride_bb,
    first_head, Hq, SHARE, Sq, Sk, T, G, J, scale, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr,
    WANT_Q: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LOG2_E: tl.constexpr = 1.4426950408889634
    PARTS: tl.constexpr = M // BLOCK_M
    t = tl.program_id(0) // PARTS
    first = t * M + tl.program_id(0) % PARTS * BLOCK_M
    h = first_head + tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    h_kv = (h // SHARE).to(tl.int64)
    slice_index = (b * tl.num_programs(1) + tl.program_id(1)) * T + t

    token, inside = _tokens(order_ptr, first, Sq, BLOCK_M, HAS_ORDER)
    offs_n = tl.arange(0, BLOCK_N)
    q_ptr += b * stride_qb + h.to(tl.int64) * stride_qh
    dout_ptr += b * stride_ob + h.to(tl.int64) * stride_oh
    q = _load_rows(q_ptr, token, stride_qs, inside, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    dout = _load_rows(dout_ptr, token, stride_os, inside, D, BLOCK_D, True)
    pair = statistics_ptr + ((b * Hq + h) * Sq + token)[:, None] * 2 + tl.arange(0, 2)[None, :]
    lse, delta = tl.split(tl.load(pair, mask=inside[:, None], other=0.0))
    lse = tl.where(inside, lse, float("inf"))  # rows past the end have weight 0
    head = b * (Hq // SHARE) + h_kv
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    dk_ptr = dk_sum_ptr
    dv_ptr = dv_sum_ptr
    if WANT_K:
        dk_ptr += head * Sk * D
    if WANT_V:
        dv_ptr += head * Sk * D
    list_ptr = lists_ptr + slice_index * G
    if HAS_BIAS:
        bias_ptr += b * stride_bb

    keys = tl.load(keys_ptr + slice_index)
    full = keys // BLOCK_N * BLOCK_N

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    shift = tl.zeros([BLOCK_N], tl.float32)
    used = offs_n >= 0

    for start in tl.range(0, full, BLOCK_N, num_stages=STAGES, disable_licm=True):
        place = start + offs_n
        key = tl.load(list_ptr + place // N) * N + place % N  # [BLOCK_N]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + key) * LOG2_E
            used = bias > float("-inf")
            shift = tl.where(used, bias, 0.0)
        dq = _tile(
            q, dout, lse, delta, dq, k_ptr, v_ptr, dk_ptr, dv_ptr, key, shift, used, stride_ks, stride_vs, qk_scale,
            D, BLOCK_D, HAS_BIAS, WIDE, PRECISION, WANT_Q, WANT_K, WANT_V,
        )  # fmt: skip

    if full < keys:
        used = full + offs_n < keys
        place = tl.minimum(full + offs_n, keys - 1)
        key = tl.load(list_ptr + place // N) * N + place % N
        if HAS_BIAS:
            bias = tl.load(bias_ptr + key) * LOG2_E
            used = used & (bias > float("-inf"))
            shift = tl.where(used, bias, 0.0)
        dq = _tile(
            q, dout, lse, delta, dq, k_ptr, v_ptr, dk_ptr, dv_ptr, key, shift, used, stride_ks, stride_vs, qk_scale,
            D, BLOCK_D, True, WIDE, PRECISION, WANT_Q, WANT_K, WANT_V,
        )  # fmt: skip

    if TAIL:
        tail_bias_ptr += slice_index * J
        dk_ptr = dtail_k_ptr
        dv_ptr = dtail_v_ptr
        if WANT_K:
            dk_ptr += head * J * D
        if WANT_V:
            dv_ptr += head * J * D
        for start in tl.range(0, J, BLOCK_N, num_stages=STAGES):
            block = start + offs_n
            shift = tl.load(tail_bias_ptr + block, mask=block < J, other=float("-inf"))
            used = shift > float("-inf")
            shift = tl.where(used, shift, 0.0)
            dq = _tile(
                q, dout, lse, delta, dq, tail_k_ptr + head * J * D, tail_v_ptr + head * J * D, dk_ptr, dv_ptr,
                block, shift, used, D, D, qk_scale,
                D, BLOCK_D, True, False, PRECISION, WANT_Q, WANT_K, WANT_V,
            )  # fmt: skip

    if WANT_Q:
        # The tokens are looked up again, from a number that the compiler can't know to be 0: kept alive over the loop
        # they would cost registers that it does not have.
        zero = tl.load(keys_ptr + slice_index, volatile=True) - keys
        token, inside = _tokens(order_ptr, first + zero, Sq, BLOCK_M, HAS_ORDER)
        offs_d = tl.arange(0, BLOCK_D)
        dq_ptrs = dq_ptr + b * stride_gb + h.to(tl.int64) * stride_gh + token[:, None] * stride_gs + offs_d[None, :]
        tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None] & (offs_d < D)[None, :])


def configuration(dtype: torch.dtype, d: int, m: int, sums: bool) -> dict:
    """BLOCK_M, BLOCK_N, STAGES and num_warps: a fixed table; nothing is autotuned inside an operator.

    sums: dk and dv are made too, not dq alone. Then a slice cut in two would add its sums twice as often.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": min(m, 64), "BLOCK_N": 32, "STAGES": 1, "num_warps": 8}
    if d > 128:
        return {"BLOCK_M": min(m, 64), "BLOCK_N": 64, "STAGES": 1, "num_warps": 8}
    if not sums:
        return {"BLOCK_M": min(m, 64), "BLOCK_N": 64, "STAGES": 2, "num_warps": 4}
    return {"BLOCK_M": m, "BLOCK_N": 64, "STAGES": 2, "num_warps": 8}
