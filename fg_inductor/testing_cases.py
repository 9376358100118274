"""The table of cases that every attention kernel must pass, with their inputs and exact results.

Nothing here calls ``kernels.reference``: ``reference_result`` computes attention in an independent, dense way, so that
the reference is tested against it like any kernel.

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_kernel(case):
        expected = reference_result(case, torch.bfloat16, "cuda")
        out, lse = launch(*expected.arguments)
        assert_as_accurate(out, expected.plain_out, expected.exact_out)
        assert_as_accurate(lse, expected.plain_lse, expected.exact_lse)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fg_inductor.kernels.mask import group_count, pack, slice_count, word_count
from fg_inductor.testing import SUMMARY, Problem, dense_mask, make_key_bias, make_qkv, random_groups


@dataclass(frozen=True)
class Case(Problem):
    """One attention problem."""

    keep: str = "random"  # or "full", "none", "single" (one group a slice), "gaps" (every other slice keeps nothing)
    density: float = 0.3
    tail: str = "none"
    scale: float | None = None
    layout: str = "mixed"


CASES = (
    # Every M and N, with a ragged last slice and a ragged last group.
    Case("m128-n1-words", m=128, n=1, keys=300),  # mask rows of 12 words (a third full): the word stride
    Case("m16-n128", m=16, n=128, keys=300),  # more slices than groups; one 44-key group left over
    Case("m32-n8", m=32, n=8),
    Case("m64-n16", m=64, n=16),
    Case("m128-n32", m=128, n=32, keys=270),
    Case("m64-n64", m=64, n=64, keys=330, density=0.5),
    Case("m64-n8", m=64, n=8, queries=210, keys=530),  # bit 31 set and more than one word
    Case("m16-n1", m=16, n=1, queries=50, keys=90),
    Case("divides", m=64, n=16, queries=128, keys=256, layout="contiguous"),  # nothing ragged: the unmasked path
    # Lengths.
    Case("fewer-keys-than-group", m=64, n=64, keys=5, keep="full"),  # the only group is ragged
    Case("fewer-queries-than-slice", m=128, n=8, queries=7, keys=200),
    Case("one-query-one-key", m=16, n=1, queries=1, keys=1, keep="full"),  # lse is the score itself
    Case("one-row-slice", m=32, n=8, queries=65, keys=129),  # last slice of one row, last group of one key
    Case("few-keys-many-queries", m=32, n=1, queries=300, keys=33),
    # Heads, batch, head dims, layouts.
    Case("gqa-4-2", heads=4, kv_heads=2),  # h // 2, not h % 2
    Case("mqa-3-1-batch-2", batch=2, heads=3, kv_heads=1, n=1),
    Case("batch-2-bshd", batch=2, m=32, queries=97, layout="bshd"),  # batch and head strides differ from contiguous
    Case("fused-qkv", layout="fused", queries=140, keys=140, n=16),
    Case("dim-96", dim=96, n=1),  # not a power of two
    Case("dim-128", dim=128, m=128, n=1),
    Case("dim-256", dim=256, m=32, n=16, queries=70, keys=100),
    # What a slice keeps.
    Case("full", m=128, n=8, keep="full"),  # equals dense SDPA
    Case("empty-slices", m=16, n=8, keep="gaps"),  # zeros and lse = -inf beside ordinary slices
    Case("nothing-kept", m=64, n=1, keep="none"),  # no slice has work
    Case("single-group", m=32, n=1, queries=200, keys=290, keep="single"),  # a lone key: out = v[key], lse = its score
    # Scores.
    Case("scale", scale=0.31, n=1),  # not 1 / sqrt(D)
    Case("scale-negative", scale=-0.2),  # the largest score is not the largest q . k
    Case("peaked", spread=40.0, n=1),  # scores of +-100: exp overflows unless the running maximum is subtracted
    # Key bias.
    Case("bias-padding", batch=2, n=8, keys=300, bias="padding"),  # masked groups, a straddled one, a masked block
    Case("bias-padding-n128", m=32, n=128, keys=420, bias="padding", keep="full"),  # kept groups that are all masked
    Case("bias-float", n=16, keys=200, bias="float", heads=4),
    Case(
        "bias-additive", n=1, keys=200, bias="additive", dim=96
    ),  # -10000 masks, also a slice that keeps only such keys
    Case("bias-entry", batch=2, n=32, bias="entry"),  # one batch entry has no key at all
    # Query order.
    Case("ordered", m=32, n=8, queries=147, ordered=True),  # gather and scatter; mask rows are in query order
    Case("ordered-batch-2", m=128, n=1, batch=2, heads=4, kv_heads=2, queries=141, ordered=True, layout="bshd"),
    # The pooled tail.
    Case("tail", m=64, n=1, keys=300, density=0.1, tail="pooled"),  # the last block has 44 keys
    Case("tail-n8", m=128, n=8, keys=256, tail="pooled"),
    Case("tail-blocks", m=32, n=128, keys=500, density=0.4, tail="pooled"),  # blocks kept whole have no summary
    Case("tail-only", m=16, n=8, keys=200, keep="gaps", tail="pooled"),  # slices with nothing but summaries
    Case("tail-full", m=64, n=16, keep="full", tail="pooled"),  # nothing dropped: as without a tail
    Case(
        "tail-padding", n=8, batch=2, queries=70, keys=420, bias="padding", tail="pooled"
    ),  # masked keys are not dropped keys
    Case(
        "tail-float-gqa", n=1, queries=70, keys=270, heads=4, kv_heads=2, bias="float", tail="pooled"
    ),  # mean bias of a block
    Case("tail-ordered", m=32, n=16, keys=290, dim=96, ordered=True, tail="pooled", scale=0.2),
    Case(
        "tail-entry", m=32, n=64, batch=2, queries=70, bias="entry", tail="pooled"
    ),  # no key and no summary: zeros, not NaN
)


def make_groups(case: Case, seed: int = 0) -> Tensor:
    """bool [B, Hq, T, G]: what each slice of a ``Case`` keeps."""
    shape = (case.batch, case.heads, slice_count(case.queries, case.m), group_count(case.keys, case.n))
    if case.keep in ("full", "none"):
        return torch.full(shape, case.keep == "full")
    if case.keep == "single":
        only = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(seed))
        only[..., 0], only[..., -1] = shape[-1] - 1, 0  # the very last and the very first group among them
        return F.one_hot(only, shape[-1]).bool()
    groups = random_groups(shape, case.density, seed)
    if case.keep == "gaps":
        groups[:, :, ::2] = False
    return groups


class Expected(NamedTuple):
    """Inputs of one case and what attention of them is. ``arguments`` are those of ``reference.attention``."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    key_bias: Tensor | None
    order: Tensor | None
    scale: float
    m: int
    n: int
    tail: str
    exact_out: Tensor  # float64 [B, Hq, Sq, D]
    exact_lse: Tensor  # float64 [B, Hq, Sq]
    plain_out: Tensor  # from SDPA, in q's dtype
    plain_lse: Tensor  # float32, from scores in q's dtype

    @property
    def arguments(self) -> tuple:
        """(q, k, v, mask, key_bias, order, scale, m, n, tail); the operator takes ``min_seq`` in addition."""
        return self[:10]


