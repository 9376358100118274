"""Backward of attention: what both schedules need, the choice between them, and the final rounding (portable Triton).

    statistics[i] = lse[i] in base 2, delta[i] = dout[i] . out[i]
    dk[j]    = scale * (dk_sum[j] + dtail_k[block of j] / keys of the block)         without ``scale`` for dv

out, dout          [B, Hq, Sq, D]    any strides, contiguous last dimension
lse                [B, Hq, Sq]       float32, natural log; statistics [B, Hq, Sq, 2] float32
dk_sum, dv_sum     [B, Hkv, Sk, D]   float32, contiguous; dtail_k, dtail_v [B, Hkv, J, D]: of the summaries of 128 keys
dq, dk, dv         as q, k, v, in BSHD storage
Grid               _statistics: (ceil(Sq / BLOCK), B * Hq)      _finish: (ceil(Sk / BLOCK), B * Hkv)

By slices, one kernel does five products a tile and adds dk and dv to their sums in no fixed order
(``attention_backward_hopper`` where it can run, else ``attention_backward_slices``); by keys, two kernels do seven
products and share no sums: the first makes dq by slices, the second is ``attention_backward_keys``. ``by_keys`` says
which. A summary is a mean, so its gradient belongs in equal parts to the keys that it was taken over. The mask is not
differentiated. Meaning: ``reference.attention_backward``. Numbers: ``python -m fg_inductor bench training``.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels import attention_backward_keys as keys_schedule
from fg_inductor.kernels import attention_backward_slices as slices_schedule
from fg_inductor.kernels import attention_forward, choice, column_lists, group_means
from fg_inductor.kernels.mask import group_count
from fg_inductor.kernels.reference import SUMMARY, group_statistics, normalise_key_bias
from fg_inductor.kernels.sizes import cdiv, next_power_of_2

BLOCK = 64


@triton.jit
def _statistics(
    dout_ptr, out_ptr, lse_ptr, statistics_ptr,
    stride_gb, stride_gh, stride_gs,
    stride_ob, stride_oh, stride_os,
    H, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    LOG2_E: tl.constexpr = 1.4426950408889634
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    inside = (row < S)[:, None] & (offs_d < D)[None, :]
    dout = tl.load(dout_ptr + b * stride_gb + h * stride_gh + row[:, None] * stride_gs + offs_d, mask=inside, other=0.0)
    out = tl.load(out_ptr + b * stride_ob + h * stride_oh + row[:, None] * stride_os + offs_d, mask=inside, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + bh * S + row, mask=row < S, other=0.0) * LOG2_E
    pair = statistics_ptr + (bh * S + row)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(pair, tl.join(lse, delta), mask=(row < S)[:, None])


@triton.jit
def _finish(
    sum_ptr, tail_ptr, block_keys_ptr, bias_ptr, grad_ptr,
    stride_gb, stride_gh, stride_gs, stride_bb,
    H, S, J, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SUMMARY: tl.constexpr,
    TAIL: tl.constexpr, HAS_BIAS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    inside = (row < S)[:, None] & (offs_d < D)[None, :]
    grad = tl.load(sum_ptr + (bh * S + row)[:, None] * D + offs_d[None, :], mask=inside, other=0.0)
    if TAIL:
        block = tl.program_id(0) * BLOCK // SUMMARY  # BLOCK divides SUMMARY
        tail = tl.load(tail_ptr + (bh * J + block) * D + offs_d, mask=offs_d < D, other=0.0)
        tail = tail / tl.maximum(tl.load(block_keys_ptr + b * J + block), 1.0)
        member = row < S
        if HAS_BIAS:
            member = tl.load(bias_ptr + b * stride_bb + row, mask=member, other=float("-inf")) > float("-inf")
        grad += tl.where(member[:, None], tail[None, :], 0.0)
    if LANES:  # of each 16 columns the order is 0 1 8 9 2 3 10 11 ..
        grad = tl.permute(tl.reshape(grad, [BLOCK, BLOCK_D // 16, 4, 2, 2]), [0, 1, 3, 2, 4])
        grad = tl.reshape(grad, [BLOCK, BLOCK_D])
    ptrs = grad_ptr + b * stride_gb + h * stride_gh + row.to(tl.int64)[:, None] * stride_gs + offs_d[None, :]
    tl.store(ptrs, (grad * factor).to(grad_ptr.dtype.element_ty), mask=inside)


def _empty_grad(x: Tensor) -> Tensor:
    """Like x in BSHD storage, which the projection's backward flattens without a copy."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def by_keys(n: int, block_n: int, bulk: bool = False) -> bool:
    """Whether dk and dv are made by a program a tile of ``block_n`` keys, in a fixed order.

    So it is for deterministic algorithms, and for groups as long as a tile. ``bulk``: Hopper's copy engine can add them
    instead (``attention_backward_hopper.bulk``). That is faster, and then only deterministic algorithms go by keys.
    """
    return torch.are_deterministic_algorithms_enabled() or (n >= block_n and not bulk)


