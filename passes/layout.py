"""What the dimensions of each tensor hold: sequences concatenated from segments, and tokens folded into the batch.

One forward pass over the graph. A concatenation of token sequences marks its dimension with the segments (text, video);
the marks follow the tokens through projections, norms, transposes, reshapes and attention, so that a site knows its
segments although the concatenation lies above the projection, or many layers above.
"""

from torch import Tensor
from torch.fx import Node

from fg_inductor.passes.graph import Extent, argument, name, names, permutation, product, same, value
from fg_inductor.passes.program import Program

RESHAPES = names("view reshape flatten unflatten _unsafe_view squeeze unsqueeze view_as")
STARTS = RESHAPES | names("cat concat")  # what marks a dimension, or folds one
NEW_DIMENSIONS = names("stack expand repeat unsqueeze")
# Operators after which tokens stand elsewhere, or not all of them are left.
REORDERS = names("index_select gather take_along_dim index_copy index_put scatter flip roll sort argsort index narrow")


class Layout:
    """``segments(node, dim)`` and ``is_folded(node)`` for every node of a program."""

    def __init__(self, program: Program):
        self._marks: dict[Node, dict[int, tuple[Extent, ...]]] = {}
        self._folded: dict[Node, set[int]] = {}  # dimensions that count frames or positions beside the batch
        marks, folded = self._marks, self._folded
        for node in program.nodes:
            # Most nodes have no marks and make none; their shapes are not looked at.
            inputs = [x for x in program.inputs(node) if x in marks or x in folded]
            if (inputs or name(node) in STARTS) and _tensor(node) is not None:
                inputs = program.inputs(node) if name(node) in RESHAPES else inputs
                self._visit(node, [x for x in inputs if _tensor(x) is not None])

    def segments(self, node: Node, dim: int) -> tuple[Extent, ...]:
        """The segments of a dimension in order; empty if it was not concatenated, or nothing is known of it."""
        return self._marks.get(node, {}).get(dim, ())

    def is_folded(self, node: Node) -> bool:
        """Whether the batch dimension counts frames or positions, by a reshape upstream: factorised attention."""
        return 0 in self._folded.get(node, ())

    def _visit(self, node: Node, inputs: list[Node]) -> None:
        marks = _concatenated(node) if name(node) in ("cat", "concat") else {}
        for source in inputs if name(node) not in REORDERS else ():
            for dim, segments in self._marks.get(source, {}).items():
                target = _carried(source, dim, node)
                if target is not None:
                    marks.setdefault(target, segments)
        if marks:
            self._marks[node] = marks
        starts = name(node) in RESHAPES
        folded = {dim for x in inputs if starts or x in self._folded for dim in self._folds(x, node)}
        if folded:
            self._folded[node] = folded

    def _folds(self, source: Node, node: Node) -> set[int]:
        """The dimensions of ``node`` that are folded, as its input ``source`` has it."""
        x, y = _tensor(source).shape, _tensor(node).shape
        if not x or not y:
            return set()
        before = self._folded.get(source, ())
        folded = {_carried(source, dim, node) for dim in before} - {None}
        if same(x[0], y[0]):
            return folded | ({0} if 0 in before else set())
        # A reshape keeps the order of elements: a multiple of the batch counts something that came after it.
        multiple = name(node) in RESHAPES and not _adds_dimension(source) and not same(x[0], 0)
        return folded | {0} if multiple and same(y[0] % x[0], 0) else folded


def _adds_dimension(node: Node) -> bool:
    """Whether the node put a dimension in that holds copies, or separate inputs (guidance), and no tokens."""
    if name(node) == "getitem":
        index = node.args[1]
        return index is None or (isinstance(index, tuple) and any(i is None for i in index))
    return name(node) in NEW_DIMENSIONS


def _tensor(node: Node) -> Tensor | None:
    """The value of a node; of a tuple (chunk, split, unbind) the first part."""
    x = value(node)
    if isinstance(x, (tuple, list)):
        x = next((part for part in x if isinstance(part, Tensor)), None)
    return x if isinstance(x, Tensor) else None


def _concatenated(node: Node) -> dict[int, tuple[Extent, ...]]:
    parts, rank = argument(node, 0, "tensors"), _tensor(node).dim()
    dim = argument(node, 1, "dim", "axis", default=0) % rank
    tensors = [value(part) for part in parts] if isinstance(parts, (tuple, list)) else []
    if len(tensors) < 2 or not all(isinstance(x, Tensor) and x.dim() == rank for x in tensors):
        return {}
    return {dim: tuple(Extent(x.shape[dim], part, dim) for x, part in zip(tensors, parts, strict=True))}


def _carried(source: Node, dim: int, node: Node) -> int | None:
    """The dimension of ``node`` that holds the tokens of dimension ``dim`` of ``source``, if one does."""
    x, y = _tensor(source).shape, _tensor(node).shape
    target = _moved(source, dim, node, x, y)
    return target if target is not None and 0 <= target < len(y) and same(x[dim], y[target]) else None


def _moved(source: Node, dim: int, node: Node, x, y) -> int | None:
    method, rank = name(node), len(x)
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
    return dim + len(y) - rank  # one to one, broadcast from the right: norms, projections, arithmetic, attention


def _indexed(index, dim: int, rank: int) -> int | None:
    index = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, list) or (isinstance(i, Node) and _tensor(i) is not None) for i in index):
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
