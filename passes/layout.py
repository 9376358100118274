"""What the dimensions of a tensor hold: sequences concatenated from segments, and tokens folded into the batch.

A concatenation of token sequences makes a dimension of segments (text, video). From the dimension that a site asks for,
the tokens are followed back through attention, projections, norms, transposes and reshapes, so that a site knows its
segments although the concatenation lies above the projection, or many layers above.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from fg_inductor.passes.graph import TRANSPOSES, Extent, argument, name, names, permutation, product, same, value
from fg_inductor.passes.program import CATS, RESHAPES, Program
from fg_inductor.passes.segments import Segments

# The other operators keep the order of dimensions, and broadcast from the right.
MOVES = RESHAPES | TRANSPOSES | names("unbind select stack getitem")
UNFILLED = names("empty zeros new_empty new_zeros")  # made to be filled, and not like a tensor of tokens
NEW_DIMENSIONS = names("stack expand repeat unsqueeze")
# Operators after which tokens stand elsewhere, or not all of them are left.
REORDERS = names("index_select gather take_along_dim index_copy index_put scatter flip roll sort argsort index narrow")


Shape = torch.Size


class Layout:
    """``segments(node, dim)`` and ``is_folded(node)`` for the nodes of a program."""

    def __init__(self, program: Program):
        self._program = program
        self._segments: dict[tuple[Node, int], Segments] = {}
        self._folded = _folded(program)
        cats = [node for method in CATS for node in program.named[method] if program.is_data(node)]
        self._has_cats = any(value(node).dim() > 2 for node in cats)  # not of a timestep's embedding

    def segments(self, node: Node, dim: int) -> Segments:
        """The segments of a dimension in order; empty if it was not concatenated, or nothing is known of it."""
        if not self._has_cats:
            return ()
        way: list[tuple[tuple[Node, int], Iterator[tuple[Node, int]]]] = []  # back from it, each with what is to come
        found = self._look(node, dim, way)
        while way and not found:
            place, sources = way[-1]
            source = next(sources, None)
            if source is None:
                self._segments[place] = ()
                way.pop()
            else:
                found = self._look(*source, way)
        self._segments |= {place: found for place, _ in way}
        return found

    def is_folded(self, node: Node) -> bool:
        """Whether the batch dimension counts frames or positions, by a reshape upstream: factorised attention."""
        return 0 in self._folded.get(node, ())

    def _look(self, node: Node, dim: int, way: list) -> Segments:
        """The segments of a dimension if they are known or made here; else it becomes the end of the way."""
        place = node, dim
        if place not in self._segments:
            made = _concatenated(node, dim) if name(node) in CATS else ()
            if not made:
                way.append((place, self._sources(node, dim)))
                return ()
            self._segments[place] = made
        return self._segments[place]

    def _sources(self, node: Node, dim: int) -> Iterator[tuple[Node, int]]:
        """Inputs, with the dimension that holds the tokens which ``node`` has in ``dim``."""
        method, shape = name(node), _shape(node)
        if shape is None or method in REORDERS or method in UNFILLED:
            return
        for source in self._program.arguments(node):
            if (x := _shape(source)) is not None:
                dims = range(len(x)) if method in MOVES else (dim - len(shape) + len(x),)
                for d in dims:
                    if 0 <= d < len(x) and same(x[d], shape[dim]) and _carried(node, method, d, x, shape) == dim:
                        yield source, d


def _shape(node: Node) -> Shape | None:
    """The shape of a node; of a tuple (chunk, split, unbind) that of the first part; None for other values."""
    x = value(node)
    if isinstance(x, (tuple, list)):
        x = next((part for part in x if isinstance(part, Tensor)), None)
    return x.shape if isinstance(x, Tensor) else None


def _folded(program: Program) -> dict[Node, set[int]]:
    """The dimensions that count frames or positions beside the batch, of the nodes that have such."""
    folded: dict[Node, set[int]] = {}
    reshapes = [(node, method) for method in RESHAPES for node in program.named[method] if program.is_data(node)]
    starts = {node for node, method in reshapes if _visit(program, node, method, folded)}
    for node in program.nodes if starts else ():
        is_reached = node in starts or not folded.keys().isdisjoint(program.arguments(node))
        if is_reached and (found := _visit(program, node, name(node), folded)):
            folded[node] = found
    return folded


def _visit(program: Program, node: Node, method: str, folded: dict[Node, set[int]]) -> set[int]:
    shape, found = _shape(node), set()
    for source in program.arguments(node) if shape is not None and method not in UNFILLED else ():
        if (source in folded or method in RESHAPES) and (x := _shape(source)) is not None:
            found |= _folds(source, node, method, folded.get(source, set()), x, shape)
    return found


def _folds(source: Node, node: Node, method: str, before: set[int], x: Shape, y: Shape) -> set[int]:
    """The dimensions of ``node`` that are folded, as its input ``source`` has it, in which ``before`` are."""
    if not x or not y:
        return set()
    folded = {_carried(node, method, dim, x, y) for dim in before} - {None} if before else set()
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


def _concatenated(node: Node, dim: int) -> Segments:
    """The parts of a concatenation along ``dim``."""
    parts, rank = argument(node, 0, "tensors"), value(node).dim()
    if argument(node, 1, "dim", "axis", default=0) % rank != dim:
        return ()
    tensors = [value(part) for part in parts] if isinstance(parts, (tuple, list)) else []
    if len(tensors) < 2 or not all(isinstance(x, Tensor) and x.dim() == rank for x in tensors):
        return ()
    return tuple(Extent(x.shape[dim], part, dim) for x, part in zip(tensors, parts, strict=True))


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
