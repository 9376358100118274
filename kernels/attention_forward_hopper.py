"""Attention over the kept keys of each query slice, forward, for Hopper (Gluon).

    out[i] = softmax over kept keys j of (scale * q[i] . k[j] + bias[j]) @ v        for every query i of a slice

q, out     [B, Hq, Sq, D]    k, v [B, Hkv, Sk, D]    bfloat16 or float16; any strides, contiguous last dimension
lists      [B, H, X, G]      int32, ascending ids of the groups that a tile keeps (``column_lists``)
work       [B * H * X + 1, 4] int32: the tiles in the order they are begun, and the keys of each (``work_order``); the
                              last row counts those that were drawn
bias       [B, Sk]           float32, -inf where a key is masked, or None
order      [Sq]              int32: row i of query order is token order[i]; out and lse are in token order; or None
alike      [B, H, T]         int32: the slices in the order in which they fill tiles (``alike_slices``), or None
tail_k, v  [B, Hkv, J, D]    summaries of the 128-key blocks, tail_bias [B, H, T, J] (base 2; -inf: none dropped)
lse        [B, Hq, Sq]       float32, natural log
Grid       as many CTAs as the GPU holds at once; each draws its tiles, two ahead

A CTA attends for one tile of queries at a time: CONSUMERS x 64 rows of query order, X tiles a head. Its producer brings
the listed rows of K and V into swizzled shared memory (STAGES tiles of BLOCK_N keys) and never computes: where groups
have 8 keys or more it is one warp that asks the copy engine for them (``hopper_loader``), else a warpgroup that gathers
them by 16-byte cp.async (``hopper_producer``). Each consumer, a warpgroup, holds 64 queries and runs wgmma: the scores
of a tile of keys are computed beside the product of the tile before with V, so that the tensor cores work while the
softmax does. mbarriers hand the buffers over, also from one tile of queries to the next: the producer goes on to the
next one while the consumers finish. Only the first and the last, ragged tile of a list are masked, and those of groups
that hold a masked key; the tiles of the pooled tail follow in the same softmax.

Where a slice is smaller than a tile (M = 32 and 16), the list is the union of what the tile's slices keep, every entry
carries one bit for each slice above its id, and each row masks what its own slice did not keep: exact for every slice.
``query_order`` sees to it that such slices agree on most of their keys; where there is none, ``alike_slices`` finds
those that do.

Meaning: ``reference.attention``. Numbers: ``python -m fg_inductor bench attention``.
"""

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fg_inductor.kernels import alike_slices, column_lists, work_order
from fg_inductor.kernels.attention_forward import heads_at_once, prepare
from fg_inductor.kernels.hopper_consumer import consumer
from fg_inductor.kernels.hopper_loader import BOX_SHARED, loader
from fg_inductor.kernels.hopper_producer import producer
from fg_inductor.kernels.mask import group_count
from fg_inductor.kernels.sizes import next_power_of_2


