"""What the dimensions of each tensor hold: sequences concatenated from segments, and tokens folded into the batch.

One forward pass over the graph. A concatenation of token sequences marks its dimension with the segments (text, video);
the marks follow the tokens through projections, norms, transposes, reshapes and attention, so that a site knows its
segments although the concatenation lies above the projection, or many layers above.
"""

import torch
from torch import Tensor
from torch.fx import Node

from fg_inductor.passes.graph import TRANSPOSES, Extent, argument, name, names, permutation, product, same, value
from fg_inductor.passes.program import Program

CATS = names("cat concat")
RESHAPES = names("view reshape flatten unflatten _unsafe_view squeeze unsqueeze view_as")
STARTS = RESHAPES | CATS  # what marks a dimension, or folds one
# The other operators keep the order of dimensions, and broadcast from the right.
MOVES = RESHAPES | TRANSPOSES | names("unbind select stack getitem")
LIKES = names("empty_like zeros_like ones_like full_like rand_like randn_like")
NEW_DIMENSIONS = names("stack expand repeat unsqueeze")
# Operators after which tokens stand elsewhere, or not all of them are left.
REORDERS = names("index_select gather take_along_dim index_copy index_put scatter flip roll sort argsort index narrow")


Shape = torch.Size


class Layout:
    """``segments(node, dim)`` and ``is_folded(node)`` for every node of a program."""

    def __init__(self, program: Program):
        self._marks: dict[Node, dict[int, tuple[Extent, ...]]] = {}
        self._folded: dict[Node, set[int]] = {}  # dimensions that count frames or positions beside the batch
        self._shapes: dict[Node, Shape] = {}
        marks, folded, laid_out = self._marks, self._folded, set()
        for node in program.nodes:
            # A tensor made to be filled (in-place rotary embeddings) is laid out as the one that it is made like.
            method = name(node)
            shaped = node.all_input_nodes if method in LIKES else program.inputs(node)
            if laid_out.isdisjoint(shaped) and method not in STARTS:
                continue  # most nodes; their shapes are not looked at
            if self._shape(node) is not None:
                shaped = shaped if method in RESHAPES else [x for x in shaped if x in laid_out]
                self._visit(node, method, [x for x in shaped if self._shape(x) is not None])
                if node in marks or node in folded:
                    laid_out.add(node)

    def segments(self, node: Node, dim: int) -> tuple[Extent, ...]:
        """The segments of a dimension in order; empty if it was not concatenated, or nothing is known of it."""
        return self._marks.get(node, {}).get(dim, ())

    def is_folded(self, node: Node) -> bool:
        """Whether the batch dimension counts frames or positions, by a reshape upstream: factorised attention."""
        return 0 in self._folded.get(node, ())

    def _shape(self, node: Node) -> Shape | None:
        """The shape of a node; of a tuple (chunk, split, unbind) that of the first part; None for other values."""
        shape = self._shapes.get(node)
        if shape is None:
            x = value(node)
            if isinstance(x, (tuple, list)):
                x = next((part for part in x if isinstance(part, Tensor)), None)
            if isinstance(x, Tensor):
                shape = self._shapes[node] = x.shape
        return shape

    def _visit(self, node: Node, method: str, inputs: list[Node]) -> None:
        shape = self._shape(node)
        marks = _concatenated(node) if method in CATS else {}
        folded: set[int] = set()
        for source in inputs:
            before, source_shape = self._folded.get(source), self._shape(source)
            if method not in REORDERS:
                for dim, segments in self._marks.get(source, {}).items():
                    target = _carried(node, method, dim, source_shape, shape)
                    if target is not None:
                        marks.setdefault(target, segments)
            if before or method in RESHAPES:
                folded |= _folds(source, node, method, before or set(), source_shape, shape)
        if marks:
            self._marks[node] = marks
        if folded:
            self._folded[node] = folded


def _folds(source: Node, node: Node, method: str, before: set[int], x: Shape, y: Shape) -> set[int]:
    """The dimensions of ``node`` that are folded, as its input ``source`` has it, in which ``before`` are."""
    if not x or not y:
        return set()
    folded = {_carried(node, method, dim, x, y) for dim in before} - {None}
    if same(x[0], y[0]):
        return folded | ({0} if 0 in before else set())
    # A reshape keeps the order of elements: a multiple of the batch counts something that came after it.
    multiple = method in RESHAPES and not _adds_dimension(source) and not same(x[0], 0)
    return folded | {0} if multiple and same(y[0] % x[0], 0) else folded


def _adds_dimension(node: Node) -> bool:
    """Whether the node put a dimension in that holds copies, or separate inputs (guidance), and no tokens."""
    if name(node) == "getitem":
        index = node.args[1]
        return index is None or (isinstance(index, tuple) and any(i is None for i in index))
    return name(node) in NEW_DIMENSIONS


def _concatenated(node: Node) -> dict[int, tuple[Extent, ...]]:
    parts, rank = argument(node, 0, "tensors"), value(node).dim()
    dim = argument(node, 1, "dim", "axis", default=0) % rank
    tensors = [value(part) for part in parts] if isinstance(parts, (tuple, list)) else []
    if len(tensors) < 2 or not all(isinstance(x, Tensor) and x.dim() == rank for x in tensors):
        return {}
    return {dim: tuple(Extent(x.shape[dim], part, dim) for x, part in zip(tensors, parts, strict=True))}


def _carried(node: Node, method: str, dim: int, x: Shape, y: Shape) -> int | None:
    """The dimension of ``node``, of shape ``y``, that holds the tokens of dimension ``dim`` of an input of shape ``x``,
    if one does."""
    target = _moved(node, method, dim, x, y) if method in MOVES else dim + len(y) - len(x)
    return target if target is not None and 0 <= target < len(y) and same(x[dim], y[target]) else None


def _moved(node: Node, method: str, dim: int, x: Shape, y: Shape) -> int | None:
    """Where ``node`` puts a dimension, whatever its size becomes."""
    rank = len(x)
    if (order := permutation(node)) is not None:
        return order.index(dim)
    if method in ("unbind", "select"):
        removed = argument(node, 1, "dim", default=0) % rank
        return None if removed == dim else dim - (removed < dim)
    if method == "stack":
        return dim + (argument(node, 1, "dim", default=0) % len(y) <= dim)
    if method in RESHAPES:
        before = product(x[:dim])
        return next((d for d in range(len(y)) if same(y[d], x[dim]) and same(product(y[:d]), before)), None)
    if method == "getitem" and isinstance(value(node.args[0]), Tensor):  # not the result of a child graph
        return _indexed(node.args[1], dim, rank)
    return dim + len(y) - rank


def _indexed(index, dim: int, rank: int) -> int | None:
    index = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, list) or isinstance(value(i), Tensor) for i in index):
        return None  # tokens are picked one by one
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index[at : at + 1] = [slice(None)] * (rank - sum(i is not None for i in index) + 1)
    target = 0
    for i in index:
        if dim == 0 and i is not None:
            return target if isinstance(i, slice) else None
        target += i is None or isinstance(i, slice)
        dim -= i is not None
    return target + dim
