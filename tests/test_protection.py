"""What must stay dense because another mechanism owns attention, and what must keep working beside the rewrite."""

import copy

import pytest
import torch
from torch import nn

import fg_inductor
from fg_inductor.testing_passes import run_pass
from fg_inductor.toy_models import SHORT, SelfAttention, Stack, tokens

EXACT = {**SHORT, "fgattn.density": 1.0}


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def by_hand(q, k, v):
    return (q @ k.mT * 0.1).softmax(-1) @ v


def test_dtensor_inputs(mesh):
    """Sharded q, k and v: the operators have no rule for them. (SDPA of DTensors takes Dynamo minutes on a CPU; its
    refusal is tested on an edited graph.)"""
    from torch.distributed.tensor import Shard, distribute_tensor

    q, k, v = (distribute_tensor(torch.randn(1, 2, 64, 32), mesh, [Shard(1)]) for _ in range(3))
    done = run_pass(by_hand, (q, k, v))
    assert [(site.decision, site.reason, site.detail) for site in done.sites] == [
        ("dense", "tensor subclass", "DTensor")
    ]
    assert done.before == done.after


class MergedOverRanks(nn.Module):
    """Ring attention in its own words: partial results are merged by their log-sum-exp."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4).unbind(0)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        parts = [attend(q, a, b) for a, b in zip(k.chunk(2, 2), v.chunk(2, 2), strict=True)]
        lse = torch.stack([part[1] for part in parts])
        weights = lse.softmax(0)[..., None]
        return sum(weight * part[0] for weight, part in zip(weights, parts, strict=True))


@torch.no_grad()
def test_results_merged_by_their_lse():
    done = run_pass(MergedOverRanks(), (torch.randn(1, 64, 64),))
    assert [site.decision for site in done.sites] == ["dense", "dense"]
    assert {site.reason for site in done.sites} == {"its log-sum-exp is used elsewhere"}
    assert done.before == done.after


# Export


def test_export_is_left_alone():
    """Also of a model that was compiled before: the backend has no part in it."""
    model, x = Stack(2), tokens()
    torch.compile(model, backend="fgattn", options={**EXACT, "fgattn.inner": "eager"})(x)
    program = torch.export.export(model, (x,))
    assert not [n for n in program.graph.nodes if "fgattn" in str(n.target)]


def test_rewrite_an_exported_program():
    model, x = Stack(2), tokens()
    gm = torch.export.export(model, (x,)).module()
    report = fg_inductor.rewrite(gm, EXACT)
    assert [(row.site.decision, row.kernel) for row in report] == [("rewritten", "reference")] * 2
    torch.testing.assert_close(gm(x), model(x))
    again = torch.export.export(gm, (x,))
    assert len([n for n in again.graph.nodes if n.target is torch.ops.fgattn.attention.default]) == 2
    torch.testing.assert_close(again.module()(x), model(x))


def test_rewrite_exported_attention_by_hand_of_any_length():
    class Block(SelfAttention):
        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
            return by_hand(q, k, v).transpose(1, 2).flatten(2)

    model, x = Block(), tokens()
    program = torch.export.export(model, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=32, max=512)},))
    gm = program.module()
    assert fg_inductor.rewrite(gm, EXACT).rewritten == 1
    for length in (64, 200):
        y = tokens(length)
        torch.testing.assert_close(gm(y), model(y))


@pytest.mark.parametrize(
    ("argument", "options", "error", "message"),
    [
        (Stack(1), None, TypeError, "takes a torch.fx.GraphModule, got Stack; export or trace it first"),
        (torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), None, TypeError, r"pass program\.module\(\)"),
        (None, {"fgattn.dentisy": 1}, ValueError, "did you mean"),
        (None, {"max_autotune": True}, ValueError, "max_autotune would have no effect"),
        (None, {**SHORT, "fgattn.strict": True}, RuntimeError, "can't be rewritten"),
        (None, {"fgattn.mask": "observed"}, ValueError, "neither steps nor state"),
        (None, {"fgattn.dense_first": 0.2}, ValueError, "neither steps nor state"),
    ],
    ids=["module", "program", "unknown option", "option of Inductor", "strict", "observed", "dense first"],
)
def test_rewrite_refuses(argument, options, error, message):
    if argument is None:
        argument = torch.export.export(SelfAttention(dropout_p=0.1), (tokens(),)).module()
    with pytest.raises(error, match=message):
        fg_inductor.rewrite(argument, options)


# Beside the rewrite


def test_inference_tensors():
    """Made under inference mode, used outside of it."""
    model = Stack(1).requires_grad_(False)
    with torch.inference_mode():
        x = tokens()
    compiled = torch.compile(model, backend="fgattn", options={**EXACT, "fgattn.inner": "aot_eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert fg_inductor.report().rewritten == 1


def test_a_deep_copy_of_a_compiled_model():
    model, x = Stack(1), tokens()
    compiled = torch.compile(model, backend="fgattn", options={**EXACT, "fgattn.inner": "aot_eager"})
    expected = compiled(x)
    torch.testing.assert_close(copy.deepcopy(compiled)(x), expected)
