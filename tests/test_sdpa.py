"""Finding sites, deciding on them, and the graph that the rewrite leaves."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from fg_inductor.kernels import ops
from fg_inductor.passes import sdpa
from fg_inductor.passes.graph import value
from fg_inductor.passes.printer import graph_text
from fg_inductor.settings import Settings
from fg_inductor.testing import assert_as_accurate
from fg_inductor.testing_passes import SMALL, PassBackend, run_pass

SDPA = F.scaled_dot_product_attention
aten = torch.ops.aten.scaled_dot_product_attention


class Attention(nn.Module):
    """[B, S, C] -> [B, S, C]; ``call(q, k, v)`` attends, ``text`` is what keys and values are projected from."""

    def __init__(self, call=SDPA, heads=2, kv_heads=None, dim=32, width=64):
        super().__init__()
        self.call, self.heads, self.kv_heads = call, heads, kv_heads or heads
        self.to_q = nn.Linear(width, heads * dim)
        self.to_k, self.to_v = (nn.Linear(width, self.kv_heads * dim) for _ in range(2))
        self.to_out = nn.Linear(heads * dim, width)

    def forward(self, x, text=None, **kwargs):
        text = x if text is None else text
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(text).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for f in (self.to_k, self.to_v))
        return self.to_out(self.call(q, k, v, **kwargs).transpose(1, 2).flatten(2))


def tokens(length=40, batch=2, width=64, **kwargs):
    return torch.randn(batch, length, width, **kwargs)


def with_kernel(q, k, v):
    with sdpa_kernel(SDPBackend.MATH):
        return SDPA(q, k, v)


SPELLINGS = {
    "positional": lambda q, k, v: SDPA(q, k, v, None, 0.0, False),
    "keywords": lambda q, k, v: SDPA(
        query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ),
    "keywords in another order": lambda q, k, v: SDPA(value=v, query=q, key=k),
    "mixed": lambda q, k, v: SDPA(q, value=v, key=k, is_causal=False),
    "aten packet": lambda q, k, v: aten(q, k, v),
    "aten overload": lambda q, k, v: aten.default(q, k, v),
    "inside sdpa_kernel": with_kernel,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_found(spelling):
    model, x = Attention(SPELLINGS[spelling]), tokens()
    done = run_pass(model, (x,), density=1.0)
    assert done.counts() == (0, 1, 1, 0)
    (site,) = done.sites
    assert (site.kind, site.query, site.key, site.dtype) == ("self", "2x2x40x32", "2x2x40x32", "float32")
    torch.testing.assert_close(done.result, model(x))


@pytest.mark.parametrize("scale", [None, 0.5, 1])
def test_scale(scale):
    model, x = Attention(functools.partial(SDPA, scale=scale)), tokens()
    done = run_pass(model, (x,), density=1.0)
    assert done.attention()[0]["scale"] == (1 / math.sqrt(32) if scale is None else scale)
    torch.testing.assert_close(done.result, model(x))


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_grouped_queries(kv_heads):
    model, x = Attention(functools.partial(SDPA, enable_gqa=True), heads=4, kv_heads=kv_heads), tokens()
    done = run_pass(model, (x,), density=1.0)
    assert done.sites[0].rewritten and done.sites[0].key == f"2x{kv_heads}x40x32"
    torch.testing.assert_close(done.result, model(x))


@pytest.mark.parametrize(("density", "tail"), [(0.2, "pooled"), (0.3, "none")])
def test_tail_follows_the_density(density, tail):
    (arguments,) = run_pass(Attention(), (tokens(),), density=density).attention()
    assert arguments["tail"] == tail


def test_settings_become_arguments():
    wanted = {"pool": 8, "top_p": 0.8, "density": 0.25, "max_density": 0.5, "tail": "pooled"}
    (arguments,) = run_pass(Attention(), (tokens(),), slice="32x16", **wanted).attention()
    wanted |= {"m": 32, "n": 16, "min_seq": 0, "dense_keys": [], "dense_queries": [], "key_bias": None, "order": None}
    assert {key: arguments[key] for key in wanted} == wanted


def test_a_sparse_graph_computes_what_the_operators_compute():
    def by_hand(q, k, v):
        scale = 1 / math.sqrt(q.shape[-1])
        mask = ops.select_pooled(q, k, None, None, scale, 16, 8, 16, 0.9, 0.3, 1.0, [], [], 0)
        return ops.attention(q, k, v, mask, None, None, scale, 16, 8, "none", 0)[0]

    model, x = nn.Sequential(Attention(), Attention()), tokens(100)
    result, dense = run_pass(model, (x,), density=0.3).result, model(x)
    for block in model:
        block.call = by_hand
    torch.testing.assert_close(result, model(x))
    assert not torch.allclose(result, dense)


# Refusals. Each is one argument away from a site that is rewritten.


def masked(q, k, v):
    return SDPA(q, k, v, attn_mask=torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril())


def one_head(q, k, v):
    """No reshape says that the first dimension holds heads."""
    return torch.stack([SDPA(q[:, i], k[:, i], v[:, i]) for i in range(1)], 1).expand_as(q)


def few_keys(q, k, v):
    return SDPA(q, k[:, :, :8], v[:, :, :8])


def one_key_head(q, k, v):
    return SDPA(q, k[:, :1], v[:, :1])


def short_values(q, k, v):
    return F.pad(SDPA(q, k, v[..., :16]), (0, 16))


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        return SDPA(q, k, v) * 2

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, grad


def mapped(q, k, v):
    return torch.vmap(lambda q, k, v: SDPA(q[None], k[None], v[None])[0])(q, k, v)


# id: attention, further inputs, settings, reason, whether it counts as a video site
REFUSALS = {
    "mask setting": (Attention(), {}, {"mask": "dense"}, "fgattn.mask is 'dense'", False),
    "cross attention": (Attention(), {"text": tokens()}, {}, "cross attention", False),
    "causal": (Attention(functools.partial(SDPA, is_causal=True)), {}, {}, "causal", False),
    "short": (Attention(), {}, {"min_seq": 41}, "shorter than min_seq", False),
    "short keys": (Attention(few_keys), {}, {"min_seq": 9}, "shorter than min_seq", False),
    "3-D": (Attention(one_head), {}, {}, "not 4-D", False),
    "dropout": (Attention(functools.partial(SDPA, dropout_p=0.1)), {}, {}, "dropout", True),
    "mask": (Attention(masked), {}, {}, "mask is not a key mask", True),
    "head dim": (Attention(dim=257), {}, {}, "head dim without a kernel", True),
    "head dim of v": (Attention(short_values), {}, {}, "head dims of q and v differ", True),
    "broadcast heads": (Attention(one_key_head), {}, {}, "q, k and v broadcast", True),
    "one head, as in VAEs": (Attention(masked, heads=1), {}, {}, "mask is not a key mask", False),
    "vmap": (Attention(mapped), {}, {}, "inside a torch.func transform", True),
    "autograd.Function": (Attention(lambda *qkv: Doubling.apply(*qkv)), {}, {}, "inside an autograd.Function", True),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    model, inputs, settings, reason, video = REFUSALS[case]
    done = run_pass(model, {"x": tokens(), **inputs}, **settings)
    (site,) = done.sites
    assert (site.decision, site.reason, site.video) == ("dense", reason, video)
    assert done.before == done.after


def test_a_reason_holds_no_number_and_its_detail_does():
    (site,) = run_pass(Attention(), (tokens(),), min_seq=4096).sites
    assert site.reason == "shorter than min_seq" and site.detail == "40 queries, 40 keys, fgattn.min_seq=4096"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model, x = Attention().to(dtype), tokens(dtype=dtype)
    (site,) = run_pass(model, (x,)).sites
    assert site.rewritten and f"torch.{site.dtype}" == str(dtype)


def with_scale_node(node):
    with node.graph.inserting_before(node):
        node.kwargs = {"scale": node.graph.call_function(math.sqrt, (2.0,))}


def with_value(**changed):
    def edit(node):
        for x in (*node.args, node):
            x.meta["example_value"] = value(x).to(**changed)

    return edit


def with_subclass(node):
    for x in node.args:
        x.meta["example_value"] = TwoTensor(value(x), value(x))


def without_values(node):
    for x in node.args:
        del x.meta["example_value"]


# What Dynamo on a CPU cannot be made to trace: id -> edit of the SDPA node, reason, whether it counts as a video site.
EDITS = {
    "scale": (with_scale_node, "scale is not a constant", True),
    "dtype": (with_value(dtype=torch.float8_e4m3fn), "dtype", True),
    "complex": (with_value(dtype=torch.complex64), "dtype", True),
    "device": (with_value(device="meta"), "device", True),
    "subclass": (with_subclass, "tensor subclass", True),
    "no values": (without_values, "no shapes in the graph", False),
}


@pytest.mark.parametrize("case", EDITS)
def test_refusal_of_an_edited_graph(case):
    edit, reason, video = EDITS[case]
    sites = []

    def backend(gm, example_inputs):
        (node,) = gm.graph.find_nodes(op="call_function", target=SDPA)
        dense = copy.deepcopy(gm)
        edit(node)
        before = graph_text(gm)
        sites.extend(sdpa.rewrite(gm, Settings(**SMALL)))
        assert graph_text(gm) == before
        return dense.forward

    torch.compile(Attention(), backend=backend)(tokens())
    assert [(site.decision, site.reason, site.video) for site in sites] == [("dense", reason, video)]


# Lengths


@pytest.mark.parametrize(
    "low, high, min_seq, decision, reason, passed_on",
    [
        (32, 64, 32, "rewritten", "", 0),  # every length is long enough
        (8, 64, 32, "rewritten", "dense below 32 tokens", 32),  # only run time knows
        (8, 31, 32, "dense", "shorter than min_seq", None),  # no length is
    ],
)
def test_symbolic_length(low, high, min_seq, decision, reason, passed_on):
    x = tokens(31)
    torch._dynamo.mark_dynamic(x, 1, min=low, max=high)
    if low > 31:
        x = tokens(40)
        torch._dynamo.mark_dynamic(x, 1, min=low, max=high)
    done = run_pass(Attention(), (x,), min_seq=min_seq)
    (site,) = done.sites
    assert (site.decision, site.reason) == (decision, reason)
    assert [arguments["min_seq"] for arguments in done.attention()] == ([] if passed_on is None else [passed_on])


def test_one_graph_serves_all_lengths():
    """Above and below ``min_seq``; the pass adds no guard (PassBackend checks) and no recompile."""
    model, backend = Attention(), PassBackend(Settings(**{**SMALL, "min_seq": 32}, density=1.0))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for length in (40, 33, 20, 100):
        x = tokens(length)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(backend.graphs) == 1 and backend.sites[0].rewritten


def test_length_that_only_run_time_knows():
    """As in Mochi: text tokens are picked by a mask, so the length is u0 + 40."""

    class Joint(Attention):
        def forward(self, x, text, valid):
            return super().forward(torch.cat([x, text[:, valid.nonzero().flatten()]], 1))

    model, inputs = Joint(), (tokens(), tokens(8), torch.tensor([1, 1, 0, 1, 0, 0, 0, 0]))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        done = run_pass(model, inputs, density=1.0)
        (site,) = done.sites
        assert site.rewritten and site.query == site.key and "u0" in site.query
        assert site.reason == "" and site.details["text"].startswith("40:")
        torch.testing.assert_close(done.result, model(*inputs))
        (site,) = run_pass(model, inputs, min_seq=45).sites
        assert site.reason == "dense below 45 tokens"


# Programs around the site


def test_autocast_outside_and_inside():
    def inside(q, k, v):
        with torch.autocast("cpu", dtype=torch.float16):
            return SDPA(q, k.half(), v).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        done = run_pass(Attention(), (tokens(),))
    assert done.sites[0].rewritten and done.sites[0].dtype == "bfloat16" and done.result.dtype == torch.bfloat16
    done = run_pass(Attention(inside), (tokens(),), density=1.0)
    assert done.sites[0].rewritten and done.sites[0].dtype == "float16"
    assert value(done.calls(ops.attention)[0])[0].dtype == torch.float16


def test_autocast_of_mixed_dtypes():
    """Norms of q may leave it in float32; attention casts it as SDPA would."""
    model, x = Attention(lambda q, k, v: SDPA(q.float(), k, v)), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done, plain = run_pass(model, (x,), density=1.0), model(x)
    assert done.sites[0].rewritten and done.sites[0].dtype == "bfloat16"
    exact = copy.deepcopy(model).double()
    exact.call = SDPA
    assert_as_accurate(done.result, plain, exact(x.double()))


def test_training():
    """With everything kept, gradients are those of dense attention."""
    model, x = Attention(), tokens(requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
    result = run_pass(model, (x,), density=1.0).result
    actual = torch.autograd.grad(result.square().sum(), (x, *model.parameters()))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    with mode():
        assert run_pass(Attention(), (tokens(),)).sites[0].rewritten


def test_checkpointed_regions():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Attention() for _ in range(3))

        def forward(self, x):
            first, *rest = self.blocks
            x = first(x)
            for block in rest:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model, x = Blocks(), tokens(requires_grad=True)
    done = run_pass(model, (x,), density=1.0)
    assert [(site.index, site.path, site.rewritten) for site in done.sites] == [
        (0, "blocks.0", True), (1, "blocks.1", True), (2, "blocks.2", True)
    ]  # fmt: skip
    assert done.counts() == (0, 3, 3, 0)
    expected = torch.autograd.grad(model(x).sum(), (x, *model.parameters()))
    torch.testing.assert_close(torch.autograd.grad(done.result.sum(), (x, *model.parameters())), expected)


@torch.compiler.nested_compile_region
def region(q, k, v):
    return SDPA(q, k, v) * 2


def branches(q, k, v):
    return torch.cond(q.sum() > 0, SDPA, lambda q, k, v: q * 2, (q, k, v))


@pytest.mark.parametrize("call", [lambda q, k, v: region(region(q, k, v), k, v), branches], ids=["region", "branches"])
def test_child_graphs(call):
    """One body is one site, however often it is called."""
    model, x = Attention(call), tokens()
    with torch.no_grad():
        done = run_pass(model, (x,), density=1.0)
        torch.testing.assert_close(done.result, model(x))
    assert [(site.index, site.decision) for site in done.sites] == [(0, "rewritten")]


@pytest.mark.parametrize(
    "after",
    [
        lambda out: out.view(4, 40, 32).view(2, 2, 40, 32),
        lambda out: out.to(torch.float64).view(2, -1).view(2, 2, 40, 32),
        lambda out: out.transpose(1, 2).flatten(2).view(2, 40, 2, 32).transpose(1, 2),
    ],
    ids=["view", "cast and view", "transpose and view"],
)
def test_views_of_the_result(after):
    """Dense attention may return other strides than the operator: code that takes a view of them still can."""

    def call(q, k, v):
        return after(SDPA(q.contiguous(), k.contiguous(), v.contiguous())).to(q.dtype)

    model, x = Attention(call), tokens()
    done = run_pass(model, (x,), density=1.0)
    assert done.sites[0].rewritten
    torch.testing.assert_close(done.result, model(x))


def test_graph_breaks_leave_projections_out_of_the_graph():
    """Then only equal lengths tell self from cross attention."""

    def split(q, k, v):
        torch._dynamo.graph_break()
        return SDPA(q, k, v)

    (site,) = run_pass(Attention(split), (tokens(),), fullgraph=False).sites
    assert (site.kind, site.decision) == ("unknown", "rewritten")
    (site,) = run_pass(Attention(split), (tokens(), tokens(24)), fullgraph=False).sites
    assert (site.kind, site.decision, site.reason) == ("unknown", "dense", "no projection in the graph")


def test_exported_program():
    model, x = Attention(), tokens()
    gm = torch.export.export(model, (x,)).module()
    sites = sdpa.rewrite(gm, Settings(**SMALL, density=1.0))
    assert [(site.path, site.kind, site.decision) for site in sites] == [("", "self", "rewritten")]
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(gm(x), model(x))


def test_nodes_carry_their_site():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleDict({"a": nn.ModuleList([Attention(), Attention()])})

        def forward(self, x):
            return self.down["a"][1](self.down["a"][0](x))

    done = run_pass(Two(), (tokens(),))
    assert [site.path for site in done.sites] == ["down.a.0", "down.a.1"]
    for index, node in enumerate(done.calls(ops.attention)):
        assert node.meta["fgattn_site"] == index
        assert "scaled_dot_product_attention" in node.meta["stack_trace"] or "self.call" in node.meta["stack_trace"]
        assert node.meta["nn_module_stack"] == node.args[3].meta["nn_module_stack"]


def test_indices_count_sites_of_an_earlier_run():
    """A later pass may run over the same graph: what it finds keeps its place."""
    causal = Attention(functools.partial(SDPA, is_causal=True))
    done = run_pass(nn.Sequential(Attention(), causal, Attention()), (tokens(),))
    assert [site.index for site in done.sites] == [0, 1, 2]
    assert [site.index for site in sdpa.rewrite(done.graphs[0], done.settings)] == [1]


# Errors of the pass itself


def test_an_error_leaves_its_site_as_it_was(monkeypatch, caplog):
    call = sdpa.call

    def fail(graph, target, args, *rest, **kwargs):
        if target is ops.attention and args[4] is not None:
            raise KeyError("a defect")
        return call(graph, target, args, *rest, **kwargs)

    monkeypatch.setattr(sdpa, "call", fail)
    masked_site = Attention(lambda q, k, v: SDPA(q, k, v, attn_mask=q.new_ones(1, 1, 1, q.shape[2])))
    model, x = nn.Sequential(Attention(), masked_site), tokens()
    done = run_pass(model, (x,), density=1.0)
    assert [(site.decision, site.reason) for site in done.sites] == [("rewritten", ""), ("dense", "error in the pass")]
    assert done.sites[1].detail == "KeyError: 'a defect'"
    assert done.counts() == (1, 1, 1, 0) and "aten.select" not in done.after[0]
    assert "the pass failed on" in caplog.text
    torch.testing.assert_close(done.result, model(x))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a defect"):
        run_pass(masked_site, (x,), strict=True)


# Context parallelism: the ring needs the dense operator on every rank


def test_context_parallel_stays_dense():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    done = run_pass(Attention(), (tokens(),), mask="dense")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh, buffer = init_device_mesh("cpu", (2,)), torch.randn(1, 2, 256, 32)
        with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[2]):
            (site,) = sdpa.rewrite(done.graphs[0], Settings(**SMALL))
        assert (site.decision, site.reason, site.video) == ("dense", "context parallel", True)
    finally:
        torch.distributed.destroy_process_group()
    (site,) = sdpa.rewrite(done.graphs[0], Settings(**SMALL))
    assert site.rewritten
