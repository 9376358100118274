"""Reduce an attention mask that says the same to every query and head to one bias (or bool) per key, [B, Sk].

A mask of valid keys and valid queries, keys[b, j] & queries[b, i], is two such reductions: queries that are masked
attend to nothing, and their rows of the result are zero. What a mask was expanded or repeated from is read in its
place, so that the rewritten graph never builds a mask of queries by keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fg_inductor.passes.graph import (
    CASTS,
    call,
    known,
    name,
    names,
    permutation,
    repeat_call,
    same,
    shape_text,
    size_of,
    value,
)
from fg_inductor.passes.program import Program

aten = torch.ops.aten
# An element of the result depends on the elements of the inputs at its own place alone.
ELEMENTWISE = CASTS | names(
    "masked_fill where mul add sub rsub truediv div neg logical_not invert bitwise_not and_ or_ bitwise_and bitwise_or "
    "logical_and logical_or __and__ eq ne gt ge lt le"
)
NEGATIONS = names("logical_not invert bitwise_not")
CONJUNCTIONS = names("and_ bitwise_and logical_and __and__ mul")
RESHAPES = names("view reshape unflatten flatten squeeze")
REASON = "mask is not a key mask"
ROLES = ("batch", "head", "query", "key")


@dataclass(frozen=True)
class _Mask:
    """A tensor and which of its dimensions are batch, head, query and key; None where it has none and broadcasts."""

    node: Node
    dims: tuple[int | None, int | None, int | None, int | None]

    @classmethod
    def of(cls, node: Node) -> "_Mask":
        """As SDPA broadcasts it."""
        rank = value(node).dim()
        return cls(node, tuple(dim if dim >= 0 else None for dim in range(rank - 4, rank)))

    def dim(self, role: str) -> int | None:
        return self.dims[ROLES.index(role)]

    def mapped(self, node: Node, targets: dict[int, int | None]) -> "_Mask":
        """``node``, whose dimension ``targets[d]`` is this one's d."""
        return _Mask(node, tuple(None if dim is None else targets.get(dim) for dim in self.dims))


def refusal(program: Program, mask, q: Node, k: Node) -> tuple[str, str] | None:
    """None for a mask of keys, or of keys and queries; else a reason and a detail."""
    x = value(mask)
    if not isinstance(x, Tensor):
        return REASON, f"it is {mask!r}, not a tensor"
    if x.requires_grad:
        return "mask needs gradients", ""
    shape = shape_text(x)
    if not 2 <= x.dim() <= 4:
        return REASON, f"shape {shape}"
    whole = _Mask.of(mask)
    if not _is_uniform(program, whole, "head"):
        return REASON, f"shape {shape}, it may differ from head to head"
    if _terms(program, whole) is None:
        return REASON, f"shape {shape}, it may differ from query to query"
    sizes = {1: value(k).shape[2], 2: value(q).shape[2], 4: value(q).shape[0]}
    for dim, size in sizes.items():
        if x.dim() >= dim and not (known(x.shape[-dim] == 1) or same(x.shape[-dim], size)):
            return REASON, f"shape {shape}, which is not provably 1 or {size} in dimension {-dim}"
    return None


def reduce(graph: Graph, program: Program, mask: Node, q: Node, k: Node, origin: Node) -> tuple[Node, Node | None]:
    """Insert the nodes that make of a mask without a refusal: the bias [B, Sk]; and the valid queries [B or 1, Sq]."""
    terms = _terms(program, _Mask.of(mask))
    reads = {role: None for role in ("key", "query")}
    for role in reads:
        for term in terms[role]:
            part = _read(graph, program, term, role, origin)
            reads[role] = (
                part if reads[role] is None else call(graph, aten.logical_and.default, (reads[role], part), origin)
            )
    bias = reads["key"]
    sizes = (value(q).shape[0], value(k).shape[2])
    if bias is not None and not all(map(same, value(bias).shape, sizes)):
        nodes = [size_of(graph, q, 0, origin), size_of(graph, k, 2, origin)]
        bias = call(graph, aten.expand.default, (bias, nodes), origin)
    return bias, reads["query"]


# Terms: a mask as keys & queries


def _terms(program: Program, mask: _Mask) -> dict[str, list[_Mask]] | None:
    """The tensors whose conjunction is the mask: those that depend on the key alone, and on the query alone.

    None if the mask is none. A mask that depends on neither, or is added to the scores, is a term of the keys.
    """
    if not _is_uniform(program, mask, "head"):
        return None
    if _is_uniform(program, mask, "query"):
        return {"key": [mask], "query": []}
    if value(mask.node).dtype != torch.bool or program.is_written(mask.node):
        return None
    if _is_uniform(program, mask, "key"):
        return {"key": [], "query": [mask]}
    inputs, method = _inputs(program, mask), name(mask.node)
    if method in NEGATIONS and inputs and name(inputs[0].node) in NEGATIONS:
        inputs = _inputs(program, inputs[0])  # not (not x)
    elif method in ELEMENTWISE and method not in CONJUNCTIONS | CASTS:
        return None
    found = [_terms(program, x) if value(x.node).dtype == torch.bool else None for x in inputs]
    if not found or any(terms is None for terms in found):
        return None
    return {role: [x for terms in found for x in terms[role]] for role in ("key", "query")}


