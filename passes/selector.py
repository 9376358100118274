"""The selector of a site: the operator that makes its block mask, and its arguments."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fg_inductor.kernels import ops
from fg_inductor.kernels.choose_order import candidates
from fg_inductor.kernels.query_order import ALONE, TIME
from fg_inductor.passes.graph import call, same, size_of, value
from fg_inductor.passes.refusal import Refusal

CURVES = {"dfs": "hilbert"}  # query order by selector; the others take rods
# Selectors whose groups are runs of keys in query order. The others place their keys themselves.
REORDERED = ("pooled", "observed")


def chooses_order(settings, grid: tuple) -> bool:
    """Whether the order follows from the queries of a call: a mask that is kept over calls needs one that stays.

    grid: T, H, W, numbers or symbols. Where it leaves no choice the order is the usual one, which sites share.
    """
    if settings.time_step != "auto" or settings.mask != "pooled" or settings.m < ALONE:
        return False
    return not all(isinstance(size, int) for size in grid) or len(candidates(*grid, settings.m)) > 1


def order_options(settings) -> tuple:
    """What ``query_order`` takes behind its device: nothing where it is as always, so that graphs are short to read."""
    curve, time = CURVES.get(settings.mask, "rods"), settings.time_step
    if time not in (TIME, "auto"):
        return curve, time
    return () if curve == "rods" else (curve,)


def order_of_calls(
    settings, grid: tuple[int, int, int], device: torch.device, before: int = 0, after: int = 0
) -> Callable[[Tensor], Tensor]:
    """The query order int32 [Sq] of a call with q [B, H, Sq, D], text at its ends, as a rewritten graph has it.

    Chosen anew in each call, or made once for all of them.
    """
    if chooses_order(settings, grid):
        return lambda q: ops.choose_order(q, *grid, before, after, settings.m)
    order = ops.query_order(*grid, before, after, settings.m, device, *order_options(settings))
    return lambda q: order


class Refused(Exception):
    """A site that the chosen selector can't serve; holds the Refusal."""

    def __init__(self, refusal: Refusal):
        self.refusal = refusal


@dataclass(frozen=True)
class Operands:
    """What selectors are given, as arguments of nodes."""

    q: Node
    k: Node
    key_bias: Node | None
    order: Node | None
    scale: float
    dense_keys: list
    dense_queries: list
    min_seq: int


def emit(graph: Graph, settings, x: Operands, origin: Node, cast: torch.dtype, memo: dict) -> Node:
    """Insert the selector that ``settings.mask`` names; returns the node of the mask. Raises Refused.

    ``memo``: that of ``passes.graph.call``.
    """
    shape = (x.scale, settings.m, settings.n)
    density = settings.share
    by_head = list(density) if isinstance(density, tuple) else None
    if by_head and not same(len(by_head), value(x.q).shape[1]):
        detail = f"{len(by_head)} in fgattn.sites for {value(x.q).shape[1]} heads"
        raise Refused(Refusal("densities for another number of heads", detail, True))
    density = None if by_head else density
    if settings.mask in ("pooled", "observed"):  # which ``passes.state`` replaces where it can keep masks
        keep = (settings.queries_per_mean, settings.mass, density, settings.max_density)
        rules = (x.dense_keys, x.dense_queries, x.min_seq, settings.reduce, settings.gamma, settings.alpha)
        args = (x.q, x.k, x.key_bias, x.order, *shape, *keep, *rules, by_head)
        return call(graph, ops.select_pooled, args, origin, cast, memo)
    if settings.mask in ("static", "dfs"):  # they place queries and keys in the grid
        if x.order is None:
            raise Refused(Refusal("no token grid", f"fgattn.mask={settings.mask!r} needs fgattn.token_grid", True))
        if not same(value(x.q).shape[2], value(x.k).shape[2]):
            lengths = f"{value(x.q).shape[2]} and {value(x.k).shape[2]}, with fgattn.mask={settings.mask!r}"
            raise Refused(Refusal("queries and keys differ in number", lengths, True))
    if settings.mask == "static":
        *grid, before = x.order.args[:4]
        rule = settings.static
        args = (x.q, x.k, x.order, *shape[1:], grid, before, rule.tile, rule.window, rule.radius, rule.ranges)
        mask = call(graph, ops.select_static, args, origin, cast, memo)
    elif settings.mask == "dfs":
        args = (x.q, x.k, x.key_bias, x.order, *shape, density, by_head)
        mask = call(graph, ops.select_dfs, args, origin, cast, memo)
    else:
        mask = call(graph, settings.selector, (x.q, x.k, x.key_bias, x.order, *shape), origin, cast)
    if not (x.dense_keys or x.dense_queries):
        return mask
    lengths = (size_of(graph, x.q, 2, origin), size_of(graph, x.k, 2, origin))
    args = (mask, x.order, *lengths, *shape[1:], x.dense_keys, x.dense_queries)
    return call(graph, ops.keep_dense, args, origin)
