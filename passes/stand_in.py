"""SDPA that stands in for attention written otherwise, so that one set of rules decides on all of it.

The stand-in is inserted before the pass looks at the graph, beside the code that it stands for. Where the site is
rewritten, that code is erased; where it is not, the stand-in is, and the graph is as the user wrote it.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fg_inductor.passes.graph import (
    CASTS,
    VALUE_KEYS,
    call,
    fake_mode,
    is_contiguous,
    is_viewed,
    name,
    names,
    permutation,
    same,
    value,
)

aten = torch.ops.aten
SDPA = torch._C._nn.scaled_dot_product_attention
DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@dataclass(frozen=True)
class StandIn:
    """One stand-in.

    sdpa      the call that the pass decides on
    form      how the attention was written, for the report: "matmul, softmax, matmul"
    original  the node whose uses the result took over
    result    the node that took them over: sdpa, or what restores the layout and dtype behind it
    added     the nodes inserted, in order
    dead      the nodes that nobody needs once the site is rewritten, in order, original last
    refused   (reason, detail) why the site must stay dense, if the form already says so
    """

    sdpa: Node
    form: str
    original: Node
    result: Node
    added: tuple[Node, ...]
    dead: tuple[Node, ...]
    refused: tuple[str, str] | None = None

    def keep(self) -> None:
        """The site was rewritten: erase what it stood for."""
        for node in reversed(self.dead):
            if not node.users:
                node.graph.erase_node(node)

    def take_out(self) -> None:
        """The site stays dense: erase the stand-in."""
        self.result.replace_all_uses_with(self.original)
        for node in reversed(self.added):
            node.graph.erase_node(node)


@dataclass(frozen=True)
class Unknown:
    """Attention, to all appearance, of which nothing can stand in: a node of it, and why."""

    node: Node
    reason: str
    detail: str


@dataclass
class Insertion:
    """What a matcher found: where a stand-in goes; its subclasses build it.

    form       how the attention was written
    original   the node whose uses the stand-in takes over
    dead       the nodes that the original consists of, in order
    refused    (reason, detail) why the site must stay dense, if the form already says so
    """

    form: str
    original: Node
    dead: list[Node]
    refused: tuple[str, str] | None

    def insert(self) -> StandIn:
        """Put the stand-in before the original."""
        graph, before = self.original.graph, self.original.prev
        try:
            with graph.inserting_before(self.original):
                sdpa, result = self.build(graph)
        except Exception:
            for node in reversed(_between(before, self.original)):
                graph.erase_node(node)
            raise
        self.original.replace_all_uses_with(result)
        added = _between(before, self.original)
        return StandIn(sdpa, self.form, self.original, result, tuple(added), tuple(self.dead), self.refused)

    def build(self, graph: Graph) -> tuple[Node, Node]:
        """Insert the nodes; (SDPA, what takes the place of the original)."""
        raise NotImplementedError


@dataclass
class Form(Insertion):
    """Attention of q, k and v that lie in the graph, each [..., S, D] once its dimensions are in the given order.

    q, k, v    (node, order of its dimensions); batch dimensions first, tokens and channels last
    out        order of the dimensions of SDPA's result that gives the original's
    scale      what the scores are multiplied by; None: SDPA's default
    masks      (tensor, factor): added to the scores
    kept       conditions that are True where a key is kept; dropped: where it is masked
    dtype      what q, k and v are cast to, if they are not as attention must have them
    sequences  packed sequences of equal length, [sequences * S, H, D]: their number
    """

    q: tuple[Node, list[int]]
    k: tuple[Node, list[int]]
    v: tuple[Node, list[int]]
    out: list[int]
    scale: object = None
    masks: list[tuple[Node, float]] = field(default_factory=list)
    kept: list[Node] = field(default_factory=list)
    dropped: list[Node] = field(default_factory=list)
    dropout_p: object = 0.0
    is_causal: object = False
    enable_gqa: object = False
    dtype: torch.dtype | None = None
    sequences: int | None = None

    def build(self, graph: Graph) -> tuple[Node, Node]:
        origin, heads = self.original, None
        q, k, v = (self._operand(graph, *x) for x in (self.q, self.k, self.v))
        rank = value(q).dim()
        if rank == 3:
            heads = heads_of((q, k, v), origin)
        if heads is not None:
            q, k, v = (_unfold(graph, x, heads, origin) for x in (q, k, v))
        mask = self._mask(graph, heads)
        kwargs = {"attn_mask": mask, "dropout_p": self.dropout_p, "is_causal": self.is_causal, "scale": self.scale}
        dtype = self.dtype or value(origin).dtype
        sdpa = sdpa_call(graph, (q, k, v), kwargs | {"enable_gqa": self.enable_gqa}, origin, dtype)
        result = sdpa
        if heads is not None:
            # As reshape, whatever the strides of the rewritten result.
            result = call(graph, aten.flatten.using_ints, (result, 0, 1), origin)
        if self.out != list(range(rank)):
            result = call(graph, aten.permute.default, (result, self.out), origin)
        if self.sequences is not None:
            result = call(graph, aten.flatten.using_ints, (result, 0, 1), origin)
        if value(origin).dtype != dtype:
            result = call(graph, aten.to.dtype, (result, value(origin).dtype), origin)
        return sdpa, as_original(graph, sdpa, result, origin)

    def _operand(self, graph: Graph, node: Node, order: list[int]) -> Node:
        if self.sequences is not None:
            node = call(graph, aten.unflatten.int, (node, 0, [self.sequences, -1]), self.original)
        node = permuted(graph, node, order, self.original)
        return node if self.dtype is None else call(graph, aten.to.dtype, (node, self.dtype), self.original)

    def _mask(self, graph: Graph, heads: tuple[int, int] | None) -> Node | None:
        def read(mask: Node) -> Node:
            return _unfold(graph, mask, heads, self.original) if heads and value(mask).dim() == 3 else mask

        masks = [(read(mask), factor) for mask, factor in self.masks]
        kept, dropped = ([read(mask) for mask in masks] for masks in (self.kept, self.dropped))
        return combined_mask(graph, masks, kept, dropped, self.original)


def combined_mask(graph: Graph, masks, kept, dropped, origin: Node) -> Node | None:
    """One mask of the sum of ``masks`` (tensor, factor) and of the conditions where keys are kept and dropped."""
    bools = floats = None
    for mask, factor in masks:
        if factor != 1:
            mask = call(graph, aten.mul.Scalar, (mask, factor), origin)
        floats = mask if floats is None else call(graph, aten.add.Tensor, (floats, mask), origin)
    for mask in (*kept, *(call(graph, aten.logical_not.default, (x,), origin) for x in dropped)):
        bools = mask if bools is None else call(graph, aten.logical_and.default, (bools, mask), origin)
    if bools is None or floats is None:
        return bools if floats is None else floats
    return call(graph, aten.where.ScalarOther, (bools, floats, -torch.inf), origin)


def sdpa_arguments(node: Node) -> dict[str, object]:
    """The arguments of a call of SDPA by name, however they were written."""
    return DEFAULTS | dict(zip(("query", "key", "value", *DEFAULTS), node.args, strict=False)) | node.kwargs


def sdpa_call(graph: Graph, qkv: tuple[Node, Node, Node], kwargs: dict, origin: Node, dtype: torch.dtype) -> Node:
    """Insert SDPA. Its value is not computed: it may have arguments that SDPA refuses and the site does, too."""
    sdpa = graph.call_function(SDPA, qkv, kwargs)
    q, _, v = map(value, qkv)
    _annotate(sdpa, origin, lambda: q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype))
    return sdpa


def as_original(graph: Graph, sdpa: Node, result: Node, origin: Node) -> Node:
    """``result`` with contiguous elements, where the original has them and a view is taken of it."""
    if result is sdpa or not (is_contiguous(value(origin)) and is_viewed(origin)):
        return result
    return call(graph, aten.clone.default, (result,), origin, memory_format=torch.contiguous_format)


def _between(first: Node, last: Node) -> list[Node]:
    found, node = [], first.next
    while node is not last:
        found.append(node)
        node = node.next
    return found


def _annotate(node: Node, origin: Node, make: Callable[[], Tensor]) -> None:
    """Metadata of a node whose value is not computed by calling it."""
    node.meta = {key: x for key, x in origin.meta.items() if key in ("nn_module_stack", "stack_trace", "custom")}
    key = next((key for key in VALUE_KEYS if key in origin.meta), VALUE_KEYS[0])
    with fake_mode(origin) or contextlib.nullcontext():
        node.meta[key] = make()


def permuted(graph: Graph, node: Node, order: list[int], origin: Node) -> Node:
    """``node`` with its dimensions in another order: the tensor behind its transposes, if that has it."""
    source, through = node, order
    while (step := permutation(source)) is not None:
        source, through = source.args[0], [step[d] for d in through]
        if through == list(range(len(through))):
            return source
    if order == list(range(len(order))):
        return node
    return call(graph, aten.permute.default, (source, through), origin)


# Heads folded into the batch: [B * H, S, D]


def heads_of(tensors: tuple[Node, ...], out: Node) -> tuple[int, int] | None:
    """(batch, heads) that were folded into the first dimension: seen where they were folded, or unfolded again."""
    total = value(out).shape[0]
    around = [node for x in tensors for node in _folded_from(x)] + _unfolded_to(out)
    for node in around:
        batch, heads = value(node).shape[:2]
        # A static number of heads; the batch follows.
        if isinstance(heads, int) and same(batch * heads, total):
            return (batch if isinstance(batch, int) else -1), heads
    return None


FOLDS = names("view reshape flatten _unsafe_view")
UNFOLDS = names("view reshape unflatten")
# What may stand between the fold and the attention; a projection may not: it makes tokens of frames what it folds.
BETWEEN = CASTS | names("mul truediv div transpose permute swapaxes swapdims getattr mT")


def _folded_from(node: Node) -> list[Node]:
    """The 4-D tensor whose first two dimensions a reshape folded, behind casts, scales and transposes."""
    while (source := _first_tensor(node)) is not None and value(node).dim() == 3:
        if name(node) in FOLDS and value(source).dim() == 4:
            return [source] if _same_matrices(source, node) else []
        if name(node) not in BETWEEN:
            return []
        node = source
    return []


def _unfolded_to(node: Node) -> list[Node]:
    """The 4-D tensors that reshapes make of a folded result."""
    found = []
    for user in node.users:
        if not isinstance(value(user), Tensor) or _first_tensor(user) is not node:
            continue
        if name(user) in UNFOLDS and value(user).dim() == 4 and _same_matrices(user, node):
            found.append(user)
        elif name(user) in CASTS:
            found += _unfolded_to(user)
    return found


def _first_tensor(node: Node) -> Node | None:
    source = node.args[0] if node.op.startswith("call") and node.args else None
    return source if isinstance(value(source), Tensor) and isinstance(value(node), Tensor) else None


def _same_matrices(a: Node, b: Node) -> bool:
    return all(map(same, value(a).shape[-2:], value(b).shape[-2:]))


def _unfold(graph: Graph, node: Node, heads: tuple[int, int], origin: Node) -> Node:
    """[B * H, S, D] -> [B, H, S, D]; the tensor that was folded, if it is at hand. A mask of one batch has one head."""
    if same(value(node).shape[0], 1):
        return call(graph, aten.unsqueeze.default, (node, 0), origin)
    if name(node) in FOLDS and (source := _folded_from(node)) and same(value(source[0]).shape[1], heads[1]):
        return source[0]
    return call(graph, aten.unflatten.int, (node, 0, list(heads)), origin)
