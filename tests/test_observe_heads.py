"""One observed mask for heads that agree: which heads do, the masks of what they share, and the portable kernels.

Sums are rounded differently in kernels and reference, so which heads share is compared where it is clear: some heads
are near copies of each other. Given that, a mask may differ from the exact one as in ``test_observe``: at the cut.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch
from test_observe import DTYPES, arguments, dense_lse, dense_mass

from fg_inductor.kernels import ops, ops_observed, reference, reference_heads, reference_observed
from fg_inductor.kernels.mask import group_count, slice_count, unpack, word_count
from fg_inductor.testing_selection import SelectionCase as Case
from fg_inductor.testing_selection import assert_differs_at_the_cut_only

kernels = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

FOUR = {"heads": 4, "kv_heads": 4, "density": 0.25, "queries": 70}
CASES = (
    Case("density", **FOUR),
    Case("top-p", **FOUR | {"density": None}),
    Case("max", reduce="max", n=1, **FOUR | {"queries": 20}, keys=100),
    Case("m16-few-queries", m=16, **FOUR | {"queries": 20}),  # slices without a query in the sample
    Case("gqa", **FOUR | {"kv_heads": 2}),
    Case("batch-ordered", batch=2, ordered=True, **FOUR | {"queries": 150, "keys": 70}),
    Case("single-keys", n=1, keys=150, m=128, **FOUR),
    Case("whole-blocks", n=128, keys=400, m=128, **FOUR | {"density": 0.5, "queries": 20}),
    Case("padding", batch=2, keys=420, bias="padding", **FOUR),  # masked for all heads
    Case("entry", batch=2, bias="entry", **FOUR),  # one without mass
    Case(
        "ranges",
        bias="float",
        ordered=True,
        dense_keys=(0, 3, 97, 100),
        dense_queries=(140, 141),
        **FOUR | {"queries": 200, "density": 0.5, "keys": 100},
    ),
    Case("forty", n=1, **FOUR | {"heads": 40, "kv_heads": 40, "queries": 40}, keys=100),  # two tiles of heads
)
cases = pytest.mark.parametrize("case", CASES, ids=str)


def partners(case: Case) -> list[int]:
    """Of each head the lowest of those it nearly equals: 0 1 1 0, and neighbours where they share keys."""
    if case.kv_heads < case.heads:
        return [head // 2 * 2 for head in range(case.heads)]
    return [min(head, case.heads - 1 - head) for head in range(case.heads)]


def agreeing(case: Case, dtype=torch.float32, device="cpu"):
    """As ``arguments`` of the case, with pairs of heads that nearly equal each other."""
    q, k, rest = arguments(case, dtype, device)
    q = 3 * q[:, partners(case)] + 0.05 * q
    if case.kv_heads == case.heads:
        k = k[:, partners(case)].clone()
    for x in (q, k) if case.batch > 1 else ():  # other heads agree in the last entry
        x[-1] = x[-1].roll(1, 0)
    return q, k, rest


def expected_slots(case: Case, device="cpu"):
    """With a mask for each pair."""
    pairs = [partners(case)] * case.batch
    if case.batch > 1:
        pairs[-1] = pairs[-1][-1:] + pairs[-1][:-1]
    numbers = [{head: i for i, head in enumerate(dict.fromkeys(entry))} for entry in pairs]
    slots = [[number[head] for head in entry] for number, entry in zip(numbers, pairs, strict=True)]
    return torch.tensor(slots, dtype=torch.int32, device=device)


def state(case: Case, masks: int, device="cpu", value=0):
    """(mask, slots)."""
    shape = case.batch, masks, slice_count(case.queries, case.m), word_count(case.keys, case.n)
    options = {"dtype": torch.int32, "device": device}
    return torch.full(shape, value, **options), torch.full((case.batch, case.heads), value, **options)


# Which heads share

AGREEMENTS = {  # upper triangles by rows; how many masks; the slots
    "pairs": ([[1, 1, 9], [8, 1], [1]], 2, [0, 1, 1, 0]),
    "best-pair-first": ([[1, 1, 9], [8, 1], [1]], 3, [0, 1, 2, 0]),
    "all": ([[1, 1, 9], [8, 1], [1]], 1, [0, 0, 0, 0]),
    "none": ([[1, 1, 9], [8, 1], [1]], 4, [0, 1, 2, 3]),
    "mean-not-the-best": ([[10, 9, 0], [1, 0], [6]], 2, [0, 0, 1, 1]),
    "mean-not-the-worst": ([[10, 7, 0], [5.5, 0], [6]], 2, [0, 0, 0, 1]),
    "mean-over-heads": ([[10, 9, 2, 0], [9, 2, 0], [8, 0], [4.5]], 2, [0, 0, 0, 1, 1]),  # and not over clusters
    "into-a-lower-head": ([[0, 9, 4], [10, 0], [0]], 2, [0, 0, 0, 1]),
    "ties": ([[5, 5, 5], [5, 5], [5]], 2, [0, 0, 0, 1]),
    "nothing-in-common": ([[0, 0], [0]], 2, [0, 0, 1]),
    "numbered-by-the-lowest": ([[1, 1, 1, 1], [1, 1, 9], [8, 1], [1]], 3, [0, 1, 2, 2, 1]),
}
agreements = pytest.mark.parametrize(("rows", "masks", "slots"), AGREEMENTS.values(), ids=AGREEMENTS)


def upper(rows):
    """[H, H] from the rows of its upper triangle; below and on the diagonal NaN, which nothing may read."""
    result = torch.full((len(rows) + 1,) * 2, torch.nan)
    for i, row in enumerate(rows):
        result[i, i + 1 :] = torch.tensor(row)
    return result


def merged_by_kernels(agreement, masks, device):
    """The agreement [B, H, H] in two parts, in a side that fits more heads."""
    from fg_inductor.kernels import observe_heads

    heads = agreement.shape[1]
    side = max(16, 1 << (heads - 1).bit_length())
    parts = torch.full((len(agreement), 2, side, side), torch.nan, device=device)
    parts[:, :, :heads, :heads] = torch.stack([agreement / 4, agreement * 3 / 4], 1).to(device)
    slots = torch.full((len(agreement), heads), -1, dtype=torch.int32, device=device)
    observe_heads.launch_merge(parts, slots, masks, torch.tensor(True, device=device))
    return slots.cpu()


@agreements
def test_reference_merges(rows, masks, slots):
    assert reference_heads.shared_slots(upper(rows)[None].nan_to_num(0), masks).tolist() == [slots]


@kernels
@agreements
def test_kernels_merge(rows, masks, slots, device, poison):
    other = upper([[1.0] * len(row) for row in rows])  # each entry of a batch has slots of its own
    found = merged_by_kernels(torch.stack([upper(rows), other]), masks, device)
    ties = [0] * (len(slots) - masks + 1) + list(range(1, masks))
    assert found.tolist() == [slots, ties]


@kernels
@pytest.mark.parametrize(("heads", "masks"), [(2, 1), (12, 6), (40, 3), (128, 120)])
def test_kernels_merge_as_the_reference(heads, masks, device, poison):
    agreement = torch.rand(2, heads, heads, generator=torch.Generator().manual_seed(0))
    expected = reference_heads.shared_slots(agreement.double(), masks)
    assert torch.equal(merged_by_kernels(agreement, masks, device), expected)


def test_sampled_blocks():
    samples = {n: reference_heads.sampled_blocks(n) for n in (1, 128, 129, 2048, 32_760, 75_600)}
    assert [len(blocks) for blocks in samples.values()] == [1, 1, 2, 8, 16, 37]
    assert list(samples[2048]) == [1, 3, 5, 7, 9, 11, 13, 15] and samples[75_600][-1] == 584 < 590


# The masks


@cases
def test_reference_shares(case):
    """The heads that nearly equal each other share a mask, which is made from what they hold together."""
    q, k, rest = agreeing(case)
    lse = dense_lse(q, k, rest[0], rest[2]).float()
    mask, slots = state(case, case.heads // 2)
    reference_observed.update_observed(q, k, lse, mask, *rest, torch.tensor(True), None, slots)
    if case.id != "entry":  # whose first half has no mass, so that all agree as little
        assert torch.equal(slots, expected_slots(case))
    mass = dense_mass(q, k, *rest[:6])
    joined = torch.stack(
        [torch.stack([m[s == i].sum(0) for i in range(mask.shape[1])]) for m, s in zip(mass, slots, strict=True)]
    )
    keep = unpack(mask, group_count(case.keys, case.n))
    smallest, largest = (torch.where(x, joined, y) for x, y in ((keep, torch.inf), (~keep, -torch.inf)))
    if not (case.dense_keys or case.bias):
        assert (smallest.amin(-1) >= largest.amax(-1) - 1e-4).all()
    if case.density is not None and not case.bias and not case.dense_keys:
        assert (keep.sum(-1) == int(case.density * keep.shape[-1] + 0.5)).all()  # the density is that of each head
    if case.density is None:
        share = torch.where(keep, joined, 0).sum(-1) / joined.sum(-1)
        assert (share >= case.top_p - 1e-4).all() and not keep.all()


def test_one_head_a_mask_is_the_mask_of_each():
    case = CASES[0]
    q, k, rest = agreeing(case)
    lse = dense_lse(q, k, rest[0], rest[2]).float()
    mask, slots = state(case, case.heads)
    reference_observed.update_observed(q, k, lse, mask, *rest, torch.tensor(True), None, slots)
    assert slots.tolist() == [[0, 1, 2, 3]]
    assert torch.equal(mask, reference_observed.observed_mask(q, k, lse, *rest))


def launched(case, q, k, rest, masks, device, due=True):
    from fg_inductor.kernels import observe_heads

    lse = dense_lse(q, k, rest[0], rest[2]).float()
    mask, slots = state(case, masks, device, value=-1)
    observe_heads.launch(q, k, lse, mask, *rest, torch.tensor(due, device=device), slots)
    return mask, slots, lse


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_kernels(case, dtype, device, poison):
    q, k, rest = agreeing(case, dtype, device)
    bias, order, scale, m, n, reduce, *_ = rest
    masks = case.heads // 2
    mask, slots, lse = launched(case, q, k, rest, masks, device)
    if case.id != "entry":
        assert torch.equal(slots, expected_slots(case, device))
    groups = group_count(case.keys, n)
    assert not unpack(mask, mask.shape[-1] * 32)[..., groups:].any(), "unused bits must be 0"
    exact = q.double(), k.double()
    exact_mask = reference_observed.observed_mask(*exact, lse.double(), *rest, slots=slots, masks=masks)
    keep, exact_keep = unpack(mask, groups), unpack(exact_mask, groups)
    mass = reference_heads.joined_mass(dense_mass(*exact, bias, order, scale, m, n, reduce), slots, masks)
    shift = (q.float() @ k.float().repeat_interleave(case.heads // case.kv_heads, 1).mT * scale).double()
    shift -= exact[0] @ exact[1].repeat_interleave(case.heads // case.kv_heads, 1).mT * scale
    # As in test_observe, and a rounding for each head.
    eps = torch.finfo(torch.float32).eps
    rounding = (8 + (m * n).bit_length() + case.heads) * eps
    off = shift.abs().max() + 4 * eps * lse[lse.isfinite()].abs().max()
    assert_differs_at_the_cut_only(keep, exact_keep, mass, 2 * mass * (off.exp().item() - 1 + rounding))
    if case.density is not None and not case.dense_keys:
        assert torch.equal(keep.sum(-1), exact_keep.sum(-1))


@kernels
@pytest.mark.parametrize("case", [*(CASES[i] for i in (0, 3, 4, 8, 11)), replace(CASES[5], queries=300)], ids=str)
def test_kernels_find_the_agreement(case, device, poison, monkeypatch):
    """Above the diagonal, and nothing else is read; of blocks 0 and 2 where there are three."""
    from fg_inductor.kernels import observe, observe_heads

    blocks = range(0, (case.queries + 127) // 128, 2)
    monkeypatch.setattr(reference_observed, "sampled_blocks", lambda queries: blocks)
    q, k, rest = agreeing(case, torch.float32, device)
    lse, due = dense_lse(q, k, rest[0], rest[2]).float(), torch.tensor(True, device=device)
    in_block = 128 // case.m
    mass = torch.empty(
        case.batch * case.heads, in_block * len(blocks), word_count(case.keys, case.n) * 32, device=device
    )
    column_mass = observe.prepare(q, k, lse, *rest[:6], due)
    parts = observe_heads.agreement_of(column_mass, mass, [blocks], case.batch, case.heads, in_block, due)
    exact = reference_observed.heads_agreement(q.double(), k.double(), lse.double(), *rest[:6])
    side = torch.arange(case.heads)
    pairs = side[:, None] < side
    found = parts.sum(1)[:, : case.heads, : case.heads]
    torch.testing.assert_close(found[:, pairs].double(), exact[:, pairs], rtol=1e-4, atol=1e-4)


@kernels
def test_what_is_not_finite_agrees_with_nothing(device, poison):
    from fg_inductor.kernels import observe_heads

    given = torch.rand(2 * 3, 2, 128, generator=torch.Generator().manual_seed(0))
    given[:, 0, 3] = torch.tensor([torch.nan, 1, torch.inf, 1, 1, torch.inf])
    given[:, :, 70:] = -1  # masked
    mass = torch.empty(6, 2, 128, device=device)

    def column_mass(mass, blocks, first, heads, slices):
        mass.copy_(given)

    due = torch.tensor(True, device=device)
    parts = observe_heads.agreement_of(column_mass, mass, [range(2)], 2, 3, 1, due)
    valid = torch.where(given == -1, 0, given).unflatten(0, (2, 3))
    pairs = torch.ones(3, 3, dtype=torch.bool).triu(1)
    exact = reference_heads.agreement(valid)
    assert exact.isfinite().all()
    torch.testing.assert_close(parts.sum(1)[:, :3, :3].cpu()[:, pairs], exact[:, pairs])


@kernels
def test_kernels_in_parts_of_the_slices(device, poison, monkeypatch):
    """However few fit the workspace."""
    from fg_inductor.kernels import observe

    case = CASES[10]
    q, k, rest = agreeing(case, torch.float32, device)
    whole = launched(case, q, k, rest, 2, device)
    monkeypatch.setattr(observe, "MASS_BYTES", 1)
    for a, b in zip(whole, launched(case, q, k, rest, 2, device), strict=True):
        assert torch.equal(a, b)


@kernels
def test_kernels_do_the_same_again(device, poison):
    case = replace(CASES[3], heads=12, kv_heads=12)
    q, k, rest = arguments(case, torch.float32, device)  # heads that agree about as little
    first = launched(case, q, k, rest, 7, device)
    for a, b in zip(first, launched(case, q, k, rest, 7, device), strict=True):
        assert torch.equal(a, b)
    assert first[1].unique().tolist() == list(range(7))


@kernels
def test_kernels_end_at_once_without_a_refresh(device):
    """Whatever the inputs, mask and slots stay."""
    case = CASES[0]
    q, k, rest = agreeing(case, torch.float32, device)
    mask, slots, _ = launched(case, q.fill_(torch.nan), k, rest, 2, device, due=False)
    assert (mask == -1).all() and (slots == -1).all()


@kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_has_no_say_in_who_shares(value, device, poison):
    """Its slice keeps every group, for all heads of its slot; the other slices and slots choose."""
    case = replace(CASES[0], n=1, keys=150, m=16)
    q, k, rest = agreeing(case, torch.float32, device)
    q[0, 3, 35, 3] = value  # slice 2
    _, lse = reference.attention(q, k, k, reference.full_mask(q, k, case.m, 1), *rest[:5])
    mask, slots = state(case, 2, device)
    expected = state(case, 2, device)
    from fg_inductor.kernels import observe_heads

    observe_heads.launch(q, k, lse, mask, *rest, torch.tensor(True, device=device), slots)
    reference_observed.update_observed(
        q, k, lse, expected[0], *rest, torch.tensor(True, device=device), None, expected[1]
    )
    assert torch.equal(slots, expected[1]) and torch.equal(slots, expected_slots(case, device))
    keep = unpack(mask, 150)
    assert torch.equal(mask, expected[0]) and not keep[0, 1].all(-1).any() and not keep[0, 0, 1].all()
    assert value == torch.inf or keep[0, 0, 2].all()


# The operators


def test_expand_heads():
    mask = torch.arange(2 * 3 * 2 * 4, dtype=torch.int32).view(2, 3, 2, 4)
    slots = torch.tensor([[0, 1, 2, 1], [0, 0, 1, 2]], dtype=torch.int32)
    expected = torch.stack([torch.stack([m[i] for i in s]) for m, s in zip(mask, slots, strict=True)])
    for given in (mask, mask.transpose(2, 3).contiguous().transpose(2, 3)):
        out = ops.expand_heads(given, slots)
        assert torch.equal(out, expected) and out.is_contiguous()
    assert torch.equal(reference_heads.expand_heads(mask, slots), expected)


@pytest.mark.parametrize(
    ("mask", "slots", "message"),
    [
        (torch.zeros(2, 1, 3, 4), torch.zeros(2, 4).int(), r"mask must be int32 \[B, K, T, W\], got torch.float32"),
        (torch.zeros(2, 3, 4).int(), torch.zeros(2, 4).int(), r"mask must be int32 .* \(2, 3, 4\)"),
        (torch.zeros(2, 1, 3, 4).int(), torch.zeros(1, 4).int(), r"\[B, Hq\] = \[2, 4\], but it is \(1, 4\)"),
        (torch.zeros(1, 9, 1, 4).int(), torch.zeros(1, 8).int(), "9 masks for 8 heads"),
        (torch.zeros(1, 9, 1, 4).int(), torch.zeros(1, 129).int(), "129 heads; at most 128 may share masks"),
    ],
)
def test_expand_heads_refuses(mask, slots, message):
    with pytest.raises(ValueError, match=f"fgattn::expand_heads: .*{message}"):
        ops.expand_heads(mask, slots)


def step(q, k, mask, slots, rest, refresh, drift=None, bound=None):
    """Begin, attend, update."""
    due = ops.begin_observed_(q, k, mask, *rest[:5], 0, refresh, drift, bound, slots)
    out, lse = ops.attention(q, k, k, ops.expand_heads(mask, slots), *rest[:5], "none", 0)
    ops.update_observed_(q, k, lse, mask, *rest, 0, due, drift, None, slots)
    return out


@pytest.mark.parametrize("inner", [None, "aot_eager", "inductor"])
def test_steps(inner):
    """A refresh attends densely and tells who shares; the next steps attend by the masks; both are updated in place."""
    case = CASES[5]
    q, k, rest = agreeing(case)

    def run(q, mask, slots, refresh):
        return step(q, k, mask, slots, rest, refresh)

    if inner is not None:
        from torch._inductor.decomposition import select_decomp_table

        select_decomp_table().setdefault(ops.expand_heads, ops_observed.expand_heads_decomposition)
        run = torch.compile(run, backend=inner, fullgraph=True)
    mask, slots = state(case, 2)
    addresses = mask.data_ptr(), slots.data_ptr()
    dense = reference.attention(q, k, k, reference.full_mask(q, k, case.m, case.n), *rest[:5])
    torch.testing.assert_close(run(q, mask, slots, torch.tensor(True)), dense[0])
    assert torch.equal(slots, expected_slots(case))
    expected = reference_observed.observed_mask(q, k, dense[1], *rest, slots=slots, masks=2)
    assert torch.equal(mask, expected)
    each = torch.stack([m[s.long()] for m, s in zip(mask, slots, strict=True)])
    out = run(q.flip(1), mask, slots, torch.tensor(False))
    torch.testing.assert_close(out, reference.attention(q.flip(1), k, k, each, *rest[:5])[0])
    assert torch.equal(mask, expected) and (mask.data_ptr(), slots.data_ptr()) == addresses
    k.copy_(k.roll(1, 1))  # now others agree
    q = q.roll(1, 1)
    run(q, mask, slots, torch.tensor(True))
    assert slots.tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]


# Drift


def drift_by_kernels(q, k, mask, slots, rest, refresh, drift, bound):
    from fg_inductor.kernels import drift as schedule
    from fg_inductor.kernels import observe, observe_heads

    due = schedule.decide(q, k, mask, *rest[:5], refresh, drift, bound, slots)
    due = observe.launch_begin(mask, k.shape[2], rest[4], due)
    _, lse = reference.attention(q, k, k, ops.expand_heads(mask, slots), *rest[:5])
    observe_heads.launch(q, k, lse, mask, *rest, due, slots)
    schedule.note(q, k, mask, *rest[:5], due, drift, slots)


@pytest.mark.parametrize("run", [step, pytest.param(drift_by_kernels, marks=kernels)])
def test_drift(run, device, poison):
    """What is sampled of a head is what the mask of its slot keeps."""
    case = replace(CASES[5], batch=1, m=16, spread=4.0)
    q, k, rest = agreeing(case, device=device)
    (mask, slots), drift = state(case, 2, device), torch.zeros(3, device=device)
    yes, no = (torch.tensor(x, device=device) for x in (True, False))
    run(q, k, mask, slots, rest, yes, drift, 0.1)
    each = reference_heads.expand_heads(mask, slots)
    kept = reference_observed.kept_mass(q.double(), k.double(), each, *rest[:5])
    torch.testing.assert_close(drift.cpu(), torch.tensor([kept, kept, 1.0]))
    copy = mask.clone(), slots.clone()
    run(q, k, mask, slots, rest, no, drift, 0.1)
    assert drift[2] == 1 and torch.equal(mask, copy[0]) and torch.equal(slots, copy[1])
    q = q.flip(2)
    kept = reference_observed.kept_mass(q.double(), k.double(), each, *rest[:5])
    run(q, k, mask, slots, rest, no, drift, 0.99)
    torch.testing.assert_close(drift[1].cpu(), kept.cpu())
    assert drift[2] == 1
    run(q, k, mask, slots, rest, no, drift, 0.1)
    assert drift[2] == 2 and drift[0] > kept + 0.1 and not torch.equal(mask, copy[0])


@pytest.mark.gpu
def test_captured_by_a_cuda_graph(device):
    """Which heads share is decided anew at each replay."""
    case = replace(CASES[0], queries=300)
    q, k, rest = agreeing(case, torch.bfloat16, device)
    (mask, slots), refresh = state(case, 2, device), torch.tensor(True, device=device)
    step(q, k, mask, slots, rest, refresh)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(q, k, mask, slots, rest, refresh)
    for told in (True, False, True):
        before = mask.clone(), slots.clone()
        refresh.fill_(told)
        q.copy_(q.roll(1, 1))
        k.copy_(k.roll(1, 1))
        graph.replay()
        expected = before
        step(q, k, *expected, rest, refresh)
        assert torch.equal(mask, expected[0]) and torch.equal(slots, expected[1])
