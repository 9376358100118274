"""What becomes of a graph: the rows of its sites, and the forms in which it runs."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from fg_inductor import cost
from fg_inductor.kernels import ops
from fg_inductor.passes import checkpoint, density, sdpa, variant
from fg_inductor.passes.graph import hint, value
from fg_inductor.passes.site import Site
from fg_inductor.passes.state import Stateful, add_state
from fg_inductor.report import Meter, Report, Row
from fg_inductor.settings import Settings

log = logging.getLogger(__name__)


def rewrite_graph(gm: GraphModule, settings: Settings, graph_id: str, host_counts: bool = True) -> list[Row]:
    """Rewrite the sites of a graph in place. An error of the pass is a reason to stay dense, unless ``strict``.

    ``host_counts``: whether what Python takes to launch kernels is part of what a site takes.
    """
    try:
        sites = sdpa.rewrite(gm, settings, cost.forecaster(host_counts))
    except Exception as error:
        if settings.strict:
            raise
        log.exception(
            "fgattn: the pass failed on graph %s, whose attention stays as it is; please report this.", graph_id
        )
        detail = f"{type(error).__name__}: {error}"
        sites = [Site("", 0, "unknown", "", "", "", "dense", "error in the pass", detail, video=True)]
    if any(site.rewritten for site in sites):
        checkpoint.translate_policies(gm)
    _check_layers(sites, settings)
    kernels_ = _kernels(gm, sites)
    return [Row(graph_id, x, settings.for_site(x.path), kernel) for x, kernel in zip(sites, kernels_, strict=True)]


def _check_layers(sites: list[Site], settings: Settings) -> None:
    """Raises ValueError where ``fgattn.sites`` has settings of single layers for a graph that all layers share."""
    for path in () if settings.sites is None else dict.fromkeys(x.path for x in sites if x.rewritten):
        if meant := settings.sites.of_layers(path):
            raise ValueError(
                f"fgattn: fgattn.sites has {meant[0]!r}, but this graph is of one block and serves every layer: its "
                f"site is {path!r}. Settings of single layers need the whole model compiled, with "
                f"torch.compile(model, ...) in place of compile_repeated_blocks; or name {path!r}, for all layers."
            )


def _kernels(gm: GraphModule, sites: list[Site]) -> list[str | None]:
    """The kernel that will run each site. Raises ValueError where ``fgattn.kernel`` forces one that can't.

    Nodes that are no site are the user's own calls.
    """
    graphs = [m.graph for m in gm.modules() if isinstance(m, GraphModule)]
    nodes = [node for graph in graphs for node in graph.find_nodes(op="call_function", target=ops.attention)]
    at = {node.meta["fgattn_site"]: node for node in nodes if "fgattn_site" in node.meta}
    return [_kernel(at[site.index]) if site.index in at else None for site in sites]


def _kernel(node: Node) -> str:
    """What the operator chooses for a node: from its fake arguments, cast as autocast will cast them."""
    dtype = value(node)[0].dtype
    q, k, v, *rest = (_traced(value(x)) if isinstance(x, Node) else x for x in node.args)
    return ops.attention_kernel(*(x.to(dtype) for x in (q, k, v)), *rest)


def _traced(x: Any) -> Any:
    """A fake tensor with the sizes that the graph was traced with, so that a question about them adds no guard."""
    if not isinstance(x, FakeTensor) or all(isinstance(size, int) for size in (*x.shape, *x.stride())):
        return x
    # Any size will do where only run time knows it: a kernel refuses layouts and head dims, not lengths.
    shape, stride = ([4096 if hint(size) is None else hint(size) for size in sizes] for sizes in (x.shape, x.stride()))
    with x.fake_mode:
        return torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)


def check_strict(rows: list[Row], settings: Settings) -> None:
    dense = [row for row in rows if row.site.video and not row.site.rewritten]
    if settings.strict and dense:
        raise RuntimeError(
            f"fgattn: {len(dense)} video attention sites can't be rewritten, and 'fgattn.strict' is on. Change what "
            f"the reasons name, or drop 'fgattn.strict' to leave these sites dense.\n{Report(dense)}"
        )


def note_unmeasured(row: Row, meter: Meter) -> Row:
    if not row.site.rewritten or row.site.index in meter.sites:
        return row
    return dataclasses.replace(row, note="density not measured inside a checkpointed region")


@dataclasses.dataclass
class StageForms:
    """The rewritten graph in one stage of the density, and with observed masks of each size that may be kept."""

    sparse: GraphModule
    observed: list[Stateful]


def stages_of(
    gm: GraphModule,
    original: GraphModule,
    example_inputs: Sequence[Any],
    rows: list[Row],
    settings: Settings,
    graph: str,
    ahead: bool = True,
) -> list[StageForms]:
    """The forms of a graph. ``gm`` is the first of them, rewritten, ``original`` the graph before.

    ahead: masks in host memory may be fetched ahead, as nothing replays the graph.
    """

    stages, chosen = settings.stages, frozenset(row.site.index for row in rows if row.site.rewritten)

    def form(of: Settings) -> GraphModule:
        if of is stages[0][1]:
            return variant.copy_graph(gm)
        other = variant.copy_graph(original)
        sdpa.rewrite(other, of, only=chosen)
        checkpoint.translate_policies(other)
        if settings.stats:
            density.add_outputs(other)
        return other

    def with_state(of: Settings) -> Stateful:
        return _with_state(form(of), example_inputs, rows, of, graph, ahead)

    return [StageForms(form(stage), [with_state(level) for level in stage.levels]) for _, stage in stages]


def _with_state(
    gm: GraphModule, example_inputs: Sequence[Any], rows: list[Row], settings: Settings, graph_id: str, ahead: bool
) -> Stateful:
    """A rewritten graph with state. An error of the pass is a reason to go without, unless ``strict``."""
    try:
        host = settings.state_memory == "host"
        return add_state(gm, example_inputs, settings.drift, settings.heads_per_mask, host, ahead)
    except Exception as error:
        if settings.strict:
            raise
        log.exception("fgattn: graph %s gets no observed masks, as the pass failed; please report this.", graph_id)
        return Stateful(gm, reasons={row.site.index: f"error in the pass: {error}" for row in rows})


def note_stateless(row: Row, stateful: Stateful) -> Row:
    found = {"state": ("none", stateful.reasons), "masks": ("one for each head", stateful.unshared)}
    index = row.site.index
    details = {name: f"{what}: {reasons[index]}" for name, (what, reasons) in found.items() if index in reasons}
    if not details or not row.site.rewritten:
        return row
    site = dataclasses.replace(row.site, details={**row.site.details, **details})
    return dataclasses.replace(row, site=site)
