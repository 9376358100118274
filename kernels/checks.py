"""Checks of the operators' arguments: who, what was wrong with the actual value, what to do.

They run at every call, so a message is put together only where it is raised. Sizes are compared only where both are
plain ints: comparing SymInts would add a guard to the user's graph.
"""

import math
from typing import NoReturn

import torch
from torch import Tensor

from fg_inductor.kernels.mask import GROUPS, SLICES, slice_count, word_count

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 96, 128, 256)
TAILS = ("none", "pooled")
KERNELS = ("auto", "portable", "hopper")
POOLS = (8, 16, 32, 64, 128)
REDUCES = ("sum", "max")
CURVES = ("rods", "hilbert")
SHARING_HEADS = 128  # at most that share masks: one program holds what each pair agrees


def fail(op: str, message: str) -> NoReturn:
    """Raise ValueError in the name of an operator."""
    raise ValueError(f"fgattn::{op}: {message}")


def _differ(a, b) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _shape(x: Tensor) -> tuple:
    return tuple(x.shape)


def check_slice(op: str, m: int, n: int | None = None) -> None:
    """m queries a slice, n keys a group."""
    if m not in SLICES:
        fail(op, f"m={m} queries a slice; choose one of {SLICES}.")
    if n is not None and n not in GROUPS:
        fail(op, f"n={n} keys a group; choose one of {GROUPS}.")


def check_order(m: int, curve: str, time: float) -> None:
    """The arguments of ``query_order``, sizes apart."""
    check_slice("query_order", m)
    if curve not in CURVES:
        fail("query_order", f"curve={curve!r}; choose one of {CURVES}.")
    if not 0 < time < math.inf:
        fail("query_order", f"time={time}: a step in time counts as some steps in height or width, more than none.")


def check_reorder(x: Tensor, order: Tensor) -> None:
    """x [B, H, S, D], order int32 [S]: what rows a tensor has, and where each goes."""
    if x.dim() != 4:
        fail("reorder", f"x must be [B, H, S, D], got {_shape(x)}; add the missing dimensions.")
    if order.dim() != 1 or order.dtype != torch.int32 or order.device != x.device:
        fail("reorder", f"order must be int32 [S] on {x.device}, got {order.dtype} {_shape(order)} on {order.device}.")
    if _differ(order.shape[0], x.shape[2]):
        fail("reorder", f"order has {order.shape[0]} places and x {x.shape[2]} rows; they must agree.")


def check_ranges(op: str, dense_keys, dense_queries) -> None:
    """[start, end) pairs of tokens."""
    for name, x in (("dense_keys", dense_keys), ("dense_queries", dense_queries)):
        if len(x) % 2:
            fail(op, f"{name} must hold [start, end) pairs, got {len(x)} numbers.")


