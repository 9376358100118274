"""Small models for tests: attention with its projections, and a tiny Wan; their gradients, and operator calls."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fg_inductor.testing import assert_l2_as_accurate, l2_error

# What makes the backend rewrite the short sequences of these models.
SHORT = {"fgattn.min_seq": 1, "fgattn.when": "always", "fgattn.slice": "16x8", "fgattn.quiet": True}
FEW = 8  # numbers whose errors are no measure of the error of one of them


class SelfAttention(nn.Module):
    """[B, S, heads * dim] -> the same. Matrix products and views only: Inductor has no C++ to compile for it."""

    def __init__(self, heads: int = 2, dim: int = 64, **sdpa: Any):
        super().__init__()
        self.heads, self.sdpa = heads, sdpa
        width = heads * dim
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=width**-0.5)  # keeps norms: attention stays far from uniform

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(query=q, key=k, value=v, **self.sdpa)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """``layers`` SelfAttention in a row, each called as ``call(block, x)``: a checkpoint, say."""

    def __init__(self, layers: int = 2, call: Callable[[nn.Module, Tensor], Tensor] | None = None, **attention: Any):
        super().__init__()
        self.blocks = nn.ModuleList(SelfAttention(**attention) for _ in range(layers))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.call is None else self.call(block, x)
        return x


def tokens(length: int = 128, batch: int = 1, width: int = 128, **kwargs: Any) -> Tensor:
    """Normal input [batch, length, width] of the models above."""
    return torch.randn(batch, length, width, **kwargs)


def tiny_wan(layers: int = 2) -> nn.Module:
    """diffusers' Wan with 2 heads of 64."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=64, num_layers=layers, rope_max_seq_len=32,
    )  # fmt: skip


def wan_inputs(frames: int = 3, height: int = 8, width: int = 12, text: int = 8, batch: int = 1) -> dict[str, Any]:
    """Keyword arguments for ``tiny_wan``: frames x height/2 x width/2 video tokens, and ``text`` text tokens."""
    return {
        "hidden_states": torch.randn(batch, 4, frames, height, width),
        "timestep": torch.rand(batch) * 1000,
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "return_dict": False,
    }


def gradients(model: nn.Module, run: Callable, inputs: dict[str, Any]) -> list[Tensor]:
    """The output of ``run(**inputs)``, and the gradients of its mean square to parameters and floating inputs."""
    leaves = {
        name: x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    model.zero_grad()
    out = run(**leaves)
    out = out[0] if isinstance(out, tuple) else out
    out.float().square().mean().backward()
    tensors = (*model.parameters(), *(x for x in leaves.values() if isinstance(x, Tensor)))
    return [out.detach(), *(x.grad.clone() for x in tensors if x.grad is not None)]


def assert_as_accurate_as_eager(model: nn.Module, run: Callable, inputs: dict[str, Any]) -> None:
    """Output and gradients of ``run``, which computes with the parameters of ``model``, are as near to those of the
    model in float64 as those of the eager model are, under the ambient autocast.

    One number may be right to the last bit in plain PyTorch by chance: results of few numbers, such as the gradient of
    a timestep, are given the largest relative error that the eager model has in any of them.
    """
    plain, actual = gradients(model, model, inputs), gradients(model, run, inputs)
    double = {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    with torch.autocast("cpu", enabled=False):
        exact_model = copy.deepcopy(model).double()
        exact = gradients(exact_model, exact_model, double)
    assert len(actual) == len(plain) == len(exact)
    exact = [x.double() for x in exact]
    worst = max(map(l2_error, plain, exact))
    for i, results in enumerate(zip(actual, plain, exact, strict=True)):
        known = worst if exact[i].numel() < FEW else 0.0
        assert_l2_as_accurate(*results, label=f"result {i}", plain_error=known)


def count_calls(run: Callable[[], Any]) -> dict[str, int]:
    """How often ``run()`` calls each operator of ours, name -> count, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as events:
        run()
    prefix = "fgattn::"
    return {e.key.removeprefix(prefix): e.count for e in events.key_averages() if e.key.startswith(prefix)}
