"""Reduce an attention mask that says the same to every query and head to one bias (or bool) per key, [B, Sk]."""

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fg_inductor.passes.graph import CASTS, call, known, name, names, same, shape_text, size_of, value
from fg_inductor.passes.program import Program

# An element of the result depends on the elements of the inputs at its own place alone.
ELEMENTWISE = CASTS | names(
    "masked_fill where mul add sub rsub truediv div neg logical_not invert and_ or_ eq ne gt ge lt le"
)


def refusal(program: Program, mask, q: Node, k: Node) -> tuple[str, str] | None:
    """None for a key mask, else a reason and a detail. The mask's dimensions are read as SDPA broadcasts them."""
    x, reason = value(mask), "mask is not a key mask"
    if not isinstance(x, Tensor):
        return reason, f"it is {mask!r}, not a tensor"
    if x.requires_grad:
        return "mask needs gradients", ""
    shape = shape_text(x)
    if not 2 <= x.dim() <= 4:
        return reason, f"shape {shape}"
    for dim, what in ((2, "query"), (3, "head")):
        if x.dim() >= dim and not _is_uniform(program, mask, x.dim() - dim):
            return reason, f"shape {shape}, it may differ from {what} to {what}"
    for dim, size in ((1, value(k).shape[2]), (4, value(q).shape[0])):
        if x.dim() >= dim and not (known(x.shape[-dim] == 1) or same(x.shape[-dim], size)):
            return reason, f"shape {shape}, which is not provably 1 or {size} in dimension {-dim}"
    return None


def key_bias(graph: Graph, mask: Node, q: Node, k: Node, origin: Node) -> Node:
    """Insert the nodes that make [B, Sk] of a mask without a refusal: views of it."""
    # Queries, then heads: each is the dimension before the keys when its turn comes.
    for _ in range(min(value(mask).dim(), 3) - 1):
        mask = call(graph, torch.ops.aten.select.int, (mask, -2, 0), origin)
    sizes = (value(q).shape[0], value(k).shape[2])
    if value(mask).dim() == 2 and all(map(same, value(mask).shape, sizes)):
        return mask
    sizes = [size_of(graph, q, 0, origin), size_of(graph, k, 2, origin)]
    return call(graph, torch.ops.aten.expand.default, (mask, sizes), origin)


def _is_uniform(program: Program, node: Node, dim: int) -> bool:
    """Whether a tensor provably holds the same all along a dimension: of size 1, or expanded or repeated from it."""
    x = value(node)
    if known(x.shape[dim] == 1) or same(x.stride(dim), 0):
        return True
    method, inputs = name(node), [y for y in program.inputs(node) if isinstance(value(y), Tensor)]
    if not inputs or program.is_written(node):
        return False
    if method in ("repeat", "repeat_interleave"):
        return value(inputs[0]).dim() == x.dim() and known(value(inputs[0]).shape[dim] == 1)
    if method in ("view", "reshape", "unflatten"):
        return dim == 1 and not program.is_written(inputs[0]) and _splits_repeat(inputs[0], x)
    if method not in ELEMENTWISE:
        return False
    places = [(y, dim - x.dim() + value(y).dim()) for y in (inputs[:1] if method in CASTS else inputs)]
    return all(place < 0 or _is_uniform(program, y, place) for y, place in places)


def _splits_repeat(repeated: Node, x: Tensor) -> bool:
    """[B, ...] -> repeat_interleave(H, dim=0) -> view [B, H, ...]: how diffusers gives each head its mask."""
    if name(repeated) != "repeat_interleave":
        return False
    batch = value(repeated.all_input_nodes[0]).shape[0]
    return same(x.shape[0], batch) and same(value(repeated).shape[0], batch * x.shape[1])
