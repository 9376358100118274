"""A graph with its child graphs as one program: execution order, and the data flow across their borders."""

import functools
import operator
from collections import defaultdict

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fg_inductor.passes.graph import argument, name, names, value

# Results that share the storage of their first argument: a write to one is a write to the other.
VIEWS = names(
    "getitem view reshape transpose permute unsqueeze squeeze flatten unflatten select narrow expand chunk split "
    "split_with_sizes unbind view_as t swapaxes movedim"
)
# ``x += y`` and its like, and ``x[i] = y``.
IN_PLACE = frozenset((
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.imatmul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.ilshift, operator.irshift, operator.iand, operator.ior,
    operator.ixor,
))  # fmt: skip
INPUTS = frozenset(("placeholder", "get_attr"))
CATS = names("cat concat")
RESHAPES = names("view reshape flatten unflatten _unsafe_view squeeze unsqueeze view_as")
NAMED = CATS | RESHAPES | names("conv3d stack")  # what the other files look for
ALLOCATIONS = names("empty_like zeros_like ones_like full_like empty zeros new_empty new_zeros")


class Program:
    """The nodes of a graph and of its child graphs, and what flows between them.

    nodes    in execution order: a child graph (the body of a checkpointed region) comes before the node that calls it
    named    those that call one of NAMED, by name
    callers  child graph -> the node that calls it (the first, if it is called several times)
    """

    def __init__(self, gm: GraphModule):
        self.nodes: list[Node] = []
        self.named: dict[str, list[Node]] = {method: [] for method in NAMED}
        self.callers: dict[Graph, Node] = {}
        self._weights: set[Node] = set()  # computed from parameters and buffers alone
        self._data: set[Node] = set()  # tensors computed from an input of the graph
        self._writes: dict[Node, list[Node]] = defaultdict(list)  # tensor -> what is stored into it or a view of it
        self._border: dict[Node, list[Node]] = {}  # inputs of a node where they lie in another graph
        self._results: dict[Node, list] = {}  # call of a child graph -> its results
        self._inputs: dict[Node, list[Node]] = {}  # where they are others than a node's arguments
        self._enter(gm)
        self.projections: dict[Node, list[Node]] = {}  # what ``provenance.projections`` found

    def inputs(self, node: Node) -> list[Node]:
        """Nodes whose values ``node`` is computed from, values stored into it included."""
        found = self._inputs.get(node)
        return node.all_input_nodes if found is None else found

    def arguments(self, node: Node) -> list[Node]:
        """Its inputs when it was made, without what is stored into it later."""
        found = self._border.get(node)
        return node.all_input_nodes if found is None else found

    def activations(self, node: Node) -> list[Node]:
        """The inputs that are tensors and depend on the input of the graph: no weights, constants, sizes."""
        return [x for x in self.inputs(node) if x in self._data]

    def is_data(self, node: Node) -> bool:
        """Whether it is a tensor that depends on the input of the graph."""
        return node in self._data

    def replace(self, old: Node, new: Node) -> None:
        """Note that ``new`` has taken the place of ``old``."""
        if old in self._data:
            self._data.add(new)

    def is_written(self, node: Node) -> bool:
        """Whether something is stored into the tensor, or into a view of it, after it was made."""
        return node in self._writes

    def has_weight_matrix(self, node: Node) -> bool:
        """Whether an input is a weight of two or more dimensions (a norm's weight has one)."""
        weights = (value(x) for x in node.all_input_nodes if x in self._weights)
        return any(not isinstance(w, Tensor) or w.dim() > 1 for w in weights)

    def weight_inputs(self, node: Node) -> list[Node]:
        """Inputs of the graph that are weights and that ``node`` reads, as they are or computed from (cast, fused)."""
        found, stack = [], [x for x in node.all_input_nodes if x in self._weights]
        while stack:
            x = stack.pop(0)
            if x.op == "placeholder" and x not in self._border:
                found.append(x)
            stack += [y for y in self.inputs(x) if y in self._weights]
        return found

    def _enter(self, module: GraphModule) -> None:
        bodies = {x: child for x in module.graph.find_nodes(op="get_attr") if (child := _child(module, x))}
        for node in module.graph.nodes:
            if node.op == "output":
                continue
            children = [x for x in node.all_input_nodes if x in bodies] if bodies else []
            for x in children:
                self._enter_child(bodies[x], node, children)
            method = name(node)
            if self._results and method == "getitem" and node.args[0] in self._results:
                result = self._results[node.args[0]][node.args[1]]
                self._border[node] = [result] if isinstance(result, Node) else []
            if method and (node.kwargs or _written_places(node.target)):  # else it writes into nothing
                for target in written(node):
                    self._store(node, target)
            if method in ALLOCATIONS or node in self._border:
                self._find_inputs(node, method)
            self._mark(node)
            self.nodes.append(node)
            if method in NAMED:
                self.named[method].append(node)

    def _enter_child(self, child: GraphModule, caller: Node, children: list[Node]) -> None:
        alone = len(children) == 1  # the branches of a condition and autograd.Functions keep their border closed
        if child.graph not in self.callers:
            self.callers[child.graph] = caller
            inputs = [n for n in child.graph.nodes if n.op == "placeholder"]
            operands: list[Node] = []
            map_arg((caller.args, caller.kwargs), operands.append)
            operands = [n for n in operands if n not in children]
            if alone and len(operands) == len(inputs):
                self._border |= {inner: [outer] for inner, outer in zip(inputs, operands, strict=True)}
            self._enter(child)
        if alone:
            results = next(n for n in child.graph.nodes if n.op == "output").args[0]
            self._results[caller] = list(results) if isinstance(results, (tuple, list)) else [results]
            self._border[caller] = [n for n in self._results[caller] if isinstance(n, Node)]

    def _store(self, node: Node, target: Node) -> None:
        """``node`` writes into ``target``: into the tensor that it is a view of."""
        base = target
        while name(base) in VIEWS and isinstance(source := argument(base, 0, "input"), Node):
            base = source
        self._writes[base] += [x for x in node.all_input_nodes if x is not target]
        self._find_inputs(base, name(base))
        self._mark(base)

    def _find_inputs(self, node: Node, method: str) -> None:
        stored = self._writes.get(node, [])
        is_filled = method in ALLOCATIONS and (stored or method != "empty_like")
        self._inputs[node] = stored if is_filled else self.arguments(node) + stored

    def _mark(self, node: Node) -> None:
        inputs = self._inputs.get(node)  # as ``inputs``, once for every node
        if inputs is None:
            inputs = node.all_input_nodes
        is_weight = node.op in INPUTS and _is_weight(node)
        is_data = not self._data.isdisjoint(inputs)
        if not is_data and not is_weight:
            is_data = node in self._data or (node.op == "placeholder" and node not in self._border)
            is_weight = not is_data and bool(inputs) and self._weights.issuperset(inputs)
        if is_weight:
            self._weights.add(node)
        elif is_data and (isinstance(x := value(node), Tensor) or _holds_tensors(x)):
            self._weights.discard(node)
            self._data.add(node)


