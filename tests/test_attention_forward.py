"""The portable attention kernel against float64; in Triton's interpreter where there is no GPU."""

import pytest
import torch

from fg_inductor.kernels import attention_forward, column_lists
from fg_inductor.kernels.mask import GROUPS, SLICES, group_count, pack, unpack, word_count
from fg_inductor.testing import CASES, Case, assert_as_accurate, make_groups, reference_result

CUDA = torch.cuda.is_available()
# The interpreter's dot does not know bfloat16.
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float32,)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    expected = reference_result(case, dtype, device)
    out, lse = attention_forward.launch(*expected.arguments)
    assert out.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    assert_as_accurate(out, expected.plain_out, expected.exact_out, "out")
    assert_as_accurate(lse, expected.plain_lse, expected.exact_lse, "lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, dtype, device, poison):
    check(case, dtype, device)


@pytest.mark.parametrize("case", [c for c in CASES if c.id in ("dim-128", "tail-n8", "ordered")], ids=str)
def test_half_precision(case, device, poison):
    check(case, torch.float16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("tail", ["none", "pooled"])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("n", GROUPS)
@pytest.mark.parametrize("m", SLICES)
def test_every_slice_shape(m, n, dim, tail, device, poison):
    case = Case(f"{m}x{n}", m=m, n=n, dim=dim, tail=tail, queries=1000, keys=1100, ordered=True)
    check(case, torch.bfloat16, device)


def test_heads_in_chunks(device, poison, monkeypatch):
    """A workspace for one head at a time must not change what a head reads or writes."""
    case = next(c for c in CASES if c.id == "ordered-batch-2")
    monkeypatch.setattr(attention_forward, "LIST_BYTES", 1)
    check(case, torch.float32, device)


def test_offsets_beyond_32_bits(device, monkeypatch):
    """The int64 path gives the same bits as the int32 path."""
    expected = reference_result(CASES[0], torch.float32, device)
    plain, _ = attention_forward.launch(*expected.arguments)
    wide, _ = attention_forward.launch(*expected.arguments, WIDE=True)
    assert torch.equal(plain, wide)


@pytest.mark.parametrize("token", [67, 69])  # 69: the key that lanes past the end of the list read again
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_not_finite(where, value, token, device, poison):
    """At density 1.0 NaN and Inf come out where dense attention has them, and nowhere hang or fault."""
    case = Case("full", m=32, n=8, keep="full", queries=70, keys=70, layout="contiguous")
    expected = reference_result(case, torch.float32, device)
    q, k, v, *rest = expected.arguments
    {"q": q, "k": k, "v": v}[where][0, 1, token, 3] = value
    out, _ = attention_forward.launch(q, k, v, *rest)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=expected.scale)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=expected.scale)
    assert_as_accurate(out, dense, exact)


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("case", [c for c in CASES if c.id in ("bias-padding", "bias-float", "tail-padding")], ids=str)
def test_masked_keys_have_no_say(case, where, device, poison):
    """Padding may hold anything, NaN too, also where it shares a kept group with keys that are visible."""
    expected = reference_result(case, torch.float32, device)
    q, k, v, mask, key_bias, *rest = expected.arguments
    k, v = k.clone(), v.clone()
    masked = ~key_bias if key_bias.dtype == torch.bool else key_bias == -torch.inf
    {"k": k, "v": v}[where].transpose(1, 2)[masked] = torch.nan
    out, lse = attention_forward.launch(q, k, v, mask, key_bias, *rest)
    assert_as_accurate(out, expected.plain_out, expected.exact_out, "out")
    assert_as_accurate(lse, expected.plain_lse, expected.exact_lse, "lse")


@pytest.mark.parametrize("tail", ["none", "pooled"])
def test_dropped_keys_are_not_read(tail, device, poison):
    """NaN in keys that no slice keeps cannot reach the result without a tail, and only through means with one."""
    case = Case("dropped", m=32, n=8, queries=70, keys=300, tail=tail, layout="contiguous")
    expected = reference_result(case, torch.float32, device)
    q, k, v, mask, *rest = expected.arguments
    keep = torch.ones(1, 2, 3, group_count(300, 8), dtype=torch.bool)
    keep[..., 4] = False
    mask = pack(keep, word_count(300, 8)).to(device)
    k[:, :, 32:40] = v[:, :, 32:40] = torch.nan
    out, _ = attention_forward.launch(q, k, v, mask, *rest)
    assert out.isnan().any().item() == (tail == "pooled")


@pytest.mark.parametrize("n", [1, 8, 128])
@pytest.mark.parametrize("keep", ["random", "full", "none", "single"])
def test_column_lists(keep, n, device, poison):
    case = Case(keep, m=16, n=n, queries=40, keys=2100, keep=keep)
    groups = make_groups(case)
    lists, counts, _ = column_lists.launch(pack(groups, word_count(2100, n)).to(device), groups.shape[-1], n)
    assert torch.equal(counts.cpu().long(), groups.sum(-1))
    for row, count, kept in zip(lists.flatten(0, 2), counts.flatten(), groups.flatten(0, 2), strict=True):
        assert row[:count].tolist() == kept.nonzero()[:, 0].tolist()


def test_mask_of_strided_heads(device):
    """A slice of the mask's heads is expanded without a copy."""
    groups = torch.rand(2, 3, 2, 300) < 0.4
    mask = pack(groups, word_count(300, 1)).to(device)
    lists, counts, _ = column_lists.launch(mask[:, 1:], 300, 1)
    rebuilt = torch.zeros(2, 2, 2, 300, dtype=torch.bool)
    for index in torch.cartesian_prod(*map(torch.arange, (2, 2, 2))).tolist():
        rebuilt[tuple(index)][lists[tuple(index)][: counts[tuple(index)]].long().cpu()] = True
    assert torch.equal(rebuilt, groups[:, 1:])
    assert torch.equal(unpack(mask, 300).cpu(), groups)