def launch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    tail: str,
    wanted: Sequence[bool] = (True, True, True),
    kernel_name: str = "auto",
    *,
    split: bool | None = None,
    slices: dict | None = None,
    keys: dict | None = None,
    hopper: dict | None = None,
) -> tuple[Tensor, ...]:
    """dq, dk, dv in BSHD storage, an empty tensor where not ``wanted``; other arguments as in ``kernels.ops``.

    ``split`` forces a schedule (True: by keys), ``slices``, ``keys`` and ``hopper`` replace entries of the schedules'
    tables.
    """
    on_hopper = choice.choose_backward(kernel_name, q, scale, m) == "hopper"
    if on_hopper:
        from fg_inductor.kernels import attention_backward_hopper as hopper_schedule
        from fg_inductor.kernels.attention_forward_hopper import aligned

        q, k, v, dout = map(aligned, (q, k, v, dout))
    B, Hq, Sq, D = q.shape
    Hkv, Sk, T, G = k.shape[1], k.shape[2], mask.shape[2], group_count(k.shape[2], n)
    share = Hq // Hkv
    want_q, want_k, want_v = wanted
    shape = dict(D=D, BLOCK_D=next_power_of_2(D))
    keys = keys_schedule.configuration(q.dtype, D, m) | (keys or {})
    if split is None:
        split = by_keys(n, keys["BLOCK_N"], bulk=on_hopper and hopper_schedule.bulk(m, n))
    wide = max(k.stride(2), v.stride(2)) * Sk >= 1 << 31
    slices = slices_schedule.configuration(q.dtype, D, m, sums=not split) | {"WIDE": wide} | (slices or {})

    statistics = torch.empty(B, Hq, Sq, 2, dtype=torch.float32, device=q.device)
    _statistics[(cdiv(Sq, BLOCK), B * Hq)](
        dout, out, lse, statistics, *dout.stride()[:3], *out.stride()[:3], Hq, Sq, **shape, BLOCK=BLOCK, num_warps=4
    )  # fmt: skip
    bias = normalise_key_bias(key_bias, torch.float32)
    tail_k = tail_v = block_keys = None
    blocks = 0
    if tail == "pooled":
        blocks = group_count(Sk, SUMMARY)
        block_keys, _ = group_statistics(bias, Sk, SUMMARY, lse[:, 0])
        tail_k, tail_v = (group_means.launch(x, SUMMARY, blocks, bias=bias) for x in (k, v))
    allocate = torch.empty if split else torch.zeros
    dk_sum, dv_sum = (
        allocate(B, Hkv, Sk, D, dtype=torch.float32, device=q.device) if want else None for want in (want_k, want_v)
    )
    dtail_k, dtail_v = (
        allocate(B, Hkv, blocks, D, dtype=torch.float32, device=q.device) if want and blocks else None
        for want in (want_k, want_v)
    )
    dq = _empty_grad(q) if want_q else None
    lanes = False  # the order of columns of the sums

    flags = dict(HAS_ORDER=order is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32")
    bias_stride = 0 if bias is None else bias.stride(0)
    chunk = max(1, attention_forward.LIST_BYTES // (4 * B * T * G * share)) * share  # all heads of a KV head together
    for first in range(0, Hq, chunk):
        part = mask[:, first : first + chunk]
        heads = part.shape[1]
        padding = key_bias is not None and key_bias.dtype == torch.bool
        lists = column_lists.launch(part, Sk, n, 1, tail == "pooled", bias, padding)
        tail_bias = lists.tail_bias
        if on_hopper and (want_q or not split):
            sums = (None,) * 4 if split else (dk_sum, dv_sum, dtail_k, dtail_v)
            lanes = hopper_schedule.launch(
                q, k, v, dout, statistics, lists, bias, order, tail_k, tail_v, (dq, *sums), first, scale, m, n,
                **(hopper or {}),
            )  # fmt: skip
        elif want_q or not split:
            slices_schedule._attention_bwd_slices[(T * m // slices["BLOCK_M"], heads, B)](
                q, k, v, dout, statistics,
                lists.lists, lists.keys, bias, order, tail_k, tail_v, tail_bias,
                dq, dk_sum, dv_sum, dtail_k, dtail_v,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
                *(dq.stride()[:3] if want_q else (0, 0, 0)), bias_stride,
                first, Hq, share, Sq, Sk, T, G, blocks, scale, scale * attention_forward.LOG2_E,
                M=m, N=n, HAS_BIAS=bias is not None, TAIL=tail == "pooled",
                WANT_Q=want_q, WANT_K=want_k and not split, WANT_V=want_v and not split,
                **shape, **flags, **slices,
            )  # fmt: skip
        if split and (want_k or want_v):
            del lists
            lists, counts = keys_schedule.lists_of_slices(part, Sk, n, keys["BLOCK_N"])
            for summaries in (False, True)[: 1 + (tail == "pooled")]:
                x, y, length = (tail_k, tail_v, blocks) if summaries else (k, v, Sk)
                sums = (dtail_k, dtail_v) if summaries else (dk_sum, dv_sum)
                keys_schedule._attention_bwd_keys[(cdiv(length, keys["BLOCK_N"]), heads // share, B)](
                    q, x, y, dout, statistics,
                    part, lists, counts, None if summaries else bias, order, tail_bias, *sums,
                    *q.stride()[:3], *x.stride()[:3], *y.stride()[:3], *dout.stride()[:3], *part.stride()[:3],
                    bias_stride,
                    first, Hq, share, Sq, length, T, scale * attention_forward.LOG2_E,
                    M=m, N=n, HAS_BIAS=bias is not None and not summaries, SUMMARIES=summaries,
                    WANT_K=want_k, WANT_V=want_v,
                    **shape, **flags, **keys,
                )  # fmt: skip

    grads = [dq if want_q else q.new_empty(0), k.new_empty(0), v.new_empty(0)]
    for i, x, total, of_tail, factor in ((1, k, dk_sum, dtail_k, scale), (2, v, dv_sum, dtail_v, 1.0)):
        if total is not None:
            grads[i] = _empty_grad(x)
            _finish[(cdiv(Sk, BLOCK), B * Hkv)](
                total, of_tail, block_keys, bias, grads[i],
                *grads[i].stride()[:3], bias_stride,
                Hkv, Sk, blocks, factor,
                **shape, BLOCK=BLOCK, SUMMARY=SUMMARY, TAIL=tail == "pooled", HAS_BIAS=bias is not None,
                LANES=lanes and not split, num_warps=4,
            )  # fmt: skip
    return tuple(grads)
