"""Kept density as extra outputs of the graph: what ``fgattn.stats`` measures."""

import torch
from torch.fx import GraphModule

from fg_inductor.kernels import ops
from fg_inductor.passes.graph import call, value


def add_outputs(gm: GraphModule) -> list[int]:
    """Append the kept density of each rewritten site to the outputs of ``gm``: float32 scalars on the site's device.

    Returns the sites' indices, in the order of the new outputs. Sites in child graphs (checkpointed regions) are left
    out: their values can't leave the region without becoming outputs of it.
    """
    graph = gm.graph
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    sites, densities = [], []
    for node in graph.find_nodes(op="call_function", target=ops.attention):
        if "fgattn_site" not in node.meta:
            continue  # the user's own call
        q, k, _, mask, key_bias, _, _, m, n, *_ = node.args
        with graph.inserting_before(output):
            lengths = [_length(graph, x) for x in (q, k)]
            densities.append(call(graph, ops.kept_density, (mask, key_bias, *lengths, m, n), node))
        sites.append(node.meta["fgattn_site"])
    output.args = ((*output.args[0], *densities),)
    graph.lint()
    gm.recompile()
    return sites


def _length(graph, x):
    """Tokens of q or k: an int, or a node where the size is symbolic."""
    size = value(x).shape[2]
    return size if isinstance(size, int) else call(graph, torch.ops.aten.sym_size.int, (x, 2), x)