def _check_tensor(op: str, name: str, x: Tensor, q: Tensor) -> None:
    if x.dim() != 4:
        fail(op, f"{name} must be [B, H, S, D], got {_shape(x)}; add the missing dimensions.")
    if any(isinstance(size, int) and size == 0 for size in x.shape):
        fail(op, f"{name} {_shape(x)} is empty; leave such calls out.")
    if x.dtype != q.dtype or x.device != q.device:
        fail(op, f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; give them one dtype and device.")
    if _differ(x.shape[3], q.shape[3]) or _differ(x.shape[0], q.shape[0]):
        fail(op, f"{name} {_shape(x)} must share batch and head dim with q {_shape(q)}.")


def check_tensors(
    op: str, q: Tensor, k: Tensor, v: Tensor | None, key_bias: Tensor | None, order: Tensor | None
) -> None:
    """q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], key_bias [B, Sk], order int32 [Sq], on one device."""
    _check_tensor(op, "q", q, q)
    _check_tensor(op, "k", k, q)
    if v is not None:
        _check_tensor(op, "v", v, q)
        if _differ(v.shape[1], k.shape[1]) or _differ(v.shape[2], k.shape[2]):
            fail(op, f"v {_shape(v)} must have the heads and the length of k {_shape(k)}.")
    device, dim = q.device, q.shape[3]
    if q.dtype not in DTYPES and not (device.type == "cpu" and q.dtype == torch.float64):
        fail(op, f"dtype {q.dtype} is not supported; cast q, k and v to one of {DTYPES}.")
    if device.type == "cuda" and isinstance(dim, int) and dim not in HEAD_DIMS:
        fail(op, f"head dim {dim} has no kernel; there are {HEAD_DIMS}: pad q, k and v with zeros to the next one.")
    heads, kv_heads = q.shape[1], k.shape[1]
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        fail(op, f"{heads} query heads are not a multiple of {kv_heads} KV heads; repeat k and v.")
    if key_bias is not None and (
        key_bias.dim() != 2
        or not (key_bias.dtype == torch.bool or key_bias.is_floating_point())
        or _differ(key_bias.shape[0], q.shape[0])
        or _differ(key_bias.shape[1], k.shape[2])
        or key_bias.device != device
    ):
        fail(
            op,
            f"key_bias must be bool (True = attend) or float [B, Sk] = [{q.shape[0]}, {k.shape[2]}] on {device}, got "
            f"{key_bias.dtype} {_shape(key_bias)} on {key_bias.device}.",
        )
    if order is not None and (
        order.dim() != 1 or order.dtype != torch.int32 or _differ(order.shape[0], q.shape[2]) or order.device != device
    ):
        fail(
            op,
            f"order must be an int32 permutation of the {q.shape[2]} queries on {device}, got {order.dtype} "
            f"{_shape(order)} on {order.device}.",
        )


def check_mask(op: str, mask: Tensor, q: Tensor, k: Tensor, m: int, n: int, shared: bool = False) -> None:
    """mask int32 [B, Hq, T, W]; where heads share masks, ``shared``, [B, K, T, W]."""
    if mask.dtype != torch.int32 or mask.dim() != 4 or mask.device != q.device:
        fail(op, f"mask must be int32 [B, Hq, T, W] on {q.device}, got {mask.dtype} {_shape(mask)} on {mask.device}.")
    heads = mask.shape[1] if shared else q.shape[1]
    expected = (q.shape[0], heads, slice_count(q.shape[2], m), word_count(k.shape[2], n))
    if any(map(_differ, mask.shape, expected)):
        fail(
            op,
            f"mask has shape {_shape(mask)}, but {_shape(q)} queries and {k.shape[2]} keys with m={m}, n={n} need "
            f"{expected}; make it with the same m and n.",
        )


def check_select(
    q, k, key_bias, order, m, n, pool, top_p, density, max_density, dense_keys, dense_queries, reduce, gamma, alpha
) -> None:
    """The arguments of ``select_pooled``."""
    op = "select_pooled"
    check_tensors(op, q, k, None, key_bias, order)
    check_slice(op, m, n)
    if pool not in POOLS:
        fail(op, f"pool={pool} queries a mean; choose one of {POOLS}.")
    _check_selection(op, q, top_p, density, max_density, dense_keys, dense_queries, reduce)
    if gamma is not None and not 0 < gamma < 1:
        fail(op, f"gamma={gamma} is compared with cosines; it must lie between 0 and 1.")
    if alpha is not None and (not alpha > 0 or density is not None):
        fail(op, f"alpha={alpha} with density={density}; give a positive alpha, or a density, or neither.")


def _check_state(op: str, q: Tensor, mask: Tensor, flag: tuple[str, Tensor], drift: Tensor | None) -> None:
    """What is kept from step to step, and the flag that says whether it is made anew."""
    if mask.stride(3) != 1:
        fail(op, f"the words of a mask row must be contiguous, but mask has strides {mask.stride()}.")
    name, x = flag
    if x.dtype != torch.bool or x.dim() != 0 or x.device != q.device:
        fail(op, f"{name} must be a bool scalar on {q.device}, got {x.dtype} {_shape(x)} on {x.device}.")
    if drift is not None and (
        drift.dtype != torch.float32 or _shape(drift) != (3,) or drift.device != q.device or drift.stride() != (1,)
    ):
        fail(op, f"drift must be float32 [3] on {q.device}, got {drift.dtype} {_shape(drift)} on {drift.device}.")


def _check_slots(op: str, mask: Tensor, slots: Tensor, batch, heads) -> None:
    """slots int32 [B, H], which of the masks [B, K, T, W] each head has."""
    if slots.dtype != torch.int32 or slots.dim() != 2 or slots.device != mask.device:
        fail(op, f"slots must be int32 [B, Hq] on {mask.device}, got {slots.dtype} {_shape(slots)} on {slots.device}.")
    if _differ(slots.shape[0], batch) or _differ(slots.shape[1], heads) or _differ(slots.stride(1), 1):
        fail(
            op,
            f"slots must be contiguous and have a number for each head, [B, Hq] = [{batch}, {heads}], but it is "
            f"{_shape(slots)} with strides {slots.stride()}.",
        )
    masks, heads = mask.shape[1], slots.shape[1]
    if isinstance(masks, int) and isinstance(heads, int) and masks > heads:
        fail(op, f"{masks} masks for {heads} heads, by mask {_shape(mask)}; give as many as heads, or fewer.")
    if isinstance(heads, int) and heads > SHARING_HEADS:
        fail(op, f"{heads} heads; at most {SHARING_HEADS} may share masks: give each a mask of its own, without slots.")


def check_expand(mask: Tensor, slots: Tensor) -> None:
    """The arguments of ``expand_heads``."""
    op = "expand_heads"
    if mask.dtype != torch.int32 or mask.dim() != 4:
        fail(op, f"mask must be int32 [B, K, T, W], got {mask.dtype} {_shape(mask)}.")
    _check_slots(op, mask, slots, mask.shape[0], slots.shape[-1])


def check_begin(q, k, mask, key_bias, order, m, n, refresh, drift, bound, slots) -> None:
    """The arguments of ``begin_observed_``."""
    op = "begin_observed_"
    check_tensors(op, q, k, None, key_bias, order)
    check_slice(op, m, n)
    check_mask(op, mask, q, k, m, n, slots is not None)
    _check_state(op, q, mask, ("refresh", refresh), drift)
    if slots is not None:
        _check_slots(op, mask, slots, q.shape[0], q.shape[1])
    if (drift is None) != (bound is None):
        fail(op, f"drift and bound={bound} go together; give both or neither.")
    if bound is not None and not 0 < bound < 1:
        fail(op, f"bound={bound} is a fall of the kept share of the mass; it must lie between 0 and 1.")


def check_observed(
    q, k, lse, mask, key_bias, order, m, n, reduce, top_p, density, max_density, dense_keys, dense_queries, due, drift,
    slots,
) -> None:  # fmt: skip
    """The arguments of ``update_observed_``."""
    op = "update_observed_"
    check_tensors(op, q, k, None, key_bias, order)
    check_slice(op, m, n)
    check_mask(op, mask, q, k, m, n, slots is not None)
    if lse.dtype != torch.float32 or lse.dim() != 3 or any(map(_differ, lse.shape, q.shape)):
        fail(op, f"lse must be float32 {_shape(q)[:3]}, as attention returns it, got {lse.dtype} {_shape(lse)}.")
    _check_selection(op, q, top_p, density, max_density, dense_keys, dense_queries, reduce)
    _check_state(op, q, mask, ("due", due), drift)
    if slots is not None:
        _check_slots(op, mask, slots, q.shape[0], q.shape[1])
        if isinstance(density, list):
            fail(op, f"head_density={density} with slots: heads that share a mask keep one share; give density.")


def check_fetch(op: str, mask: Tensor) -> None:
    """The mask that ``fetch`` and ``put_back_`` take, of any shape."""
    if mask.dtype != torch.int32:
        fail(op, f"mask must be int32, got {mask.dtype}.")


def check_put_back(mask: Tensor, staged: Tensor, due: Tensor) -> None:
    """The arguments of ``put_back_``."""
    op = "put_back_"
    check_fetch(op, mask)
    same = staged.dtype == mask.dtype and staged.device == mask.device and staged.dim() == mask.dim()
    if not same or any(map(_differ, staged.shape, mask.shape)):
        fail(
            op,
            f"staged must be what fetch gave of mask, {mask.dtype} {_shape(mask)} on {mask.device}, got {staged.dtype} "
            f"{_shape(staged)} on {staged.device}.",
        )
    if due.dtype != torch.bool or due.dim() != 0 or due.device != mask.device:
        fail(op, f"due must be a bool scalar on {mask.device}, got {due.dtype} {_shape(due)} on {due.device}.")


def joined_density(op: str, density: float | None, head_density) -> float | list[float] | None:
    """How much to keep by ``density`` or by ``head_density``: a number for all heads, or a list of one for each."""
    if head_density is None:
        return density
    if density is not None:
        fail(op, f"density={density} and head_density={list(head_density)} both say how much to keep; give one.")
    return list(head_density)


def _check_density(op: str, q: Tensor, density: float | list[float] | None) -> None:
    if isinstance(density, list):
        if _differ(len(density), q.shape[1]):
            fail(
                op, f"head_density has {len(density)} numbers, but q {_shape(q)} has {q.shape[1]} heads; give as many."
            )
        if not all(0 < x <= 1 for x in density):
            fail(op, f"head_density={density}: each number must lie in (0, 1].")
    elif density is not None and not 0 < density <= 1:
        fail(op, f"density={density} must lie in (0, 1].")


def _check_selection(op, q, top_p, density, max_density, dense_keys, dense_queries, reduce) -> None:
    """How much a selector keeps, which tokens whole, and how the queries of a slice are joined."""
    for name, x in (("top_p", top_p), ("max_density", max_density)):
        if not 0 < x <= 1:
            fail(op, f"{name}={x} must lie in (0, 1].")
    _check_density(op, q, density)
    check_ranges(op, dense_keys, dense_queries)
    if reduce not in REDUCES:
        fail(op, f"reduce={reduce!r}; choose one of {REDUCES}.")


def _check_same_length(op: str, q: Tensor, k: Tensor, order: Tensor) -> None:
    if _differ(q.shape[2], k.shape[2]):
        fail(op, f"{q.shape[2]} queries and {k.shape[2]} keys; it places both by one order, so give it as many.")
    check_tensors(op, q, k, None, None, order)


def check_dfs(q, k, key_bias, order, m, n, density) -> None:
    """The arguments of ``select_dfs``."""
    op = "select_dfs"
    _check_same_length(op, q, k, order)
    check_tensors(op, q, k, None, key_bias, order)
    check_slice(op, m, n)
    if density is None:
        fail(op, "density=None and head_density=None; give one of them: it has no top-p.")
    _check_density(op, q, density)


def check_static(q, k, order, m, n, grid, before, tile, window, radius, ranges) -> None:
    """The arguments of ``select_static``."""
    op = "select_static"
    _check_same_length(op, q, k, order)
    check_slice(op, m, n)
    if len(grid) != 3 or len(tile) != 3 or min(tile) < 1:
        fail(op, f"grid={list(grid)}, tile={list(tile)}; give three positive sizes each: time, height, width.")
    known = all(isinstance(x, int) for x in (*grid, before, q.shape[2]))
    if known and (min(grid) < 1 or before < 0 or before + grid[0] * grid[1] * grid[2] > q.shape[2]):
        fail(op, f"a grid of {list(grid)} behind {before} tokens does not fit into {q.shape[2]} tokens.")
    if window and (len(window) != 3 or any(x < 1 or x % 2 == 0 for x in window)):
        fail(op, f"window={list(window)} tiles; give three odd numbers, or none.")
    if not radius >= 0:
        fail(op, f"radius={radius} tokens; give 0 (none) or more.")
    if len(ranges) % 2:
        fail(op, f"ranges must hold [start, end) pairs, got {len(ranges)} numbers.")


def check_attention(q, k, v, mask, key_bias, order, m, n, tail, kernel_name) -> None:
    """The arguments of ``attention``."""
    op = "attention"
    check_tensors(op, q, k, v, key_bias, order)
    check_slice(op, m, n)
    check_mask(op, mask, q, k, m, n)
    if tail not in TAILS:
        fail(op, f"tail={tail!r}; choose one of {TAILS}.")
    if kernel_name not in KERNELS:
        fail(op, f"kernel_name={kernel_name!r}; choose one of {KERNELS}.")
