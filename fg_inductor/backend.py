"""The backend: ``torch.compile(model, backend="fgattn", mode=..., options={...})``.

It rewrites attention on Dynamo's graph, where a site is one node as the user wrote it, and hands the rest to Inductor.
"""

import copy
import dataclasses
import difflib
import logging
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from fg_inductor import cost, explain_page, kernels, passes, state, variants
from fg_inductor.kernels import ops
from fg_inductor.passes import cache_key, checkpoint, density, sdpa, variant
from fg_inductor.passes.graph import hint, value
from fg_inductor.passes.site import Site
from fg_inductor.passes.state import Stateful, add_state
from fg_inductor.report import Meter, Report, Row, announce, note_sites, record, unmatched_note
from fg_inductor.report import reset as forget_report
from fg_inductor.settings import PREFIX, Settings
from fg_inductor.variants import Variants

log = logging.getLogger(__name__)

HOOK = "joint_custom_pre_pass"


def fgattn(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable:
    """Compile a graph of Dynamo's. ``mode`` is Inductor's; ``options`` holds ``fgattn.*``, "mode" and Inductor's own.

    Raises ValueError or TypeError for an option that nobody knows, and RuntimeError under ``fgattn.strict`` where a
    video site stays dense.
    """
    from torch._dynamo import eval_frame
    from torch._dynamo.utils import dynamo_timed

    # Dynamo resets the backends it has met since its last reset, and forgets those of functions compiled before that.
    eval_frame.cached_backends.setdefault(id(fgattn), fgattn)
    settings, patches = read_options(mode, options)
    graph_id = str(torch._guards.CompileContext.current_compile_id())
    before = gm.print_readable(print_output=False) if log.isEnabledFor(logging.DEBUG) else None
    with dynamo_timed("fgattn_pass", log_pt2_compile_event=True):
        varies = settings.dense_first or settings.mask == "observed" or len(settings.stages) > 1
        original = variant.copy_graph(gm) if varies else None
        rows = rewrite_graph(gm, settings.stages[0][1], graph_id, host_counts=not _replays(patches))
        rows = [dataclasses.replace(row, settings=settings.for_site(row.site.path)) for row in rows]
        _check_strict(rows, settings)
        rewritten = any(row.site.rewritten for row in rows)
        meter = Meter(density.add_outputs(gm)) if settings.stats and rewritten else None
        stages = [_Stage(gm, [])]
        if varies and rewritten:
            stages = _stages(gm, original, example_inputs, rows, settings, graph_id)
            if settings.mask == "observed":
                rows = [_note_stateless(row, stages[0].observed[0]) for row in rows]
                state.say_reasons(settings, stages[0].observed[0])
    if before is not None:
        log.debug("graph %s before:\n%s\nafter:\n%s", graph_id, before, gm.print_readable(print_output=False))
    if meter:
        rows = [_note_unmeasured(row, meter) for row in rows]
    record(rows, meter)
    note_sites(graph_id, rows, settings)
    announce(graph_id, rows, settings)
    if not rewritten:
        return _compile(gm, example_inputs, settings.inner, patches)
    ours = _with_joint_pass(patches, settings)

    def compile_sparse(graph, inputs):
        compiled = _compile(graph, inputs, settings.inner, ours)
        return meter.wrap(compiled) if meter else compiled

    if not varies:
        return compile_sparse(gm, example_inputs)
    inputs = variant.fake_inputs(example_inputs)
    observes = bool(stages[0].observed) and bool(stages[0].observed[0].sites)
    keeper = None
    if observes:
        paths = {row.site.index: row.site.path for row in rows}
        keeper = state.Keeper(settings, graph_id, [stage.observed for stage in stages], paths, inputs)

    def compilers(stage: _Stage):
        observed = [partial(compile_sparse, form.gm, [*inputs, *form.inputs]) for form in stage.observed if observes]
        return partial(compile_sparse, stage.sparse, inputs), observed

    dense = partial(_compile, original, inputs, settings.inner, patches)
    return Variants(settings, dense, list(map(compilers, stages)), variant.is_symbolic(inputs), keeper)


def reset(model: torch.nn.Module | None = None) -> None:
    """Forget the observed masks of a model; without one all of them, and all rows, densities and lines printed."""
    state.forget(model)
    if model is None:
        forget_report()
        variants.forget()


fgattn.reset = reset  # called by torch._dynamo.reset()


def register() -> None:
    """Make ``backend="fgattn"`` known where the package runs from a checkout; installed, its entry point does."""
    if "fgattn" not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(fgattn, name="fgattn")


def explain(
    model: Callable, *args, options: dict[str, Any] | None = None, page: str | Path | None = None, **kwargs
) -> Report:
    """Print what ``backend="fgattn"`` would do with each attention site of ``model(*args, **kwargs)``, and return it.

    Runs the model once, eagerly: with dense attention; where ``page`` names a file, with sparse attention, and writes
    an HTML page with the block mask of each rewritten site. ``fg_inductor.report()`` and the counters stay as they are.
    """
    settings = read_options(None, options)[0].stages[0][1]
    rows, pictures = [], {}

    def trace(gm, example_inputs):
        graph_id = str(torch._guards.CompileContext.current_compile_id())
        # A copy, but for the weights: what runs without a page is the graph as it was.
        weights = {id(x): x for x in (*gm.parameters(), *gm.buffers())}
        rewritten = copy.deepcopy(gm, weights)
        rows.extend(rewrite_graph(rewritten, settings, graph_id))
        if page is None:
            return gm.forward

        def run(*inputs):
            recorder = explain_page.Recorder(rewritten)
            result = recorder.run(*inputs)
            pictures.update({(graph_id, index): x for index, x in recorder.pictures.items()})
            return result

        return run

    def run():
        return model(*args, **kwargs)

    # Dynamo caches, and counts towards its recompile limit, by code object: a fresh one leaves the model's own alone.
    run.__code__ = run.__code__.replace()
    torch.compile(run, backend=trace)()
    unique = {(row.graph, row.site.path, row.site.index): row for row in rows}.values()
    note = unmatched_note(settings.sites, (row.site.path for row in unique))
    shown = (_with_density(row, pictures.get((row.graph, row.site.index))) for row in unique)
    report = Report(shown, [note] if note else [])
    if page is not None:
        explain_page.write(page, report, pictures, getattr(model, "__name__", type(model).__name__))
    report.print()
    return report


def _with_density(row: Row, picture: explain_page.Picture | None) -> Row:
    mean = None if picture is None else sum(picture.densities) / len(picture.densities)
    return dataclasses.replace(row, density=mean)


def rewrite(gm: GraphModule, options: dict[str, Any] | None = None) -> Report:
    """Rewrite the attention of a graph in place, and say what became of each site: for ``torch.export``.

        program = torch.export.export(model, args)
        gm = program.module()
        print(fg_inductor.rewrite(gm, {"fgattn.top_p": 0.9}))

    ``torch.export`` knows no backends, so the graph is rewritten behind it; it can be run, compiled, or exported again.
    Options of Inductor and of denoising steps are refused: nothing is compiled or counted here. Raises TypeError for
    anything but a GraphModule.
    """
    if not isinstance(gm, GraphModule):
        hint = "pass program.module()" if isinstance(gm, torch.export.ExportedProgram) else "export or trace it first"
        raise TypeError(f"fg_inductor.rewrite takes a torch.fx.GraphModule, got {type(gm).__name__}; {hint}.")
    settings, patches = read_options(None, options)
    if patches:
        raise ValueError(f"fg_inductor.rewrite compiles nothing, so that {', '.join(patches)} would have no effect.")
    if settings.mask == "observed" or settings.dense_first or len(settings.stages) > 1:
        raise ValueError(
            "fg_inductor.rewrite: a graph alone has neither steps nor state, so that the mask 'observed', "
            "'fgattn.dense_first' and a density by steps need the backend; leave them out."
        )
    rows = rewrite_graph(gm, settings, "exported")
    _check_strict(rows, settings)
    return Report(rows)


# Options


def read_options(mode: str | None, options: dict[str, Any] | None) -> tuple[Settings, dict[str, Any]]:
    """Our settings and Inductor's config patches. Raises ValueError or TypeError for what neither knows."""
    from torch._inductor import config, list_mode_options

    ours, theirs = {}, {}
    for key, option in (options or {}).items():
        if not isinstance(key, str):
            raise TypeError(f"fgattn: the names of options are strings; got {key!r}.")
        (ours if key.startswith(PREFIX) else theirs)[key] = option
    settings = Settings.parse(ours)

    if "mode" in theirs and mode is not None:
        raise ValueError(f"fgattn: mode={mode!r} and options={{'mode': {theirs['mode']!r}}} are both given; give one.")
    mode = theirs.pop("mode", mode) or "default"
    modes = list_mode_options()
    if mode not in modes:
        raise ValueError(f"fgattn: unknown mode {mode!r}; {_suggest(mode, modes, 'choose one of ' + ', '.join(modes))}")

    known = config.get_config_copy()
    patches = dict(modes[mode])
    for key, option in theirs.items():
        name = key.replace("-", "_")
        if name not in known:
            names = (*(PREFIX + f.name for f in dataclasses.fields(Settings)), "mode", *known)
            hint = _suggest(key, names, "fg_inductor.settings and torch._inductor.list_options() name them")
            raise ValueError(f"fgattn: unknown option {key!r}, neither '{PREFIX}<name>' nor one of Inductor's; {hint}")
        kind = config.get_type(name)
        # Generic types don't support isinstance; Inductor itself leaves those unchecked.
        if typing.get_origin(kind) is None and not isinstance(option, kind):
            raise TypeError(f"fgattn: Inductor's option {key!r} takes a {kind.__name__}; got {option!r}.")
        patches[name] = option
    return settings, patches


def _suggest(name: Any, names: Iterable[str], otherwise: str) -> str:
    name = str(name)
    # The bare name of one of our options is the likeliest slip, and not a near match.
    near = [PREFIX + name] if PREFIX + name in names else difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise}."


