"""Attention over the kept keys of each query slice, forward (portable Triton).

    out[i] = softmax over kept keys j of (scale * q[i] . k[j] + bias[j]) @ v        for every query i of a slice

q, out     [B, Hq, Sq, D]    k, v [B, Hkv, Sk, D]    any strides, contiguous last dimension; out has BSHD storage
lists      [B, H, T, G]      int32, ascending ids of the kept groups (``column_lists``), keys and clean keys [B, H, T]
bias       [B, Sk]           float32, -inf where a key is masked, or None
order      [Sq]              int32: row i of query order is token order[i]; out and lse are in token order; or None
tail_k, v  [B, Hkv, J, D]    summaries of the 128-key blocks, tail_bias [B, H, T, J] (base 2; -inf: none dropped)
lse        [B, Hq, Sq]       float32, natural log
Grid       (T, heads of a chunk, B)

One program owns one slice and walks its list, BLOCK_N gathered keys at a time: first the full tiles, then one masked
tile, then the summaries. The softmax state is float32 and in base 2. Lists are made for as many heads at once as fit
LIST_BYTES, so the workspace does not grow with the number of heads. Meaning: ``reference.attention``. Numbers:
``python -m fg_inductor bench attention``.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels import column_lists, group_means
from fg_inductor.kernels.mask import group_count
from fg_inductor.kernels.reference import SUMMARY, normalise_key_bias
from fg_inductor.kernels.sizes import next_power_of_2

LIST_BYTES = 3 << 29
LOG2_E = math.log2(math.e)


@triton.jit
def _update(q, kt, v, shift, keep, m_i, l_i, acc, qk_scale, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Online softmax over one tile of keys: kt [D, BLOCK_N], v [BLOCK_N, D], shift and keep [BLOCK_N]."""
    s = tl.dot(q, kt, input_precision=PRECISION) * qk_scale + shift[None, :]  # [M, BLOCK_N]
    if MASKED:
        s = tl.where(keep[None, :], s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1))
    # A row whose scores are all -inf so far must not become -inf - -inf.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l_i, acc


