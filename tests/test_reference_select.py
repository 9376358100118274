"""The specification of the selection by pooled scores against loops over Python numbers, and its rules by hand."""

import math

import pytest
import torch

from fg_inductor.kernels import reference, reference_select
from fg_inductor.kernels.mask import group_count, slice_count, unpack
from fg_inductor.testing_cases import Case, reference_result

pytestmark = pytest.mark.usefixtures("poison", "one_thread")


def mean_cosine(rows):
    return torch.nn.functional.cosine_similarity(rows, rows.mean(0, keepdim=True), dim=1).mean().item()


def scores_by_loops(q, k, key_bias, order, scale, m, n, pool, reduce="sum", gamma=None):
    """{(b, h, t): {g: mass}} for the groups with a key that is not masked; NaN where self-similarity is below gamma."""
    batch, heads, queries, _ = q.shape
    keys, share, pool = k.shape[2], heads // k.shape[1], min(pool, m)
    order = list(range(queries)) if order is None else order.tolist()
    scores = {}
    for b in range(batch):
        bias = [0.0] * keys
        if key_bias is not None:
            bias = [(0.0 if x else -math.inf) if isinstance(x, bool) else x for x in key_bias[b].tolist()]
        groups = {}
        for g in range(math.ceil(keys / n)):
            members = [j for j in range(g * n, min(keys, (g + 1) * n)) if bias[j] >= -1000]
            if members:
                groups[g] = members, math.log(len(members)) + sum(bias[j] for j in members) / len(members)
        for h in range(heads):
            k_rows = {g: k[b, h // share, members] for g, (members, _) in groups.items()}
            blurred = {g for g, rows in k_rows.items() if gamma and n > 1 and mean_cosine(rows) < gamma}
            for t in range(math.ceil(queries / m)):
                masses, weights, cosines = [], [], []
                for start in range(t * m, min(queries, (t + 1) * m), pool):
                    rows = q[b, h, order[start : min(start + pool, queries, (t + 1) * m)]]
                    logit = {
                        g: scale * (rows.mean(0) @ k_rows[g].mean(0)).item() + shift
                        for g, (_, shift) in groups.items()
                        if g not in blurred
                    }
                    top = max(logit.values(), default=0.0)
                    total = sum(math.exp(x - top) for x in logit.values())
                    masses.append({g: math.exp(x - top) / total for g, x in logit.items()})
                    weights.append(len(rows))
                    cosines.append(mean_cosine(rows))
                similarity = sum(w * c for w, c in zip(weights, cosines, strict=True)) / sum(weights)
                join = sum if reduce == "sum" else max
                unknown = set(groups) if gamma and similarity < gamma else blurred
                scores[b, h, t] = {g: math.nan if g in unknown else join(x[g] for x in masses) for g in groups}
    return scores


def kept_by_loops(
    scores, queries, order, m, n, top_p, density, max_density, dense_keys, dense_queries, alpha=None, pool=None
):
    """{(b, h, t): set of kept groups}."""
    order = list(range(queries)) if order is None else order.tolist()

    def inside(token, ranges):
        return any(a <= token < b for a, b in zip(ranges[::2], ranges[1::2], strict=True))

    kept = {}
    for (b, h, t), mass in scores.items():
        forced = {g for g in mass if any(inside(j, dense_keys) for j in range(g * n, (g + 1) * n))}
        forced |= {g for g, x in mass.items() if math.isnan(x)}
        mass = {g: 0.0 if math.isnan(x) else x for g, x in mass.items()}
        summed = math.ceil((min(queries, (t + 1) * m) - t * m) / pool) if pool else 1
        limit = max(1, math.floor(len(mass) * (max_density if density is None else density) + 0.5))
        prefix, held = [], 0.0
        for g in sorted(mass, key=lambda g: (g not in forced, -mass[g], g)):
            crossed = density is None and alpha is None and top_p < 1 and held >= top_p * sum(mass.values())
            if alpha is not None:
                crossed = prefix and mass[g] / summed <= alpha / len(mass)
            if len(prefix) == limit or crossed:
                break
            prefix.append(g)
            held += mass[g]
        dense = any(inside(token, dense_queries) for token in order[t * m : (t + 1) * m])
        kept[b, h, t] = set(mass) if dense else forced | set(prefix)
    return kept


PARAMETERS = {"pool": 16, "top_p": 0.9, "density": None, "max_density": 1.0, "dense_keys": [], "dense_queries": []}
SELECT = (  # (case, what differs from PARAMETERS)
    (Case("top-p", m=64, n=8, heads=4, kv_heads=2, queries=150, keys=210, spread=4.0), {}),
    (Case("top-p-low", m=16, n=1, queries=50, keys=70, spread=4.0), {"top_p": 0.3}),
    (Case("top-p-bounded", m=128, n=16, queries=150, keys=210), {"max_density": 0.4}),
    (Case("top-p-all", m=32, n=8, keys=90), {"top_p": 1.0}),
    (Case("bound-only", m=32, n=8, keys=90), {"top_p": 1.0, "max_density": 0.5}),
    (Case("density", m=32, n=8, batch=2, heads=3, kv_heads=1, queries=70, keys=150), {"density": 0.3}),
    (Case("density-rounds-to-one", m=32, n=64, keys=300), {"density": 0.01}),
    (Case("density-half-rounds-up", m=32, n=8, keys=40), {"density": 0.5}),  # 2.5 of 5 groups
    (Case("density-full", m=32, n=8, keys=90), {"density": 1.0}),
    (Case("pool-8", m=64, n=8, queries=75, spread=4.0), {"pool": 8}),  # the last mean has 3 rows, others none
    (Case("pool-128-over-m", m=32, n=8, queries=75), {"pool": 128}),
    (Case("one-key", m=16, n=128, queries=3, keys=1), {"density": 0.2}),
    (Case("ordered", m=16, n=8, queries=50, ordered=True, spread=4.0), {"top_p": 0.5}),
    (Case("padding", m=32, n=8, batch=2, keys=300, bias="padding", queries=50), {"density": 0.4}),
    (Case("float", m=32, n=16, keys=200, bias="float", queries=50), {"top_p": 0.6}),
    (Case("additive", m=32, n=8, keys=200, bias="additive", queries=50), {"top_p": 0.7}),
    (Case("entry", m=32, n=32, batch=2, bias="entry", queries=50), {"density": 1.0}),  # nothing to keep: nothing kept
    (Case("dense-keys", m=32, n=16, keys=200, queries=50), {"density": 0.1, "dense_keys": [0, 1, 40, 70, 199, 200]}),
    (Case("dense-keys-top-p", m=32, n=8, keys=200, queries=50, spread=4.0), {"top_p": 0.5, "dense_keys": [17, 90]}),
    (Case("dense-keys-masked", m=32, n=8, keys=200, bias="padding"), {"density": 0.1, "dense_keys": [120, 200]}),
    (Case("dense-queries", m=32, n=8, queries=150), {"density": 0.2, "dense_queries": [0, 3, 149, 150]}),
    (Case("dense-queries-ordered", m=16, n=8, queries=150, ordered=True), {"density": 0.2, "dense_queries": [40, 43]}),
    (Case("dense-queries-masked", m=32, n=8, keys=200, bias="padding"), {"density": 0.2, "dense_queries": [0, 150]}),
    (Case("max", m=64, n=8, queries=150, keys=210, spread=4.0), {"reduce": "max", "top_p": 0.6}),
    (Case("max-gqa-ordered", m=128, n=1, heads=4, ordered=True, keys=70), {"reduce": "max", "density": 0.3, "pool": 8}),
    (Case("alpha", m=64, n=8, queries=170, keys=210), {"alpha": 1.0}),  # the last slice sums 3 means, not 4
    (Case("alpha-one-mean", m=32, n=1, queries=50, keys=70), {"alpha": 0.5, "pool": 32}),  # p > 0.5 / Sk
    (Case("alpha-max", m=64, n=8, queries=170, keys=210), {"alpha": 1.3, "reduce": "max"}),
    (Case("alpha-bounded", m=64, n=8, queries=150, keys=210), {"alpha": 0.5, "max_density": 0.4}),
    (Case("alpha-above-all", m=64, n=8, keys=210), {"alpha": 50.0}),  # the best is kept always
    (Case("alpha-padding", m=32, n=8, batch=2, keys=300, bias="padding", queries=50), {"alpha": 1.0}),
    (Case("alpha-dense-keys", m=32, n=8, keys=210), {"alpha": 3.0, "dense_keys": [17, 90]}),
    (Case("gamma", m=32, n=8, heads=4, kv_heads=2, queries=150, keys=210), {"gamma": 0.355, "top_p": 0.5, "pool": 8}),
    (Case("gamma-ordered", m=64, n=16, queries=150, keys=210, ordered=True), {"gamma": 0.25, "density": 0.3}),
    (Case("gamma-single-keys", m=64, n=1, queries=150, keys=70), {"gamma": 0.25, "density": 0.3}),
    (Case("gamma-padding", m=32, n=8, batch=2, keys=300, bias="padding"), {"gamma": 0.355, "top_p": 0.5, "pool": 8}),
    (Case("gamma-alpha-max", m=32, n=8, keys=210), {"gamma": 0.25, "alpha": 1.0, "reduce": "max"}),
)


def _select_arguments(case, dtype=torch.float64):
    q, k, _, _, key_bias, order, scale, m, n, _ = reference_result(case, dtype).arguments
    return q, k, key_bias, order, scale, m, n


@pytest.mark.parametrize("case, parameters", SELECT, ids=[case.id for case, _ in SELECT])
def test_select_against_loops(case, parameters):
    parameters = PARAMETERS | parameters
    q, k, key_bias, order, scale, m, n = _select_arguments(case)
    mask = reference_select.select_pooled(q, k, key_bias, order, scale, m, n, **parameters)
    pool, reduce, gamma = parameters.pop("pool"), parameters.pop("reduce", "sum"), parameters.pop("gamma", None)
    scores = scores_by_loops(q, k, key_bias, order, scale, m, n, pool, reduce, gamma)
    unknown = [math.isnan(x) for mass in scores.values() for x in mass.values()]
    assert any(unknown) == (gamma is not None) and not all(unknown), "the gate must hold back some, and not all"
    parameters["pool"] = min(pool, m) if reduce == "sum" else None
    expected = kept_by_loops(scores, case.queries, order, m, n, **parameters)
    kept = unpack(mask, group_count(case.keys, n))
    assert kept.shape[:3] == (case.batch, case.heads, slice_count(case.queries, m))
    for at, groups in expected.items():
        assert set(kept[at].nonzero()[:, 0].tolist()) == groups, f"slice {at}"


def test_scores_are_pooled_probabilities():
    case = Case("bias", m=64, n=8, heads=4, kv_heads=2, keys=200, bias="float", ordered=True)
    q, k, key_bias, order, scale, m, n = _select_arguments(case)
    score, valid = reference_select.pooled_scores(q, k, key_bias, order, scale, m, n, 16)
    for (b, h, t), mass in scores_by_loops(q, k, key_bias, order, scale, m, n, 16).items():
        assert set(valid[b].nonzero()[:, 0].tolist()) == set(mass)
        torch.testing.assert_close(score[b, h, t][valid[b]], torch.tensor(list(mass.values()), dtype=torch.float64))
        assert (score[b, h, t][~valid[b]] == 0).all()


def _select_with_masses(masses, **parameters):
    """Kept groups of one query whose keys have exactly the given probabilities."""
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, len(masses), 4)
    mask = reference_select.select_pooled(q, k, torch.tensor([masses]).log(), None, 0.5, 16, 1, **parameters)
    return unpack(mask, len(masses))[0, 0, 0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    "top_p, kept",
    [
        (0.4, [2]),
        (0.55, [0, 2]),
        (0.74, [0, 2]),
        (0.76, [0, 2, 3]),
        (0.91, [0, 1, 2, 3]),
        (0.001, [2]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_element_that_crosses(top_p, kept):
    assert _select_with_masses([0.25, 0.1, 0.5, 0.15], top_p=top_p) == kept


@pytest.mark.parametrize(
    "top_p, max_density, kept",
    [
        (0.2, 0.5, [2]),  # the mass binds: one group holds it
        (0.9, 0.5, [0, 2]),  # the bound binds
        (0.9, 0.25, [2]),
        (0.9, 0.0001, [2]),  # one group, however low the bound
        (0.0001, 1.0, [2]),
        (0.75, 0.5, [0, 2]),  # both at once
        (0.76, 0.75, [0, 2, 3]),
        (1.0, 0.75, [0, 2, 3]),
        (1.0, 1.0, [0, 1, 2, 3]),
    ],
)
def test_max_density_bounds_top_p(top_p, max_density, kept):
    assert _select_with_masses([0.25, 0.1, 0.5, 0.15], top_p=top_p, max_density=max_density) == kept


@pytest.mark.parametrize("alpha, kept", [(0.3, [0, 1, 2, 3]), (0.41, [0, 2, 3]), (0.61, [0, 2]), (1.01, [2]), (9, [2])])
def test_alpha_is_relative_to_uniform_probability(alpha, kept):
    assert _select_with_masses([0.25, 0.1, 0.5, 0.15], alpha=alpha) == kept


def test_ties_keep_the_lower_index():
    assert _select_with_masses([0.1] * 10, density=0.3) == [0, 1, 2]
    assert _select_with_masses([0.1, 0.2, 0.1, 0.2, 0.2, 0.1, 0.1], density=0.6) == [0, 1, 3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_score_is_kept(value):
    arguments = list(_select_arguments(Case("gqa", m=32, n=8, heads=4, kv_heads=2, queries=100, keys=100)))
    usual = unpack(reference_select.select_pooled(*arguments, density=0.2), 13)
    arguments[1] = arguments[1].clone()
    arguments[1][0, 1, 42] = value  # group 5 of KV head 1, which query heads 2 and 3 use; inf - inf is NaN as well
    kept = unpack(reference_select.select_pooled(*arguments, density=0.2), 13)
    assert kept[:, 2:, :, 5].all() and not usual[:, 2:, :, 5].all()
    assert torch.equal(kept[:, :2], usual[:, :2])
    assert (kept.sum(-1) == usual.sum(-1)).all()  # it takes one of the places
    arguments[1][0, 1, 42] = 0.0
    arguments[0][0, 3, 40] = value  # slice 1 of head 3: every score is NaN
    kept = unpack(reference_select.select_pooled(*arguments, density=0.2), 13)
    assert kept[0, 3, 1].all() and not kept[0, 3, 0].all() and not kept[0, 2, 1].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [{"density": 1.0}, {"top_p": 1.0}, {"dense_queries": [0, 999]}], ids=str)
def test_keep_everything(parameters, dtype):
    q, k, *rest = _select_arguments(Case("all", m=32, n=8, queries=70, keys=530, spread=20.0), dtype)
    assert torch.equal(reference_select.select_pooled(q, k, *rest, **parameters), reference.full_mask(q, k, 32, 8))


def test_select_is_deterministic():
    arguments = _select_arguments(Case("n1", m=64, n=1, heads=4, keys=500), torch.float32)
    masks = [reference_select.select_pooled(*arguments, top_p=0.7) for _ in range(3)]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