# The pass


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


def _check_strict(rows: list[Row], settings: Settings) -> None:
    dense = [row for row in rows if row.site.video and not row.site.rewritten]
    if settings.strict and dense:
        raise RuntimeError(
            f"fgattn: {len(dense)} video attention sites can't be rewritten, and 'fgattn.strict' is on. Change what "
            f"the reasons name, or drop 'fgattn.strict' to leave these sites dense.\n{Report(dense)}"
        )


def _note_unmeasured(row: Row, meter: Meter) -> Row:
    if not row.site.rewritten or row.site.index in meter.sites:
        return row
    return dataclasses.replace(row, note="density not measured inside a checkpointed region")


@dataclasses.dataclass
class _Stage:
    """The rewritten graph in one stage of the density, and with observed masks of each size that may be kept."""

    sparse: GraphModule
    observed: list[Stateful]


def _stages(
    gm: GraphModule,
    original: GraphModule,
    example_inputs: Sequence[Any],
    rows: list[Row],
    settings: Settings,
    graph: str,
) -> list[_Stage]:
    """The forms of a graph. ``gm`` is the first of them, rewritten, ``original`` the graph before."""

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
        return _with_state(form(of), example_inputs, rows, settings, graph)

    return [_Stage(form(stage), [with_state(level) for level in stage.levels]) for _, stage in stages]


