"""Checkpointing keeps its meaning: attention is saved or recomputed as SDPA would have been, and its mask with it.

Plain checkpointing needs nothing: it recomputes selector and attention alike, from the same q and k. A selective policy
names the ops that it saves, and can't know that SDPA became ``fgattn::attention``; ``translate_policies`` asks it about
SDPA in its place. What is saved of a forward pass must then be saved whole: a backward that pairs the saved lse with a
mask that was made anew from recomputed, differently rounded q and k would differentiate another function.
``save_masks`` sees to that on the joint graph, whatever made the partitioner save attention. And a query order that was
chosen by the queries is always saved: chosen anew it might be another one, in which a saved mask means nothing.
"""

import functools
import operator
from collections.abc import Callable

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fg_inductor.kernels import ops

aten = torch.ops.aten
# What SDPA decomposes to under AOTAutograd, by device and backend; policies name some or all of them.
SDPA_OPS = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_attention_math.default,
    aten.scaled_dot_product_attention.default,
)
_RECOMPUTE = (False, CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def _ask(policy, ctx, op, *args, **kwargs):
    """The user's policy, which answers for attention as it would have for SDPA."""
    answer = policy(ctx, op, *args, **kwargs)
    if op is not ops.attention:
        return answer
    for sdpa in SDPA_OPS:
        if answer not in _RECOMPUTE:
            break
        answer = policy(ctx, sdpa, *args[:3])
    return answer


class _TranslatedContexts:
    """A checkpoint's ``context_fn`` whose selective policies know attention."""

    def __init__(self, context_fn: Callable):
        self.context_fn = context_fn
        # AOTAutograd's cache takes part only where the user gave a hash, and looks for the attribute.
        if hasattr(context_fn, "cache_hash"):
            self.cache_hash = f"fgattn {context_fn.cache_hash}"

    def __call__(self):
        modes = self.context_fn()
        for mode in modes:
            # The recomputing mode has no policy since torch 2.12, and a user's own modes may have none.
            if policy := getattr(mode, "policy_fn", None):
                mode.policy_fn = functools.partial(_ask, policy)
        return modes


def translate_policies(gm: fx.GraphModule) -> None:
    """Wraps the ``context_fn`` of each checkpointed region of a rewritten Dynamo graph."""
    for module in gm.modules():
        context_fn = getattr(module, "meta", {}).get("_checkpoint_context_fn")
        if context_fn is not None:
            module.meta["_checkpoint_context_fn"] = _TranslatedContexts(context_fn)


def save_masks(graph: fx.Graph) -> None:
    """Where a joint graph does not recompute attention, saves its outputs and its mask; and a chosen order anyhow."""
    if not graph.find_nodes(op="call_function", target=torch.ops.fgattn.attention_backward.default):
        return
    for order in graph.find_nodes(op="call_function", target=ops.choose_order):
        order.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    for node in graph.find_nodes(op="call_function", target=ops.attention):
        if node.meta.get("recompute") in _RECOMPUTE:
            continue
        # A tuple can't be saved: without a mark of their own its parts would be recomputed, and so would the node.
        parts = (user for user in node.users if user.target is operator.getitem)
        for saved in (node, *parts, node.args[3]):
            saved.meta["recompute"] = CheckpointPolicy.MUST_SAVE
