"""The meaning of observed masks, in plain PyTorch: made from the exact mass, kept, and made anew where they drift.

It belongs to the specification and is never tuned; arithmetic and letters as in ``kernels.reference``.
"""

import math

import torch
from torch import Tensor

from fg_inductor.kernels.mask import group_count, slice_count, unpack
from fg_inductor.kernels.reference import accumulate_dtype, full_mask, group_statistics, normalise_key_bias
from fg_inductor.kernels.reference_heads import (
    SAMPLED_BLOCK,
    agreement,
    expand_heads,
    joined_mass,
    sampled_blocks,
    shared_slots,
)
from fg_inductor.kernels.reference_select import best_groups, probabilities

SAMPLED_QUERIES, SAMPLED_HEADS = 32, 8


def column_mass(
    q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, rows: Tensor, scale: float, m: int, n: int, reduce: str
) -> Tensor:
    """Exact probability mass of each key group for the slices of the queries ``rows`` [R]: [B, Hq, ceil(R / m), G].

        mass[t, g] = sum over the keys j of group g of reduce over the queries i of slice t of p[i, j]
        p[i, j]    = exp(logits[i, j] - lse[i])

    q, k, lse in the dtype of the arithmetic, bias from ``normalise_key_bias``. reduce is "sum", or "max" as in FG-Attn
    v1. NaN where a logit or the lse of the slice is NaN or +inf, 0 where a key is masked.
    """
    slices, groups = slice_count(len(rows), m), group_count(k.shape[2], n)
    logits = q[:, :, rows] @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if bias is not None:
        logits = logits + bias[:, None, None]
    p = torch.exp(logits - lse[:, :, rows, None])
    if bias is not None:
        p = p.masked_fill((bias == -math.inf)[:, None, None], 0)
    p = torch.nn.functional.pad(p, (0, groups * n - k.shape[2], 0, slices * m - len(rows))).unflatten(2, (slices, m))
    mass = p.sum(3) if reduce == "sum" else p.amax(3)
    return mass.unflatten(-1, (groups, n)).sum(-1)


