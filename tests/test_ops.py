"""The operator contracts: schema, fake, autograd, autocast, compilation, and every error."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fg_inductor.kernels import ops, reference
from fg_inductor.kernels.checks import TAILS
from fg_inductor.kernels.contracts import SCHEMAS
from fg_inductor.kernels.mask import unpack
from fg_inductor.testing import assert_as_accurate, make_key_bias, make_qkv, random_mask
from fg_inductor.testing_cases import Case, reference_gradients, reference_result

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# (case, dtype, which of q, k and v require a gradient)
PROBLEMS = (
    (Case("contiguous", m=16, n=8, queries=32, keys=64, layout="contiguous"), torch.float32, "qkv"),
    (Case("odd-bshd", m=16, n=8, batch=2, queries=37, keys=37, layout="bshd"), torch.bfloat16, "qkv"),
    (Case("mixed-q-only", m=32, n=1, queries=33, keys=50), torch.bfloat16, "q"),
    (Case("gqa-bias-order-kv", m=16, n=8, heads=4, queries=37, bias="padding", ordered=True), torch.float32, "kv"),
    (Case("fused-tail-v", m=16, n=16, queries=40, keys=40, layout="fused", tail="pooled"), torch.float32, "v"),
    (Case("float-bias-none", m=16, n=8, queries=20, keys=140, bias="float", tail="pooled"), torch.float32, ""),
)
problems = pytest.mark.parametrize("case, dtype, wanted", PROBLEMS, ids=[case.id for case, _, _ in PROBLEMS])


def _select_arguments(q, k, key_bias, order, scale, m, n, min_seq=0, **changes):
    usual = {"pool": 16, "top_p": 0.8, "density": None, "max_density": 1.0, "dense_keys": [], "dense_queries": []}
    return q, k, key_bias, order, scale, m, n, *(usual | changes).values(), min_seq


def _attention_arguments(case, dtype, wanted, min_seq=0):
    q, k, v, *rest = reference_result(case, dtype).arguments
    return *(x.requires_grad_(name in wanted) for name, x in zip("qkv", (q, k, v), strict=True)), *rest, min_seq


def _every_call(case, dtype, wanted):
    """(name, op, arguments) for each operator."""
    attention = q, k, v, mask, key_bias, order, scale, m, n, *_ = _attention_arguments(case, dtype, wanted)
    ranges = {"dense_keys": [0, 3, 17, 20], "dense_queries": [5, 6]}
    select = _select_arguments(q, k, key_bias, order, scale, m, n, density=0.3, **ranges)
    drift = torch.tensor([1.0, 1.0, 3.0])
    begin = q, k, mask.clone(), key_bias, order, scale, m, n, 0, torch.tensor(False), drift, 0.1
    lse = torch.randn(q.shape[:3])
    observed = q, k, lse, mask.clone(), key_bias, order, scale, m, n, "max", 0.8, None, 1.0, *ranges.values(), 0
    by_head = [0.3, 0.1, 0.9, 0.5][: q.shape[1]]
    shared, slots = mask[:, :1].clone(), torch.zeros(q.shape[:2], dtype=torch.int32)
    state = torch.tensor(True), drift.clone()
    with torch.no_grad():
        backward = torch.randn_like(q), q, k, v, *ops.attention(*attention), *attention[3:]
    backward = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in backward)
    length = min(q.shape[2], k.shape[2])  # by place: as many keys as queries
    square = q[:, :, :length], k[:, :, :length]
    bias = None if key_bias is None else key_bias[:, :length]
    placed = torch.arange(length, dtype=torch.int32).flip(0)
    rule = ([1, 2, length // 2], 0, [1, 1, 4], [1, 1, 3], 5.0, [0, 3])
    return (
        ("select_pooled", ops.select_pooled, select),
        ("select_dfs", ops.select_dfs, (*square, bias, placed, scale, m, n, None, by_head)),
        ("select_static", ops.select_static, (*square, placed, m, n, *rule)),
        ("keep_dense", ops.keep_dense, (mask, order, q.shape[2], k.shape[2], m, n, *ranges.values())),
        ("begin_observed_", ops.begin_observed_, begin),
        ("update_observed_", ops.update_observed_, (*observed, *state, by_head)),
        ("begin_observed_", ops.begin_observed_, (*begin[:2], shared, *begin[3:-2], drift.clone(), 0.1, slots)),
        ("update_observed_", ops.update_observed_, (*observed[:3], shared, *observed[4:], *state, None, slots.clone())),
        ("expand_heads", ops.expand_heads, (mask[:, 1:], slots)),
        ("fetch", ops.fetch, (mask.clone(), False)),
        ("put_back_", ops.put_back_, (mask.clone(), torch.ones_like(mask), torch.tensor(True))),
        ("attention", ops.attention, attention),
        ("attention_backward", torch.ops.fgattn.attention_backward.default, backward),
        ("kept_density", ops.kept_density, (mask, key_bias, case.queries, case.keys, m, n)),
        ("query_order", ops.query_order, (2, 5, 6, 3, 4, m, torch.device("cpu"), "hilbert")),
        ("choose_order", ops.choose_order, (q, 1, 1, q.shape[2] - 5, 2, 3, m)),
        ("reorder", ops.reorder, (k, torch.arange(k.shape[2], dtype=torch.int32).flip(0))),
    )


NAMES = tuple(SCHEMAS)


@problems
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, case, dtype, wanted):
    for other, op, arguments in _every_call(case, dtype, wanted):
        if other == name:
            torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("min_seq", [0, 10_000], ids=["sparse", "dense"])
@problems
def test_fake_equals_real(case, dtype, wanted, min_seq):
    for name, op, arguments in _every_call(case, dtype, wanted):
        if name in ("update_observed_", "put_back_"):
            continue  # return nothing
        if name in ("select_pooled", "attention", "attention_backward"):
            arguments = (*arguments[:-1], min_seq)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            fake = op(*fakes)
        real = op(*arguments)
        for i, (a, b) in enumerate(zip(*(x if isinstance(x, tuple) else (x,) for x in (real, fake)), strict=True)):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), f"result {i} of {name}"
        if name == "attention":
            out, lse = real
            assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
        # What a caller does to a result reaches no input and no other result.
        results = [x for x in (real if isinstance(real, tuple) else (real,))]
        storages = [x.untyped_storage().data_ptr() for x in (*arguments, *results) if isinstance(x, torch.Tensor)]
        assert all(storages.count(x.untyped_storage().data_ptr()) == 1 for x in results), name


# Autograd


@problems
def test_only_wanted_gradients(case, dtype, wanted):
    arguments = _attention_arguments(case, dtype, wanted)
    out, lse = ops.attention(*arguments)
    assert out.requires_grad == bool(wanted) and not lse.requires_grad
    if not wanted:
        return
    dout = torch.randn_like(out)
    out.backward(dout)
    exact, plain = reference_gradients(arguments[:-1], dout)
    for name, x, *expected in zip("qkv", arguments[:3], plain, exact, strict=True):
        assert (x.grad is not None) == (name in wanted)
        if x.grad is not None:
            assert_as_accurate(x.grad, *expected, f"d{name}")


def test_mask_and_lse_have_no_gradient():
    q, k, v = (x.requires_grad_() for x in make_qkv(queries=20))
    mask = ops.select_pooled(*_select_arguments(q, k, None, None, 0.1, 16, 8))
    out, lse = ops.attention(q, k, v, mask, None, None, 0.1, 16, 8, "none", 0)
    assert not mask.requires_grad and not lse.requires_grad and out.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        lse.sum().backward()
    (out.sum() + lse.sum()).backward()
    assert q.grad.isfinite().all()


def test_double_backward_is_refused():
    q, k, v = (x.requires_grad_() for x in make_qkv(queries=20))
    mask = reference.full_mask(q, k, 16, 8)
    out, _ = ops.attention(q, k, v, mask, None, None, 0.1, 16, 8, "none", 0)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="fgattn::attention: there is no double backward"):
        dq.sum().backward()


# min_seq


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("bias", [None, "padding", "float", "additive", "entry"])
def test_below_min_seq_attention_is_dense(bias, tail):
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 4, 2, queries=70, keys=150, dtype=torch.bfloat16))
    key_bias = make_key_bias(bias, 2, 150, torch.bfloat16)
    mask = ops.select_pooled(*_select_arguments(q, k, key_bias, None, 0.1, 32, 8, min_seq=71, density=0.1))
    groups = unpack(mask, mask.shape[-1] * 32)
    assert groups[..., :19].all() and not groups[..., 19:].any()
    mask = random_mask(q, k, 32, 8, 0.3)  # another selector may not know min_seq: the mask is not read
    sparse, dense = (
        (q, k, v, m, key_bias, None, 0.1, 32, 8, tail, min_seq)
        for m, min_seq in ((reference.full_mask(q, k, 32, 8), 0), (mask, 71))
    )
    out, _ = ops.attention(*dense)
    assert out.stride() == ops.attention(*sparse)[0].stride()
    attn_mask = None
    if key_bias is not None:
        attn_mask = reference.normalise_key_bias(key_bias, torch.bfloat16)[:, None, None]
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, attn_mask, scale=0.1, enable_gqa=True))
    dout = torch.randn_like(out)
    out.backward(dout)
    exact, plain = reference_gradients(sparse[:-1], dout)
    for name, x, *expected in zip("qkv", (q, k, v), plain, exact, strict=True):
        assert_as_accurate(x.grad, *expected, f"d{name}")


def test_min_seq_is_the_shorter_length():
    q, k, v = make_qkv(queries=70, keys=150)
    mask = random_mask(q, k, 16, 8, 0.1)
    sparse, at_least, below = (ops.attention(q, k, v, mask, None, None, 0.1, 16, 8, "none", s)[0] for s in (0, 70, 71))
    assert torch.equal(sparse, at_least) and not torch.equal(sparse, below)


# Autocast


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_takes_the_ambient_dtype(device, ambient):
    q, k, v = make_qkv(queries=70, keys=90, spread=4.0, device=device)
    k = k.bfloat16()  # mixed, as norms in float32 beside projections in bfloat16 give
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    cast = [x.detach().to(ambient) for x in (q, k, v)]
    key_bias = make_key_bias("float", 1, 90, torch.float32).to(device)
    select = _select_arguments(q, k, key_bias, None, 0.1, 16, 8, top_p=0.5)
    with torch.autocast(device, ambient):
        mask = ops.select_pooled(*select)
        out, lse = ops.attention(q, k, v, mask, key_bias, None, 0.1, 16, 8, "none", 0)
    assert torch.equal(mask, ops.select_pooled(*cast[:2], *select[2:]))
    expected = ops.attention(*cast, mask, key_bias, None, 0.1, 16, 8, "none", 0)
    assert out.dtype == ambient and lse.dtype == torch.float32
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    out.float().sum().backward()
    assert [x.grad.dtype for x in (q, k, v)] == [torch.float32, torch.bfloat16, torch.float32]


def test_autocast_leaves_float64_alone():
    q, k, v = make_qkv(queries=20, dtype=torch.float64)
    mask = reference.full_mask(q, k, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = ops.attention(q, k, v, mask, None, None, 0.1, 16, 8, "none", 0)
    assert out.dtype == torch.float64


def test_autocast_that_is_off_casts_nothing():
    q, k, v = make_qkv(queries=20)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        mask = ops.select_pooled(*_select_arguments(q, k, None, None, 0.1, 16, 8))
        out, _ = ops.attention(q, k, v, mask, None, None, 0.1, 16, 8, "none", 0)
    assert out.dtype == torch.float32


# Compilation


def _sparse(q, k, v, tail, min_seq):
    mask = ops.select_pooled(*_select_arguments(q, k, None, None, 0.2, 16, 8, min_seq, top_p=0.5))
    out, lse = ops.attention(q, k, v, mask, None, None, 0.2, 16, 8, tail, min_seq)
    return out.transpose(1, 2).flatten(2), lse, ops.kept_density(mask, None, q.shape[2], k.shape[2], 16, 8)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("tail", TAILS)
def test_compiles_once_for_every_length(tail, autocast):
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_sparse, fullgraph=True, backend=backend)
    # The last two lie below min_seq. None has one slice: AOTAutograd guards on sizes of 1 in every graph it traces.
    for queries, keys in ((50, 70), (130, 260), (37, 41), (20, 300)):
        q, k, v = make_qkv(1, 4, 2, queries, keys, spread=4.0)
        results = []
        for function in (_sparse, compiled):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            for x in leaves:
                torch._dynamo.mark_dynamic(x, 2)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out, lse, density = function(*leaves, tail, 48)
            out.float().square().sum().backward()
            results.append((out, lse, density, *(x.grad for x in leaves)))
        for eager, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, eager, rtol=0, atol=0, equal_nan=True)
        assert results[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
        assert (results[0][2] == 1) == (queries < 48)
    assert backend.frame_count == 1


def _symbolic(mode, x, *dynamic):
    sizes = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(x.dim())]
    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


@pytest.mark.parametrize("tail", TAILS)
def test_symbolic_sizes_get_no_guard(tail):
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    q, k, v = (_symbolic(mode, x, 0, 1, 2).requires_grad_() for x in make_qkv(3, 4, 2, 50, 70))
    key_bias = _symbolic(mode, torch.zeros(3, 70), 0, 1)
    order = _symbolic(mode, torch.arange(50, dtype=torch.int32), 0)
    assert not any(isinstance(size, int) for x in (q, k, v) for size in x.shape[:3])
    before = len(env.guards)
    with mode:
        ranges = {"dense_keys": [q.shape[2], k.shape[2]], "dense_queries": [0, q.shape[2]]}
        mask = ops.select_pooled(*_select_arguments(q, k, key_bias, order, 0.1, 16, 8, 4096, **ranges))
        refresh = mode.from_tensor(torch.tensor(True))
        selection = ("sum", 0.9, None, 1.0, *ranges.values(), 4096)
        shape = (key_bias, order, 0.1, 16, 8)
        staged = ops.fetch(mask)
        due = ops.begin_observed_(q, k, staged, *shape, 4096, refresh, mode.from_tensor(torch.zeros(3)), 0.1)
        out, lse = ops.attention(q, k, v, staged, *shape, tail, 4096)
        ops.update_observed_(q, k, lse, staged, *shape, *selection, due)
        ops.put_back_(mask, staged, due)
        shared = mask.new_empty(mask.shape[0], (q.shape[1] + 1) // 2, *mask.shape[2:])
        slots = mask.new_empty(q.shape[:2])
        due = ops.begin_observed_(q, k, shared, *shape, 4096, refresh, slots=slots)
        ops.attention(q, k, v, ops.expand_heads(shared, slots), *shape, tail, 4096)
        ops.update_observed_(q, k, lse, shared, *shape, *selection, due, slots=slots)
        dq, *_ = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        ops.kept_density(mask, key_bias, q.shape[2], k.shape[2], 16, 8)
        ops.query_order(q.shape[0], q.shape[1], q.shape[2], 0, k.shape[2], 16, torch.device("cpu"))
        ops.choose_order(q, q.shape[0], 1, 1, 0, k.shape[2], 16)
    assert [str(guard.expr) for guard in env.guards[before:]] == []
    assert [str(size) for size in dq.shape] == [str(size) for size in q.shape]


@pytest.mark.gpu
def test_strided_head_dim_is_taken(device):
    q, k, v = (x.repeat_interleave(2, -1)[..., ::2] for x in make_qkv(queries=150, dtype=torch.bfloat16, device=device))
    assert q.stride(-1) == 2
    select = _select_arguments(q, k, None, None, 0.1, 64, 8)
    mask = ops.select_pooled(*select)
    assert torch.equal(mask, ops.select_pooled(q.contiguous(), k.contiguous(), *select[2:]))
    rest = (mask, None, None, 0.1, 64, 8, "none", 0)
    out, _ = ops.attention(q, k, v, *rest)
    assert torch.equal(out, ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), *rest)[0])


# Errors: (changes to a good call, what the message must hold). Every message starts with the operator's name.


def _tensors(**changes):
    shapes = {"q": (2, 4, 40, 64), "k": (2, 2, 50, 64), "v": (2, 2, 50, 64)}
    return {name: torch.zeros(shape) for name, shape in (shapes | changes).items()}


BOTH = {
    "rank": ({"q": torch.zeros(4, 40, 64)}, r"q must be \[B, H, S, D\], got \(4, 40, 64\)"),
    "key-rank": ({"k": torch.zeros(1, 2, 2, 50, 64)}, r"k must be \[B, H, S, D\], got \(1, 2, 2, 50, 64\)"),
    "dtypes-differ": ({"k": torch.zeros(2, 2, 50, 64).half()}, "k is torch.float16 on cpu but q is torch.float32"),
    "dtype": ({x: y.int() for x, y in _tensors().items()}, "dtype torch.int32 is not supported; cast q, k and v"),
    "device": ({"k": torch.zeros(2, 2, 50, 64, device="meta")}, "k is torch.float32 on meta but q is .* on cpu"),
    "batch": ({"k": torch.zeros(1, 2, 50, 64)}, r"k \(1, .*\) must share batch and head dim with q \(2, 4, 40, 64\)"),
    "head-dim": ({"k": torch.zeros(2, 2, 50, 96)}, r"k \(2, 2, 50, 96\) must share batch and head dim"),
    "heads": ({"q": torch.zeros(2, 3, 40, 64)}, "3 query heads are not a multiple of 2 KV heads"),
    "no-queries": ({"q": torch.zeros(2, 4, 0, 64)}, r"q \(2, 4, 0, 64\) is empty"),
    "no-keys": (_tensors(k=(2, 2, 0, 64), v=(2, 2, 0, 64)), r"k \(2, 2, 0, 64\) is empty"),
    "m": ({"m": 48}, r"m=48 queries a slice; choose one of \(16, 32, 64, 128\)"),
    "n": ({"n": 4}, r"n=4 keys a group; choose one of \(1, 8, 16, 32, 64, 128\)"),
    "bias-shape": ({"key_bias": torch.zeros(2, 40)}, r"float \[B, Sk\] = \[2, 50\] on cpu, got .* \(2, 40\)"),
    "bias-rank": ({"key_bias": torch.zeros(2, 1, 1, 50)}, r"key_bias must be bool .* got .* \(2, 1, 1, 50\)"),
    "bias-dtype": ({"key_bias": torch.zeros(2, 50).int()}, "key_bias must be bool .* got torch.int32"),
    "bias-device": ({"key_bias": torch.zeros(2, 50, device="meta")}, "key_bias must be bool .* on meta"),
    "order-dtype": ({"order": torch.arange(40)}, "order must be an int32 permutation of the 40 .* torch.int64"),
    "order-length": ({"order": torch.arange(50).int()}, r"order must be an int32 permutation of the 40 .* \(50,\)"),
}  # fmt: skip
SELECT_ONLY = {
    "pool": ({"pool": 24}, r"pool=24 queries a mean; choose one of \(8, 16, 32, 64, 128\)"),
    "density-zero": ({"density": 0.0}, r"density=0.0 must lie in \(0, 1\]"),
    "density-two": ({"density": 2.0}, r"density=2.0 must lie in \(0, 1\]"),
    "density-nan": ({"density": math.nan}, r"density=nan must lie in \(0, 1\]"),
    "max-density": ({"max_density": 1.5}, r"max_density=1.5 must lie in \(0, 1\]"),
    "top-p-zero": ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
    "top-p-percent": ({"top_p": 90.0}, r"top_p=90.0 must lie in \(0, 1\]"),
    "odd-keys": ({"dense_keys": [0, 4, 9]}, r"dense_keys must hold \[start, end\) pairs, got 3 numbers"),
    "odd-queries": ({"dense_queries": [7]}, r"dense_queries must hold \[start, end\) pairs, got 1 numbers"),
    "head-density-two": (
        {"head_density": [0.1, 2.0, 0.1, 0.1]},
        r"head_density=\[0.1, 2.0, .*: each number must lie in",
    ),
    "head-density-heads": ({"head_density": [0.1] * 3}, r"has 3 numbers, but q \(2, 4, 40, 64\) has 4 heads; give as"),
    "head-density-density": (
        {"head_density": [0.1] * 4, "density": 0.3},
        r"density=0.3 and head_density=\[.* give one",
    ),
    "reduce": ({"reduce": "mean"}, r"reduce='mean'; choose one of \('sum', 'max'\)"),
    "gamma": ({"gamma": 1.0}, "gamma=1.0 is compared with cosines; it must lie between 0 and 1"),
    "alpha": ({"alpha": 0.0}, "alpha=0.0 with density=None; give a positive alpha"),
    "alpha-density": ({"alpha": 0.5, "density": 0.3}, "alpha=0.5 with density=0.3; give a positive alpha, or a dens"),
}
POOLED_ONLY = ("pool", "gamma", "alpha", "alpha-density")
STATE = {
    "mask": ({"mask": torch.zeros(2, 4, 2, 4).int()}, r"mask has shape \(2, 4, 2, 4\), .* need \(2, 4, 3, 4\)"),
    "mask-strides": ({"mask": torch.zeros(2, 4, 4, 3).int().mT}, r"words of a mask row must be contiguous, .* 1, 3\)"),
    "drift": ({"drift": torch.zeros(2)}, r"drift must be float32 \[3\] on cpu, got torch.float32 \(2,\)"),
}
SLOTS = torch.zeros(2, 4).int()
SHARED = {
    "slots-dtype": ({"slots": SLOTS.long()}, r"slots must be int32 \[B, Hq\] on cpu, got torch.int64 \(2, 4\)"),
    "slots-rank": ({"slots": SLOTS[0]}, r"slots must be int32 \[B, Hq\] .* \(4,\)"),
    "slots-heads": ({"slots": SLOTS[:, :3]}, r"a number for each head, \[B, Hq\] = \[2, 4\], but it is \(2, 3\)"),
    "slots-strides": ({"slots": SLOTS.mT.contiguous().mT}, r"slots must be contiguous .* strides \(1, 2\)"),
    "slots-masks": ({"slots": SLOTS, "mask": torch.zeros(2, 5, 3, 4).int()}, "5 masks for 4 heads, by mask .* fewer"),
    "slots-words": ({"slots": SLOTS, "mask": torch.zeros(2, 2, 3, 8).int()}, r"need \(2, 2, 3, 4\)"),
}
BEGIN_ONLY = {
    "refresh-number": ({"refresh": torch.tensor(1)}, r"refresh must be a bool scalar .*, got torch.int64 \(\)"),
    "refresh-vector": ({"refresh": torch.ones(2).bool()}, r"refresh must be a bool scalar on cpu, got .* \(2,\)"),
    "refresh-device": ({"refresh": torch.tensor(True, device="meta")}, "refresh must be a bool scalar .* on meta"),
    "drift-alone": ({"bound": None}, "drift and bound=None go together; give both or neither"),
    "bound": ({"bound": 1.5}, "bound=1.5 is a fall of the kept share of the mass; it must lie between 0 and 1"),
}
OBSERVED_ONLY = {
    "due": ({"due": torch.tensor(1)}, r"due must be a bool scalar .*, got torch.int64 \(\)"),
    "lse-dtype": ({"lse": torch.zeros(2, 4, 40).double()}, r"lse must be float32 \(2, 4, 40\), .*got torch.float64"),
    "slots-by-head": (
        {"slots": SLOTS, "head_density": [0.1] * 4, "mask": torch.zeros(2, 2, 3, 4).int()},
        r"head_density=\[0.1, .* with slots: heads that share a mask keep one share; give density",
    ),
    "lse-heads": ({"lse": torch.zeros(2, 2, 40)}, r"lse must be .* got torch.float32 \(2, 2, 40\)"),
}
ATTENTION_ONLY = {
    "tail": ({"tail": "mean"}, r"tail='mean'; choose one of \('none', 'pooled'\)"),
    "kernel": ({"kernel_name": "triton"}, r"kernel_name='triton'; choose one of \('auto', 'portable', 'hopper'\)"),
    "kernel-on-cpu": ({"kernel_name": "portable"}, "the portable kernel can't run this call: q is on cpu.* CUDA; pass"),
    "values-length": ({"v": torch.zeros(2, 2, 49, 64)}, r"v \(2, 2, 49, 64\) must have .* k \(2, 2, 50, 64\)"),
    "values-heads": ({"v": torch.zeros(2, 4, 50, 64)}, r"v \(2, 4, 50, 64\) must have the heads"),
    "values-dtype": ({"v": torch.zeros(2, 2, 50, 64).half()}, "v is torch.float16 on cpu but q is torch.float32"),
    "mask-dtype": ({"mask": torch.zeros(2, 4, 3, 4)}, r"mask must be int32 \[B, Hq, T, W\] on cpu, got torch.float32"),
    "mask-rank": ({"mask": torch.zeros(4, 3, 4).int()}, r"mask must be int32 .* \(4, 3, 4\)"),
    "mask-device": ({"mask": torch.zeros(2, 4, 3, 4, device="meta").int()}, "mask must be int32 .* on meta"),
    "mask-kv-heads": ({"mask": torch.zeros(2, 2, 3, 4).int()}, r"mask has shape \(2, 2, 3, 4\)"),
    "mask-of-other-m": (
        {"mask": torch.zeros(2, 4, 2, 4).int()},
        r"mask has shape \(2, 4, 2, 4\), .* with m=16, n=8 need \(2, 4, 3, 4\); make it with the same m and n",
    ),
    "mask-of-other-n": ({"mask": torch.zeros(2, 4, 3, 8).int()}, r"need \(2, 4, 3, 4\)"),
}  # fmt: skip


def _bad_call(op, changes):
    shared = {"key_bias": None, "order": None, "scale": 0.1, "m": 16, "n": 8}
    tensors = _tensors()
    if op is ops.select_pooled:
        usual = {"pool": 16, "top_p": 0.9, "density": None, "max_density": 1.0, "dense_keys": [], "dense_queries": []}
        usual |= {"reduce": "sum", "gamma": None, "alpha": None, "head_density": None}
        tensors.pop("v")
    elif op is ops.begin_observed_:
        usual = {"mask": torch.zeros(2, 4, 3, 4).int(), "refresh": torch.tensor(True)}
        usual |= {"drift": torch.zeros(3), "bound": 0.1, "slots": None}
        tensors.pop("v")
    elif op is ops.update_observed_:
        usual = {"reduce": "sum", "top_p": 0.9, "density": None, "max_density": 1.0, "dense_keys": []}
        usual |= {"dense_queries": [], "due": torch.tensor(True), "mask": torch.zeros(2, 4, 3, 4).int()}
        usual |= {"lse": torch.zeros(tensors["q"].shape[:3]), "drift": torch.zeros(3)}
        usual |= {"head_density": None, "slots": None}
        tensors.pop("v")
    else:
        usual = {"mask": torch.zeros(2, 4, 3, 4, dtype=torch.int32), "tail": "none", "kernel_name": "auto"}
    arguments = tensors | shared | usual | {"min_seq": 0}
    return op(**arguments | {name: x for name, x in changes.items() if name in arguments})


ERRORS = [
    pytest.param(op, *row, id=f"{op._opname}-{name}")
    for op, tables in (
        (ops.select_pooled, (BOTH, SELECT_ONLY)),
        (ops.begin_observed_, (BOTH, STATE, SHARED, BEGIN_ONLY)),
        (
            ops.update_observed_,
            (BOTH, {k: v for k, v in SELECT_ONLY.items() if k not in POOLED_ONLY}, STATE, SHARED, OBSERVED_ONLY),
        ),
        (ops.attention, (BOTH, ATTENTION_ONLY)),
    )
    for table in tables
    for name, row in table.items()
]


@pytest.mark.parametrize("op, changes, message", ERRORS)
def test_error(op, changes, message):
    with pytest.raises(ValueError, match=f"fgattn::{op._opname}: .*{message}"):
        _bad_call(op, changes)


def test_good_calls_raise_nothing():
    for op in (ops.select_pooled, ops.begin_observed_, ops.update_observed_, ops.attention):
        _bad_call(op, {})
    for op in (ops.begin_observed_, ops.update_observed_):
        _bad_call(op, {"slots": SLOTS.clone(), "mask": torch.zeros(2, 2, 3, 4).int()})


def test_error_is_seen_while_tracing():
    compiled = torch.compile(lambda: _bad_call(ops.attention, {"m": 48}), backend="eager")
    with pytest.raises(Exception, match="m=48 queries a slice"):
        compiled()


@pytest.mark.gpu
def test_head_dim_without_a_kernel(device):
    q = torch.zeros(1, 2, 20, 80, device=device)
    with pytest.raises(ValueError, match=r"head dim 80 has no kernel; the kernels have \(64, 96, 128, 256\)"):
        ops.select_pooled(*_select_arguments(q, q, None, None, 0.1, 16, 8))
