"""Attention through other operators than SDPA: FlashAttention's, xformers', ATen's own kernels, SDPA of three
dimensions. Each is recognised by its name and read by its schema.

An argument that changes the result and that SDPA does not have (a window, a soft cap, a page table, ...) is a reason to
leave the site. Packed sequences (``cu_seqlens``) are rewritten where the graph says that all are equally long.
FlexAttention is reported and left: its masks and scores are programs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fg_inductor.passes.graph import name, names, same, value
from fg_inductor.passes.program import written
from fg_inductor.passes.stand_in import SDPA, Form, Unknown, heads_of, sdpa_arguments

BSHD, BHSD = [0, 2, 1, 3], [0, 1, 2, 3]


@dataclass(frozen=True)
class Operator:
    """order: of the dimensions of its tensors that makes them BHSD; lengths: its arguments ``cu_seqlens``."""

    order: list[int]
    lengths: tuple[str, str] | None = None


OPERATORS = {
    "flash_attn::_flash_attn_forward": Operator(BSHD),
    "flash_attn::_flash_attn_varlen_forward": Operator(BSHD, ("cu_seqlens_q", "cu_seqlens_k")),
    "flash_attn_3::_flash_attn_forward": Operator(BSHD, ("cu_seqlens_q", "cu_seqlens_k")),
    "_diffusers_flash_attn_3::_flash_attn_forward": Operator(BSHD),
    "xformers_flash::flash_fwd": Operator(BSHD, ("cu_seqlens_q", "cu_seqlens_k")),
    "xformers_flash3::flash_fwd": Operator(BSHD, ("cu_seqlens_q", "cu_seqlens_k")),
    "xformers::efficient_attention_forward_cutlass": Operator(BSHD, ("cu_seqlens_q", "cu_seqlens_k")),
    "aten::_flash_attention_forward": Operator(BSHD, ("cum_seq_q", "cum_seq_k")),
    "aten::_efficient_attention_forward": Operator(BSHD, ("cu_seqlens_q", "cu_seqlens_k")),
    "aten::_scaled_dot_product_flash_attention": Operator(BHSD),
    "aten::_scaled_dot_product_efficient_attention": Operator(BHSD),
    "aten::_scaled_dot_product_cudnn_attention": Operator(BHSD),
    "aten::_scaled_dot_product_flash_attention_for_cpu": Operator(BHSD),
}
FLEX = names("flex_attention")
CALLS = FLEX | {"scaled_dot_product_attention", *(full_name.partition("::")[2] for full_name in OPERATORS)}
TENSORS = (("q", "query"), ("k", "key"), ("v", "value"))
SCALES = ("softmax_scale", "scale")
CAUSAL = ("causal", "is_causal")
DROPOUT = ("dropout_p", "p")
MASKS = ("bias", "attn_bias", "attn_mask")
# Arguments that leave the result as it is, whatever they are.
IGNORED = {
    "return_softmax", "return_debug_mask", "compute_log_sumexp", "compute_logsumexp", "max_seqlen_q", "max_seqlen_k",
    "max_q", "max_k", "num_splits", "pack_gqa", "sm_margin", "deterministic", "zero_tensors", "scheduler_metadata",
    "rotary_interleaved",
}  # fmt: skip
WINDOWS = {"window_size_left", "window_size_right", "window_left", "window_right", "window_size"}


def find(calls: list[Node]) -> Iterator[Form | Unknown]:
    """Each such call, of the CALLS in a graph."""
    for node in calls:
        if node.target is SDPA:
            if form := _folded_sdpa(node):
                yield form
        elif name(node) in FLEX:
            yield Unknown(node, "flex attention", "its mask is a program of its own")
        elif (overload := _overload(node.target)) and (operator := OPERATORS.get(overload._schema.name)):
            yield _match(node, overload, operator)


def _overload(target) -> torch._ops.OpOverload | None:
    if isinstance(target, torch._ops.OpOverloadPacket):
        return getattr(target, "default", None)
    return target if isinstance(target, torch._ops.OpOverload) else None


def _match(node: Node, overload: torch._ops.OpOverload, operator: Operator) -> Form | Unknown:
    full_name = overload._schema.name
    arguments = {a.name: a.default_value for a in overload._schema.arguments}
    arguments |= dict(zip(arguments, node.args, strict=False)) | node.kwargs
    taken: set[str] = set()

    def take(*names: str, default=None):
        found = next((x for x in names if x in arguments), None)
        taken.add(found)
        return default if found is None else arguments[found]

    q, k, v = (take(*names) for names in TENSORS)
    if isinstance(value(node), Tensor):
        outs, others = [node], []
    else:
        parts = [user for user in node.users if name(user) == "getitem"]
        outs = [part for part in parts if part.args[1] == 0]
        others = [user for user in node.users if user not in outs and user.users]
    tensors = [value(x) for x in (q, k, v)]
    if not outs or not all(isinstance(x, Tensor) for x in tensors):
        return Unknown(node, "its result is not used as attention", full_name)
    refused = None
    if len(outs) > 1 or others:
        refused = ("its log-sum-exp is used elsewhere", f"of {full_name}")
    mask = take(*MASKS)
    fields = {
        "scale": take(*SCALES), "is_causal": take(*CAUSAL, default=False), "dropout_p": take(*DROPOUT, default=0.0),
        "enable_gqa": not same(tensors[0].shape[-2 if operator.order is BSHD else 1], tensors[1].shape[
            -2 if operator.order is BSHD else 1]),
    }  # fmt: skip
    lengths = [take(x) for x in operator.lengths or ()]
    if any(x is not None for x in lengths):
        fields["sequences"] = _sequences(lengths, tensors[:2])
        if fields["sequences"] is None:
            return Unknown(node, "packed sequences", f"{full_name}: their lengths are not known to be equal")
    elif any(x.dim() != 4 for x in tensors):
        return Unknown(node, "not 4-D", full_name)
    for argument, x in arguments.items():
        neutral = x is None or x is False or (x == -1 if argument in WINDOWS else not isinstance(x, Node) and x == 0)
        if argument not in IGNORED and argument not in taken and not neutral:
            refused = refused or (f"{full_name} with {argument}", "" if isinstance(x, Node) else str(x))
    if written(node):
        refused = refused or ("its result is written in place", full_name)
    own = [node, *(user for user in node.users if user not in outs and user not in others)]
    kinds = {"kept" if value(mask).dtype == torch.bool else "masks": [mask]} if isinstance(value(mask), Tensor) else {}
    if "masks" in kinds:
        kinds["masks"] = [(mask, 1.0)]
    return Form(
        full_name, outs[0], own if outs[0] is node else [*own, outs[0]], refused, q=(q, operator.order),
        k=(k, operator.order), v=(v, operator.order), out=operator.order, **fields, **kinds,
    )  # fmt: skip


def _sequences(lengths: list, tensors: list[Tensor]) -> int | None:
    """The number of equally long sequences that q and k [tokens, H, D] are packed from; None if that is not known."""
    starts = [_constant(x) for x in lengths]
    if any(x is None or x.dim() != 1 for x in starts) or any(x.dim() != 3 for x in tensors):
        return None
    batch = len(starts[0]) - 1
    if batch < 1 or len(starts[1]) != batch + 1:
        return None
    for start, x in zip(starts, tensors, strict=True):
        total = x.shape[0]
        if not isinstance(total, int) or total % batch or start.tolist() != list(range(0, total + 1, total // batch)):
            return None
    return batch


# Calls of which a small constant tensor, such as cu_seqlens, may be made.
CONSTANT = names(
    "tensor arange zeros ones full new_zeros new_ones new_tensor new_full cat cumsum to int long pad add mul"
)


def _constant(node, limit: int = 16) -> Tensor | None:
    """The value of a small tensor that is made of constants alone."""
    if not isinstance(node, Node) or limit == 0 or name(node) not in CONSTANT or not isinstance(value(node), Tensor):
        return None
    found: dict[Node, Tensor | None] = {x: _constant(x, limit - 1) for x in node.all_input_nodes}
    if any(x is None for x in found.values()) or "device" in str(node.kwargs.get("dtype", "")):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
    kwargs = {key: x for key, x in kwargs.items() if key != "device"}
    if node.op == "call_method":
        args = tuple(x for x in args if not isinstance(x, torch.device))
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def _folded_sdpa(node: Node) -> Form | None:
    """SDPA over [B * H, S, D], where the graph says what was folded."""
    arguments = sdpa_arguments(node)
    qkv = [arguments.pop(key) for key in ("query", "key", "value")]
    if not all(isinstance(value(x), Tensor) and value(x).dim() == 3 for x in (*qkv, node)):
        return None
    mask = arguments.pop("attn_mask")
    if heads_of(tuple(qkv), node) is None or (isinstance(value(mask), Tensor) and value(mask).dim() > 3):
        return None
    order = [0, 1, 2]
    kinds = {}
    if isinstance(value(mask), Tensor):
        kinds = {"kept": [mask]} if value(mask).dtype == torch.bool else {"masks": [(mask, 1.0)]}
    q, k, v = ((x, order) for x in qkv)
    return Form("SDPA of folded heads", node, [node], None, q=q, k=k, v=v, out=order, **arguments, **kinds)