def written(node: Node) -> list[Node]:
    """The tensors that a call writes into: ``x[i] = y``, ``x += y``, ``x.add_(y)``, ``add(x, y, out=z)``, ..."""
    if not node.op.startswith("call"):
        return []
    kwargs, places = node.kwargs, _written_places(node.target)
    if not (places or kwargs):
        return []
    out, in_place = kwargs.get("out"), kwargs.get("inplace") is True
    if not places and out is None and not in_place:
        return []
    targets = [
        out,
        *(argument(node, place, keyword) for place, keyword in places),
        *(node.args[:1] if in_place else ()),
    ]
    flat = [x for target in targets for x in (target if isinstance(target, (tuple, list)) else [target])]
    return [x for x in flat if isinstance(x, Node) and (value(x) is None or _holds_tensors(value(x)))]


@functools.lru_cache(maxsize=1024)
def _written_places(target) -> tuple[tuple[int, str], ...]:
    """(position, keyword) of the arguments that a function or method always writes into."""
    if isinstance(target, torch._ops.OpOverload):
        return tuple((i, x.name) for i, x in enumerate(target._schema.arguments) if x.is_write)
    if target in IN_PLACE:
        return ((0, "input"),)
    method = target if isinstance(target, str) else getattr(target, "__name__", "")
    of_operator = getattr(target, "__module__", "") == "_operator"  # and_, or_, not_
    in_place = method.endswith("_") and not method.endswith("__") and not of_operator
    return ((0, "input"),) if in_place else ()


def _child(module: GraphModule, node: Node) -> GraphModule | None:
    child = getattr(module, node.target, None)
    return child if isinstance(child, GraphModule) else None


def _is_weight(node: Node) -> bool:
    if node.op == "placeholder":
        return "_parameters_" in node.name or "_buffers_" in node.name or isinstance(value(node), torch.nn.Parameter)
    return node.op == "get_attr" and isinstance(value(node), Tensor)


def _holds_tensors(x) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, (tuple, list)) and any(isinstance(item, Tensor) for item in x))
