"""Find scaled-dot-product attention, decide, and rewrite it to a selector and ``fgattn::attention``.

It works on Dynamo's graph (and export's), where a site is one call as the user wrote it; after AOTAutograd it is a
device kernel with its backward. ``sdpa_kernel(...)`` chooses among dense kernels: a site inside it is rewritten.
"""

import logging
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fg_inductor.kernels import ops
from fg_inductor.passes import key_mask, other_forms, provenance, segments, selector
from fg_inductor.passes.graph import (
    Extent,
    add,
    call,
    hint,
    is_contiguous,
    is_viewed,
    known,
    module_path,
    product,
    same,
    shape_text,
    value,
)
from fg_inductor.passes.layout import Layout
from fg_inductor.passes.program import Program
from fg_inductor.passes.refusal import Call, Refusal, refusal
from fg_inductor.passes.site import Forecast, Site
from fg_inductor.passes.stand_in import StandIn, Unknown
from fg_inductor.passes.token_grid import TokenGrid

log = logging.getLogger(__name__)

Ask = Callable[..., Forecast | None]

# F.scaled_dot_product_attention is the first, unless somebody has patched it.
SDPA = (
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
SITES = frozenset((*SDPA, ops.attention))  # those that were rewritten before are counted


def rewrite(gm: GraphModule, settings, ask: Ask | None = None, only: Collection[int] | None = None) -> list[Site]:
    """Rewrite the sites of ``gm`` and of its child graphs in place.

    ``ask(settings, batch, heads, queries, keys, dim, dtype, device)`` forecasts what a rewrite gains; where that is
    nothing, the site stays dense. Symbolic sizes are asked for as they were traced, which adds no guard. ``only``: the
    indices of the sites that may be rewritten, those of another form of the graph.

    One Site for each call of SDPA and each attention written otherwise, in execution order (last what looks like
    attention and can't be made out); sites rewritten by an earlier call are counted in ``index`` and not listed. Where
    the pass itself fails, the site is left as it was; under ``settings.strict`` the error is raised.
    """
    inserted, unknown = other_forms.insert(gm)
    stand_ins = {x.sdpa: x for x in inserted}
    rewriter = None
    try:
        program = Program(gm)
        aside = {x.original for x in inserted}  # SDPA in a form of its own, beside its stand-in
        calls = [n for n in program.nodes if n.op == "call_function" and n.target in SITES and n not in aside]
        rest = [_left(x, len(calls) + i) for i, x in enumerate(unknown)]
        if not any(n.target in SDPA for n in calls):
            return rest
        rewriter = _Rewriter(settings, program, Layout(program), TokenGrid(program), stand_ins, ask, only)
        return [rewriter.visit(node, index) for index, node in enumerate(calls) if node.target in SDPA] + rest
    finally:
        for stand_in in stand_ins.values():  # those of the sites that stay dense
            stand_in.take_out()
        for module in gm.modules():
            if isinstance(module, GraphModule) and rewriter and module.graph in rewriter.touched:
                module.recompile()


@dataclass
class _Rewriter:
    settings: object
    program: Program
    layout: Layout
    grids: TokenGrid
    stand_ins: dict[Node, StandIn]
    ask: Ask | None
    only: Collection[int] | None
    touched: set[Graph] = field(default_factory=set)
    orders: dict[tuple, Node] = field(default_factory=dict)  # where it is used and of what -> query order
    values: dict[tuple, Any] = field(default_factory=dict)  # of equal calls of our operators
    masks: dict[Any, tuple[Node | None, Node | None]] = field(default_factory=dict)  # likewise -> key bias, queries
    biases: dict[tuple[Node, Node], Node] = field(default_factory=dict)  # key bias, query order -> bias in that order

    def visit(self, node: Node, index: int) -> Site:
        """Decide on one site and rewrite it."""
        row = _describe(node, index)
        last = node.prev
        try:
            attention = Call.of(node)
            row["kind"] = provenance.kind_of(self.program, attention.query, attention.key)
            stand_in = self.stand_ins.get(node)
            written = stand_in and stand_in.refused
            settings = self.settings.for_site(row["path"])
            if settings.mask == "dense" != self.settings.mask:
                return self._left_dense(row, node, Refusal("dense in fgattn.sites"))
            if self.only is not None and index not in self.only:
                return self._left_dense(row, node, Refusal("dense in another form"))
            refused = refusal(attention, row["kind"], self.program, self.layout, settings, written)
            if refused:
                return self._left_dense(row, node, refused)
            expected = self._forecast(attention, settings)
            if expected and not expected.worth:
                return self._left_dense(row, node, Refusal("not faster than dense", f"expected {expected.text}"))
            min_seq, slice_, details = self._replace(attention, index, settings)
            if expected:
                details["expected"] = expected.text
            if stand_in:
                details["written as"] = stand_in.form
                self.stand_ins.pop(node).keep()
        except selector.Refused as error:
            self._undo(node, last)
            return self._left_dense(row, node, error.refusal)
        except Exception as error:
            self._undo(node, last)
            if self.settings.strict:
                raise
            where = row["path"] or f"site {index}"
            log.exception("fgattn: the pass failed on %s, which stays dense; please report this.", where)
            detail = f"{type(error).__name__}: {error}"
            return Site(**row, decision="dense", reason="error in the pass", detail=detail, video=True)
        reason = f"dense below {min_seq} tokens" if min_seq else ""
        return Site(**row, decision="rewritten", reason=reason, video=True, slice=slice_, details=details)

    def _forecast(self, attention: Call, settings) -> Forecast | None:
        """What is expected of the site at the sizes it was traced with; None where nobody knows."""
        if self.ask is None:
            return None
        q, k, _ = attention.tensors
        sizes = [hint(size) for size in (*q.shape[:3], k.shape[2], q.shape[3])]
        return None if None in sizes else self.ask(settings, *sizes, value(attention.node).dtype, q.device)

    def _left_dense(self, row: dict, node: Node, refused: Refusal) -> Site:
        how = {"written as": self.stand_ins[node].form} if node in self.stand_ins else {}
        reasons = {"reason": refused.reason, "detail": refused.detail, "video": refused.video}
        return Site(**row, decision="dense", **reasons, details=how)

    def _replace(self, attention: Call, index: int, settings) -> tuple[int, str, dict]:
        """Puts the operators in the place of the site; returns its ``min_seq``, its slice and what was found."""
        node, graph = attention.node, attention.node.graph
        q, k, v = attention.query, attention.key, attention.value
        lengths = [value(x).shape[2] for x in (q, k)]
        min_seq = 0 if all(known(x >= settings.min_seq) for x in lengths) else settings.min_seq
        of_queries, of_keys = self._segments(q, k)
        details = {"text": text} if (text := segments.ranges_text(of_keys)) else {}
        with graph.inserting_before(node):
            bias = valid_queries = None
            if attention.attn_mask is not None:
                bias, valid_queries = self._masks(attention, graph)
                details["key_mask"] = shape_text(value(attention.attn_mask))
            order = self._order(q, of_queries, node, settings, details)
            moved = order is not None and settings.mask in selector.REORDERED and same(*lengths)
            settings = settings.with_order(moved)
            moved = moved and settings.n > 1
            shape = (attention.factor, settings.m, settings.n)
            cast = value(node).dtype
            if moved:  # keys that are near in the grid agree better on who needs them than runs of a row of it
                k, v = (call(graph, ops.reorder, (x, order), node, cast, self.values) for x in (k, v))
                bias = bias and self._reordered(bias, order, node)
            dense_keys = segments.text_ranges(graph, of_keys, node, moved)
            dense_queries = segments.text_ranges(graph, of_queries, node)
            operands = selector.Operands(q, k, bias, order, attention.factor, dense_keys, dense_queries, min_seq)
            mask = selector.emit(graph, settings, operands, node, cast, self.values)
            attention_args = (q, k, v, mask, bias, order, *shape, settings.tail_kind, min_seq, settings.kernel)
            result = call(graph, ops.attention, attention_args, node, cast, self.values)
            out = call(graph, operator.getitem, (result, 0), node)
            if valid_queries is not None:
                rows = call(graph, operator.getitem, (valid_queries, (slice(None), None, slice(None), None)), node)
                out = call(graph, torch.ops.aten.where.ScalarOther, (rows, out, 0.0), node)
            if is_contiguous(value(node)) and is_viewed(node):
                clone = torch.ops.aten.clone.default
                out = call(graph, clone, (out,), node, memory_format=torch.contiguous_format)
        result.meta["fgattn_site"] = index
        node.replace_all_uses_with(out)
        self.program.replace(node, out)
        graph.erase_node(node)
        self.touched.add(graph)
        return min_seq, settings.slice, details

    def _masks(self, attention: Call, graph: Graph) -> tuple[Node, Node | None]:
        """The reduced mask: once for all sites of a graph that share it."""
        mask, sizes = attention.attn_mask, (*value(attention.query).shape, *value(attention.key).shape)
        shared = not self.program.is_written(mask) and all(isinstance(size, int) for size in sizes)
        key = (graph, mask, *sizes) if shared else attention.node
        if key not in self.masks:
            self.masks[key] = key_mask.reduce(graph, self.program, mask, attention.query, attention.key, attention.node)
        return self.masks[key]

    def _reordered(self, bias: Node, order: Node, node: Node) -> Node:
        if (bias, order) not in self.biases:
            self.biases[bias, order] = call(node.graph, torch.ops.aten.index_select.default, (bias, 1, order), node)
        return self.biases[bias, order]

    def _undo(self, node: Node, last: Node) -> None:
        """Take out the nodes that were added between ``last`` and ``node``."""
        added = set()
        while node.prev is not last:
            added.add(node.prev)
            node.graph.erase_node(node.prev)
        self.orders = {key: order for key, order in self.orders.items() if order not in added}
        self.masks = {key: nodes for key, nodes in self.masks.items() if added.isdisjoint(nodes)}
        self.biases = {key: bias for key, bias in self.biases.items() if bias not in added}

    def _segments(self, q: Node, k: Node) -> tuple[segments.Segments, segments.Segments]:
        """The segments of the queries and of the keys; those of one hold for both where they are as many."""
        of_queries, of_keys = (segments.without_empty(self.layout.segments(x, 2)) for x in (q, k))
        if same(value(q).shape[2], value(k).shape[2]):
            return of_queries or of_keys, of_keys or of_queries
        return of_queries, of_keys

    def _order(self, q: Node, of_queries: segments.Segments, node: Node, settings, details: dict) -> Node | None:
        """The query order of cubes of the token grid: one node a graph for each (grid, m, text)."""
        graph = node.graph
        if settings.token_grid is None:
            return None
        of_queries = of_queries or (Extent(value(q).shape[2], q, 2),)
        at = segments.video_index(of_queries)
        tokens = of_queries[at].size
        if settings.token_grid == "auto":
            grid = self.grids.find(tokens, node)
        else:
            grid = tuple(Extent(size) for size in settings.token_grid)
            if not same(product(settings.token_grid), tokens):
                shape = "x".join(map(str, settings.token_grid))
                details["order"] = f"none: fgattn.token_grid {shape} has not the {tokens} tokens of the video"
                return None
        text = (*of_queries[:at], *of_queries[at + 1 :])
        if grid is None or not all(x.readable(graph) for x in (*grid, *text)):
            return None
        details["token_grid"] = "x".join(str(x.size) for x in grid)
        options = selector.order_options(settings)
        chosen_by = q if selector.chooses_order(settings, tuple(x.size for x in grid)) else None
        key = (graph, at, settings.m, options, chosen_by, value(q).device, *(x.key for x in (*grid, *text)))
        if key not in self.orders:
            sizes = [x.read(graph, node) for x in grid]
            for part in (of_queries[:at], of_queries[at + 1 :]):
                total = 0
                for x in part:
                    total = add(graph, total, x.read(graph, node), node)
                sizes.append(total)
            if chosen_by is None:
                args = (*sizes, settings.m, value(q).device, *options)
                self.orders[key] = call(graph, ops.query_order, args, node)
            else:
                details["order"] = "by the queries"
                self.orders[key] = call(graph, ops.choose_order, (q, *sizes, settings.m), node)
        return self.orders[key]


def _left(found: Unknown, index: int) -> Site:
    """The row of attention that the pass could not make out."""
    row = {"path": module_path(found.node), "index": index, "kind": "unknown", "query": "", "key": "", "dtype": ""}
    return Site(**row, decision="dense", reason=found.reason, detail=found.detail)


def _describe(node: Node, index: int) -> dict:
    shapes = {}
    for position, keyword in enumerate(("query", "key")):
        x = value(node.args[position] if len(node.args) > position else node.kwargs.get(keyword))
        shapes[keyword] = shape_text(x) if isinstance(x, Tensor) else ""
    dtype = str(getattr(value(node), "dtype", "")).removeprefix("torch.")
    return {"path": module_path(node), "index": index, "kind": "unknown", **shapes, "dtype": dtype}
