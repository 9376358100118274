"""The portable selector against ``reference_select.select_pooled``; in Triton's interpreter where there is no GPU.

The kernel's products are in the dtype of q, so its mask may differ from the exact one in groups whose score lies at the
cut, closer to it than plain PyTorch errs in that dtype; nowhere else.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from fg_inductor.kernels import reference, reference_select, select_cut, select_pooled, select_scores
from fg_inductor.kernels.mask import GROUPS, SLICES, group_count, unpack
from fg_inductor.testing import make_qkv
from fg_inductor.testing_selection import SelectionCase, assert_differs_at_the_cut_only

CUDA = torch.cuda.is_available()
# Triton's interpreter has no bfloat16 products.
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float16, torch.float32)
# The interpreter is slow: without the mark ``full`` it sees 16-bit inputs only where their scores, which are float16
# then, take a path of their own or come near a limit.
HALF_ON_CPU = (
    "top-p", "density", "top-p-one", "peaked", "pool-8", "many-groups", "float-bias", "entry", "both-padding", "max",
    "alpha-bounded", "gamma", "gamma-pool-is-slice",
    "ranked", "ranked-keys", "ranked-peaked", "ranked-padding", "ranked-float-bias", "ranked-by-head", "ranked-gamma",
)  # fmt: skip


def of_dtypes(cases):
    """Every (case, dtype) of a run."""

    def marks(case, dtype):
        return () if CUDA or dtype == torch.float32 or case.id in HALF_ON_CPU else pytest.mark.full

    rows = [(case, dtype) for case in cases for dtype in DTYPES]
    return [pytest.param(*row, marks=marks(*row), id=f"{row[0]}-{row[1]}") for row in rows]


@dataclass(frozen=True)
class Case(SelectionCase):
    pool: int = 16
    gamma: float | None = None
    alpha: float | None = None

    __str__ = SelectionCase.__str__


CASES = (
    Case("top-p"),
    Case("density", density=0.3),
    Case("max-density", max_density=0.2),  # the bound cuts what top-p would keep
    Case("all", density=1.0),
    Case("one", density=1e-9),  # the best group is always kept
    Case("top-p-one", top_p=1.0),  # everything, also groups without mass
    Case("peaked", spread=30.0, n=1),  # few groups hold all the mass; most scores underflow
    Case("single-keys", m=128, n=1, density=0.25),
    Case("whole-blocks", m=128, n=128, keys=700, density=0.5),
    Case("pool-is-slice", m=32, pool=32),  # P = 1
    Case("pool-above-slice", m=16, pool=16, queries=100),
    Case("pool-8", m=128, pool=8, queries=200),  # a ragged last mean, and means without a query
    Case("many-groups", n=1, keys=4500, queries=20, heads=1, kv_heads=1, m=16),  # more than one block of the selection
    # One mean a slice, and groups by number: 16-bit inputs are ranked by logarithms of their scores.
    Case("ranked", m=32, pool=32, density=0.3, keys=1100),
    Case("ranked-keys", m=128, pool=128, n=1, density=0.25, queries=300, keys=200, heads=4, kv_heads=2, ordered=True),
    Case("ranked-peaked", m=64, pool=64, n=1, max_density=0.4, top_p=1.0, spread=30.0),
    Case("ranked-padding", m=64, pool=64, n=1, batch=2, keys=420, bias="padding", density=0.3),
    Case("ranked-float-bias", m=32, pool=32, bias="float", n=16, keys=2300, density=0.3),
    Case("ranked-by-head", m=32, pool=32, heads=4, kv_heads=2, density=(0.02, 0.5, 1.0, 0.3), dense_keys=(37, 60)),
    Case("ranked-gamma", m=32, pool=32, n=32, gamma=0.18, density=0.3),
    Case("gqa", heads=4, kv_heads=2),
    Case("batch-ordered", batch=2, ordered=True, dim=96),
    Case("padding", batch=2, keys=420, bias="padding"),  # masked groups, one straddled
    Case("padding-density", batch=2, keys=420, bias="padding", n=1, density=0.4),  # the share of what is not masked
    Case("float-bias", bias="float", n=16),
    Case("entry", batch=2, bias="entry"),  # nothing to select from
    Case("ranges", dense_keys=(0, 10, 290, 300), dense_queries=(140, 150), density=0.2, n=16),
    Case("ranges-ordered", dense_keys=(37, 38), dense_queries=(0, 1), ordered=True),
    Case("ranges-empty", dense_keys=(37, 37, 301, 310), n=16, density=0.2),  # one without a token, one behind the last
    Case("ranges-over-budget", dense_keys=(0, 200), density=0.1),  # forced groups are kept beyond the density
    Case("padding-rounds", batch=2, keys=420, bias="padding", density=0.3),  # 12.6 of 42 groups, and 7.8 of 26
    Case("half-rounds-up", batch=2, keys=280, bias="entry", density=0.7),  # 24.5 of 35, where float32 has less
    Case("both-mass", top_p=0.3, max_density=0.9),  # top-p and its bound: the mass binds
    Case("both-bound", top_p=0.95, max_density=0.3),
    Case("both-padding", batch=2, heads=1, kv_heads=1, keys=420, bias="padding", top_p=0.9, max_density=0.3),
    Case("by-head", batch=2, heads=4, kv_heads=2, density=(0.05, 0.9, 1.0, 0.3)),
    Case("by-head-padding", batch=2, keys=280, heads=3, kv_heads=1, bias="entry", density=(0.7, 0.1, 1e-9)),  # 24.5
    Case("by-head-ranges", dense_keys=(37, 60), dense_queries=(0, 1), density=(0.02, 0.5)),
    Case("max", reduce="max", spread=4.0),
    Case("max-pool-8", m=128, pool=8, queries=200, reduce="max", density=0.3),  # means without a query
    Case("max-padding", batch=2, heads=1, kv_heads=1, keys=420, bias="padding", reduce="max"),
    Case("alpha", alpha=1.0, queries=170),  # the last slice sums 3 means, not 4
    Case("alpha-single-keys", alpha=0.7, n=1, m=32, pool=32),
    Case("alpha-max", alpha=1.3, reduce="max", queries=170),
    Case("alpha-bounded", alpha=0.5, max_density=0.3),
    Case("alpha-loose-bound", alpha=1.2, max_density=0.9),
    Case("alpha-above-all", alpha=60.0),  # the best group is always kept
    Case("alpha-ranges", alpha=60.0, dense_keys=(37, 60)),  # and counts as kept where a range is
    Case("alpha-padding", alpha=1.0, batch=2, heads=1, kv_heads=1, keys=420, bias="padding"),
    Case("alpha-entry", alpha=1.0, batch=2, bias="entry"),
    Case("gamma", gamma=0.355, m=32, pool=8, top_p=0.5, heads=4),
    Case("gamma-ordered", gamma=0.255, n=16, density=0.3, ordered=True, queries=200),
    Case("gamma-single-keys", gamma=0.255, n=1, queries=200),
    Case("gamma-pool-is-slice", gamma=0.19, m=32, pool=32, queries=200, keys=420, n=32, alpha=1.0),
    Case("gamma-padding", gamma=0.355, batch=2, keys=420, bias="padding", m=16, pool=8),
)


def arguments(case: Case, dtype, device):
    q, k, bias, order = case.inputs(dtype, device)
    selection = (*case.selection, case.reduce, case.gamma, case.alpha)
    return (q, k, bias, order, case.dim**-0.5, case.m, case.n, case.pool), selection


def score_error(scoring, exact, ranked):
    """Largest error of the scores when means and products are rounded to the dtype of q, as plain PyTorch would."""
    q, k, *rest = scoring
    *head, m, n, pool = rest
    acc = torch.float32
    order, bias = head[1], reference.normalise_key_bias(head[0], acc)
    rows = q if order is None else q[:, :, order.long()]
    mean_q = reference_select.pool_queries(rows.float(), m, min(pool, m))[0].to(q.dtype).float()
    mean_k = reference.group_means(k.float(), bias, n).to(k.dtype).float()
    mean_k = mean_k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("bhtpd,bhgd->bhtpg", mean_q, mean_k) * head[2]
    exact_q = reference_select.pool_queries(rows.double(), m, min(pool, m))[0]
    exact_k = reference.group_means(k.double(), None if bias is None else bias.double(), n)
    exact_k = exact_k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    shift = (logits - torch.einsum("bhtpd,bhgd->bhtpg", exact_q, exact_k) * head[2]).abs().max().item()
    # A logit off by x moves a probability by at most the factor exp(2x): its own, and the normaliser's. The scores
    # of 16-bit inputs are float16, times 2048; or steps of 2^-8 octaves.
    rounding, smallest = (8 * torch.finfo(acc).eps, 0.0) if q.dtype == acc else (2.0**-11, 2.0**-36)
    if ranked and q.dtype != acc:
        rounding, smallest = 2 ** (2.0**-9) - 1, 0.0
    return exact * (torch.tensor(2 * shift).exp().item() - 1 + rounding) + smallest


def check(case: Case, dtype, device):
    scoring, selection = arguments(case, dtype, device)
    mask = select_pooled.launch(*scoring, *selection)
    q, k, *rest = scoring
    exact_mask = reference_select.select_pooled(q.double(), k.double(), *rest, *selection)
    groups = group_count(case.keys, case.n)
    assert mask.shape == exact_mask.shape and mask.dtype == torch.int32
    assert not unpack(mask, mask.shape[-1] * 32)[..., groups:].any(), "unused bits must be 0"
    keep, exact_keep = unpack(mask, groups), unpack(exact_mask, groups)
    score, valid = reference_select.pooled_scores(q.double(), k.double(), *rest, case.reduce, case.gamma)
    unknown = score.isnan()
    assert unknown.any() == (case.gamma is not None) and not unknown.all(), "the gate must hold back some, and not all"
    assert (keep | ~unknown).all(), "a group without a score was dropped"
    score = score.nan_to_num(torch.inf)
    ranked = case.pool >= case.m and case.alpha is None and (case.density is not None or case.top_p == 1)
    budget = 2 * score_error(scoring, score, ranked)
    differ = assert_differs_at_the_cut_only(keep, exact_keep, score, budget)
    if dtype == torch.float32:  # whose errors are far below the gaps between these scores
        assert not differ.any(), f"{differ.sum()} groups differ"
    assert not (keep & ~valid[:, None, None]).any(), "a masked group was kept"
    if case.density is not None and not case.dense_keys and case.gamma is None:
        assert torch.equal(keep.sum(-1), exact_keep.sum(-1))
    return differ.sum().item()


@pytest.mark.parametrize(("case", "dtype"), of_dtypes(CASES))
def test_cases(case, dtype, device, poison):
    check(case, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("n", GROUPS)
@pytest.mark.parametrize("m", SLICES)
def test_every_slice_shape(m, n, device, poison):
    check(Case(f"{m}x{n}", m=m, n=n, queries=1000, keys=1100, dim=128), torch.bfloat16, device)


def test_heads_in_chunks(device, poison, monkeypatch):
    monkeypatch.setattr(select_scores, "SCORE_BYTES", 1)
    check(replace(CASES[3], id="chunks", batch=2, heads=4), torch.float32, device)
    check(replace(CASES[1], id="by-head", heads=4, density=(0.1, 0.2, 0.9, 0.4)), torch.float32, device)


@pytest.mark.parametrize("case", [c for c in CASES if c.id in ("top-p", "density", "ranges", "padding")], ids=str)
@pytest.mark.parametrize("lean", [False, True], ids=["float32", "lean"])
def test_rows_that_fit_no_block(case, lean, device, poison, monkeypatch):
    """A row read block by block, or kept in pairs, is selected from like one that stays in registers."""
    rows = {"WORDS": 4, "REST": 2, "LOOP": True, "LEAN": lean, "num_warps": 4}
    monkeypatch.setattr(select_cut, "configuration", lambda words, wide: rows)
    case = replace(case, n=1, queries=70, heads=1, kv_heads=1)
    check(case, torch.float16 if lean else torch.float32, device)


@pytest.mark.parametrize("case", [c for c in CASES if c.id in ("top-p", "pool-8", "padding")], ids=str)
def test_rows_in_parts(case, device, poison, monkeypatch):
    """Programs that share the groups of a row: normalisers of parts are joined, and each part is scored."""
    small = {"BLOCK_R": 64, "BLOCK_G": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(select_scores, "row_lse_configuration", lambda dtype, d: small)
    monkeypatch.setattr(select_scores, "scores_configuration", lambda dtype, d, p: small)
    case = replace(case, n=1, queries=70, heads=1, kv_heads=1)
    check(case, torch.float32, device)
    blocks = select_scores._blocks(1, case.keys, 16, select_scores.MAX_SPLITS)
    assert blocks * 16 < case.keys, "one part: nothing is tested"


@pytest.mark.parametrize("rise", [1.0, -1.0], ids=["rising", "falling"])
def test_scores_far_from_the_first_block(rise, device, poison):
    """Scores hundreds above, or below, all of the block that gives the pivot: exp2 of the difference overflows."""
    q, k, _ = make_qkv(1, 1, 1, 64, 600, 64, device=device)
    q = q.abs()
    k = 0.3 * k + k.abs() * (torch.arange(600, device=device) // 150)[:, None] * rise * 20
    scoring, selection = (q, k, None, None, 0.125, 64, 1, 16), (0.9, None, 1.0, [], [])
    keep = unpack(select_pooled.launch(*scoring, *selection), 600)
    assert torch.equal(keep, unpack(reference_select.select_pooled(*scoring, *selection), 600))


@pytest.mark.parametrize(
    "rules, kept",
    [
        ((0.9, 0.35, 1.0, [], []), 70),
        ((0.3025, None, 1.0, [], []), 61),  # the 60 first hold 0.3
        ((0.9, None, 0.2, [], []), 40),
        ((0.9, None, 1.0, [], [], "max", None, 0.99), 200),
        ((0.9, None, 1.0, [], [], "max", None, 1.01), 1),
    ],
    ids=["density", "top-p", "max-density", "alpha below", "alpha above"],
)
def test_equal_scores_are_taken_by_index(rules, kept, device):
    """All keys the same: the kept groups are the first ones, whatever the order in which blocks are read."""
    q, k, _ = make_qkv(1, 1, 1, 64, 200, 64, device=device)
    k = k[:, :, :1].expand(-1, -1, 200, -1).contiguous()
    mask = select_pooled.launch(q, k, None, None, 0.125, 64, 1, 16, *rules)
    assert unpack(mask, 200)[0, 0, 0].nonzero()[:, 0].tolist() == list(range(kept))


def test_same_bits_every_time(device):
    scoring, selection = arguments(CASES[0], torch.float32, device)
    assert torch.equal(select_pooled.launch(*scoring, *selection), select_pooled.launch(*scoring, *selection))


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_not_finite_scores_are_kept(value, reduce, device, poison):
    """A key with a NaN is kept by every slice; a query with one makes its slice keep everything; the rest stays."""
    scoring, selection = arguments(replace(CASES[1], n=1, keys=150, reduce=reduce), torch.float32, device)
    q, k, *rest = scoring
    k[0, 0, 77, 3] = value
    keep = unpack(select_pooled.launch(q, k, *rest, *selection), 150)
    exact = unpack(reference_select.select_pooled(q, k, *rest, *selection), 150)
    assert torch.equal(keep, exact)
    assert value == torch.inf or keep[0, 0, :, 77].all()
    k[0, 0, 77, 3] = 0
    q[0, 1, 70, 3] = value
    keep = unpack(select_pooled.launch(q, k, *rest, *selection), 150)
    assert keep[0, 1, 1].sum() > 0 and not keep[0, 1, 0].all()
    assert value == torch.inf or keep[0, 1, 1].all()


# One mean a slice and groups by number: scores of 16-bit inputs are steps of their logarithms.


@pytest.mark.parametrize("rise", [1.0, -1.0], ids=["rising", "falling"])
def test_ranked_far_from_some_groups(rise, device, poison):
    """The pivot is of groups from all over the row: those at its beginning may lie hundreds of octaves away."""
    q, k, _ = make_qkv(1, 1, 1, 128, 600, 64, device=device)
    q = q.abs() + 0.5
    k = 0.3 * k + (torch.arange(600, device=device) // 150)[:, None] * rise * 12
    q, k = q.half(), k.half()
    scoring, selection = (q, k, None, None, 0.125, 64, 1, 64), (0.9, 0.2, 1.0, [], [])
    keep = unpack(select_pooled.launch(*scoring, *selection), 600)
    exact = (q.double(), k.double(), *scoring[2:])
    expected = unpack(reference_select.select_pooled(*exact, *selection), 600)
    score, _ = reference_select.pooled_scores(*exact)
    logits = torch.einsum("bhqd,bhkd->bhqk", reference_select.pool_queries(q.float(), 64, 64)[0][:, :, :, 0], k.float())
    assert logits.amax() - logits.amin() > 300 / 0.125
    assert_differs_at_the_cut_only(keep, expected, score, 2 * score_error(scoring, score, True))
    assert torch.equal(keep.sum(-1), expected.sum(-1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_ranked_and_not_finite(value, device, poison):
    """NaN is kept beyond the density, the score +inf before all others, -inf last; no other slice or head changes."""
    case = replace(CASES[1], m=64, pool=64, n=1, keys=150, density=0.1)
    (q, k, *rest), selection = arguments(case, torch.float16, device)
    q[..., 3] = torch.where(torch.arange(150, device=device) < 64, 0.5, -0.5)  # so that slices see both signs
    before = unpack(select_pooled.launch(q, k, *rest, *selection), 150)
    k[0, 0, 77, 3] = value
    keep = unpack(select_pooled.launch(q, k, *rest, *selection), 150)
    assert torch.equal(keep[0, 1], before[0, 1])
    kept = torch.tensor([value != -torch.inf, value != torch.inf, value != torch.inf], device=device)
    assert torch.equal(keep[0, 0, :, 77], kept)
    assert keep.sum(-1).eq(15).all()
    q[0, 1, 70, 5] = torch.nan
    keep = unpack(select_pooled.launch(q, k, *rest, *selection), 150)
    assert keep[0, 1, 1].all() and torch.equal(keep[0, 1, 0], before[0, 1, 0])


@pytest.mark.parametrize("p", [1, 8])
def test_options_of_other_cards(p, monkeypatch):
    """Triton refuses an option that the card's compiler doesn't know, and maxnreg is NVIDIA's."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for dtype in (torch.bfloat16, torch.float32):
        for config in (
            select_scores.scores_configuration(dtype, 128, p),
            select_scores.row_lse_configuration(dtype, 128),
        ):
            assert config.keys() == {"BLOCK_R", "BLOCK_G", "num_warps", "num_stages"}


def test_ranked_and_equal(device):
    q, k, _ = make_qkv(1, 1, 1, 64, 200, 64, device=device, dtype=torch.float16)
    k = k[:, :, :1].expand(-1, -1, 200, -1).contiguous()
    mask = select_pooled.launch(q, k, None, None, 0.125, 64, 1, 64, 0.9, 0.35, 1.0, [], [])
    assert unpack(mask, 200)[0, 0, 0].nonzero()[:, 0].tolist() == list(range(70))
