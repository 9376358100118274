"""Self, joint, mixed or cross: told by the tensors that q and k are projected from.

Lengths do not tell: text padded to the length of the video is still cross attention, and the lengths of self attention
over data-dependent text need not be provably equal.
"""

import functools
import re

import torch
from torch import Tensor
from torch.fx import Node

from fg_inductor.passes.graph import argument, known, name, names, target_name, value
from fg_inductor.passes.program import Program

CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
LINEARS = frozenset(("linear", "addmm")) | CONVOLUTIONS
MATMULS = re.compile("matmul|einsum|mm(_|$)")  # mm, bmm, _scaled_mm, _weight_int8pack_mm, ...
# Selections of tokens: the part is another source than the whole.
PARTS = names(
    "getitem narrow select index_select gather masked_select take_along_dim chunk split split_with_sizes tensor_split "
    "unbind"
)


def is_projection(program: Program, node: Node) -> bool:
    """A product of activations with a weight, as a known function or hidden in an opaque one (quantised linears)."""
    product = _product(node.op, node.target)
    if product in ("", "linear"):
        return product != ""
    activations = program.activations(node)
    if not activations or not program.has_weight_matrix(node):
        return False
    return product != "matmul" or len(activations) == 1


@functools.lru_cache(maxsize=1024)
def _product(op: str, target) -> str:
    """What a call may be: "linear", "matmul", "opaque", or "" for anything that is no product of two tensors."""
    if op != "call_function" and op != "call_method":
        return ""
    method = target_name(target)
    if method in LINEARS:
        return "linear"
    if MATMULS.search(method):
        return "matmul"
    return "opaque" if op == "call_function" and _is_opaque(target) else ""


def _is_opaque(target) -> bool:
    """Whether a function is none of torch's own, whose names say what they do."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in ("aten", "prims")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name() == "autograd_function_apply"
    module = getattr(target, "__module__", None) or ""
    return module.partition(".")[0] not in ("", "torch", "_operator", "math")


def projections(program: Program, node: Node) -> list[Node]:
    """The projections that ``node`` is computed from, without crossing one: through norms, RoPE, reshapes, cats."""
    if node not in program.projections:
        program.projections[node] = _projections(program, node)
    return program.projections[node]


def _projections(program: Program, node: Node) -> list[Node]:
    found, seen, stack = [], {node}, [node]
    while stack:
        x = stack.pop()
        if _product(x.op, x.target) and is_projection(program, x):
            found.append(x)
            continue
        for y in program.activations(x):
            if y not in seen:
                seen.add(y)
                stack.append(y)
    return found


def _source(program: Program, node: Node, merge: bool = True) -> Node:
    """The tensor behind casts, dropout, norms, dynamic quantisation and low-rank projections of one tensor.

    A LoRA adapter adds B(A(x)) to W(x): both come from x, though B's own input is A(x).
    """
    while True:
        if is_projection(program, node) and not _is_low_rank(program, node):
            return node
        if name(node) in PARTS and isinstance(value(argument(node, 0, "input")), Tensor):
            return node
        inputs = list(dict.fromkeys(program.activations(node)))
        if len(inputs) > 1 and merge:  # x / amax(x): one tensor by two ways
            inputs = list({_source(program, x, merge=False) for x in inputs})
        if len(inputs) != 1 or name(inputs[0]) in ("chunk", "split", "unbind"):
            return node
        node = inputs[0]


def _is_low_rank(program: Program, node: Node) -> bool:
    x, y = value(program.activations(node)[0]), value(node)
    return isinstance(x, Tensor) and isinstance(y, Tensor) and known(y.shape[-1] < x.shape[-1])


def sources(program: Program, found: list[Node], open_cats: bool = False) -> set[Node]:
    """What the projections read. ``open_cats``: the parts of a concatenation in place of it."""
    inputs = [_source(program, program.activations(node)[0]) for node in found if program.activations(node)]
    while open_cats and (cats := [x for x in inputs if name(x) in ("cat", "concat")]):
        inputs = [x for x in inputs if x not in cats] + [
            _source(program, part) for cat in cats for part in program.activations(cat)
        ]
    return set(inputs)


def kind_of(program: Program, q: Node, k: Node) -> str:
    """The kind of a site, as ``Site`` lists them."""
    found = projections(program, q), projections(program, k)
    for open_cats in (False, True):
        of_q, of_k = (sources(program, x, open_cats) for x in found)
        if not of_q or not of_k:
            return "unknown"
        if of_q == of_k:
            return "self" if len(of_q) == 1 else "joint"
        if of_q < of_k:
            return "mixed"
    return "cross"


def is_convolutional(program: Program, q: Node) -> bool:
    """Whether q is projected by convolutions, as in the attention of VAEs."""
    found = projections(program, q)
    return bool(found) and all(name(x) in CONVOLUTIONS for x in found)