def observed_mask(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    reduce: str = "sum",
    top_p: float = 0.9,
    density: float | list[float] | None = None,
    max_density: float = 1.0,
    dense_keys: list[int] = (),
    dense_queries: list[int] = (),
    chunk_elements: int = 1 << 27,
    slots: Tensor | None = None,
    masks: int = 0,
) -> Tensor:
    """The block mask [B, Hq, T, W] from the exact mass (``column_mass``) by the rule of ``best_groups``.

    lse [B, Hq, Sq] is that of dense attention, natural log. Some slices at a time (``chunk_elements`` probabilities):
    the masses of a layer are never held at once. With ``slots`` [B, Hq] it is [B, masks, T, W]: one mask for the heads
    of each slot, from their masses together.
    """
    acc = accumulate_dtype(q.dtype)
    keys = k.shape[2]
    bias = normalise_key_bias(key_bias, acc)
    valid = group_statistics(bias, keys, n, k)[0] > 0
    rows = torch.arange(q.shape[2], device=q.device) if order is None else order.long()
    slices = max(1, chunk_elements // (q.shape[0] * q.shape[1] * m * keys))
    q, k, lse = q.to(acc), k.to(acc), lse.to(acc)
    selection = (top_p, density, max_density, dense_keys, dense_queries)
    parts = []
    for part in rows.split(slices * m):
        mass = column_mass(q, k, lse, bias, part, scale, m, n, reduce)
        if slots is not None:
            mass = joined_mass(mass, slots, masks)
        parts.append(best_groups(mass, valid, part, keys, m, n, *selection))
    return torch.cat(parts, 2)


def heads_agreement(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    reduce: str = "sum",
) -> Tensor:
    """How much heads agree, [B, Hq, Hq]: ``agreement`` over the slices of ``sampled_blocks``."""
    acc = accumulate_dtype(q.dtype)
    bias = normalise_key_bias(key_bias, acc)
    rows = torch.arange(q.shape[2], device=q.device) if order is None else order.long()
    q, k, lse = q.to(acc), k.to(acc), lse.to(acc)
    parts = rows.split(SAMPLED_BLOCK)
    return sum(
        agreement(column_mass(q, k, lse, bias, parts[i], scale, m, n, reduce)) for i in sampled_blocks(q.shape[2])
    )


def kept_mass(
    q: Tensor, k: Tensor, mask: Tensor, key_bias: Tensor | None, order: Tensor | None, scale: float, m: int, n: int
) -> Tensor:
    """The share of the attention mass that a mask keeps, a float32 scalar: the mean over a sample of the queries.

    SAMPLED_QUERIES places, evenly spread over the query order, of at most SAMPLED_HEADS heads, evenly spread; of these
    it is exact. A query whose keys are all masked has lost nothing: 1.
    """
    acc = accumulate_dtype(q.dtype)
    (_, heads, queries, _), keys = q.shape, k.shape[2]
    count = min(heads, SAMPLED_HEADS)
    head = torch.arange(count, device=q.device) * heads // count
    place = (2 * torch.arange(SAMPLED_QUERIES, device=q.device) + 1) * queries // (2 * SAMPLED_QUERIES)
    row = place if order is None else order.long()[place]
    logits = q[:, head][:, :, row].to(acc) @ k[:, head // (heads // k.shape[1])].to(acc).mT * scale
    valid = torch.ones_like(logits[:, :1, :1], dtype=torch.bool)
    bias = normalise_key_bias(key_bias, acc)
    if bias is not None:
        logits = logits + bias[:, None, None]
        valid = (bias != -math.inf)[:, None, None]
    keep = unpack(mask[:, head][:, :, place // m], group_count(keys, n)).repeat_interleave(n, -1)[..., :keys]
    share = torch.where(keep, probabilities(logits, valid), 0).sum(-1)
    return torch.where(valid.any(-1), share, 1).mean().to(torch.float32)


def begin_observed(
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    refresh: Tensor,
    drift: Tensor | None = None,
    bound: float | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Whether the mask is to be observed in this step, a bool scalar; where it is, every bit of it is set.

    It is where ``refresh`` says so, or where the mask has drifted: where the share of the mass that it keeps
    (``kept_mass``) has fallen more than ``bound`` below what it was right after the last refresh, or is NaN.

    drift is float32 [3], updated too: the share right after the last refresh, the share now, the number of refreshes.
    With ``slots`` [B, Hq] heads share the masks: mask is [B, K, T, W], and slots the one of each head.
    """
    due = refresh.clone()
    if drift is not None and not refresh:
        each = mask if slots is None else expand_heads(mask, slots)
        drift[1] = kept_mass(q, k, each, key_bias, order, scale, m, n)
        due = ~(drift[1] >= drift[0] - bound)
    if due:
        mask.copy_(full_mask(q[:, : mask.shape[1]], k, m, n))
    return due


def update_observed(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    reduce: str,
    top_p: float,
    density: float | list[float] | None,
    max_density: float,
    dense_keys: list[int],
    dense_queries: list[int],
    due: Tensor,
    drift: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """Write ``observed_mask`` into ``mask`` where ``due`` says so; lse is that of attention with every bit set.

    With ``slots``, where it says so, the heads that agree most now (``shared_slots``) share a mask from then on.
    """
    if not due:
        return
    shape, masks = (key_bias, order, scale, m, n), mask.shape[1]
    if slots is not None:
        slots.copy_(shared_slots(heads_agreement(q, k, lse, *shape, reduce), masks))
    selection = (reduce, top_p, density, max_density, dense_keys, dense_queries)
    mask.copy_(observed_mask(q, k, lse, *shape, *selection, slots=slots, masks=masks))
    if drift is not None:
        drift[:2] = kept_mass(q, k, mask if slots is None else expand_heads(mask, slots), *shape)
        drift[2] += 1


def fetch(mask: Tensor) -> Tensor:
    """A copy of a mask in the memory of its device; the mask may lie in host memory (``kernels.host_memory``)."""
    return mask.clone(memory_format=torch.contiguous_format)


def put_back(mask: Tensor, staged: Tensor, due: Tensor) -> None:
    """Write ``staged``, what became of a copy of ``mask``, into it where ``due`` says so."""
    if due:
        mask.copy_(staged)
