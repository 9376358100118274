"""Reading and extending FX graphs that Dynamo or ``torch.export`` made. Nothing here adds a guard."""

import contextlib
import functools
import operator
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.fx.node import map_arg

try:
    from torch.fx.experimental.symbolic_shapes import optimization_hint
except ImportError:  # torch 2.11
    from torch.fx.experimental.symbolic_shapes import size_hint as optimization_hint

# Calls that change how a tensor is stored, not what it says.
CASTS = frozenset(("to", "type", "type_as", "float", "half", "bfloat16", "bool", "contiguous", "clone", "detach"))
TRANSPOSES = frozenset(("transpose", "swapaxes", "swapdims", "permute", "t", "T", "mT", "getattr"))
VALUE_KEYS = ("example_value", "val")  # Dynamo's name and export's


# Sizes


def known(condition) -> bool:
    """Whether a condition on sizes holds for every size that the graph admits. Never adds a guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def same(a, b) -> bool:
    """Whether two sizes are provably equal."""
    return known(a == b)


def product(sizes):
    """Product of sizes, 1 for none."""
    return functools.reduce(operator.mul, sizes, 1)


def hint(size) -> int | None:
    """The size that the graph was traced with, None where only run time knows it. Never adds a guard."""
    return None if not isinstance(size, int) and free_unbacked_symbols(size) else optimization_hint(size)


def shape_text(x: Tensor) -> str:
    """``1x12x32760x128``; a symbolic size is printed as its expression."""
    return "x".join(str(size) for size in x.shape)


# Reading nodes


def value(node):
    """The fake value of a node, or None."""
    if not isinstance(node, Node):
        return None
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


def name(node: Node) -> str:
    """The bare name of what a node calls: ``linear`` for ``F.linear`` and for ``aten.linear.default`` alike.

    "" for a node that calls nothing: Dynamo names inputs of child graphs after the calls that made them.
    """
    op, target = node.op, node.target
    if op == "call_method":
        return target
    return target_name(target) if op == "call_function" or op == "call_module" else ""


@functools.lru_cache(maxsize=1024)
def target_name(target) -> str:
    """The bare name of a function, operator or method."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def names(text: str) -> frozenset[str]:
    """A set of such names."""
    return frozenset(text.split())


def argument(node: Node, position: int, *keywords: str, default=None):
    """An argument of a call, given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[key] for key in keywords if key in node.kwargs), default)


def is_contiguous(x: Tensor) -> bool:
    """Whether the elements provably lie in the order of their indices."""
    return all(same(x.stride(dim), product(x.shape[dim + 1 :])) for dim in range(x.dim()))


def is_viewed(node: Node) -> bool:
    """Whether a view is taken that depends on the strides of a result, which a rewrite may change."""
    return any(name(user) == "view" or (name(user) in CASTS and is_viewed(user)) for user in node.users)


def permutation(node: Node) -> list[int] | None:
    """Which dimension of its input each dimension of the result is, if ``node`` is a transpose or a permutation."""
    method = name(node)
    if method not in TRANSPOSES or not node.args or not isinstance(x := value(node.args[0]), Tensor):
        return None
    order, rank = list(range(x.dim())), x.dim()
    if method == "permute":
        dims = argument(node, 1, "dims")
        dims = node.args[1:] if isinstance(dims, int) else dims
        return [d % rank for d in dims]
    if method == "getattr":  # torch before 2.14; since then x.mT calls mT
        method = node.args[1]
        if method not in ("T", "mT"):
            return None
    if method in ("t", "T", "mT"):
        if rank < 2 or (rank > 2 and method != "mT"):
            return None
        swap = [rank - 2, rank - 1]
    else:
        swap = [argument(node, i, f"dim{i - 1}", f"axis{i - 1}") % rank for i in (1, 2)]
    order[swap[0]], order[swap[1]] = order[swap[1]], order[swap[0]]
    return order


def module_path(node: Node) -> str:
    """``blocks.0.attn1`` from the innermost module of ``nn_module_stack``; "" where there is none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][
        0
    ]  # L['self'].blocks.0.attn1; the children of a module may be read off its __dict__
    parts = re.sub(r"\.?__dict__\['_modules'\]|\._modules\b|\['|'\]|\[|\]", ".", path).split(".")
    parts = [part for part in parts if part]
    return ".".join(parts[2:] if parts[:1] == ["L"] else parts)


# Adding nodes


def fake_mode(node: Node):
    """The fake mode of the values of a node and its inputs. Dynamo gives backends another one: not to be mixed."""
    values = (value(n) for n in (*node.all_input_nodes, node))
    fakes = (x for item in values for x in (item if isinstance(item, (tuple, list)) else (item,)))
    return next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)


