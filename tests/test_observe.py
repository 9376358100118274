"""Observed masks: the exact mass against dense softmax, the operators, and the portable kernels against the reference.

The kernels' products are in the dtype of q, accumulated in float32, so a mask may differ from the exact one in groups
whose mass lies at the cut, closer to it than plain PyTorch errs in float32; nowhere else.
"""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch

from fg_inductor.kernels import ops, reference, reference_observed
from fg_inductor.kernels.mask import GROUPS, SLICES, group_count, slice_count, unpack, word_count
from fg_inductor.testing_selection import SelectionCase as Case
from fg_inductor.testing_selection import assert_differs_at_the_cut_only

CUDA = torch.cuda.is_available()
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float32,)


CASES = (
    Case("top-p"),
    Case("density", density=0.3),
    Case("max", reduce="max", density=0.3),
    Case("max-peaked", reduce="max", spread=30.0, m=32),  # the mass of one query decides
    Case("max-density", max_density=0.2),
    Case("by-head", heads=3, kv_heads=3, density=(0.6, 0.05, 0.3)),
    Case("peaked", spread=30.0, n=1),  # few groups hold all the mass; exp overflows unless the maximum is subtracted
    Case("single-keys", m=128, n=1, density=0.25),
    Case("whole-blocks", m=128, n=128, keys=700, density=0.5),
    Case("m16", m=16, queries=100),  # eight slices a program, the last ones without a query
    Case("m32-one-query", m=32, queries=1, keys=129),
    Case("gqa", heads=4, kv_heads=2),
    Case("batch-ordered", batch=2, ordered=True, dim=96),
    Case("dim-256", dim=256, queries=70, keys=100),
    Case("padding", batch=2, keys=420, bias="padding"),  # masked groups, one straddled
    Case("padding-density", batch=2, keys=420, bias="padding", n=1, density=0.4),  # the share of what is not masked
    Case("float-bias", bias="float", n=16),
    Case("entry", batch=2, bias="entry"),  # nothing to select from
    Case("ranges", dense_keys=(0, 10, 290, 300), dense_queries=(140, 150), density=0.2, n=16),
    Case("ranges-ordered", dense_keys=(37, 38), dense_queries=(0, 1), ordered=True),
)
cases = pytest.mark.parametrize("case", CASES, ids=str)


def arguments(case: Case, dtype=torch.float32, device="cpu"):
    """q, k, and what stands between mask and refresh in the operator."""
    q, k, bias, order = case.inputs(dtype, device)
    return q, k, (bias, order, case.dim**-0.5, case.m, case.n, case.reduce, *case.selection)


def empty_mask(case: Case, device="cpu", value=0):
    shape = case.batch, case.heads, slice_count(case.queries, case.m), word_count(case.keys, case.n)
    return torch.full(shape, value, dtype=torch.int32, device=device)


def dense_lse(q, k, bias, scale):
    """[B, Hq, Sq] in float64: -inf where all keys are masked."""
    logits = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    bias = reference.normalise_key_bias(bias, torch.float64)
    logits = (
        logits
        if bias is None
        else (logits + bias[:, None, None]).masked_fill((bias == -math.inf)[:, None, None], -math.inf)
    )
    return logits.logsumexp(-1)