@gluon.jit
def _attention_fwd_hopper(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    lists_ptr, work_ptr, bias_ptr, order_ptr, alike_ptr, tail_k_ptr, tail_v_ptr, tail_bias_ptr,
    k_desc, v_desc, tail_k_desc, tail_v_desc,
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
    WIDE: gl.constexpr, BOX: gl.constexpr, ALIKE: gl.constexpr,
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
    # Every thread of the producer arrives where it gathered; where the copy engine loads, one that says how much.
    GATHERED: gl.constexpr = BOX == 0
    THREADS: gl.constexpr = PRODUCER_WARPS * 32
    K_FULL: gl.constexpr = THREADS if GATHERED else (THREADS + 1 if SUB > 1 else 1)
    V_FULL: gl.constexpr = THREADS if GATHERED else 1
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=K_FULL)
        mbarrier.init(v_full.index(stage), count=V_FULL)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    mbarrier.init(q_full, count=PRODUCER_WARPS * 32)
    mbarrier.init(q_empty, count=CONSUMERS)
    mbarrier.init(place_full, count=1)
    if not GATHERED:
        # The copy engine counts in barriers through the asynchronous proxy; they were made through the generic one.
        fence_async_shared()

    q_side = (q_bufs, q_full, q_empty, place_buf, place_full)
    buffers = (k_bufs, v_bufs, bits_bufs)
    bars = (k_full, k_empty, v_full, v_empty)
    k_strides, v_strides = (stride_kb, stride_kh, stride_ks), (stride_vb, stride_vh, stride_vs)
    strides = (stride_qb, stride_qh, stride_qs, stride_bb)
    consumer_tensors = (work_ptr, lists_ptr, bias_ptr, tail_bias_ptr, order_ptr, alike_ptr, out_ptr, lse_ptr)
    consumer_sizes = (first_head, heads, Hq, Sq, T, X, G, J, ITEMS, stride_bb)
    out_strides = (stride_ob, stride_oh, stride_os)
    producer_tensors = (work_ptr, lists_ptr, bias_ptr, order_ptr, alike_ptr, tail_k_ptr, tail_v_ptr)
    producer_sizes = (first_head, heads, SHARE, Hkv, Sq, T, X, G, J, ITEMS)
    qkv = (q_ptr, k_ptr, v_ptr)
    descriptors = (k_desc, v_desc, tail_k_desc, tail_v_desc)
    # The arguments stand here as literals: assigned to a name, their constants would become run-time values.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (
                    gl.constexpr(0), q_side, buffers, bars, consumer_tensors, consumer_sizes, out_strides, qk_scale,
                    D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_BIAS, HAS_ORDER, TAIL, NEGATIVE, BOX, ALIKE,
                )),
                (consumer, (
                    gl.constexpr(1), q_side, buffers, bars, consumer_tensors, consumer_sizes, out_strides, qk_scale,
                    D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_BIAS, HAS_ORDER, TAIL, NEGATIVE, BOX, ALIKE,
                )),
                (_producer, (
                    q_side, buffers, bars, producer_tensors, qkv, producer_sizes, strides, k_strides, v_strides,
                    descriptors, WIDE, PRODUCER_WARPS,
                    D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_BIAS, HAS_ORDER, TAIL, NEGATIVE, BOX, ALIKE,
                )),
            ],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consumer, (
                    gl.constexpr(0), q_side, buffers, bars, consumer_tensors, consumer_sizes, out_strides, qk_scale,
                    D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_BIAS, HAS_ORDER, TAIL, NEGATIVE, BOX, ALIKE,
                )),
                (_producer, (
                    q_side, buffers, bars, producer_tensors, qkv, producer_sizes, strides, k_strides, v_strides,
                    descriptors, WIDE, PRODUCER_WARPS,
                    D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_BIAS, HAS_ORDER, TAIL, NEGATIVE, BOX, ALIKE,
                )),
            ],
            [PRODUCER_WARPS],
            [PRODUCER_REGISTERS],
        )  # fmt: skip


@gluon.jit
def _producer(
    q_side, buffers, bars, tensors, qkv, sizes, strides, k_strides, v_strides, descriptors,
    WIDE: gl.constexpr, WARPS: gl.constexpr,
    D: gl.constexpr, BLOCK_D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SUB: gl.constexpr, CONSUMERS: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_ORDER: gl.constexpr, TAIL: gl.constexpr, NEGATIVE: gl.constexpr, BOX: gl.constexpr, ALIKE: gl.constexpr,
):  # fmt: skip
    if BOX == 0:
        producer(
            q_side, buffers, bars, tensors, qkv, sizes, strides, k_strides, v_strides, WIDE, WARPS,
            D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_BIAS, HAS_ORDER, TAIL, NEGATIVE, ALIKE,
        )  # fmt: skip
    else:
        loader(
            q_side, buffers, bars, tensors, qkv, sizes, strides, descriptors, WIDE, WARPS,
            D, BLOCK_D, M, N, BLOCK_N, STAGES, SUB, CONSUMERS, HAS_ORDER, TAIL, BOX, ALIKE,
        )  # fmt: skip


