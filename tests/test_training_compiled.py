"""Compiled training: gradients, and what checkpointing saves and recomputes."""

import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fg_inductor
from fg_inductor.passes import checkpoint as checkpoint_pass
from fg_inductor.toy_models import (
    SHORT,
    Stack,
    assert_as_accurate_as_eager,
    count_calls,
    gradients,
    tiny_wan,
    tokens,
    wan_inputs,
)

aten = torch.ops.aten


class Modulated(torch.nn.Module):
    """Attention between two norms whose scales and shifts are chunks of one table, as in a block of Wan."""

    def __init__(self, width: int):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, shift, scale_after, shift_after = self.table.chunk(4, dim=1)
        q = (self.norm(x) * (1 + scale) + shift).unflatten(-1, (-1, 64)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return self.norm(x) * (1 + scale_after) + shift_after

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:])


def plain(block, x):
    return checkpoint(block, x, use_reentrant=False)


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def selective(*saved, answer=CheckpointPolicy.MUST_SAVE, other=CheckpointPolicy.PREFER_RECOMPUTE):
    """A checkpoint that saves the ops named, by a policy."""

    def policy(ctx, op, *args, **kwargs):
        return answer if op in saved else other

    context_fn = functools.partial(create_selective_checkpoint_contexts, policy)
    return lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=context_fn)


def listed(*saved):
    """The same, by a list."""
    context_fn = functools.partial(create_selective_checkpoint_contexts, list(saved))
    return lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=context_fn)


CALLS = {"none": None, "checkpoint": plain, "reentrant": reentrant}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_gradients_equal_dense_at_density_1(call, autocast):
    model = Stack(call=call)
    options = {**SHORT, "fgattn.inner": "aot_eager", "fgattn.density": 1.0}
    run = torch.compile(model, backend="fgattn", options=options, fullgraph=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        assert_as_accurate_as_eager(model, run, {"x": tokens()})
    assert fg_inductor.report().rewritten == 2


def test_gradients_of_wan_equal_dense_at_density_1():
    model = tiny_wan()
    options = {**SHORT, "fgattn.inner": "aot_eager", "fgattn.density": 1.0}
    run = torch.compile(model, backend="fgattn", options=options, fullgraph=True)
    assert_as_accurate_as_eager(model, run, wan_inputs())
    assert fg_inductor.report().rewritten == 2


# How often selector and attention run in one step of one layer: once saved, twice recomputed.
SDPA_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
SDPA_CUDA = aten._scaled_dot_product_flash_attention.default
POLICIES = {
    "no-checkpoint": (None, 1),
    "plain": (plain, 2),
    "reentrant": (reentrant, 2),
    "saves-sdpa": (selective(SDPA_CPU), 1),
    "saves-sdpa-of-cuda": (selective(SDPA_CUDA), 1),
    "prefers-to-save-sdpa": (selective(SDPA_CPU, answer=CheckpointPolicy.PREFER_SAVE), 1),
    "true-for-sdpa": (selective(SDPA_CPU, answer=True, other=False), 1),
    "lists-sdpa": (listed(SDPA_CPU, aten.mm.default), 1),
    "saves-mm": (selective(aten.mm.default), 2),
    "saves-attention": (selective(torch.ops.fgattn.attention.default), 1),
    "must-recompute": (selective(aten.mm.default, other=CheckpointPolicy.MUST_RECOMPUTE), 2),
}
SPARSE = {**SHORT, "fgattn.density": 0.3}


@pytest.fixture(scope="module")
def sparse_gradients():
    """A layer, its input, and its gradients through an uncompiled graph without a checkpoint."""
    torch.manual_seed(0)
    model, x = Stack(1), tokens()
    run = torch.compile(model, backend="fgattn", options={**SPARSE, "fgattn.inner": "eager"}, fullgraph=True)
    return model, x, gradients(model, run, {"x": x})


@pytest.mark.parametrize(("call", "runs"), POLICIES.values(), ids=POLICIES)
def test_checkpoint_policies(sparse_gradients, call, runs):
    """The mask is kept or made anew together with attention; either way the gradients are those of one mask."""
    model, x, expected = sparse_gradients
    model.call = call
    run = torch.compile(model, backend="fgattn", options=SPARSE, fullgraph=True)
    for result, other in zip(gradients(model, run, {"x": x}), expected, strict=True):
        torch.testing.assert_close(result, other)
    calls = count_calls(lambda: gradients(model, run, {"x": x}))
    assert calls == {"select_pooled": runs, "attention": runs, "attention_backward": 1}


@pytest.mark.parametrize("backward", [True, False], ids=["joint", "inference"])
@pytest.mark.parametrize("tag", [None, *CheckpointPolicy], ids=str)
def test_saves_what_belongs_together(tag, backward):
    """Whatever the parts are marked: what attention is marked decides for its outputs and its mask."""
    graph = torch.fx.Graph()
    q, mask = graph.placeholder("q"), graph.placeholder("mask")
    order = graph.call_function(torch.ops.fgattn.choose_order.default, (q, 4, 8, 8, 0, 0, 64))
    arguments = (None, order, 0.125, 64, 8, "none", 0)
    attention = graph.call_function(torch.ops.fgattn.attention.default, (q, q, q, mask, *arguments))
    out, lse = (graph.call_function(operator.getitem, (attention, i)) for i in range(2))
    if backward:
        saved = (q, q, q, q, out, lse, mask)
        graph.call_function(torch.ops.fgattn.attention_backward.default, (*saved, *arguments))
    attention.meta["recompute"] = tag
    for node in (out, lse, mask, order):
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    checkpoint_pass.save_masks(graph)
    keeps = backward and tag not in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
    expected = CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE
    assert [node.meta["recompute"] for node in (out, lse, mask)] == [expected] * 3
    # Chosen anew, by queries that are rounded differently, it might be another: then a saved mask would mean nothing.
    assert order.meta["recompute"] == (CheckpointPolicy.MUST_SAVE if backward else CheckpointPolicy.PREFER_RECOMPUTE)
    assert "recompute" not in q.meta


class Spread(torch.nn.Module):
    """Attention over a video whose queries choose an order that is not the usual one."""

    GRID = (16, 16, 16)

    def __init__(self, call):
        super().__init__()
        self.call = call
        generator = torch.Generator().manual_seed(0)
        self.scale = torch.nn.Parameter(torch.rand(32, generator=generator) + 0.5)

    def inner(self, x):
        q = F.silu(x * self.scale) * self.scale
        return F.scaled_dot_product_attention(q, x, x)

    def forward(self, x):
        return self.call(self.inner, x) if self.call else self.inner(x)


@pytest.mark.parametrize("name", ["no-checkpoint", "plain", "saves-sdpa", "saves-mm"])
def test_a_chosen_order_is_made_once(name):
    """Whatever is saved, the order of the forward pass is that of the backward pass."""
    call, runs = POLICIES[name]
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in Spread.GRID), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, 2) * torch.tensor([0.1, 1.0, 1.0])  # slow in time
    phase = place @ (torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)) / 12)
    x = torch.cat([phase.cos(), phase.sin()], -1)[None].requires_grad_()
    options = {**SPARSE, "fgattn.slice": "64x8", "fgattn.token_grid": Spread.GRID}
    run = torch.compile(Spread(call), backend="fgattn", options=options, fullgraph=True)
    (expected,) = torch.autograd.grad(
        torch.compile(Spread(None), backend="fgattn", options={**options, "fgattn.inner": "eager"})(x).square().sum(), x
    )
    (grad,) = torch.autograd.grad(run(x).square().sum(), x)
    torch.testing.assert_close(grad, expected)
    calls = count_calls(lambda: torch.autograd.grad(run(x).square().sum(), x))
    assert [calls[op] for op in ("choose_order", "select_pooled", "attention")] == [1, runs, runs]


