"""Small helpers over FX graphs that Dynamo or ``torch.export`` made. Nothing here adds a guard."""

import contextlib
import re

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

VALUE_KEYS = ("example_value", "val")  # Dynamo's name and export's


def value(node):
    """The fake value of a node, or None."""
    if not isinstance(node, Node):
        return None
    return next((node.meta[key] for key in VALUE_KEYS if key in node.meta), None)


def known(condition) -> bool:
    """Whether a condition on sizes holds for every size that the graph admits. Never adds a guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def same(a, b) -> bool:
    """Whether two sizes are provably equal."""
    return known(a == b)


def shape_text(x: Tensor) -> str:
    """``1x12x32760x128``; a symbolic size is printed as its expression."""
    return "x".join(str(size) for size in x.shape)


def module_path(node: Node) -> str:
    """``blocks.0.attn1`` from the innermost module of ``nn_module_stack``; "" where there is none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"\.__dict__\['_modules'\]", "", path)
    path = re.sub(r"\['([^']*)'\]", r".\1", path)
    return re.sub(r"^L\.(self|\w+)\.?|^L\W?|^\.", "", path)


def fake_mode(node: Node):
    """The fake mode of the values of a node's inputs. Dynamo gives backends another one: not to be mixed."""
    fakes = (value(n) for n in node.all_input_nodes)
    return next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)


def call(graph: Graph, target, args: tuple, origin: Node, values: tuple | None = None) -> Node:
    """Insert ``target(*args)`` at the insertion point, with its fake value and the metadata of ``origin``.

    Without a fake value on every node AOTAutograd's cache is silently off. ``values`` replaces the fake arguments.
    """
    node = graph.call_function(target, args)
    key = next((key for key in VALUE_KEYS if key in origin.meta), VALUE_KEYS[0])
    node.meta = {k: v for k, v in origin.meta.items() if k in ("nn_module_stack", "stack_trace", "custom")}
    fakes = torch.fx.node.map_arg(args, value) if values is None else values
    with fake_mode(origin) or contextlib.nullcontext():
        node.meta[key] = target(*fakes)
    return node