def configuration(d: int, m: int, n: int = 1) -> dict:
    """Tiles, stages and registers: a fixed table, measured (H100, H200); nothing is autotuned inside an operator.

    ``n``: keys of a group, 1 where they have to be gathered one by one. From 8 on the copy engine takes boxes of BOX.
    The registers are those of a thread of the second consumer and of the producer; the first consumer has the rest.
    """
    if m == 64:  # two CTAs share a multiprocessor
        tile = {"CONSUMERS": 1, "BLOCK_N": 64, "STAGES": 2, "PRODUCER_WARPS": 4}
        tile |= {"CONSUMER_REGISTERS": 0, "PRODUCER_REGISTERS": 48, "maxnreg": 128}
    else:
        tile = {"CONSUMERS": 2, "BLOCK_N": 128, "STAGES": 2 if d > 64 else 3, "PRODUCER_WARPS": 4}
        tile |= {"CONSUMER_REGISTERS": 208, "PRODUCER_REGISTERS": 88, "maxnreg": 168}
    if n < 8:
        return tile | {"BOX": 0}
    tile |= {"BOX": min(n, tile["BLOCK_N"]), "PRODUCER_WARPS": 1}
    return tile if m == 64 else tile | {"CONSUMER_REGISTERS": 232, "PRODUCER_REGISTERS": 40}


def slices_of_a_tile(config: dict, m: int) -> int:
    """Slices that share a list."""
    return max(1, config["CONSUMERS"] * 64 // m)


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


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where 16-byte copies of its rows are not possible."""
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:3]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def loadable(x: Tensor) -> bool:
    """Whether the copy engine can be told of x: nothing repeats, and there is something."""
    return x.numel() > 0 and all(stride > 0 or size == 1 for size, stride in zip(x.shape, x.stride(), strict=True))


def boxes(x: Tensor | None, rows: int) -> TensorDescriptor | None:
    """What the copy engine is told of x [B, H, S, D]: it takes ``rows`` rows of 64 columns at a time."""
    if x is None:
        return None
    # Where there is one of a kind its stride means nothing, and may be one that the engine refuses.
    strides = [stride if size > 1 else 16 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, 64], BOX_SHARED.value)


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
    q, k, v = map(aligned, (q, k, v))
    _, Hq, Sq, D = q.shape
    _, Hkv, Sk, _ = k.shape
    T = mask.shape[2]
    G = group_count(Sk, n)
    out, lse, bias, padding, blocks, tail_k, tail_v = prepare(q, k, v, key_bias, tail)
    wide = max(q.stride(2) * Sq, k.stride(2) * Sk, v.stride(2) * Sk) >= 1 << 31
    config = configuration(D, m, n if bias is None and loadable(k) and loadable(v) else 1)
    config |= {"WIDE": wide, "ALIKE": m < 64 and order is None} | override
    descriptors = (None,) * 4
    if config["BOX"]:
        rows = (config["BOX"], config["BOX"], config["BLOCK_N"], config["BLOCK_N"])
        descriptors = tuple(map(boxes, (k, v, tail_k, tail_v), rows))
    sub = slices_of_a_tile(config, m)
    X = group_count(T, sub)
    ctas = torch.cuda.get_device_properties(q.device).multi_processor_count * (3 - config["CONSUMERS"])
    heads = heads_at_once(mask, Sk, n, sub)
    for first in range(0, Hq, heads):
        part = mask[:, first : first + heads]
        alike = alike_slices.launch(part, sub) if config["ALIKE"] else None
        lists, keys, clean, tail_bias = column_lists.launch(part, Sk, n, sub, tail == "pooled", bias, padding, alike)
        work = work_order.launch(keys, clean)
        items = work.shape[0] - 1
        _attention_fwd_hopper[(min(ctas, items),)](
            q, k, v, out, lse,
            lists, work, bias, order, alike, tail_k, tail_v, tail_bias, *descriptors,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            0 if bias is None else bias.stride(0),
            first, part.shape[1], Hq, Hkv, Hq // Hkv, Sq, T, X, G, blocks, items, scale * math.log2(math.e),
            D=D, BLOCK_D=next_power_of_2(D), M=m, N=n,
            HAS_BIAS=bias is not None, HAS_ORDER=order is not None, TAIL=tail == "pooled", NEGATIVE=scale < 0,
            num_warps=4,
            **config,
        )  # fmt: skip
    return out, lse
