"""The test utilities themselves: a budget that never fails, or poison that never shows, would hide every other bug."""

import math

import pytest
import torch

from fg_inductor.testing import (
    LAYOUTS,
    assert_as_accurate,
    assert_l2_as_accurate,
    dense_mask,
    make_qkv,
    poison,
    random_mask,
)

CHECKS = (assert_as_accurate, assert_l2_as_accurate)


def _triple():
    exact = torch.randn(3, 5, 7, dtype=torch.float64)
    return exact.bfloat16(), exact


@pytest.mark.parametrize("check", CHECKS)
def test_budget_is_twice_plain_and_one_rounding(check):
    plain, exact = _triple()
    check(plain, plain, exact)
    check(exact + 2 * (plain - exact), plain, exact)
    with pytest.raises(AssertionError, match=r"(?s)dk: .*exceeds the budget.*plain PyTorch has.*\(1, 2, 3\): got"):
        wrong = plain.float()
        wrong[1, 2, 3] += 1.0
        check(wrong, plain, exact, "dk")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("check", CHECKS)
def test_non_finite_values_must_be_where_they_belong(check, value):
    plain, exact = _triple()
    wrong = plain.clone()
    wrong[2, 0, 1] = value
    with pytest.raises(AssertionError, match=r"first at \(2, 0, 1\)"):
        check(wrong, plain, exact)
    exact[2, 0, 1] = value
    check(wrong, plain, exact)
    with pytest.raises(AssertionError, match="at 1 wrong or missing places"):
        check(plain, plain, exact)


@pytest.mark.parametrize("check", CHECKS)
def test_plain_that_overflows_buys_no_budget(check):
    plain, exact = _triple()
    wrong = plain.clone()
    plain[0, 0, 0], wrong[0, 0, 0] = math.nan, 40.0
    with pytest.raises(AssertionError, match="exceeds the budget"):
        check(wrong, plain, exact)


def test_poison_shows_and_ends():
    x = torch.ones(4)
    with poison():
        floats = torch.empty(4), torch.empty_like(x), x.new_empty(4), torch.empty_strided((4,), (2,))
        words, flags = x.new_empty(4, dtype=torch.int32), torch.empty(4, dtype=torch.bool)
    assert all(y.isnan().all() for y in floats)
    assert (words == torch.iinfo(torch.int32).max // 3).all() and flags.all()
    assert torch.empty.__module__ != poison.__module__


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_numbers(layout):
    for actual, expected in zip(
        make_qkv(2, 4, 2, 30, 40, layout=layout), make_qkv(2, 4, 2, 30, 40, layout="contiguous"), strict=True
    ):
        assert torch.equal(actual, expected) and actual.stride(-1) == 1
        assert actual.is_contiguous() == (layout == "contiguous")
    q, k, v = make_qkv(2, 2, 2, 40, layout=layout)
    assert len({x.stride() for x in (q, k, v)}) == (3 if layout == "mixed" else 1)


def test_dense_mask_bit_by_bit():
    q, k, _ = make_qkv(2, 2, queries=37, keys=300)
    order = torch.randperm(37).int()
    mask = random_mask(q, k, 16, 8, 0.5)
    dense = dense_mask(mask, order, 37, 300, 16, 8)
    for row, token in enumerate(order.tolist()):
        for key in (0, 7, 8, 255, 256, 299):  # group 31 is the sign bit of word 0
            bit = mask[1, 0, row // 16, key // 8 // 32].item() >> (key // 8 % 32) & 1
            assert dense[1, 0, token, key].item() == bool(bit)


def test_a_known_error_of_plain_stands_in_for_its_luck():
    """One number may be exact in plain PyTorch by chance; what it is known to miss by is the measure then, no more."""
    exact, plain = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0])
    assert_l2_as_accurate(torch.tensor([1.0 + 3e-7]), plain, exact, plain_error=1.5e-7)
    for known, error in ((0.0, 3e-7), (1.5e-7, 6e-7)):
        with pytest.raises(AssertionError, match="exceeds the budget"):
            assert_l2_as_accurate(torch.tensor([1.0 + error]), plain, exact, plain_error=known)
