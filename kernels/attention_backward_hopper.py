"""Gradients of attention by slices, for Hopper (Gluon): what ``attention_backward_slices`` computes.

    p[j, i]  = exp2(scale * log2(e) * (k[j] . q[i] - lse'[i]) + bias[j] - level)    for the kept keys j of i's slice
    ds[j, i] = p[j, i] * (v[j] . dout[i] - delta[i])
    dv_sum[j] += sum_i p[j, i] * dout[i]    dk_sum[j] += sum_i ds[j, i] * q[i]    dq[i] = scale * sum_j ds[j, i] * k[j]

q, dout, dq, k, v, statistics, dk_sum, dv_sum, dtail_k, dtail_v   as in ``attention_backward_slices``; bfloat16, float16
lists, work, bias, order, tail_k, tail_v, tail_bias               as in ``attention_forward_hopper``, one slice a tile
Grid       as many CTAs as the GPU holds at once; each draws its slices, two ahead

A CTA works on one slice at a time, of M = 64 CONSUMERS queries, and BLOCK_N = 64 CONSUMERS keys. One warpgroup, the
producer, gathers the listed rows of K and V as in the forward kernel. Each of the others, a consumer, holds 64 of the
keys: scores and ds are products of its keys with all queries, keys x queries, so that it makes dv and dk of its keys
alone, p never leaves its registers, and ds is read from shared memory as it is for dk and transposed for dq. Of dq each
consumer holds 64 queries, over all keys, while the slice lasts. The products start at -lse' and -delta: subtracted
afterwards both would cost registers that there are none of. (lse' is lse less ``level``, that of the slice's first
query where there is a bias, over scale * log2(e).)

dv and dk are added to the sums in float32, in an order that is not fixed (``backward_hopper_sums``): by threads, or,
where ``bulk`` says so, by the copy engine in tiles that need no mask (SLOTS > 0: so many pieces a consumer are under
way). Threads do it while the tensor cores work: for the other consumer, on dq (EARLY: begun before dv is added, else
beside dk), and on the scores of the next tile.

    barrier     phase of          completed by                            waited for by
    q_full      slice i           producer threads, q and dout copied     consumers, before a slice's first product
    q_empty     slice i           consumers, behind its last tile         producer, before it copies the next slice
    place_full  slice i           producer, statistics and place stored   consumers, when they have finished slice i - 1
    k_full      unit u            producer threads, 64 rows of K copied   its consumer for scores, all for dq
    k_empty     unit u            consumers, dq of its tile done          producer, before unit u + K_STAGES CONSUMERS
    v_full      unit u            producer threads, 64 rows of V copied   its consumer
    v_empty     unit u            its consumer, v . dout done;            producer, before unit u + V_STAGES CONSUMERS
                                  OVERLAY: all, dq of its tile done
    ds_full     tile t            consumers, ds stored                    consumers, before dq
    ds_empty    tile t            consumers, dq of the tile done          consumers, before tile t + 1 of V

OVERLAY: ds takes the place of the rows of V that it was made from, which frees the memory for SLOTS, and needs no
ds_empty: no unit of V comes before its place is free.

Unit u is the rows of consumer u % CONSUMERS in tile u // CONSUMERS; tiles are numbered over all slices of a CTA. A wait
for the n-th phase of a buffer's barrier is a wait for parity n & 1.

Formula: Dao, FlashAttention-2, algorithm 2; keys x queries and the order of products after FlashAttention-3's backward
(Shah et al. 2024). Meaning: ``reference.attention_backward``. Numbers: ``python -m fg_inductor bench training``.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fg_inductor.kernels import work_order
from fg_inductor.kernels.attention_forward import LOG2_E
from fg_inductor.kernels.backward_hopper_consumer import consumer
from fg_inductor.kernels.backward_hopper_producer import producer
from fg_inductor.kernels.backward_hopper_sums import PIECE_SHARED
from fg_inductor.kernels.column_lists import Lists
from fg_inductor.kernels.mask import group_count
from fg_inductor.kernels.sizes import next_power_of_2


@gluon.jit
def _attention_bwd_hopper(
    q_ptr, k_ptr, v_ptr, dout_ptr, statistics_ptr,
    lists_ptr, work_ptr, bias_ptr, order_ptr, tail_k_ptr, tail_v_ptr, tail_bias_ptr,
    dq_ptr, dk_sum_ptr, dv_sum_ptr, dtail_k_ptr, dtail_v_ptr, dk_desc, dv_desc,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    stride_gb, stride_gh, stride_gs,
    stride_bb,
    first_head, heads, Hq, Hkv, SHARE, Sq, Sk, T, G, J, ITEMS, scale, qk_scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, N: gl.constexpr,
    CONSUMERS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, PRODUCER_WARPS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ORDER: gl.constexpr, TAIL: gl.constexpr, WIDE: gl.constexpr,
    WANT_Q: gl.constexpr, WANT_K: gl.constexpr, WANT_V: gl.constexpr, EARLY: gl.constexpr, OVERLAY: gl.constexpr,
    SLOTS: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    M: gl.constexpr = 64 * CONSUMERS
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(dtype, [1, M, BLOCK_D], swizzled)
    dout_bufs = gl.allocate_shared_memory(dtype, [1, M, BLOCK_D], swizzled)
    k_bufs = gl.allocate_shared_memory(dtype, [K_STAGES * CONSUMERS, 64, BLOCK_D], swizzled)
    v_bufs = gl.allocate_shared_memory(dtype, [V_STAGES * CONSUMERS, 64, BLOCK_D], swizzled)
    ds_bufs = v_bufs
    if not OVERLAY:
        ds_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, M], swizzled)
    staging = ds_bufs
    if SLOTS > 0:
        staging = gl.allocate_shared_memory(gl.float32, [SLOTS * CONSUMERS, 64, 32], PIECE_SHARED)
    statistics_buf = gl.allocate_shared_memory(gl.float32, [2, M], plain)
    level_buf = gl.allocate_shared_memory(gl.float32, [1], plain)
    entry_bufs = gl.allocate_shared_memory(gl.int32, [K_STAGES * CONSUMERS, 64], plain)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES * CONSUMERS, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES * CONSUMERS, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES * CONSUMERS, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES * CONSUMERS, 1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    ds_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    ds_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    place_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    place_buf = gl.allocate_shared_memory(gl.int32, [1], plain)
    for stage in gl.static_range(K_STAGES * CONSUMERS):
        mbarrier.init(k_full.index(stage), count=PRODUCER_WARPS * 32)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
    for stage in gl.static_range(V_STAGES * CONSUMERS):
        mbarrier.init(v_full.index(stage), count=PRODUCER_WARPS * 32)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS if OVERLAY else 1)
    mbarrier.init(q_full, count=PRODUCER_WARPS * 32)
    mbarrier.init(q_empty, count=CONSUMERS)
    mbarrier.init(ds_full, count=CONSUMERS)
    mbarrier.init(ds_empty, count=CONSUMERS)
    mbarrier.init(place_full, count=1)

    q_side = (q_bufs, dout_bufs, statistics_buf, level_buf, q_full, q_empty, place_buf, place_full)
    buffers = (k_bufs, v_bufs, entry_bufs, ds_bufs)
    bars = (k_full, k_empty, v_full, v_empty)
    ds_side = (ds_full, ds_empty)
    consumer_tensors = (work_ptr, bias_ptr, order_ptr, tail_bias_ptr)
    results = (dq_ptr, dk_sum_ptr, dv_sum_ptr, dtail_k_ptr, dtail_v_ptr, dk_desc, dv_desc, staging)
    consumer_sizes = (first_head, heads, SHARE, Hkv, Sq, Sk, T, J, ITEMS, stride_bb)
    dq_strides = (stride_gb, stride_gh, stride_gs)
    producer_tensors = (work_ptr, lists_ptr, bias_ptr, order_ptr, tail_k_ptr, tail_v_ptr, statistics_ptr)
    inputs = (q_ptr, k_ptr, v_ptr, dout_ptr)
    producer_sizes = (first_head, heads, SHARE, Hq, Hkv, Sq, T, G, J, ITEMS, stride_bb)
    q_strides, dout_strides = (stride_qb, stride_qh, stride_qs), (stride_ob, stride_oh, stride_os)
    k_strides, v_strides = (stride_kb, stride_kh, stride_ks), (stride_vb, stride_vh, stride_vs)
    # The arguments stand here as literals: assigned to a name, their constants would become run-time values.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (
                    gl.constexpr(0), q_side, buffers, bars, ds_side, consumer_tensors, results, consumer_sizes,
                    dq_strides, scale, qk_scale,
                    D, BLOCK_D, N, CONSUMERS, K_STAGES, V_STAGES, HAS_BIAS, HAS_ORDER, TAIL, WANT_Q, WANT_K, WANT_V,
                    EARLY, OVERLAY, SLOTS, LANES,
                )),
                (consumer, (
                    gl.constexpr(1), q_side, buffers, bars, ds_side, consumer_tensors, results, consumer_sizes,
                    dq_strides, scale, qk_scale,
                    D, BLOCK_D, N, CONSUMERS, K_STAGES, V_STAGES, HAS_BIAS, HAS_ORDER, TAIL, WANT_Q, WANT_K, WANT_V,
                    EARLY, OVERLAY, SLOTS, LANES,
                )),
                (producer, (
                    q_side, buffers, bars, producer_tensors, inputs, producer_sizes, q_strides, k_strides, v_strides,
                    dout_strides, qk_scale, WIDE, PRODUCER_WARPS,
                    D, BLOCK_D, N, CONSUMERS, K_STAGES, V_STAGES, HAS_BIAS, HAS_ORDER, TAIL, WANT_Q, WANT_K, WANT_V,
                )),
            ],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consumer, (
                    gl.constexpr(0), q_side, buffers, bars, ds_side, consumer_tensors, results, consumer_sizes,
                    dq_strides, scale, qk_scale,
                    D, BLOCK_D, N, CONSUMERS, K_STAGES, V_STAGES, HAS_BIAS, HAS_ORDER, TAIL, WANT_Q, WANT_K, WANT_V,
                    EARLY, OVERLAY, SLOTS, LANES,
                )),
                (producer, (
                    q_side, buffers, bars, producer_tensors, inputs, producer_sizes, q_strides, k_strides, v_strides,
                    dout_strides, qk_scale, WIDE, PRODUCER_WARPS,
                    D, BLOCK_D, N, CONSUMERS, K_STAGES, V_STAGES, HAS_BIAS, HAS_ORDER, TAIL, WANT_Q, WANT_K, WANT_V,
                )),
            ],
            [PRODUCER_WARPS],
            [PRODUCER_REGISTERS],
        )  # fmt: skip


def bulk(m: int, n: int) -> bool:
    """Whether the copy engine adds dv and dk: a consumer's 64 keys are neighbours, and shared memory can stage them.

    On an H100, 128x64 of 12 x 32,760 x 128: 13.5 ms at density 0.3, by threads 14.7, by keys 14.4; at 1.0 41.0 ms, 46.7
    and 47.2.
    """
    return m == 128 and n >= 64


def configuration(d: int, m: int, in_bulk: bool) -> dict:
    """Stages, registers and the order of products: a fixed table, measured on an H100; nothing is autotuned here.

    ``in_bulk``: the copy engine adds dv and dk, from as many slots for 32 columns as there is memory for.

    The registers are those of a thread of the second consumer and of the producer; the first consumer has the rest.
    """
    tile = {"K_STAGES": 2, "V_STAGES": 2, "PRODUCER_WARPS": 4, "PRODUCER_REGISTERS": 48}
    if m == 64:  # two CTAs share a multiprocessor
        tile |= {"CONSUMERS": 1, "CONSUMER_REGISTERS": 0, "maxnreg": 128}
        return tile | {"OVERLAY": False, "SLOTS": 0, "LANES": False, "EARLY": True}
    tile |= {"CONSUMERS": 2, "CONSUMER_REGISTERS": 224, "maxnreg": 168}
    tile |= {"OVERLAY": in_bulk and d > 64, "SLOTS": 2 if in_bulk else 0, "LANES": in_bulk}
    # Sums by the copy engine take no thread's time, so nothing has to hide them: dq last is 1 to 2% faster then, at
    # head dim 128; at others that was not measured.
    return tile | {"EARLY": not in_bulk or d < 128}


def refusal(q: Tensor, scale: float, m: int) -> str | None:
    """Why this kernel cannot take these arguments (metadata is all that is read), or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16, not in {q.dtype}"
    if q.shape[3] not in (64, 96, 128):
        return f"its head dims are 64, 96 and 128, not {q.shape[3]}"
    if m < 64:
        return f"a consumer holds 64 queries, and a slice of {m} would leave most of it idle"
    if scale == 0:
        return "it divides by the scale, which is 0"
    return None


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    statistics: Tensor,
    lists: Lists,
    bias: Tensor | None,
    order: Tensor | None,
    tail_k: Tensor | None,
    tail_v: Tensor | None,
    grads: tuple[Tensor | None, ...],
    first_head: int,
    scale: float,
    m: int,
    n: int,
    **override,
) -> bool:
    """Write dq and add to dk_sum, dv_sum, dtail_k and dtail_v, together ``grads``: None for what is not wanted.

    ``lists`` are of the heads from ``first_head`` on; q, k, v, dout are ``attention_forward_hopper.aligned``.
    ``override`` replaces entries of the table. Returns whether the columns of the sums are in the order of
    ``_in_order_of_lanes``.
    """
    _, Hq, Sq, D = q.shape
    _, Hkv, Sk, _ = k.shape
    heads, T = lists.keys.shape[1:]
    dq, dk_sum, dv_sum, _, _ = grads
    wide = max(q.stride(2) * Sq, dout.stride(2) * Sq, k.stride(2) * Sk, v.stride(2) * Sk) >= 1 << 31
    in_bulk = override.pop("BULK", bulk(m, n) and (dk_sum is not None or dv_sum is not None))
    config = configuration(D, m, in_bulk) | {"WIDE": wide} | override
    descriptors = [
        TensorDescriptor(x, [x.numel() // D, D], [D, 1], [64, 32], PIECE_SHARED.value)
        if config["SLOTS"] and x is not None
        else None
        for x in (dk_sum, dv_sum)
    ]
    work = work_order.launch(lists.keys, lists.clean)
    items = work.shape[0] - 1
    ctas = torch.cuda.get_device_properties(q.device).multi_processor_count * (3 - config["CONSUMERS"])
    _attention_bwd_hopper[(min(ctas, items),)](
        q, k, v, dout, statistics,
        lists.lists, work, bias, order, tail_k, tail_v, lists.tail_bias, *grads, *descriptors,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
        *((0, 0, 0) if dq is None else dq.stride()[:3]),
        0 if bias is None else bias.stride(0),
        first_head, heads, Hq, Hkv, Hq // Hkv, Sq, Sk, T, group_count(Sk, n), 0 if tail_k is None else tail_k.shape[2],
        items, scale, scale * LOG2_E,
        D=D, BLOCK_D=next_power_of_2(D), N=n,
        HAS_BIAS=bias is not None, HAS_ORDER=order is not None, TAIL=tail_k is not None,
        WANT_Q=dq is not None, WANT_K=dk_sum is not None, WANT_V=dv_sum is not None,
        num_warps=4,
        **config,
    )  # fmt: skip
    return config["LANES"]