def test_policy_is_asked_about_attention_only_for_attention():
    asked = []

    def policy(ctx, op, *args, **kwargs):
        asked.append((op, len(args)))
        return CheckpointPolicy.PREFER_RECOMPUTE

    context_fn = functools.partial(create_selective_checkpoint_contexts, policy)
    model = Stack(1, call=lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=context_fn))
    options = {**SHORT, "fgattn.inner": "aot_eager"}
    torch.compile(model, backend="fgattn", options=options)(tokens(requires_grad=True)).sum().backward()
    ops = [op for op, _ in asked]
    for op in checkpoint_pass.SDPA_OPS:
        assert (op, 3) in asked
    assert ops.count(torch.ops.fgattn.attention.default) == ops.count(SDPA_CPU) > 0


def test_translated_contexts_keep_the_cache_hash():
    def context_fn():
        return create_selective_checkpoint_contexts([])

    assert not hasattr(checkpoint_pass._TranslatedContexts(context_fn), "cache_hash")
    context_fn.cache_hash = "mine"
    assert checkpoint_pass._TranslatedContexts(context_fn).cache_hash == "fgattn mine"


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ("eager", "fgattn::attention: there is no double backward"),
        ("aot_eager", "not currently support double backward"),
    ],
    ids=["eager", "aot_eager"],
)
def test_no_double_backward(inner, message):
    """Ours is refused where autograd calls it; behind AOTAutograd torch refuses all of it before."""
    x = tokens(requires_grad=True)
    out = torch.compile(Stack(1), backend="fgattn", options={**SHORT, "fgattn.inner": inner})(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_of_shared_scales_and_shifts():
    """Inductor 2.10 to 2.14 never writes some of them, unless told as ``inner.PATCHES`` does."""
    model = Modulated(512).cuda()
    options = {"fgattn.min_seq": 1, "fgattn.when": "always", "fgattn.density": 1.0}
    run = torch.compile(model, backend="fgattn", options=options, fullgraph=True)
    assert_as_accurate_as_eager(model, run, {"x": torch.randn(8, 2048, 512, device="cuda")})
    assert fg_inductor.report().rewritten == 1