def _with_state(
    gm: GraphModule, example_inputs: Sequence[Any], rows: list[Row], settings: Settings, graph_id: str
) -> Stateful:
    """A rewritten graph with state. An error of the pass is a reason to go without, unless ``strict``."""
    try:
        return add_state(gm, example_inputs, settings.drift)
    except Exception as error:
        if settings.strict:
            raise
        log.exception("fgattn: graph %s gets no observed masks, as the pass failed; please report this.", graph_id)
        return Stateful(gm, reasons={row.site.index: f"error in the pass: {error}" for row in rows})


def _note_stateless(row: Row, stateful: Stateful) -> Row:
    reason = stateful.reasons.get(row.site.index)
    if reason is None or not row.site.rewritten:
        return row
    site = dataclasses.replace(row.site, details={**row.site.details, "state": f"none: {reason}"})
    return dataclasses.replace(row, site=site)


# The inner compiler

# From 2.10 on, Inductor loses gradients of scales and shifts that are chunks of one tensor, as blocks of diffusion
# transformers have them, with dense attention too: the memory of some is never written (pytorch/pytorch#193061). The
# fix, #193103, came after 2.14.
PATCHES = {"triton.mix_order_reduction": False} if torch.__version__ < (2, 15) else {}


def _replays(patches: dict[str, Any]) -> bool:
    """Whether Inductor will replay CUDA graphs, so that Python launches nothing."""
    from torch._inductor import config

    return bool(patches.get("triton.cudagraphs", config.triton.cudagraphs))


def _with_joint_pass(patches: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Inductor's patches with our pass on the joint graph, behind the user's own hooks."""
    from torch._inductor import config

    theirs = patches.get(HOOK, config.joint_custom_pre_pass)
    theirs = () if theirs is None else tuple(theirs) if isinstance(theirs, (list, tuple)) else (theirs,)
    folders = (Path(module.__file__).parent for module in (kernels, passes))
    salt = f"{cache_key.source_hash(Path(__file__).parent, *folders)} {settings}"
    return {**patches, HOOK: cache_key.JointPass(salt, theirs)}


def _compile(gm: GraphModule, example_inputs: Sequence[Any], inner: str, patches: dict[str, Any]) -> Callable:
    if inner != "inductor":
        return torch._dynamo.lookup_backend(inner)(gm, example_inputs)
    # Imported here as torch's own backend does: importing Inductor is slow, and its worker pool should start early.
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    # Into Inductor's own table: with a table of ours, its caches would be off.
    with config.patch(patches):
        select_decomp_table().setdefault(ops.reorder, ops.reorder_decomposition)
    # As patches and not in a ``with``: backward is compiled later, and must see them too.
    return compile_fx(gm, example_inputs, config_patches=PATCHES | patches)