def _inputs(program: Program, mask: _Mask) -> list[_Mask]:
    """The tensors that each element of the mask is taken or computed from, with its dimensions in them; [] if unknown.

    None of them may change after the mask was made of it.
    """
    node, x, method = mask.node, value(mask.node), name(mask.node)
    tensors = [y for y in program.inputs(node) if isinstance(value(y), Tensor)]
    if not tensors or any(program.is_written(y) for y in (node, *tensors)):
        return []
    source = tensors[0]
    y = value(source)
    if (order := permutation(node)) is not None:
        return [mask.mapped(source, dict(enumerate(order)))]
    if method in CASTS:
        return [_Mask(source, mask.dims)]
    if method in ELEMENTWISE:
        shifts = [x.dim() - value(t).dim() for t in tensors]
        spans = [{dim: dim - shift if dim >= shift else None for dim in range(x.dim())} for shift in shifts]
        return [mask.mapped(t, span) for t, span in zip(tensors, spans, strict=True)]
    if method in ("expand", "repeat", "repeat_interleave", "expand_as"):
        shift = x.dim() - y.dim()
        copied = [d for d in range(shift, x.dim()) if not same(y.shape[d - shift], x.shape[d])]
        if not all(known(y.shape[d - shift] == 1) for d in copied):
            return []
        return [mask.mapped(source, {d: d - shift for d in range(shift, x.dim())})]
    if method in (*RESHAPES, "unsqueeze") or (method == "getitem" and _adds_dimensions(node)):
        targets = _without_ones(x.shape, y.shape)
        return [] if targets is None else [mask.mapped(source, targets)]
    return []


def _adds_dimensions(node: Node) -> bool:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is None or i is Ellipsis or i == slice(None) for i in index)


def _without_ones(shape, source) -> dict[int, int] | None:
    """Dimension -> dimension, where two shapes differ in sizes of 1 alone."""
    kept = [[d for d, size in enumerate(sizes) if not known(size == 1)] for sizes in (shape, source)]
    if len(kept[0]) != len(kept[1]) or not all(same(shape[a], source[b]) for a, b in zip(*kept, strict=True)):
        return None
    return dict(zip(*kept, strict=True))


def _is_uniform(program: Program, mask: _Mask, role: str) -> bool:
    """Whether the mask provably holds the same all along a dimension: of size 1, or expanded or repeated from it."""
    dim, x = mask.dim(role), value(mask.node)
    if dim is None or known(x.shape[dim] == 1) or same(x.stride(dim), 0):
        return True
    if _splits_repeat(program, mask.node) and dim == 1:
        return True
    inputs = _inputs(program, mask)
    return bool(inputs) and all(_is_uniform(program, y, role) for y in inputs)


def _splits_repeat(program: Program, node: Node) -> bool:
    """[B, ...] -> repeat_interleave(H, dim=0) -> view [B, H, ...]: how diffusers gives each head its mask."""
    if name(node) not in ("view", "reshape", "unflatten") or program.is_written(node):
        return False
    repeated, x = node.all_input_nodes[0], value(node)
    if name(repeated) != "repeat_interleave" or program.is_written(repeated):
        return False
    batch = value(repeated.all_input_nodes[0]).shape[0]
    return same(x.shape[0], batch) and same(value(repeated).shape[0], batch * x.shape[1])


# Reading


def _read(graph: Graph, program: Program, mask: _Mask, role: str, origin: Node) -> Node:
    """Insert the nodes that give [B or 1, S or 1] of a mask that depends on batch and ``role`` alone."""
    x, kept = value(mask.node), [mask.dim("batch"), mask.dim(role)]
    if any(not known(x.shape[d] == 1) for d in range(x.dim()) if d not in kept):
        inputs = _inputs(program, mask)
        if len(inputs) == 1 and name(mask.node) not in ELEMENTWISE:
            return _read(graph, program, inputs[0], role, origin)
        if inputs:
            parts = {y.node: _read(graph, program, y, role, origin) for y in inputs if value(y.node).dim() > 0}
            if name(mask.node) in CASTS:
                parts = {inputs[0].node: parts[inputs[0].node]}  # another input gives the dtype alone
            return repeat_call(graph, mask.node, parts, origin)
    node = mask.node
    for dim in reversed(range(x.dim())):
        if dim not in kept:
            node = call(graph, aten.select.int, (node, dim, 0), origin)
    if None not in kept and kept[0] > kept[1]:
        node = call(graph, aten.transpose.int, (node, 0, 1), origin)
    for place, dim in enumerate(kept):
        if dim is None:
            node = call(graph, aten.unsqueeze.default, (node, place), origin)
    return node
