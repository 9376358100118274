"""Observed masks: the mask of a site becomes an input of the graph, which the graph updates in place.

    mask = select_pooled(q, k, ...)          due = begin_observed_(q, k, mask, ..., refresh)
    out, _ = attention(q, k, v, mask, ...) -> out, lse = attention(q, k, v, mask, ...)
                                             update_observed_(q, k, lse, mask, ..., due)

mask and refresh are new inputs, with ``bound`` also what its drift is told by. With ``heads_per_mask`` heads share a
mask, and which one each has is state too, ``slots``: attention is given ``expand_heads(mask, slots)``. The state is an
argument, so whoever calls the compiled graph owns it: one graph serves all the layers that share its code. The inputs
are marked as static addresses, so that CUDA graphs update the state where it lies instead of copying it. Whether to
refresh is a value on the device: no guard, no recompile. Where it is, attention is dense, and its lse is what the
masses are made with.

With the masks in host memory the operators are given copies on the device:

    staged = fetch(mask);   ...the same with staged in place of mask...;   put_back_(mask, staged, due)
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from fg_inductor.kernels import ops
from fg_inductor.kernels.checks import SHARING_HEADS
from fg_inductor.passes import provenance
from fg_inductor.passes.graph import VALUE_KEYS, call, value
from fg_inductor.passes.program import Program

# What AOTAutograd looks for on an input whose address does not change from call to call.
STATIC_ADDRESS = {"_dynamo_static_input_type": "unguarded"}


@dataclass(frozen=True)
class StateSite:
    """A site whose mask is carried: its index, and the place of the weight that tells its layer among the inputs."""

    index: int
    weight: int
    mask: Tensor  # fake: shape and device
    n: int  # keys in a group
    slots: Tensor | None = None  # fake: which mask each head has, where heads share them


@dataclass
class Stateful:
    """A graph with state.

    gm        the graph; behind its own inputs it takes the masks of ``sites``, the slots of those whose heads share
              masks, with a bound on drift a float32 [3] for each site, then a flag for each of ``devices``
    inputs    example inputs for the new ones
    reasons   site index -> why it has no state and selects anew in each call
    unshared  site index -> why its heads share no masks, where they were to
    """

    gm: GraphModule
    inputs: list[Tensor] = field(default_factory=list)
    sites: list[StateSite] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    unshared: dict[int, str] = field(default_factory=dict)


def add_state(
    gm: GraphModule,
    example_inputs: list[Any],
    bound: float | None = None,
    heads_per_mask: int = 1,
    host: bool = False,
    ahead: bool = True,
) -> Stateful:
    """Give the sites of a rewritten graph state, in place.

    bound           on the fall of the mass that a mask keeps
    heads_per_mask  heads for each mask: more than one share it
    host            the masks lie in host memory
    ahead           each of them may be fetched while the one before is in use: not where CUDA graphs replay the fetch
    """
    program, result = Program(gm), Stateful(gm)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    found = []

    def new(shape: tuple, dtype: torch.dtype, node: Node) -> Tensor:
        q = value(node.args[0])
        with q.fake_mode:
            return torch.empty(shape, dtype=dtype, device=q.device)

    for node in program.nodes:
        if node.target is ops.attention and "fgattn_site" in node.meta:
            index, weight = node.meta["fgattn_site"], _layer_weight(program, node)
            if reason := _refusal(gm, node, weight):
                result.reasons[index] = reason
            else:
                mask, slots, heads = value(node.args[3]), None, value(node.args[0]).shape[1]
                if heads_per_mask > 1 and (unshared := _unshared(node, heads)):
                    result.unshared[index] = unshared
                elif heads_per_mask > 1 and heads > 1:
                    batch, _, *row = mask.shape
                    mask = new((batch, -(-heads // heads_per_mask), *row), torch.int32, node)
                    slots = new((batch, heads), torch.int32, node)
                result.sites.append(StateSite(index, inputs.index(weight), mask, _by_name(node)["n"], slots))
                found.append(node)
    last, mode = inputs[-1], detect_fake_mode(example_inputs)

    def add_input(name: str, example: Tensor) -> Node:
        nonlocal last
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(name)
        last._dynamo_source = None
        last.meta |= {VALUE_KEYS[0]: example, "tensor_dict": dict(STATIC_ADDRESS)}
        # Example inputs belong to another fake mode than the values of nodes.
        with mode:
            result.inputs.append(torch.empty(example.shape, dtype=example.dtype, device=example.device))
        return last

    masks = [add_input(f"fgattn_mask_{site.index}", site.mask) for site in result.sites]
    shared = {x.index: add_input(f"fgattn_slots_{x.index}", x.slots) for x in result.sites if x.slots is not None}
    drifts = [None] * len(found)
    if bound is not None:
        for i, node in enumerate(found):
            drifts[i] = add_input(f"fgattn_drift_{result.sites[i].index}", new((3,), torch.float32, node))
    flags = {}
    for node in found:
        device = value(node.args[0]).device
        if device not in flags:
            flags[device] = add_input(f"fgattn_refresh_{len(flags)}", new((), torch.bool, node))
    result.devices = list(flags)
    for site, node, mask, drift in zip(result.sites, found, masks, drifts, strict=True):
        slots = shared.get(site.index)
        select, cast = node.args[3], value(node)[0].dtype
        given = _by_name(select)
        q, k, *shape = (given[name] for name in ("q", "k", "key_bias", "order", "scale", "m", "n"))
        names = ("reduce", "top_p", "density", "max_density", "dense_keys", "dense_queries")
        selection = [given.get(name, "sum" if name == "reduce" else None) for name in names]
        staged = mask
        with gm.graph.inserting_before(select):
            if host:
                staged = call(gm.graph, ops.fetch, (mask, ahead), node)
            flag = flags[value(node.args[0]).device]
            arguments = (q, k, staged, *shape, given["min_seq"], flag, drift, bound, slots)
            due = call(gm.graph, ops.begin_observed_, arguments, node, cast, uncast=(drift,))
            each = staged if slots is None else call(gm.graph, ops.expand_heads, (staged, slots), node)
        node.replace_input_with(select, each)
        with gm.graph.inserting_before(node.next):
            lse = call(gm.graph, operator.getitem, (node, 1), node)
            by_head = given.get("head_density")
            arguments = (q, k, lse, staged, *shape, *selection, given["min_seq"], due, drift, by_head, slots)
            call(gm.graph, ops.update_observed_, arguments, node, cast, uncast=(lse, drift))
            if host:
                call(gm.graph, ops.put_back_, (mask, staged, due), node)
            # The density is that of the new mask, formed at the end of the graph: a mask in host memory is read where
            # it lies, so that the copy can go.
            if select.users:
                each = mask if slots is None else call(gm.graph, ops.expand_heads, (mask, slots), node)
        select.replace_all_uses_with(each)
        gm.graph.erase_node(select)
    gm.graph.lint()
    gm.recompile()
    return result


def _refusal(gm: GraphModule, node: Node, weight: Node | None) -> str | None:
    if node.graph is not gm.graph:
        return "inside a checkpointed region"
    if value(node)[0].requires_grad:
        return "gradients are computed, and observed masks are for inference"
    if weight is None or weight.graph is not gm.graph:
        return "no weight among the inputs of the graph tells the layer"
    return None


def _unshared(node: Node, heads) -> str | None:
    """Why the heads of a site have a mask each though ``heads_per_mask`` says otherwise."""
    if _by_name(node.args[3]).get("head_density") is not None:
        return "fgattn.sites gives each of its heads a density of its own"
    if not isinstance(heads, int):
        return "how many heads it has is known only when it runs"
    if heads > SHARING_HEADS:
        return f"it has {heads} heads, and {SHARING_HEADS} can share masks at most"
    return None


def _layer_weight(program: Program, node: Node) -> Node | None:
    """The input that holds the weight of the projection that made q: it tells a layer from others with the same code.

    The first one where there are several (joint attention, adapters).
    """
    found = (weight for x in provenance.projections(program, node.args[0]) for weight in program.weight_inputs(x))
    return min(found, key=program.nodes.index, default=None)


def _by_name(node: Node) -> dict[str, Any]:
    return dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
