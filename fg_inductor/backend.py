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
from torch.fx import GraphModule

from fg_inductor import explain_page, state, variants
from fg_inductor.forms import StageForms, check_strict, note_stateless, note_unmeasured, rewrite_graph, stages_of
from fg_inductor.inner import compile_graph, replays, with_joint_pass
from fg_inductor.passes import density, variant
from fg_inductor.report import Meter, Report, Row, announce, note_sites, record, unmatched_note
from fg_inductor.report import reset as forget_report
from fg_inductor.settings import PREFIX, Settings
from fg_inductor.variants import Variants

log = logging.getLogger(__name__)


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
        rows = rewrite_graph(gm, settings.stages[0][1], graph_id, host_counts=not replays(patches))
        rows = [dataclasses.replace(row, settings=settings.for_site(row.site.path)) for row in rows]
        check_strict(rows, settings)
        rewritten = any(row.site.rewritten for row in rows)
        meter = Meter(density.add_outputs(gm)) if settings.stats and rewritten else None
        stages = [StageForms(gm, [])]
        if varies and rewritten:
            stages = stages_of(gm, original, example_inputs, rows, settings, graph_id, ahead=not replays(patches))
            if settings.mask == "observed":
                rows = [note_stateless(row, stages[0].observed[0]) for row in rows]
                state.say_reasons(settings, stages[0].observed[0])
    if before is not None:
        log.debug("graph %s before:\n%s\nafter:\n%s", graph_id, before, gm.print_readable(print_output=False))
    if meter:
        rows = [note_unmeasured(row, meter) for row in rows]
    record(rows, meter)
    note_sites(graph_id, rows, settings)
    announce(graph_id, rows, settings)
    if not rewritten:
        return compile_graph(gm, example_inputs, settings.inner, patches)
    ours = with_joint_pass(patches, settings)

    def compile_sparse(graph, inputs):
        compiled = compile_graph(graph, inputs, settings.inner, ours)
        return meter.wrap(compiled) if meter else compiled

    if not varies:
        return compile_sparse(gm, example_inputs)
    inputs = variant.fake_inputs(example_inputs)
    observes = bool(stages[0].observed) and bool(stages[0].observed[0].sites)
    keeper = None
    if observes:
        paths = {row.site.index: row.site.path for row in rows}
        keeper = state.Keeper(settings, graph_id, [stage.observed for stage in stages], paths, inputs)

    def compilers(stage: StageForms):
        observed = [partial(compile_sparse, form.gm, [*inputs, *form.inputs]) for form in stage.observed if observes]
        return partial(compile_sparse, stage.sparse, inputs), observed

    dense = partial(compile_graph, original, inputs, settings.inner, patches)
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
    check_strict(rows, settings)
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
