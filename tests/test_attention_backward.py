"""The backward kernels against float64 and against plain SDPA; in Triton's interpreter where there is no GPU."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import triton

from fg_inductor.kernels import attention_backward, attention_backward_keys, attention_forward, ops
from fg_inductor.kernels.mask import GROUPS, SLICES, group_count, pack, word_count
from fg_inductor.testing import assert_as_accurate, assert_l2_as_accurate, make_key_bias, make_qkv, random_mask
from fg_inductor.testing_cases import CASES, Case, exact_attention, make_groups, reference_gradients, reference_result

CUDA = torch.cuda.is_available()
# The interpreter's dot does not know bfloat16.
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float32,)
BY_ID = {case.id: case for case in CASES}
SCHEDULES = {"slices": False, "keys": True}
schedules = pytest.mark.parametrize("split", SCHEDULES.values(), ids=SCHEDULES)
needs_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA and torch.cuda.get_device_capability() == (9, 0)), reason="needs a Hopper GPU"),
]
hopper_only = pytest.mark.parametrize("kernel_name", [pytest.param("hopper", marks=needs_hopper)])


def launch(arguments: tuple, dout: torch.Tensor, m: int, **options):
    """The backward kernels behind the operator's forward. The interpreter likes larger tiles than the table's."""
    options.setdefault("kernel_name", "portable")
    if not CUDA:
        options["slices"] = {"BLOCK_M": m, "BLOCK_N": 64} | options.get("slices", {})
        options["keys"] = {"BLOCK_M": m, "BLOCK_N": 64} | options.get("keys", {})
    out, lse = ops.attention(*arguments, 0)
    return attention_backward.launch(dout, *arguments[:3], out, lse, *arguments[3:], **options)


def problem(case: Case, dtype: torch.dtype, device: str) -> tuple[tuple, torch.Tensor]:
    """Arguments of ``reference.attention``, and dout."""
    arguments = reference_result(case, dtype, device).arguments
    dout = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return arguments, dout


def check(case: Case, dtype: torch.dtype, device: str, **options) -> None:
    arguments, dout = problem(case, dtype, device)
    exact, plain = reference_gradients(arguments, dout)
    compare = assert_as_accurate
    if dtype == torch.float32:
        # An element's error is a sum of many roundings, and the largest of a few thousand is noise. A weight
        # exp(score - lse) inherits the rounding of score and lse, which SDPA on CPU avoids: it subtracts the maximum.
        compare = assert_l2_as_accurate
        rounding = torch.finfo(dtype).eps / 2 * exact_attention(arguments)[1].nan_to_num(0, 0, 0).abs().max()
        plain = [x + rounding * y for x, y in zip(plain, exact, strict=True)]
    actual = launch(arguments, dout, case.m, **options)
    for name, *triple in zip(("dq", "dk", "dv"), actual, plain, exact, strict=True):
        assert triple[0].dtype == dtype and triple[0].transpose(1, 2).is_contiguous()
        compare(*triple, name)


# The interpreter is slow: by keys it sees only the rows that this schedule treats in its own way.
KEYS_ON_CPU = (
    "m128-n1-words", "m16-n128", "m64-n64", "m64-n8", "fewer-keys-than-group", "one-row-slice", "mqa-3-1-batch-2",
    "dim-96", "empty-slices", "nothing-kept", "peaked", "bias-padding-n128", "bias-float", "bias-entry",
    "ordered-batch-2", "tail-blocks", "tail-only", "tail-full", "tail-padding", "tail-float-gqa",
)  # fmt: skip


@schedules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, dtype, split, device, poison):
    if split and not CUDA and case.id not in KEYS_ON_CPU:
        pytest.skip("by slices in the interpreter, by both schedules on a GPU")
    check(case, dtype, device, split=split)


@schedules
@pytest.mark.parametrize("case", [BY_ID[i] for i in ("dim-128", "tail-n8", "ordered", "peaked")], ids=str)
def test_half_precision(case, split, device, poison):
    check(case, torch.float16, device, split=split)


def on_hopper(case: Case) -> Case:
    """The case with slices that the Hopper kernel takes, and a head dim that it knows."""
    dim = case.dim if case.dim in (64, 96, 128) else 64
    return replace(case, id=f"{case.id}-{max(case.m, 64)}", m=max(case.m, 64), dim=dim)


@hopper_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", map(on_hopper, CASES), ids=str)
def test_cases_on_hopper(case, dtype, kernel_name, device, poison):
    check(case, dtype, device, split=False, kernel_name=kernel_name)


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_columns_in_order_of_lanes(dim, device, poison):
    """The rounding of sums puts the columns of a tensor-core accumulator back: 0 1 8 9 2 3 10 11 .. of each 16."""
    x = torch.randn(1, 2, 70, dim, device=device)
    sums = x.unflatten(-1, (-1, 2, 4, 2)).transpose(-2, -3).reshape(x.shape)
    assert torch.equal(sums[..., :8], x[..., [0, 1, 8, 9, 2, 3, 10, 11]])
    grad = torch.empty_like(x)
    sizes = dict(D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK=64, SUMMARY=128)
    attention_backward._finish[(2, 2)](
        sums, None, None, None, grad, *grad.stride()[:3], 0, 2, 70, 0, 1.0,
        **sizes, TAIL=False, HAS_BIAS=False, LANES=True,
    )  # fmt: skip
    assert torch.equal(grad, x)


# Units of 64 keys whose sums the copy engine adds, beside those with something to mask, which are added by threads.
BULK_CASES = [
    Case("one-tile", m=128, n=64, queries=128, keys=128, dim=128, keep="full"),  # masked: it is the last
    Case("two-tiles", m=128, n=64, queries=128, keys=256, dim=128, keep="full"),
    Case("ragged", m=128, n=64, queries=1000, keys=1100, heads=4, kv_heads=2, dim=128, density=0.5),
    Case("n128", m=128, n=128, queries=1000, keys=3000, heads=3, kv_heads=1, batch=2, dim=128, density=0.5),
    Case("tail-ordered", m=128, n=64, queries=1000, keys=2100, dim=128, ordered=True, tail="pooled", density=0.5),
    Case("padding", m=128, n=64, queries=1000, keys=2100, batch=2, dim=128, bias="padding", density=0.5),
    Case("dim-96", m=128, n=128, queries=1000, keys=2100, dim=96, density=0.5),
    Case("dim-64", m=128, n=64, queries=1000, keys=2100, dim=64, density=0.5),
    Case("many", m=128, n=64, queries=9000, keys=3000, heads=6, kv_heads=3, dim=128, density=0.4),
]


@hopper_only
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", BULK_CASES, ids=str)
def test_sums_in_bulk_on_hopper(case, dtype, early, kernel_name, device, poison):
    check(case, dtype, device, split=False, kernel_name=kernel_name, hopper={"BULK": True, "EARLY": early})


@hopper_only
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize(("m", "n", "bulk"), [(64, 8, False), (128, 8, False), (128, 64, True)])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
def test_wanted_on_hopper(wanted, m, n, bulk, early, kernel_name, device, poison):
    """Each subset is another program, with other barriers; dq alone is what the schedule by keys asks for."""
    case = Case("wanted", m=m, n=n, queries=500, keys=700, heads=4, kv_heads=2, dim=128, tail="pooled", ordered=True)
    arguments, dout = problem(case, torch.bfloat16, device)
    exact, plain = reference_gradients(arguments, dout)
    options = dict(split=False, kernel_name=kernel_name, hopper={"EARLY": early, "BULK": bulk})
    grads = launch(arguments, dout, m, wanted=wanted, **options)
    for name, want, x, *expected in zip(("dq", "dk", "dv"), wanted, grads, plain, exact, strict=True):
        if want:
            assert_as_accurate(x, *expected, name)
        else:
            assert x.numel() == 0


@hopper_only
def test_masked_keys_have_no_say_on_hopper(kernel_name, device, poison):
    case = Case("masked", m=128, n=8, queries=300, keys=700, dim=128, bias="padding", tail="pooled")
    arguments, dout = problem(case, torch.bfloat16, device)
    masked = ~arguments[4]
    k, v = (x.clone() for x in arguments[1:3])
    for x in (k, v):
        x.transpose(1, 2)[masked] = torch.nan
    grads = launch((arguments[0], k, v, *arguments[3:]), dout, case.m, split=False, kernel_name=kernel_name)
    exact, plain = reference_gradients(arguments, dout)
    for name, x, *expected in zip(("dq", "dk", "dv"), grads, plain, exact, strict=True):
        assert_as_accurate(x, *expected, name)
    assert all((x.transpose(1, 2)[masked] == 0).all() for x in grads[1:])


@hopper_only
@pytest.mark.parametrize("m", [64, 128])
def test_many_slices_on_hopper(m, kernel_name, device, poison):
    """More slices than CTAs, of lengths from nothing to all keys: barriers go on from one slice to the next."""
    case = Case("many", m=m, n=8, queries=9000, keys=1500, heads=6, kv_heads=3, dim=128, layout="contiguous")
    (q, k, v, mask, *rest), dout = problem(case, torch.bfloat16, device)
    share = torch.rand(mask.shape[:3], generator=torch.Generator().manual_seed(2)).to(device)
    share = torch.where(share < 0.1, 0, share)
    groups = torch.rand(*mask.shape[:3], group_count(case.keys, case.n), device=device) < share[..., None]
    arguments = (q, k, v, pack(groups, word_count(case.keys, case.n)), *rest)
    exact, plain = reference_gradients(arguments, dout)
    actual = launch(arguments, dout, m, split=False, kernel_name=kernel_name)
    for name, *triple in zip(("dq", "dk", "dv"), actual, plain, exact, strict=True):
        assert_as_accurate(*triple, name)


@pytest.mark.gpu
@pytest.mark.parametrize("tail", ["none", "pooled"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("n", GROUPS)
@pytest.mark.parametrize("m", SLICES)
def test_every_slice_shape(m, n, dim, tail, device, poison):
    case = Case(f"{m}x{n}", m=m, n=n, dim=dim, tail=tail, queries=1000, keys=1100, ordered=True)
    for split in SCHEDULES.values():
        for kernel_name in ("portable", "auto"):  # by keys too: dq is made by slices
            check(case, torch.bfloat16, device, split=split, kernel_name=kernel_name)


@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_parts_of_a_slice(block_m, device, poison):
    check(BY_ID["ordered-batch-2"], torch.float32, device, split=False, slices={"BLOCK_M": block_m})


@schedules
@pytest.mark.parametrize("case", [replace(BY_ID["tail-float-gqa"], ordered=True, queries=70, m=32)], ids=str)
def test_heads_in_chunks(case, split, device, poison, monkeypatch):
    """A workspace for the heads of one KV head at a time must not change what a head reads or writes."""
    monkeypatch.setattr(attention_forward, "LIST_BYTES", 1)
    check(case, torch.float32, device, split=split)


def test_offsets_beyond_32_bits(device, poison):
    check(CASES[0], torch.float32, device, split=False, slices={"WIDE": True})


@schedules
def test_only_wanted(split, device, poison):
    """What else is wanted does not change a gradient, and what is not wanted is empty."""
    case = Case("wanted", m=16, n=8, queries=20, keys=140, kv_heads=1, bias="padding", tail="pooled")
    arguments, dout = problem(case, torch.float32, device)
    everything = launch(arguments, dout, case.m, split=split)
    for wanted in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        some = launch(arguments, dout, case.m, split=split, wanted=wanted)
        for x, full, want in zip(some, everything, wanted, strict=True):
            # The order of atomics is not fixed, so bits may differ on a GPU.
            torch.testing.assert_close(x, full if want else full.new_empty(0), rtol=1e-5, atol=1e-5)


def test_the_copy_engine_adds_where_64_keys_are_neighbours():
    name, lacking = "fg_inductor.kernels.attention_backward_hopper", (ImportError, AttributeError)
    hopper = pytest.importorskip(name, exc_type=lacking)  # Triton may lack what it needs of Gluon
    assert [hopper.bulk(128, n) for n in (1, 32, 64, 128)] == [False, False, True, True]
    assert not hopper.bulk(64, 64)  # two CTAs share the memory that pieces would lie in
    by_threads, in_bulk = (hopper.configuration(128, 128, x) for x in (False, True))
    assert (by_threads["SLOTS"], in_bulk["SLOTS"]) == (0, 2) and by_threads["EARLY"] and not in_bulk["EARLY"]


def test_deterministic_algorithms_have_no_atomics():
    assert not attention_backward.by_keys(8, 64) and attention_backward.by_keys(64, 64)
    assert not attention_backward.by_keys(64, 64, bulk=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert attention_backward.by_keys(8, 64) and attention_backward.by_keys(64, 64, bulk=True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("tail", ["none", "pooled"])
def test_deterministic_algorithms_repeat_their_bits(tail, device):
    case = Case("repeat", m=128, n=8, queries=3000, keys=3000, heads=4, kv_heads=2, dim=128, tail=tail)
    arguments, dout = problem(case, torch.bfloat16, device)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (launch(arguments, dout, case.m) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(map(torch.equal, first, other))


MASKED = ("bias-padding-n128", "tail-padding")


@schedules
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("case", [replace(BY_ID[i], heads=1, kv_heads=1) for i in MASKED], ids=MASKED)
def test_masked_keys_have_no_say(case, where, split, device, poison):
    """Padding may hold NaN, also where it shares a kept group with visible keys; its own gradient is 0."""
    arguments, dout = problem(case, torch.float32, device)
    expected = launch(arguments, dout, case.m, split=split)
    masked = ~arguments[4]
    changed = {"k": arguments[1].clone(), "v": arguments[2].clone()}
    changed[where].transpose(1, 2)[masked] = torch.nan
    actual = launch((arguments[0], *changed.values(), *arguments[3:]), dout, case.m, split=split)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for x in actual[1:]:
        assert (x.transpose(1, 2)[masked] == 0).all()


@schedules
def test_large_bias(split, device, poison):
    """A bias common to all keys changes nothing: rows past the end, whose weight would overflow, do not enter."""
    arguments, dout = problem(BY_ID["bias-float"], torch.float32, device)
    expected = launch(arguments, dout, 64, split=split)
    actual = launch((*arguments[:4], arguments[4] + 200, *arguments[5:]), dout, 64, split=split)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


@schedules
def test_dropped_keys_are_not_read(split, device, poison):
    case = Case("dropped", m=32, n=8, queries=70, keys=300, layout="contiguous")
    (q, k, v, _, *rest), dout = problem(case, torch.float32, device)
    keep = torch.ones(1, 2, 3, group_count(300, 8), dtype=torch.bool)
    keep[..., 4] = False
    mask = pack(keep, word_count(300, 8)).to(device)
    k[:, :, 32:40] = v[:, :, 32:40] = torch.nan
    dq, dk, dv = launch((q, k, v, mask, *rest), dout, case.m, split=split)
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    assert (dk[:, :, 32:40] == 0).all() and (dv[:, :, 32:40] == 0).all()


@schedules
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan(where, split, device, poison):
    """At density 1.0 NaN comes out where the formula has it: a row of q or dout spoils its dq, and all of dk or dv."""
    case = Case("full", m=32, n=8, keep="full", queries=70, keys=70, layout="contiguous")
    arguments, dout = problem(case, torch.float32, device)
    tensors = dict(zip("qkv", arguments[:3], strict=True)) | {"dout": dout}
    tensors[where][0, 1, 67, 3] = torch.nan
    exact, _ = reference_gradients(arguments, dout)
    for name, actual, expected in zip(("dq", "dk", "dv"), launch(arguments, dout, 32, split=split), exact, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan()), name


@pytest.mark.parametrize("block_n", [64, 128])
@pytest.mark.parametrize("n", GROUPS)
def test_lists_of_slices(n, block_n, device, poison):
    case = Case("lists", m=16, n=n, queries=16 * 150, keys=700, density=0.05 if n < 16 else 0.3)
    groups = make_groups(case)
    mask = pack(groups, word_count(case.keys, n)).to(device)
    lists, counts = attention_backward_keys.lists_of_slices(mask, case.keys, n, block_n)
    keys = F.pad(groups.repeat_interleave(n, -1)[..., : case.keys], (0, -case.keys % block_n))
    tiles = keys.unflatten(-1, (-1, block_n)).any(-1).transpose(2, 3)  # [B, H, tiles, T]
    assert torch.equal(counts.cpu().long(), tiles.sum(-1))
    for row, count, kept in zip(lists.flatten(0, 2), counts.flatten(), tiles.flatten(0, 2), strict=True):
        assert row[:count].tolist() == kept.nonzero()[:, 0].tolist()


# The operator


@pytest.mark.parametrize("tail", ["none", "pooled"])
def test_gradcheck(tail):
    case = Case("tiny", m=16, n=8, heads=2, kv_heads=1, queries=18, keys=140, dim=3, ordered=True, tail=tail)
    q, k, v, *rest = reference_result(case, torch.float64).arguments
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(lambda *qkv: ops.attention(*qkv, *rest, 0)[0], leaves, fast_mode=True)


def test_only_the_mask_is_not_differentiated():
    """With the selector in front, the gradient is the slope wherever a small step leaves the mask as it is."""
    q, k, v = make_qkv(1, 2, 2, 40, 60, 8, dtype=torch.float64, spread=2.0)
    dout = torch.randn(q.shape, dtype=torch.float64)

    def loss(q, k, v):
        mask = ops.select_pooled(q, k, None, None, 0.3, 16, 8, 16, 0.9, 0.5, 1.0, [], [], 0)
        return mask, (ops.attention(q, k, v, mask, None, None, 0.3, 16, 8, "none", 0)[0] * dout).sum()

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(loss(*leaves)[1], leaves)
    directions = [torch.randn_like(x) for x in leaves]
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True)).item()

    def difference(step):
        ends = [loss(*(x + sign * step * d for x, d in zip((q, k, v), directions, strict=True))) for sign in (1, -1)]
        return torch.equal(ends[0][0], ends[1][0]), ((ends[0][1] - ends[1][1]) / (2 * step)).item()

    same_mask, small = difference(1e-6)
    assert same_mask and small == pytest.approx(slope, rel=1e-7)
    same_mask, large = difference(0.1)
    assert not same_mask and large != pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("bias", [None, "padding", "float", "entry"])
def test_below_min_seq_backward_is_that_of_sdpa(bias, device):
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 4, 2, 70, 150, dtype=torch.float16, device=device))
    key_bias = make_key_bias(bias, 2, 150, torch.float16)
    key_bias = None if key_bias is None else key_bias.to(device)
    mask = random_mask(q, k, 32, 8, 0.3)  # not read
    out, _ = ops.attention(q, k, v, mask, key_bias, None, 0.1, 32, 8, "pooled", 71)
    out.sum().backward()  # an expanded gradient, without strides
    full = torch.full_like(mask, -1)
    exact, plain = reference_gradients((q, k, v, full, key_bias, None, 0.1, 32, 8, "none"), torch.ones_like(out))
    for name, x, *expected in zip("qkv", (q, k, v), plain, exact, strict=True):
        assert_as_accurate(x.grad, *expected, f"d{name}")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [None, "padding"])
def test_operator_on_a_gpu(bias, device, poison):
    """The whole way: autograd, strides, an expanded gradient, and the gradients of the reference."""
    case = Case("whole", m=128, n=8, batch=2, heads=4, kv_heads=2, queries=500, keys=700, dim=128, bias=bias)
    arguments, _ = problem(case, torch.bfloat16, device)
    leaves = [x.detach().requires_grad_() for x in arguments[:3]]
    ops.attention(*leaves, *arguments[3:], 0)[0].sum().backward()
    exact, plain = reference_gradients(arguments, torch.ones_like(arguments[0]))
    for name, x, *expected in zip("qkv", leaves, plain, exact, strict=True):
        assert_as_accurate(x.grad, *expected, f"d{name}")
