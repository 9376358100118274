"""``nn.MultiheadAttention``, which Dynamo leaves as one call of ``F.multi_head_attention_forward``: taken apart into
projections and SDPA."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from fg_inductor.passes.graph import call, name, names, value
from fg_inductor.passes.stand_in import Insertion, Unknown, as_original, combined_mask, sdpa_call

aten = torch.ops.aten
CALLS = names("multi_head_attention_forward")
SIGNATURE = inspect.signature(F.multi_head_attention_forward)
# What SDPA has nothing for, if it is there.
EXTRAS = ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v")


def find(calls: list[Node]) -> Iterator["MultiHead | Unknown"]:
    """Each of the CALLS in a graph."""
    for node in (x for x in calls if x.target is F.multi_head_attention_forward):
        bound = SIGNATURE.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        outs = [user for user in node.users if name(user) == "getitem" and user.args[1] == 0]
        extra = next((key for key in EXTRAS if arguments[key] not in (None, False)), None)
        query = value(arguments["query"])
        if extra or not outs or not isinstance(query, Tensor) or query.dim() != 3:
            yield Unknown(node, "attention of an unknown form", f"nn.MultiheadAttention with {extra or 'other inputs'}")
            continue
        maps = [user for user in node.users if user not in outs]
        refused = ("attention probabilities are used elsewhere", "") if any(user.users for user in maps) else None
        yield MultiHead("nn.MultiheadAttention", outs[0], [node, *maps, outs[0]], refused, arguments)


@dataclass
class MultiHead(Insertion):
    """One call; ``arguments`` by name. Its tensors are [S, B, E]."""

    arguments: dict[str, object]

    def build(self, graph: Graph) -> tuple[Node, Node]:
        origin, given = self.original, self.arguments
        heads = given["num_heads"]
        q, k, v = (self._project(graph, place) for place in range(3))
        q, k, v = (call(graph, aten.unflatten.int, (x, 2, [heads, -1]), origin) for x in (q, k, v))
        q, k, v = (call(graph, aten.permute.default, (x, [1, 2, 0, 3]), origin) for x in (q, k, v))
        dropout_p = given["dropout_p"] if given["training"] else 0.0
        kwargs = {"attn_mask": self._mask(graph), "dropout_p": dropout_p, "is_causal": given["is_causal"]}
        sdpa = sdpa_call(graph, (q, k, v), kwargs, origin, value(origin).dtype)
        result = call(graph, aten.permute.default, (sdpa, [2, 0, 1, 3]), origin)
        result = call(graph, aten.flatten.using_ints, (result, 2, 3), origin)
        result = call(graph, F.linear, (result, given["out_proj_weight"], given["out_proj_bias"]), origin)
        return sdpa, as_original(graph, sdpa, result, origin)

    def _project(self, graph: Graph, place: int) -> Node:
        given, width = self.arguments, value(self.arguments["query"]).shape[2]
        x = given[("query", "key", "value")[place]]
        weight, bias = given["in_proj_weight"], given["in_proj_bias"]
        if given["use_separate_proj_weight"]:
            weight = given[("q_proj_weight", "k_proj_weight", "v_proj_weight")[place]]
        else:
            weight = call(graph, aten.narrow.default, (weight, 0, place * width, width), self.original)
        if bias is not None:
            bias = call(graph, aten.narrow.default, (bias, 0, place * width, width), self.original)
        return call(graph, F.linear, (x, weight, bias), self.original)

    def _mask(self, graph: Graph) -> Node | None:
        """Its boolean masks are True where a key is masked."""
        origin, masks, dropped = self.original, [], []
        padding, mask = self.arguments["key_padding_mask"], self.arguments["attn_mask"]
        if padding is not None:
            padding = call(graph, aten.unsqueeze.default, (padding, 1), origin)
            padding = call(graph, aten.unsqueeze.default, (padding, 1), origin)
        if mask is not None and value(mask).dim() == 3:
            mask = call(graph, aten.unflatten.int, (mask, 0, [-1, self.arguments["num_heads"]]), origin)
        for x in (padding, mask):
            if x is not None:
                (dropped if value(x).dtype == torch.bool else masks).append(x)
        return combined_mask(graph, [(x, 1.0) for x in masks], [], dropped, origin)
