"""Block masks to time attention with: which groups each slice keeps, and how unequal the slices are."""

import torch
from torch import Tensor

from fg_inductor.kernels.mask import group_count, pack, slice_count, word_count

LISTS = ("random", "blocks", "skewed", "contiguous")
RUN = (64, 128)  # keys in a run of "blocks", the shortest and the longest
SKEW = (0.08, 0.8)  # kept density of the emptiest and of the fullest slice of "skewed"


def make_mask(
    lists: str, batch: int, heads: int, queries: int, keys: int, m: int, n: int, density: float,
    device: torch.device | str, seed: int = 0,
) -> Tensor:  # fmt: skip
    """A block mask int32 [B, H, T, W] that keeps ``density`` of the groups, exactly up to rounding.

    lists  "random": each slice its own groups, the worst case for a gather; "blocks": runs of 64 to 128 keys;
           "skewed": random, the slices keep 8% to 80%, most of the difference between heads, and as much in total as
           without skew; "contiguous": one run of keys a slice, around the end of the sequence if need be
    """
    slices, groups = slice_count(queries, m), group_count(keys, n)
    counts = kept_counts(lists == "skewed", batch, heads, slices, groups, density, seed).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    packed = []  # a head at a time: [T, G] in 64-bit numbers is large enough
    for count in counts.flatten(0, 1):
        ranked = _priority(lists, slices, groups, n, generator).argsort(dim=-1, stable=True)
        kept = torch.arange(groups, device=device) < count[:, None]
        packed.append(pack(torch.zeros_like(kept).scatter_(1, ranked, kept), word_count(keys, n)))
    return torch.stack(packed).unflatten(0, (batch, heads))


def kept_counts(
    skewed: bool, batch: int, heads: int, slices: int, groups: int, density: float, seed: int = 0
) -> Tensor:
    """Kept groups of each slice, int64 [B, H, T] on CPU; the total is the same with and without skew."""
    each = max(1, round(density * groups))
    if not skewed or each == groups:
        return torch.full((batch, heads, slices), each)
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    # Each head has its part of the range, but for a quarter of its slices, which lie anywhere.
    place = torch.stack([torch.randperm(heads, generator=generator) for _ in range(batch)])
    place = (place[..., None] + uniform(batch, heads, slices)) / heads
    place = torch.where(uniform(batch, heads, slices) < 0.25, uniform(batch, heads, slices), place)
    mean = each / groups
    low = SKEW[0] if mean > SKEW[0] else mean / 2
    high = SKEW[1] if mean < SKEW[1] else (1 + mean) / 2
    small, large = -20.0, 20.0  # log of the exponent that gives the mean
    for _ in range(60):
        exponent = (small + large) / 2
        kept = (low + (high - low) * place ** (2.0**exponent)) * groups
        small, large = (exponent, large) if kept.mean() > each else (small, exponent)
    ends = kept.flatten().cumsum(0).round().long()  # rounded so that the total is kept
    ends[-1] = each * kept.numel()
    return ends.diff(prepend=ends.new_zeros(1)).view(batch, heads, slices)


def _priority(lists: str, slices: int, groups: int, n: int, generator: torch.Generator) -> Tensor:
    """[T, G]: a slice keeps the groups of lowest priority, of equal ones the first."""
    device = generator.device
    group = torch.arange(groups, device=device)
    if lists == "contiguous":
        return (group - torch.randint(groups, (slices, 1), generator=generator, device=device)) % groups
    if lists != "blocks":
        return torch.rand(slices, groups, generator=generator, device=device)
    runs = groups * n // RUN[0] + 1
    lengths = torch.randint(RUN[0], RUN[1] + 1, (slices, runs), generator=generator, device=device)
    ends = ((lengths + n - 1) // n).cumsum(1)
    run = torch.searchsorted(ends, group.expand(slices, groups).contiguous(), right=True)
    return torch.rand(slices, runs, generator=generator, device=device).gather(1, run)
