"""The kernel behind ``fgattn.stats`` against ``reference.kept_density``; interpreted where there is no GPU."""

import pytest
import torch

from fg_inductor.kernels import kept_density, reference
from fg_inductor.testing_cases import CASES, reference_result

IDS = ("m128-n1-words", "m16-n128", "fewer-keys-than-group", "batch-2-bshd", "full", "nothing-kept")
IDS += ("bias-padding", "bias-float", "tail-padding")  # groups masked in part, and as a whole


@pytest.mark.parametrize("case", [c for c in CASES if c.id in IDS], ids=str)
def test_cases(case, device, poison):
    expected = reference_result(case, torch.float32, device)
    arguments = (expected.mask, expected.key_bias, case.queries, case.keys, case.m, case.n)
    ours, exact = kept_density.launch(*arguments), reference.kept_density(*arguments)
    assert ours.shape == () and ours.dtype == torch.float32
    assert torch.equal(ours, exact)  # counts below 2**24 are exact in float32, and the quotient is taken in float64


def test_more_groups_than_a_block(device, poison):
    mask = torch.randint(-(2**31), 2**31 - 1, (1, 2, 3, 80), dtype=torch.int32).to(device)
    arguments = (mask, None, 40, 80 * 32, 16, 1)
    assert torch.equal(kept_density.launch(*arguments), reference.kept_density(*arguments))
