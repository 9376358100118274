"""The specification against independent formulations: dense softmax, autograd, finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from fg_inductor.kernels import reference, reference_select
from fg_inductor.kernels.mask import GROUPS, SLICES
from fg_inductor.testing import (
    assert_as_accurate,
    assert_l2_as_accurate,
    dense_mask,
    make_key_bias,
    make_qkv,
    random_mask,
)
from fg_inductor.testing_cases import CASES, Case, reference_gradients, reference_result

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _dtypes(*names):
    return pytest.mark.parametrize("dtype", [DTYPES[name] for name in names], ids=names)


def _cases(*ids):
    return pytest.mark.parametrize("case", [case for case in CASES if case.id in ids or not ids], ids=str)


def test_table_has_every_slice_and_group():
    assert {case.m for case in CASES} == set(SLICES)
    assert {case.n for case in CASES} == set(GROUPS)


# attention


@_dtypes("fp32", "bf16", "fp16")
@_cases()
def test_attention(case, dtype):
    expected = reference_result(case, dtype)
    out, lse = reference.attention(*expected.arguments)
    assert_as_accurate(out, expected.plain_out, expected.exact_out, "out")
    assert_as_accurate(lse, expected.plain_lse, expected.exact_lse, "lse")


def test_attention_in_float64_is_exact():
    expected = reference_result(Case("tail", n=1, keys=300, tail="pooled", bias="float"), torch.float64)
    out, _ = reference.attention(*expected.arguments)
    torch.testing.assert_close(out, expected.exact_out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tail", ["none", "pooled"])
@pytest.mark.parametrize("n", GROUPS)
def test_full_mask_is_dense_attention(n, tail):
    q, k, v = make_qkv(2, 4, 2, queries=70, keys=140, dtype=torch.bfloat16)
    mask = reference.full_mask(q, k, 32, n)
    out, _ = reference.attention(q, k, v, mask, None, None, 0.125, 32, n, tail)
    plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert_as_accurate(out, plain, exact)


def test_rows_without_keys():
    expected = reference_result(Case("gaps", m=16, keep="gaps", bias="padding"))
    out, lse = reference.attention(*expected.arguments)
    empty = torch.arange(150) // 16 % 2 == 0
    assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -math.inf).all()
    assert out[:, :, ~empty].abs().amin(-1).all() and lse[:, :, ~empty].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_full_mask_has_the_non_finite_values_of_dense_attention(name, value):
    tensors = dict(zip("qkv", make_qkv(heads=2, kv_heads=1, queries=40, keys=50), strict=True))
    tensors[name][0, -1, 17, 5] = value
    q, k, v = tensors.values()
    out, _ = reference.attention(q, k, v, reference.full_mask(q, k, 16, 8), None, None, 0.125, 16, 8)
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert not dense.isfinite().all()
    assert torch.equal(out.nan_to_num(7e7, 8e8, -9e9) > 1e7, dense.nan_to_num(7e7, 8e8, -9e9) > 1e7)
    assert torch.equal(out.isnan(), dense.isnan()) and torch.equal(out.isneginf(), dense.isneginf())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_dropped_keys_never_leak(value):
    case = Case("gqa", heads=4, kv_heads=2, m=32, n=8, keys=200)
    q, k, v, mask, *rest = reference_result(case).arguments
    mask = mask & 0x0FFF00FF  # groups 8 to 15 and 28 onward are dropped by every slice
    before = reference.attention(q, k, v, mask, *rest)
    for x in (k, v):
        x[:, :, 64:128] = value
    after = reference.attention(q, k, v, mask, *rest)
    assert before[0].isfinite().all()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("tail", ["none", "pooled"])
def test_keys_masked_by_key_bias_never_leak(tail):
    case = Case("padding", batch=2, keys=300, bias="padding", tail=tail)
    q, k, v, mask, key_bias, *rest = reference_result(case).arguments
    dout = torch.randn_like(q)
    results = []
    for value in (1.0, math.nan):  # what a padded key holds must not matter, in the tail's means neither
        k, v = (torch.where(key_bias[:, None, :, None], x, value) for x in (k, v))
        gradients = reference.attention_backward(dout, q, k, v, mask, key_bias, *rest)
        scores = reference_select.pooled_scores(q, k, key_bias, *rest[:4], 16)
        results.append((*reference.attention(q, k, v, mask, key_bias, *rest), *gradients, *scores))
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


# attention_backward


@_dtypes("fp32", "bf16")
@_cases()
def test_backward(case, dtype):
    arguments = reference_result(case, dtype).arguments
    dout = torch.randn(arguments[0].shape).to(dtype)
    exact, plain = reference_gradients(arguments, dout)
    actual = reference.attention_backward(dout, *arguments)
    # In float32 an element's error is a sum of many roundings, and the largest of a few thousand is noise.
    check = assert_l2_as_accurate if dtype == torch.float32 else assert_as_accurate
    for name, *triple in zip(("dq", "dk", "dv"), actual, plain, exact, strict=True):
        check(*triple, name)


BACKWARD = (
    Case("gqa", heads=4, kv_heads=2, m=16, n=8, queries=40, keys=50),
    Case("ordered-bias", batch=2, m=16, n=1, queries=37, keys=150, ordered=True, bias="float", scale=-0.3),
    Case("tail-ordered", heads=4, kv_heads=2, m=32, n=16, queries=70, keys=150, ordered=True, tail="pooled"),
    Case("tail-padding", batch=2, m=16, n=8, queries=40, keys=270, bias="padding", keep="gaps", tail="pooled"),
)


@pytest.mark.parametrize("chunk_elements", [1 << 27, 20_000, 1], ids=["one-chunk", "ragged-chunks", "slice-by-slice"])
@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward_is_the_gradient_of_forward(case, chunk_elements):
    arguments = reference_result(case, torch.float64).arguments
    qkv = [x.detach().requires_grad_() for x in arguments[:3]]
    out, _ = reference.attention(*qkv, *arguments[3:])
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, qkv, dout)
    actual = reference.attention_backward(dout, *arguments, chunk_elements=chunk_elements)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tail", ["none", "pooled"])
def test_backward_against_finite_differences(tail):
    case = Case("tiny", m=16, n=8, heads=2, kv_heads=1, queries=20, keys=140, dim=4, ordered=True, tail=tail)
    arguments = reference_result(case, torch.float64).arguments
    dout = torch.randn(arguments[0].shape, dtype=torch.float64)
    actual = reference.attention_backward(dout, *arguments)
    step = 1e-5
    for i, x in enumerate(arguments[:3]):
        direction = torch.randn_like(x)
        ends = []
        for sign in (1, -1):
            moved = list(arguments)
            moved[i] = x + sign * step * direction
            ends.append((reference.attention(*moved)[0] * dout).sum().item())
        expected = (ends[0] - ends[1]) / (2 * step)
        assert (actual[i] * direction).sum().item() == pytest.approx(expected, rel=1e-6)


# kept_density


@pytest.mark.parametrize("bias", [None, "padding", "additive", "entry"])
@pytest.mark.parametrize("m, n", [(16, 1), (64, 8), (128, 128)])
def test_kept_density_counts_pairs(m, n, bias):
    q, k, _ = make_qkv(2, 3, queries=150, keys=300)
    mask = random_mask(q, k, m, n, 0.4)
    key_bias = make_key_bias(bias, 2, 300, torch.float32)
    visible = torch.ones(2, 300) if bias is None else reference.normalise_key_bias(key_bias, torch.float32).exp()
    kept = dense_mask(mask, None, 150, 300, m, n) * visible[:, None, None]
    expected = kept.double().sum() / (visible.double().sum() * 3 * 150)
    density = reference.kept_density(mask, key_bias, 150, 300, m, n)
    assert density.dtype == torch.float32 and density.shape == ()
    assert density.item() == pytest.approx(expected.item(), rel=1e-6)