def dense_mass(q, k, bias, order, scale, m, n, reduce):
    """[B, Hq, T, G] by torch's softmax over whole rows; keys that are masked hold nothing."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.mT * scale
    if bias is not None:
        bias = torch.where(bias, 0.0, -math.inf) if bias.dtype == torch.bool else bias.to(q.dtype)
        logits = logits + torch.where(bias < -1000, -math.inf, bias)[:, None, None]
    p = logits.softmax(-1).nan_to_num(0)  # NaN: all keys of an entry are masked
    p = p if order is None else p[:, :, order.long()]
    slices = [x.sum(2) if reduce == "sum" else x.amax(2) for x in p.split(m, 2)]
    return torch.stack([torch.stack([g.sum(-1) for g in x.split(n, -1)], -1) for x in slices], 2)


# The reference


@cases
def test_reference_mass(case):
    q, k, rest = arguments(case, torch.float64)
    bias, order, scale, m, n, reduce, *_ = rest
    rows = torch.arange(case.queries) if order is None else order.long()
    bias_row = reference.normalise_key_bias(bias, torch.float64)
    lse = dense_lse(q, k, bias, scale)
    mass = reference_observed.column_mass(q, k, lse, bias_row, rows, scale, m, n, reduce).nan_to_num(0)
    torch.testing.assert_close(mass, dense_mass(q, k, bias, order, scale, m, n, reduce))


@cases
def test_reference_in_chunks(case):
    """A slice at a time or all at once: the same bits are chosen."""
    q, k, rest = arguments(case)
    lse = dense_lse(q, k, rest[0], rest[2])
    whole = reference_observed.observed_mask(q, k, lse, *rest)
    assert torch.equal(reference_observed.observed_mask(q, k, lse, *rest, chunk_elements=1), whole)


def test_top_p_is_reached_and_no_group_too_many():
    case = CASES[0]
    q, k, rest = arguments(case, torch.float64)
    lse = dense_lse(q, k, rest[0], rest[2])
    keep = unpack(reference_observed.observed_mask(q, k, lse, *rest), group_count(case.keys, case.n))
    mass = dense_mass(q, k, *rest[:6])
    kept = torch.where(keep, mass, 0)
    share = kept.sum(-1) / mass.sum(-1)
    smallest = torch.where(keep, mass, math.inf).amin(-1) / mass.sum(-1)
    assert (share >= case.top_p).all() and (share - smallest < case.top_p).all()
    assert (torch.where(keep, mass, math.inf).amin(-1) >= torch.where(keep, 0, mass).amax(-1)).all()


# The operators


def observe(q, k, mask, rest, refresh, min_seq=0, drift=None, bound=None):
    """A step: begin, attend, update. Returns what attention gave."""
    shape, (reduce, top_p, density, *others) = rest[:5], rest[5:]
    uniform, by_head = (None, density) if isinstance(density, list) else (density, None)
    due = ops.begin_observed_(q, k, mask, *shape, min_seq, torch.tensor(refresh, device=q.device), drift, bound)
    out, lse = ops.attention(q, k, k, mask, *shape, "none", min_seq)
    ops.update_observed_(q, k, lse, mask, *shape, reduce, top_p, uniform, *others, min_seq, due, drift, by_head)
    return out


@cases
def test_refreshes_only_when_told(case, poison):
    """A step that is not told attends by the mask; one that is told densely, and leaves the mask of its mass."""
    q, k, rest = arguments(case)
    m, n = rest[3:5]
    mask = empty_mask(case, value=7)
    address = mask.data_ptr()
    out = observe(q, k, mask, rest, False)
    assert (mask == 7).all()
    torch.testing.assert_close(out, reference.attention(q, k, k, mask, *rest[:5])[0])
    out = observe(q, k, mask, rest, True)
    dense, lse = reference.attention(q, k, k, reference.full_mask(q, k, m, n), *rest[:5])
    assert torch.equal(out, dense)
    assert torch.equal(mask, reference_observed.observed_mask(q, k, lse, *rest))
    assert mask.data_ptr() == address


def test_below_min_seq_the_mask_stays():
    q, k, rest = arguments(CASES[0])
    mask = empty_mask(CASES[0], value=7)
    observe(q, k, mask, rest, True, min_seq=151)
    assert (mask == 7).all()


def test_autocast_takes_the_ambient_dtype():
    q, k, rest = arguments(CASES[0])
    mask, expected = empty_mask(CASES[0]), empty_mask(CASES[0])
    with torch.autocast("cpu", torch.bfloat16):
        observe(q, k.bfloat16(), mask, rest, True)
    observe(q.bfloat16(), k.bfloat16(), expected, rest, True)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_is_in_place_in_compiled_code(inner):
    """The buffer itself is written, and what reads it afterwards sees the new mask."""
    case = CASES[1]
    q, k, rest = arguments(case)

    def run(q, mask, refresh):
        due = ops.begin_observed_(q, k, mask, *rest[:5], 0, refresh)
        out, lse = ops.attention(q, k, k, mask, *rest[:5], "none", 0)
        ops.update_observed_(q, k, lse, mask, *rest, 0, due)
        return out

    compiled = torch.compile(run, backend=inner, fullgraph=True)
    mask, expected = empty_mask(case), empty_mask(case)
    address = mask.data_ptr()
    for scale, refresh in ((1, True), (-1, False), (2, True)):
        actual = compiled(scale * q, mask, torch.tensor(refresh))
        torch.testing.assert_close(actual, run(scale * q, expected, torch.tensor(refresh)))
        assert torch.equal(mask, expected) and mask.data_ptr() == address
    assert mask.any()


# The kernels


def check(case: Case, dtype, device):
    from fg_inductor.kernels import observe

    q, k, rest = arguments(case, dtype, device)
    bias, order, scale, m, n, reduce, *_ = rest
    lse = dense_lse(q, k, bias, scale).float()
    mask = empty_mask(case, device, value=-1)
    observe.launch(q, k, lse, mask, *rest, torch.tensor(True, device=device))
    groups = group_count(case.keys, n)
    assert not unpack(mask, mask.shape[-1] * 32)[..., groups:].any(), "unused bits must be 0"
    keep = unpack(mask, groups)
    exact_keep = unpack(reference_observed.observed_mask(q.double(), k.double(), lse.double(), *rest), groups)
    mass = dense_mass(q.double(), k.double(), bias, order, scale, m, n, reduce)
    shift = (q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale).double()
    shift -= q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    # A logit off by x moves a probability by the factor exp(x), and so do both roundings of lse, and of the logit, to
    # base 2; a sum rounds once for each halving.
    rounding = (8 + (m * n).bit_length()) * torch.finfo(torch.float32).eps
    off = shift.abs().max() + 4 * torch.finfo(torch.float32).eps * lse[lse.isfinite()].abs().max()
    budget = 2 * mass * (off.exp().item() - 1 + rounding)
    assert_differs_at_the_cut_only(keep, exact_keep, mass, budget)
    if case.density is not None and not case.dense_keys:
        assert torch.equal(keep.sum(-1), exact_keep.sum(-1))


kernels = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_kernels(case, dtype, device, poison):
    check(case, dtype, device)


@kernels
@pytest.mark.gpu
@pytest.mark.parametrize("n", GROUPS)
@pytest.mark.parametrize("m", SLICES)
def test_kernels_with_every_slice_shape(m, n, device, poison):
    check(Case(f"{m}x{n}", m=m, n=n, queries=1000, keys=1100, dim=128), torch.bfloat16, device)


@kernels
def test_kernels_with_heads_in_chunks(device, poison, monkeypatch):
    from fg_inductor.kernels import observe

    monkeypatch.setattr(observe, "MASS_BYTES", 1)
    check(replace(CASES[1], batch=2, heads=4), torch.float32, device)


@kernels
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_kernels_keep_what_is_not_finite(value, reduce, device, poison):
    """Where the lse of a query is not finite its slice keeps every group with a NaN; the other slices choose."""
    from fg_inductor.kernels import observe

    q, k, rest = arguments(replace(CASES[1], n=1, keys=150, reduce=reduce), torch.float32, device)
    q[0, 1, 70, 3] = value
    _, lse = reference.attention(q, k, k, reference.full_mask(q, k, rest[3], 1), *rest[:5])
    mask = empty_mask(replace(CASES[1], n=1, keys=150), device)
    observe.launch(q, k, lse, mask, *rest, torch.tensor(True, device=device))
    assert torch.equal(mask, reference_observed.observed_mask(q, k, lse, *rest))
    assert value == torch.inf or unpack(mask, 150)[0, 1, 1].all()
    assert not unpack(mask, 150)[0, 1, 0].all()


@kernels
def test_kernels_end_at_once_without_a_refresh(device):
    """They read nothing but the flag: not even NaN inputs change the mask."""
    from fg_inductor.kernels import observe

    q, k, rest = arguments(CASES[0], torch.float32, device)
    mask, told = empty_mask(CASES[0], device, value=7), torch.tensor(False, device=device)
    assert not observe.launch_begin(mask, CASES[0].keys, CASES[0].n, told)
    observe.launch(q.fill_(torch.nan), k, q[..., 0], mask, *rest, told)
    assert (mask == 7).all()


@kernels
@cases
def test_kernels_open_every_group(case, device, poison):
    """And no unused bit."""
    from fg_inductor.kernels import observe

    q, k, rest = arguments(case, torch.float32, device)
    mask = empty_mask(case, device, value=7)
    assert observe.launch_begin(mask, case.keys, case.n, torch.tensor(True, device=device))
    assert torch.equal(mask, reference.full_mask(q, k, *rest[3:5]))


@pytest.mark.gpu
def test_captured_by_a_cuda_graph(device):
    """The flag and the inputs are read at replay."""
    q, k, rest = arguments(CASES[0], torch.bfloat16, device)
    mask, refresh = empty_mask(CASES[0], device), torch.tensor(True, device=device)

    def step(mask):
        due = ops.begin_observed_(q, k, mask, *rest[:5], 0, refresh)
        _, lse = ops.attention(q, k, k, mask, *rest[:5], "none", 0)
        ops.update_observed_(q, k, lse, mask, *rest, 0, due)

    step(mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(mask)
    for told in (True, False):
        mask.fill_(7)
        refresh.fill_(told)
        k.neg_()
        graph.replay()
        expected = empty_mask(CASES[0], device, value=7)
        step(expected)
        assert torch.equal(mask, expected) and (mask == 7).all() != told