def dense_problem(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, key_bias: Tensor | None, order: Tensor | None,
    m: int, n: int, tail: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same attention as an ordinary dense one: q, k, v in ``dtype``, k and v with Hq heads and with the summary
    keys of the tail appended, and a float64 bias [B, Hq, Sq, Sk + blocks]. Differentiable in q, k and v."""
    queries, keys, share = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    shift = torch.zeros(q.shape[0], keys, dtype=torch.float64, device=q.device)
    if key_bias is not None:
        shift = torch.where(key_bias, 0.0, -math.inf) if key_bias.dtype == torch.bool else key_bias
        shift = shift.double().masked_fill(shift < -1000, -math.inf)
    visible = shift > -math.inf  # [B, Sk]
    keep = dense_mask(mask, order, queries, keys, m, n) & visible[:, None, None]
    bias = shift[:, None, None].masked_fill(~keep, -math.inf)
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    if tail == "none":
        return q.to(dtype), k.to(dtype), v.to(dtype), bias

    def blocks(x, dim):
        width = x.shape[dim]
        starts = range(0, width, SUMMARY)
        return torch.stack([x.narrow(dim, s, min(SUMMARY, width - s)).sum(dim) for s in starts], dim)

    count = blocks(visible.double(), 1)  # [B, J]
    weight = visible.double()[:, None, :, None]
    divisor = count.clamp_min(1)
    summary_k, summary_v = (blocks(x.double() * weight, 2) / divisor[:, None, :, None] for x in (k, v))
    mean_bias = blocks(shift.masked_fill(~visible, 0), 1) / divisor
    dropped = count[:, None, None] - blocks(keep.double(), 3)
    summary_bias = dropped.log() + mean_bias[:, None, None]  # log(0) = -inf: no summary
    k, v = (torch.cat([x.to(dtype), y.to(dtype)], 2) for x, y in ((k, summary_k), (v, summary_v)))
    return q.to(dtype), k, v, torch.cat([bias, summary_bias], 3)


def exact_attention(arguments: tuple) -> tuple[Tensor, Tensor]:
    """``arguments`` of ``reference.attention`` -> out, lse in float64, by a dense softmax. Differentiable."""
    *tensors, scale, m, n, tail = arguments
    q, k, v, bias = dense_problem(*tensors, m, n, tail, torch.float64)
    scores = (q @ k.mT * scale).masked_fill(bias == -math.inf, 0) + bias
    lse = scores.detach().logsumexp(-1)
    rowless = (bias == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(rowless, 0).softmax(-1).masked_fill(rowless, 0) @ v, lse


def plain_attention(arguments: tuple) -> tuple[Tensor, Tensor]:
    """``arguments`` of ``reference.attention`` -> out of SDPA in q's dtype, and lse of scores in q's dtype."""
    *tensors, scale, m, n, tail = arguments
    q, k, v, bias = dense_problem(*tensors, m, n, tail, tensors[0].dtype)
    rowless = (bias == -math.inf).all(-1)
    attn_mask = bias.to(q.dtype).masked_fill(rowless[..., None], 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
    lse = ((q @ k.mT * scale).detach() + bias.to(q.dtype)).float().logsumexp(-1)
    return out.masked_fill(rowless[..., None], 0), lse


def reference_result(
    case: Case, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> Expected:
    """Inputs of ``case``, the exact result, and that of plain PyTorch, to be given to ``assert_as_accurate``."""
    q, k, v = make_qkv(
        case.batch, case.heads, case.kv_heads, case.queries, case.keys, case.dim,
        dtype=dtype, device=device, layout=case.layout, spread=case.spread, seed=seed,
    )  # fmt: skip
    mask = pack(make_groups(case, seed), word_count(case.keys, case.n)).to(device)
    key_bias = make_key_bias(case.bias, case.batch, case.keys, dtype, seed)
    key_bias = key_bias if key_bias is None else key_bias.to(device)
    order = None
    if case.ordered:
        order = torch.randperm(case.queries, generator=torch.Generator().manual_seed(seed)).to(device, torch.int32)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    arguments = (q, k, v, mask, key_bias, order, scale, case.m, case.n, case.tail)
    return Expected(*arguments, *exact_attention(arguments), *plain_attention(arguments))


def reference_gradients(arguments: tuple, dout: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(dq, dk, dv) in float64 and from SDPA in q's dtype, for ``arguments`` of ``reference.attention``."""
    results = []
    for attend in (exact_attention, plain_attention):
        with torch.enable_grad():
            qkv = [x.detach().requires_grad_() for x in arguments[:3]]
            if attend is exact_attention:
                qkv = [x.detach().double().requires_grad_() for x in qkv]
            out = attend((*qkv, *arguments[3:]))[0]
            results.append(torch.autograd.grad(out, qkv, dout.to(out.dtype)))
    return tuple(results)
