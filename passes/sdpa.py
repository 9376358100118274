"""Find scaled-dot-product attention, decide, and rewrite it to ``fgattn::select_pooled`` and ``fgattn::attention``."""

import inspect
import operator

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fg_inductor.passes.graph import call, known, module_path, shape_text, value
from fg_inductor.passes.site import Site

SDPA = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
SIGNATURE = inspect.signature(
    lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False: None
)


def rewrite(gm: GraphModule, settings) -> list[Site]:
    """Rewrite the sites of ``gm`` and its child graphs in place; one Site for each attention call found."""
    sites = []
    for module in [m for m in gm.modules() if isinstance(m, GraphModule)]:
        for node in [n for n in module.graph.nodes if n.op == "call_function" and n.target in SDPA]:
            sites.append(_rewrite(node, len(sites), settings))
        module.graph.lint()
        module.recompile()
    return sites


def _rewrite(node: Node, index: int, settings) -> Site:
    bound = SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    q, k, v, attn_mask, dropout_p, is_causal, scale, _ = bound.args
    q_value, k_value = value(q), value(k)
    row = {
        "path": module_path(node),
        "index": index,
        "kind": "unknown",
        "query": shape_text(q_value),
        "key": shape_text(k_value),
        "dtype": str(value(node).dtype).removeprefix("torch."),
    }

    def dense(reason):
        return Site(**row, decision="dense", reason=reason)

    if settings.mask == "dense":
        return dense("fgattn.mask is 'dense'")
    if is_causal:
        return dense("causal")
    if dropout_p:
        return dense("dropout")
    if attn_mask is not None:
        return dense("mask is not a key mask")
    if q_value.dim() != 4:
        return dense("not 4-D")
    lengths = (q_value.shape[2], k_value.shape[2])
    if any(known(s < settings.min_seq) for s in lengths):
        return dense("shorter than min_seq")
    min_seq = 0 if all(known(s >= settings.min_seq) for s in lengths) else settings.min_seq
    scale = q_value.shape[3] ** -0.5 if scale is None else scale
    graph, m, n = node.graph, settings.m, settings.n
    with graph.inserting_before(node):
        select_args = (q, k, None, None, scale, m, n, settings.pool, settings.top_p, settings.density)
        mask = call(
            graph, torch.ops.fgattn.select_pooled.default, (*select_args, settings.max_density, [], [], min_seq), node
        )
        attention_args = (q, k, v, mask, None, None, scale, m, n, settings.tail, min_seq)
        attention = call(graph, torch.ops.fgattn.attention.default, attention_args, node)
        out = call(graph, operator.getitem, (attention, 0), node)
    attention.meta["fgattn_site"] = index
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return Site(**row, decision="rewritten", reason=f"dense below {min_seq} tokens" if min_seq else "")
