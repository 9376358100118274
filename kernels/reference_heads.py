"""The meaning of one observed mask for several heads, in plain PyTorch: which share one, and what it is made from.

It belongs to the specification and is never tuned; letters as in ``kernels.reference``, K masks for H heads.
"""

import torch
from torch import Tensor

SAMPLED_BLOCK = 128  # queries


def sampled_blocks(queries: int) -> range:
    """Which blocks of 128 queries, in query order, say how heads agree: every 16th, more of a short sequence.

    Eight at least, or all that there are; in the middle of what they stand for.
    """
    blocks = (queries + SAMPLED_BLOCK - 1) // SAMPLED_BLOCK
    step = max(1, min(16, blocks // 8))
    return range(step // 2, blocks, step)


def agreement(mass: Tensor) -> Tensor:
    """How much the heads of some slices agree, [B, H, T, G] -> [B, H, H]: Bhattacharyya's coefficient of their masses.

        agreement[a, b] = sum over slices t and groups g of sqrt(mass[a, t, g] * mass[b, t, g])

    A head has the agreement of all its mass with itself. Mass that is not finite counts as none.
    """
    root = mass.nan_to_num(0, 0, 0).flatten(2).sqrt()
    return root @ root.mT


def shared_slots(agreement: Tensor, masks: int) -> Tensor:
    """Which mask each head has, int32 [B, H], from their agreement [B, H, H].

    Clusters of heads are merged, the two that agree most first, until ``masks`` are left: those with the largest mean
    agreement over their pairs of heads (average linkage), of equal ones those with the lowest heads. The masks are
    numbered by the lowest head of each.
    """
    upper = agreement.triu(1)
    slots = torch.zeros(agreement.shape[:2], dtype=torch.int32, device=agreement.device)
    for entry, found in zip(upper + upper.mT, slots, strict=True):
        clusters = [[head] for head in range(len(entry))]
        while len(clusters) > masks:
            pairs = [(a, b) for b in range(len(clusters)) for a in range(b)]
            means = {(a, b): entry[clusters[a]][:, clusters[b]].mean().item() for a, b in sorted(pairs)}
            a, b = max(means, key=means.get)
            clusters[a] += clusters.pop(b)
        for slot, heads in enumerate(clusters):
            found[heads] = slot
    return slots


def joined_mass(mass: Tensor, slots: Tensor, masks: int) -> Tensor:
    """The masses of the heads of each slot together, [B, H, T, G] -> [B, K, T, G].

    A slice of each head has the same mass in all, so that every head has the same say.
    """
    member = slots[:, None] == torch.arange(masks, device=slots.device)[:, None]  # [B, K, H]
    return torch.where(member[..., None, None], mass[:, None], 0).sum(2)


def expand_heads(mask: Tensor, slots: Tensor) -> Tensor:
    """The mask of each head, [B, H, T, W], from those that they share, [B, K, T, W]."""
    entry = torch.arange(mask.shape[0], device=mask.device)[:, None]
    return mask[entry, slots.long()]