@triton.jit
def _load_tile(k_ptr, v_ptr, key, stride_ks, stride_vs, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:  # a key's offset may exceed 2**31 elements
        key = key.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    k_ptrs = k_ptr + key[:, None] * stride_ks + offs_d[None, :]
    v_ptrs = v_ptr + key[:, None] * stride_vs + offs_d[None, :]
    if D == BLOCK_D:
        return tl.trans(tl.load(k_ptrs)), tl.load(v_ptrs)
    inside = offs_d < D
    return tl.trans(tl.load(k_ptrs, mask=inside[None, :], other=0.0)), tl.load(v_ptrs, mask=inside[None, :], other=0.0)


@triton.jit
def _last_tile(
    list_ptr, place, keys, k_ptr, v_ptr, stride_ks, stride_vs,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile that may end behind the list: kt, v, the keys and which of them take part."""
    # Places past the end read the last key, and v is 0 there: 0 * v would be NaN where v is not finite.
    used = place < keys
    place = tl.minimum(place, keys - 1)
    key = tl.load(list_ptr + place // N) * N + place % N
    kt, v = _load_tile(k_ptr, v_ptr, key, stride_ks, stride_vs, D, BLOCK_D, WIDE)
    return kt, tl.where(used[:, None], v, 0.0), key, used


@triton.jit
def _without_masked(v, bias, used):
    """v, bias in base 2 and ``used`` without the keys that the bias masks: a weight of 0 would not keep NaN out."""
    visible = bias > float("-inf")
    return tl.where(visible[:, None], v, 0.0), tl.where(visible, bias, 0.0) * 1.4426950408889634, used & visible


@triton.jit
def _tokens(order_ptr, first, Sq, M: tl.constexpr, HAS_ORDER: tl.constexpr):
    """The M tokens of a slice (int64) and which of them exist."""
    row = first + tl.arange(0, M)
    inside = row < Sq
    if HAS_ORDER:
        row = tl.load(order_ptr + row, mask=inside, other=0)
    return row.to(tl.int64), inside


@triton.jit
def _attention_fwd(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    lists_ptr, keys_ptr, clean_keys_ptr, bias_ptr, order_ptr, tail_k_ptr, tail_v_ptr, tail_bias_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    stride_bb,
    first_head, Hq, SHARE, Sq, T, G, J, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LOG2_E: tl.constexpr = 1.4426950408889634
    t = tl.program_id(0)
    h = first_head + tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    h_kv = (h // SHARE).to(tl.int64)
    slice_index = (b * tl.num_programs(1) + tl.program_id(1)) * T + t

    token, inside = _tokens(order_ptr, t * M, Sq, M, HAS_ORDER)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    q_ptrs = q_ptr + b * stride_qb + h.to(tl.int64) * stride_qh + token[:, None] * stride_qs + offs_d[None, :]
    q = tl.load(q_ptrs, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0)  # [M, BLOCK_D]
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    list_ptr = lists_ptr + slice_index * G
    if HAS_BIAS:
        bias_ptr += b * stride_bb

    keys = tl.load(keys_ptr + slice_index)
    full = tl.load(clean_keys_ptr + slice_index) // BLOCK_N * BLOCK_N

    m_i = tl.full([M], float("-inf"), tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    shift = tl.zeros([BLOCK_N], tl.float32)
    everything = offs_n >= 0

    # Hoisting addresses out of this loop would cost registers that it does not have: it then computes thread ids anew.
    for start in tl.range(0, full, BLOCK_N, num_stages=STAGES, disable_licm=True):
        place = start + offs_n
        key = tl.load(list_ptr + place // N) * N + place % N  # [BLOCK_N]
        kt, v = _load_tile(k_ptr, v_ptr, key, stride_ks, stride_vs, D, BLOCK_D, WIDE)
        m_i, l_i, acc = _update(q, kt, v, shift, everything, m_i, l_i, acc, qk_scale, PRECISION, False)

    if HAS_BIAS:  # the keys of mixed groups; of all groups, where the bias is more than padding
        for start in tl.range(full, keys, BLOCK_N, num_stages=STAGES):
            kt, v, key, used = _last_tile(
                list_ptr, start + offs_n, keys, k_ptr, v_ptr, stride_ks, stride_vs, N, D, BLOCK_D, WIDE
            )
            v, shift, used = _without_masked(v, tl.load(bias_ptr + key), used)
            m_i, l_i, acc = _update(q, kt, v, shift, used, m_i, l_i, acc, qk_scale, PRECISION, True)
    elif full < keys:
        kt, v, key, used = _last_tile(
            list_ptr, full + offs_n, keys, k_ptr, v_ptr, stride_ks, stride_vs, N, D, BLOCK_D, WIDE
        )
        m_i, l_i, acc = _update(q, kt, v, shift, used, m_i, l_i, acc, qk_scale, PRECISION, True)

    if TAIL:
        tail_bias_ptr += slice_index * J
        head = (b * (Hq // SHARE) + h_kv) * J * D
        for start in tl.range(0, J, BLOCK_N, num_stages=STAGES):
            block = start + offs_n
            shift = tl.load(tail_bias_ptr + block, mask=block < J, other=float("-inf"))
            clamped = tl.minimum(block, J - 1)
            kt, v = _load_tile(tail_k_ptr + head, tail_v_ptr + head, clamped, D, D, D, BLOCK_D, False)
            # A block of which nothing was dropped has no say, whatever its mean holds.
            used = shift > float("-inf")
            v = tl.where(used[:, None], v, 0.0)
            shift = tl.where(used, shift, 0.0)
            m_i, l_i, acc = _update(q, kt, v, shift, used, m_i, l_i, acc, qk_scale, PRECISION, True)

    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    lse = (m_i + tl.log2(l_i)) / LOG2_E
    lse = tl.where(l_i == 0.0, float("-inf"), lse)
    # The tokens are looked up again, from a number that the compiler can't know to be 0: as the same values they would
    # be kept alive and cost the loop registers that it does not have.
    zero = tl.load(keys_ptr + slice_index, volatile=True) - keys
    token, inside = _tokens(order_ptr, t * M + zero, Sq, M, HAS_ORDER)
    out_ptrs = out_ptr + b * stride_ob + h.to(tl.int64) * stride_oh + token[:, None] * stride_os + offs_d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (offs_d < D)[None, :])
    tl.store(lse_ptr + (b * Hq + h) * Sq + token, lse, mask=inside)


def configuration(dtype: torch.dtype, d: int, m: int) -> dict:
    """BLOCK_N, STAGES and num_warps: a fixed table, measured on an H100; nothing is autotuned inside an operator."""
    if dtype == torch.float32:
        return {"BLOCK_N": 32, "STAGES": 1, "num_warps": 4}
    if d > 128:
        return {"BLOCK_N": 32, "STAGES": 2, "num_warps": 8 if m == 128 else 4}
    if m == 128 and d == 64:
        return {"BLOCK_N": 128, "STAGES": 2, "num_warps": 4}
    if m >= 64:
        return {"BLOCK_N": 64, "STAGES": 2, "num_warps": 4}
    return {"BLOCK_N": 64, "STAGES": 2, "num_warps": 2}


def heads_at_once(mask: Tensor, keys: int, n: int, slices: int = 1) -> int:
    """Heads whose lists, one for each tile of ``slices`` slices, fit LIST_BYTES; at least one."""
    batch, heads, count, _ = mask.shape
    one = 4 * batch * group_count(count, slices) * group_count(keys, n)
    return max(1, min(heads, LIST_BYTES // one))


class Prepared(NamedTuple):
    """What every schedule of the forward pass needs beside its lists."""

    out: Tensor  # [B, Hq, Sq, D], BSHD storage
    lse: Tensor  # [B, Hq, Sq] float32
    bias: Tensor | None  # [B, Sk] float32
    padding: bool  # bias holds nothing but 0 and -inf
    blocks: int  # of the pooled tail; 0 without one
    tail_k: Tensor | None  # [B, Hkv, blocks, D]
    tail_v: Tensor | None


def prepare(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, tail: str) -> Prepared:
    """Allocate the results, and make the bias and the summaries; arguments as in ``kernels.ops``."""
    batch, heads, queries, dim = q.shape
    out = q.new_empty(batch, queries, heads, dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    bias = normalise_key_bias(key_bias, torch.float32)
    padding = key_bias is not None and key_bias.dtype == torch.bool
    if tail == "none":
        return Prepared(out, lse, bias, padding, 0, None, None)
    blocks = group_count(k.shape[2], SUMMARY)
    return Prepared(
        out, lse, bias, padding, blocks, *(group_means.launch(x, SUMMARY, blocks, bias=bias) for x in (k, v))
    )


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
    B, Hq, Sq, D = q.shape
    Sk, T, G = k.shape[2], mask.shape[2], group_count(k.shape[2], n)
    share = Hq // k.shape[1]
    out, lse, bias, padding, blocks, tail_k, tail_v = prepare(q, k, v, key_bias, tail)
    config = configuration(q.dtype, D, m) | {"WIDE": max(k.stride(2), v.stride(2)) * Sk >= 1 << 31} | override
    heads = heads_at_once(mask, Sk, n)
    for first in range(0, Hq, heads):
        part = mask[:, first : first + heads]
        lists, kept, clean, tail_bias = column_lists.launch(part, Sk, n, 1, tail == "pooled", bias, padding)
        _attention_fwd[(T, part.shape[1], B)](
            q, k, v, out, lse,
            lists, kept, clean, bias, order, tail_k, tail_v, tail_bias,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            0 if bias is None else bias.stride(0),
            first, Hq, share, Sq, T, G, blocks, scale * LOG2_E,
            D=D, BLOCK_D=next_power_of_2(D), M=m, N=n,
            HAS_BIAS=bias is not None, HAS_ORDER=order is not None, TAIL=tail == "pooled",
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            **config,
        )  # fmt: skip
    return out, lse
