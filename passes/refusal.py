"""Which sites stay dense, and why: the reasons are counter keys, so a reason never holds a number."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fg_inductor.kernels.checks import DTYPES, HEAD_DIMS
from fg_inductor.passes import key_mask, provenance
from fg_inductor.passes.graph import known, name, same, shape_text, value
from fg_inductor.passes.layout import Layout
from fg_inductor.passes.program import Program
from fg_inductor.passes.stand_in import sdpa_arguments


@dataclass(frozen=True)
class Call:
    """The arguments of one call of scaled-dot-product attention, by name however they were written."""

    node: Node
    query: Node
    key: Node
    value: Node
    attn_mask: Node | None
    dropout_p: Any
    is_causal: Any
    scale: Any
    enable_gqa: Any

    @classmethod
    def of(cls, node: Node) -> "Call":
        return cls(node, **sdpa_arguments(node))

    @property
    def tensors(self) -> tuple[Any, Any, Any]:
        """The fake values of q, k and v."""
        return value(self.query), value(self.key), value(self.value)

    @property
    def factor(self) -> float:
        """What the scores are multiplied by."""
        return 1 / math.sqrt(self.tensors[0].shape[3]) if self.scale is None else float(self.scale)


@dataclass(frozen=True)
class Refusal:
    """Why a site stays dense; ``video``: although it is long self attention, as over a video."""

    reason: str
    detail: str = ""
    video: bool = False


def refusal(
    call: Call, kind: str, program: Program, layout: Layout, settings, written: tuple[str, str] | None = None
) -> Refusal | None:
    """None if the site can be rewritten, else the first of the reasons not to.

    ``written``: the reason and detail that lie in how attention was written, where it was not as SDPA.
    """
    if settings.mask == "dense":
        return Refusal("fgattn.mask is 'dense'")
    if found := _not_video(call, kind, program, layout, settings):
        return Refusal(*found)
    if found := written or _unsupported(call, kind, program, layout):
        return Refusal(*found, video=not known(call.tensors[0].shape[1] == 1))  # one head: a VAE
    return None


def _not_video(call: Call, kind: str, program: Program, layout: Layout, settings) -> tuple[str, ...] | None:
    q, k, v = call.tensors
    if not all(isinstance(x, Tensor) for x in (q, k, v)):
        return ("no shapes in the graph",)
    if any(x.dim() != 4 for x in (q, k, v)):
        return "not 4-D", f"query {shape_text(q)}"
    if kind == "cross":
        return ("cross attention",)
    if call.is_causal:
        return ("causal",)
    if provenance.is_convolutional(program, call.query):
        return ("convolutional projections",)
    if layout.is_folded(call.query):
        return "factorised attention", f"frames or positions are folded into the batch of {q.shape[0]}"
    if any(known(x.shape[2] < settings.min_seq) for x in (q, k)):
        return "shorter than min_seq", f"{q.shape[2]} queries, {k.shape[2]} keys, fgattn.min_seq={settings.min_seq}"
    if kind == "unknown" and not same(q.shape[2], k.shape[2]):
        return "no projection in the graph", "self and cross attention can't be told apart by different lengths"
    if kind == "unknown" and not all(program.is_data(x) for x in (call.query, call.key)):
        return "cross attention", "queries or keys are parameters"
    return None


def _unsupported(call: Call, kind: str, program: Program, layout: Layout) -> tuple[str, ...] | None:
    q, k, v = call.tensors
    if _context_parallel():
        return "context parallel", "ring attention needs the dense operator"
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in (q, k, v)):
        return ("inside a torch.func transform",)
    for x in (q, k, v):
        if is_traceable_wrapper_subclass(x) or x.is_nested:
            return "tensor subclass", type(x).__name__
    if _in_autograd_function(call.node, program):
        return "inside an autograd.Function", "its backward is written for dense attention"
    if not same(q.shape[2], k.shape[2]) and any(not program.is_data(x.node) for x in layout.segments(call.key, 2)):
        return "learned keys", "beside those of the tokens"
    if kind == "unknown" and call.attn_mask is not None:
        return "no projection in the graph", "and there is a mask"
    if isinstance(call.dropout_p, Node) or call.dropout_p > 0:
        return "dropout", str(call.dropout_p)
    if not isinstance(call.scale, (int, float, type(None))):
        return ("scale is not a constant",)
    if found := _no_kernel(call):
        return found
    return None if call.attn_mask is None else key_mask.refusal(program, call.attn_mask, call.query, call.key)


def _no_kernel(call: Call) -> tuple[str, str] | None:
    q, k, v = call.tensors
    device, dtype = q.device.type, value(call.node).dtype
    if device not in ("cpu", "cuda"):
        return "device", device
    if dtype not in DTYPES and not (device == "cpu" and dtype == torch.float64):
        return "dtype", str(dtype)
    if not same(q.shape[3], v.shape[3]):
        return "head dims of q and v differ", f"{q.shape[3]} and {v.shape[3]}"
    dim = q.shape[3]
    if not isinstance(dim, int) or dim > max(HEAD_DIMS) or (device == "cuda" and dim not in HEAD_DIMS):
        return "head dim without a kernel", f"{dim}; there are {', '.join(map(str, HEAD_DIMS))}"
    batch = same(q.shape[0], k.shape[0]) and same(q.shape[0], v.shape[0])
    heads = same(k.shape[1], v.shape[1]) and (call.enable_gqa or same(q.shape[1], k.shape[1]))
    if not batch or not heads:  # of the lengths of k and v SDPA itself asks that they are equal
        return "q, k and v broadcast", ", ".join(map(shape_text, (q, k, v)))
    if any(known(size == 0) for x in (q, k) for size in x.shape):
        return "empty", shape_text(q)
    return None


def _context_parallel() -> bool:
    """Whether ``torch.distributed.tensor.experimental.context_parallel`` has taken SDPA over, by patching it."""
    return (getattr(F.scaled_dot_product_attention, "__module__", None) or "").startswith("torch.distributed")


def _in_autograd_function(node: Node, program: Program) -> bool:
    while caller := program.callers.get(node.graph):
        if name(caller) == "autograd_function_apply":
            return True
        node = caller
    return False
