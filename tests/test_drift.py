"""Drift of observed masks: how much of the mass they still keep, and the refresh that the device then decides."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from fg_inductor.kernels import ops, reference, reference_observed
from fg_inductor.kernels.mask import group_count, slice_count, unpack, word_count
from fg_inductor.testing_selection import SelectionCase as Case

CUDA = torch.cuda.is_available()
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float32,)

CASES = (
    Case("top-p"),
    Case("more-heads-than-sampled", heads=12, kv_heads=4, m=16, density=0.3),
    Case("few-queries", queries=7, keys=129, m=16),  # sampled several times
    Case("single-keys-ordered", n=1, ordered=True, density=0.2, batch=2),
    Case("whole-blocks", n=128, keys=700, density=0.5, m=128),
    Case("padding", batch=2, keys=420, bias="padding", density=0.3),
    Case("float-bias-peaked", bias="float", n=16, density=0.2, spread=30.0),
    Case("entry", batch=2, bias="entry", density=0.3),  # one whose keys are all masked has lost nothing
)
cases = pytest.mark.parametrize("case", CASES, ids=str)


def arguments(case: Case, dtype=torch.float32, device="cpu"):
    q, k, bias, order = case.inputs(dtype, device)
    return q, k, (bias, order, case.dim**-0.5, case.m, case.n, case.reduce, *case.selection)


def empty_mask(case: Case, device="cpu"):
    shape = case.batch, case.heads, slice_count(case.queries, case.m), word_count(case.keys, case.n)
    return torch.zeros(shape, dtype=torch.int32, device=device)


def kept_of_rows(q, k, mask, bias, order, scale, m, n):
    """The share that each query keeps, [B, Hq, Sq], by torch's softmax; 1 where all keys are masked."""
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if bias is not None:
        logits += reference.normalise_key_bias(bias, q.dtype)[:, None, None]
    keep = unpack(mask, group_count(k.shape[2], n)).repeat_interleave(n, -1)[..., : k.shape[2]]
    place = torch.arange(q.shape[2]) if order is None else order.cpu().long().argsort()
    keep = keep[:, :, place.to(mask.device) // m]
    return (logits.softmax(-1) * keep).sum(-1).nan_to_num(1)


@cases
def test_the_sample_is_of_the_kept_mass(case):
    q, k, rest = arguments(case, torch.float64)
    lse = reference.attention(q, k, k, reference.full_mask(q, k, case.m, case.n), *rest[:5])[1]
    mask = reference_observed.observed_mask(q, k, lse, *rest)
    share = kept_of_rows(q, k, mask, *rest[:5])
    places = [(2 * i + 1) * case.queries // 64 for i in range(32)]
    rows = places if rest[1] is None else rest[1][places].long().tolist()
    heads = [i * case.heads // min(8, case.heads) for i in range(min(8, case.heads))]
    expected = share[:, heads][:, :, rows].mean().float()
    torch.testing.assert_close(reference_observed.kept_mass(q, k, mask, *rest[:5]), expected)
    if case.id != "entry":
        assert 0 < expected < 1


def test_what_is_sampled_of_a_random_mask_is_its_density():
    """Unbiased: equal scores, so that the share of the mass is the share of the keys."""
    case = Case("", queries=4096, keys=4096, n=1, m=16)
    q = k = torch.zeros(1, 2, 4096, 64)
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(-(2**31), 2**31, (1, 2, 256, 128), generator=generator).int()
    kept = reference_observed.kept_mass(q, k, mask, None, None, 1.0, case.m, case.n)
    assert abs(kept - 0.5) < 4 * (0.25 / (64 * 4096)) ** 0.5  # four standard errors


def run_operators(q, k, mask, rest, refresh, drift, bound):
    due = ops.begin_observed_(q, k, mask, *rest[:5], 0, refresh, drift, bound)
    _, lse = ops.attention(q, k, k, mask, *rest[:5], "none", 0)
    ops.update_observed_(q, k, lse, mask, *rest, 0, due, drift)


def run_kernels(q, k, mask, rest, refresh, drift, bound):
    from fg_inductor.kernels import drift as schedule
    from fg_inductor.kernels import observe

    due = schedule.decide(q, k, mask, *rest[:5], refresh, drift, bound)
    due = observe.launch_begin(mask, k.shape[2], rest[4], due)
    _, lse = reference.attention(q, k, k, mask, *rest[:5])
    observe.launch(q, k, lse, mask, *rest, due)
    schedule.note(q, k, mask, *rest[:5], due, drift)


class Steps:
    """A mask over denoising steps: q is turned by degrees; returns after each call what drift says."""

    def __init__(self, case, dtype=torch.float32, device="cpu", bound=0.1, run=run_operators):
        self.run = run
        self.q, self.k, self.rest = arguments(case, dtype, device)
        self.mask = empty_mask(case, device)
        self.drift = torch.zeros(3, device=device)
        self.bound = bound

    def step(self, turn, refresh=False):
        q = turn * self.q.flip(2) + (1 - turn) * self.q
        told = torch.tensor(refresh, device=q.device)
        self.run(q, self.k, self.mask, self.rest, told, self.drift, self.bound)
        return self.drift.tolist()


def check_schedule(case, dtype, device, run=run_operators):
    steps = Steps(case, dtype, device, run=run)
    first = steps.step(0.0, refresh=True)
    assert first[0] == first[1] > 0.2 and first[2] == 1
    copy = steps.mask.clone()
    again = steps.step(0.0)
    assert again == first and torch.equal(steps.mask, copy)  # the same queries: nothing has drifted
    near = steps.step(0.02)
    assert near[1] != near[0] == first[0] and near[2] == 1 and torch.equal(steps.mask, copy)
    far = steps.step(1.0)
    assert far[2] == 2 and far[0] == far[1] and not torch.equal(steps.mask, copy)
    forced = steps.step(1.0, refresh=True)
    assert forced[2] == 3 and forced[:2] == far[:2]
    steps.bound = 0.99  # nothing falls as far
    assert steps.step(0.0)[2] == 3


PEAKED = Case("peaked", n=8, density=0.2, spread=4.0, m=16)


def test_refreshes_where_the_mass_has_fallen():
    check_schedule(PEAKED, torch.float32, "cpu")


def test_nan_refreshes():
    steps = Steps(PEAKED)
    steps.step(0.0, refresh=True)
    steps.q[:, :, 2] = torch.nan  # sampled
    assert steps.step(0.0)[2] == 2


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_both_states_are_written_in_place_in_compiled_code(inner):
    q, k, rest = arguments(PEAKED)

    def run(q, mask, refresh, drift):
        run_operators(q, k, mask, rest, refresh, drift, 0.1)
        return mask.sum(), drift.sum()

    compiled = torch.compile(run, backend=inner, fullgraph=True)
    states = [(empty_mask(PEAKED), torch.zeros(3)) for _ in range(2)]
    for turned, refresh in ((q, True), (q, False), (q.flip(2), False)):
        for f, (mask, drift) in zip((compiled, run), states, strict=True):
            f(turned, mask, torch.tensor(refresh), drift)
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert states[0][1][2] == 2


kernels = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_kernels_find_the_share(case, dtype, device, poison):
    """As near to float64 as a share formed in float32 from the same inputs may be."""
    q, k, rest = arguments(case, dtype, device)
    mask, state = empty_mask(case, device), torch.zeros(3, device=device)
    run_kernels(q, k, mask, rest, torch.tensor(True, device=device), state, 0.5)
    exact = reference_observed.kept_mass(q.double(), k.double(), mask, *rest[:5])
    shift = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * rest[2]
    shift = shift - q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * rest[2]
    budget = 2 * (2 * shift.abs().max().item() + 2**-20)  # a logit off by x moves a share by 2x at most
    assert abs(state[0].item() - exact.item()) <= budget and state[2] == 1
    assert torch.equal(state[:1], state[1:2])
    before = mask.clone()
    run_kernels(q, k, mask, rest, torch.tensor(False, device=device), state, 0.5)
    assert torch.equal(mask, before) and state[1] == state[0] and state[2] == 1


@kernels
@pytest.mark.parametrize("value", [None, torch.nan], ids=str)
def test_kernels_refresh_where_the_mass_has_fallen(value, device, poison):
    if value is None:
        return check_schedule(PEAKED, torch.float32, device, run_kernels)
    steps = Steps(replace(PEAKED, density=0.3), device=device, run=run_kernels)
    steps.step(0.0, refresh=True)
    steps.q[:, :, 2] = value
    assert steps.step(0.0)[2] == 2


@pytest.mark.gpu
def test_captured_by_a_cuda_graph(device):
    """The decision is taken anew at each replay."""
    steps = Steps(PEAKED, torch.bfloat16, device)
    q, told = steps.q.clone(), torch.tensor(True, device=device)
    arguments_ = (q, steps.k, steps.mask, steps.rest, told, steps.drift, 0.1)
    run_operators(*arguments_)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_operators(*arguments_)
    told.fill_(False)
    counts = []
    for source in (steps.q, steps.q.flip(2), steps.q.flip(2)):
        q.copy_(source)
        graph.replay()
        counts.append(int(steps.drift[2]))
    assert counts == [1, 2, 2]