def call(
    graph: Graph, target, args: tuple, origin: Node, cast: torch.dtype | None = None, memo: dict | None = None,
    uncast: tuple = (), **kwargs,
) -> Node:  # fmt: skip
    """Insert ``target(*args, **kwargs)`` at the insertion point, with its fake value and the metadata of ``origin``.

    Without a fake value on every node AOTAutograd's cache is silently off. ``cast`` is the dtype that autocast gives
    floating-point arguments at this place of the program, where it is on, but for the nodes ``uncast``. ``memo`` keeps
    values for equal calls: all layers of a model make the same, and running a fake takes longer than all else that the
    pass does for a site.
    """
    node = graph.call_function(target, args, kwargs)
    node.meta = _meta(origin)
    key = _value_key(origin)

    def fake(n: Node):
        x = value(n)
        return x.to(cast) if cast and n not in uncast and isinstance(x, Tensor) and x.is_floating_point() else x

    if target is operator.getitem and isinstance(value(args[0]), tuple):
        node.meta[key] = value(args[0])[args[1]]
        return node
    signature = None if memo is None or kwargs else _signature(target, map_arg(args, value), cast)
    if signature is None or signature not in memo:
        with fake_mode(origin) or contextlib.nullcontext():
            result = target(*map_arg(args, fake), **map_arg(kwargs, fake))
        if signature is None:
            node.meta[key] = result
            return node
        memo[signature] = result
    node.meta[key] = memo[signature]
    return node


def _meta(origin: Node) -> dict:
    """What a new node takes over: where it is in the program."""
    return {key: origin.meta[key] for key in ("nn_module_stack", "stack_trace", "custom") if key in origin.meta}


def _value_key(origin: Node) -> str:
    return VALUE_KEYS[1] if VALUE_KEYS[0] not in origin.meta and VALUE_KEYS[1] in origin.meta else VALUE_KEYS[0]


def _signature(target, args: tuple, cast) -> tuple | None:
    """What the value of a call depends on; None where sizes are symbolic, or for another operator than ours."""
    if getattr(target, "namespace", "") != "fgattn":
        return None
    parts: list = [target, cast, torch.is_grad_enabled()]
    for x in args:
        if isinstance(x, Tensor):
            sizes = (*x.shape, *x.stride())
            parts += (sizes, x.dtype, x.device, x.requires_grad)
        else:
            sizes = tuple(x) if isinstance(x, (tuple, list)) else (x,)
            parts += (type(x), *map(type, sizes), sizes)
        if torch.SymInt in map(type, sizes):
            return None
    return tuple(parts)


def repeat_call(graph: Graph, node: Node, inputs: dict[Node, Node], origin: Node) -> Node:
    """Insert the call that ``node`` makes, with other inputs."""
    args, kwargs = (map_arg(x, lambda n: inputs.get(n, n)) for x in (node.args, node.kwargs))
    if node.op == "call_function":
        return call(graph, node.target, args, origin, **kwargs)
    new = graph.call_method(node.target, args, kwargs)
    new.meta, key = _meta(origin), _value_key(origin)
    with fake_mode(origin) or contextlib.nullcontext():
        tensor, *rest = map_arg(args, value)
        new.meta[key] = getattr(tensor, node.target)(*rest, **map_arg(kwargs, value))
    return new


@dataclass(frozen=True)
class Extent:
    """A size, and a tensor with the dimension that has it: where a graph can read it if it is symbolic."""

    size: int | torch.SymInt
    node: Node | None = None
    dim: int = 0

    @property
    def key(self):
        """Equal for extents that are read from one place. (SymInts are not compared: that would add a guard.)"""
        return self.size if isinstance(self.size, int) else (self.node, self.dim)

    def readable(self, graph: Graph) -> bool:
        """Whether nodes of ``graph`` can use the size."""
        return isinstance(self.size, int) or self.node.graph is graph

    def read(self, graph: Graph, origin: Node) -> int | Node:
        """The size as an argument, of a new node where it is symbolic."""
        if isinstance(self.size, int):
            return self.size
        return call(graph, torch.ops.aten.sym_size.int, (self.node, self.dim), origin)


def size_of(graph: Graph, node: Node, dim: int, origin: Node) -> int | Node:
    """A size of a tensor of ``graph`` as an argument."""
    return Extent(value(node).shape[dim], node, dim).read(graph, origin)


def add(graph: Graph, a: int | Node, b: int | Node, origin: Node) -> int | Node:
    """The sum of two arguments, folded where it can be."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if 0 in (a, b):
        return b if a == 0 else a
    return call(graph, operator.add, (a, b), origin)
