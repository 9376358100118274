"""Slices of like masks in one tile: the kernel against ``reference_tiles``; interpreted where there is no GPU."""

import pytest
import torch

from fg_inductor.kernels import alike_slices
from fg_inductor.kernels.mask import pack, word_count
from fg_inductor.kernels.reference_tiles import alike_slices as reference
from fg_inductor.kernels.reference_tiles import union_size

WINDOW = alike_slices.WINDOW


def like_some(slices: int, groups: int, kinds: int, noise: float = 0.05) -> torch.Tensor:
    """bool [2, 2, T, G]: each slice keeps what one of a few kinds keeps, but for some noise."""
    own = torch.rand(2, 2, kinds, groups) < 0.3
    kind = torch.randint(kinds, (2, 2, slices, 1))
    return own.take_along_dim(kind, 2) ^ (torch.rand(2, 2, slices, groups) < noise)


@pytest.mark.parametrize("sub", [4, 8])
@pytest.mark.parametrize(
    ("slices", "groups"),
    [(1, 5), (8, 300), (9, 300), (13, 40), (WINDOW, 100), (WINDOW + 1, 100), (2 * WINDOW + 27, 1000), (150, 5000)],
)
def test_kernel(slices, groups, sub, device, poison):
    """Windows that end in the middle of a tile, one tile and less, and masks of which some words are compared."""
    mask = pack(like_some(slices, groups, 5), word_count(groups, 1)).to(device)
    step = alike_slices.step_of(mask.shape[-1])
    assert (step > 1) == (groups == 5000)
    found = alike_slices.launch(mask, sub)
    assert found.dtype == torch.int32
    assert torch.equal(found, reference(mask, sub, WINDOW, step))
    assert torch.equal(found.sort(-1).values.cpu(), torch.arange(slices).expand(2, 2, -1).int())
    last = (slices - 1) // sub * sub
    assert torch.equal(found[..., last:].cpu(), torch.arange(last, slices).expand(2, 2, -1).int())


@pytest.mark.parametrize("keep", ["nothing", "everything", "the same"])
def test_slices_that_are_equal_stay(keep, device, poison):
    groups = torch.zeros(1, 1, 40, 300, dtype=torch.bool)
    if keep == "everything":
        groups[:] = True
    elif keep == "the same":
        groups[..., ::3] = True
    found = alike_slices.launch(pack(groups, word_count(300, 1)).to(device), 8)
    assert torch.equal(found.flatten().cpu(), torch.arange(40).int())


def test_of_a_long_mask_some_words_count(device, poison):
    """Every STEP-th word says which slices are alike; all slices keep whatever the others hold."""
    groups = like_some(65, 5000, 6)
    words = word_count(5000, 1)
    compared = torch.arange(5000) // 32 % alike_slices.step_of(words) == 0
    mask = pack(groups | ~compared, words)
    found = alike_slices.launch(mask.to(device), 8).cpu()
    assert torch.equal(found, reference(mask, 8, WINDOW, alike_slices.step_of(words)))
    assert (found[..., :-1] != torch.arange(64)).any(-1).all()


def test_every_head_has_its_own(device):
    """Also of a mask of which some heads are taken, without a copy."""
    mask = pack(like_some(60, 500, 4), word_count(500, 1)).to(device)
    found = alike_slices.launch(mask[:, 1:], 8)
    assert torch.equal(found, alike_slices.launch(mask[:, 1:].contiguous(), 8))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("kinds", [3, 10])
def test_unions_are_smaller(kinds, device):
    """Slices of a few kinds find each other: with 3 kinds few tiles hold several."""
    groups = like_some(10 * WINDOW, 400, kinds, noise=0)
    mask = pack(groups, word_count(400, 1)).to(device)
    found = alike_slices.launch(mask, 8).long()
    groups = groups.to(device)
    for b in range(2):
        for h in range(2):
            before = union_size(groups[b, h], 8)
            after = union_size(groups[b, h, found[b, h]], 8)
            assert after < 0.8 * before
            if kinds == 3:
                assert 8 * after < 1.2 * groups[b, h].sum()


def test_a_window_that_would_lose_stays(device, poison):
    """Greedy tiles are not always better than neighbours: pairs of chance then cost more than they bring."""
    keep = torch.rand(1, 40, 33, 40, generator=torch.Generator().manual_seed(0)) < 0.15
    keep[:, :, :16, :20] = False
    keep[:, :, 16:32, 20:] = False
    mask = pack(keep, word_count(40, 1))
    found = alike_slices.launch(mask.to(device), 8).cpu()
    assert torch.equal(found, reference(mask, 8, WINDOW))
    stayed = 0
    for groups, places in zip(keep[0], found[0].long(), strict=True):
        assert union_size(groups[places][:32], 8) <= union_size(groups[:32], 8)
        stayed += torch.equal(places, torch.arange(33))
    assert 0 < stayed < 40
