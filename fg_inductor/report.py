"""What became of each attention site: the report, the counters, the log and the one line of the first compile."""

import collections
import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fg_inductor import state
from fg_inductor.passes.site import Site
from fg_inductor.settings import Settings
from fg_inductor.site_settings import Sites, unmatched_text

log = logging.getLogger(__name__)

COLUMNS = ("graph", "site", "kind", "query", "key", "dtype", "decision", "kernel", "settings", "density", "notes")


@dataclass(frozen=True)
class Row:
    """One site of one compiled graph.

    graph     the compile id of Dynamo's graph, "frame/recompilation", as in its logs
    site      as ``passes.site.Site`` has it: path, kind, shapes, dtype, decision, reason
    settings  the options that it was compiled with
    kernel    "hopper" (Gluon), "portable" (Triton) or "reference" (PyTorch, on CPU): what ``kernels.choice`` says of
              the sizes that the graph was traced with; None where it stays dense
    density   kept pairs / all pairs, the mean over all calls so far; None where it was not measured
    note      why ``fgattn.stats`` could not measure it, or calls had no observed mask; else empty
    held      the observed masks that it holds, over all layers and branches that share the graph: their bytes, the
              keys in a group of theirs, how often one was observed, and how many heads share how many masks
    """

    graph: str
    site: Site
    settings: Settings
    kernel: str | None = None
    density: float | None = None
    note: str = ""
    held: state.Held = dataclasses.field(default_factory=state.Held)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON. ``settings`` holds the options that are not at their defaults."""
        row = {name: getattr(self, name) for name in ("graph", "kernel", "density", "note")}
        row |= {"held": dataclasses.asdict(self.held)}
        return row | dataclasses.asdict(self.site) | {"settings": self.settings.changed()}

    def cells(self) -> tuple[str, ...]:
        """The row of the table, in the order of ``COLUMNS``."""
        site, dense = self.site, not self.site.rewritten
        reason = f"{site.reason} ({site.detail})" if site.detail else site.reason
        found = (f"{name} {text}" for name, text in site.details.items())
        held = ""
        if self.held.bytes:
            kept, heads, masks = f"{self.settings.m}x{self.held.n}", self.held.heads, self.held.masks
            size = f"{self.held.bytes / 1e6:.3g} MB at {kept}"
            sharing = f", {heads} heads share {masks} mask{'s' * (masks > 1)}" if masks < heads else ""
            where = " in host memory" if self.held.in_host_memory else ""
            asked_for = (
                kept == site.slice
                and masks * self.settings.heads_per_mask >= heads
                and self.held.in_host_memory == (self.settings.state_memory == "host")
            )
            why = "" if asked_for else " for fgattn.state_bytes"
            held = f"masks held{where}: {size}{sharing}{why}, {self.held.refreshes} refreshes"
        notes = "; ".join(filter(None, (reason, *found, held, self.note)))
        density = "" if self.density is None else f"{self.density:.3f}"
        return (
            self.graph, site.path, site.kind, site.query, site.key, site.dtype, site.decision, self.kernel or "",
            "" if dense else summary(self.settings, site.slice), density, notes,
        )  # fmt: skip


class Report(Sequence[Row]):
    """The rows, a sequence; ``str`` gives them as a table."""

    def __init__(self, rows: Iterable[Row] = (), notes: Iterable[str] = ()):
        self.rows = tuple(rows)
        self.notes = tuple(notes)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    @property
    def rewritten(self) -> int:
        """The number of sites that run sparse."""
        return sum(row.site.rewritten for row in self.rows)

    @property
    def headline(self) -> str:
        return f"fgattn: {self.rewritten} of {len(self)} attention sites rewritten"

    def to_dict(self) -> dict[str, Any]:
        return {"rewritten": self.rewritten, "sites": [row.to_dict() for row in self.rows]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def print(self) -> None:
        """Print the table: in colour and fitted to the terminal where ``rich`` is installed, else as plain text."""
        try:
            from rich.console import Console
        except ImportError:
            print(self)
            return
        Console().print(_rich_table(self) if self.rows else str(self))
        for note in self.notes if self.rows else ():
            print(note)

    def __str__(self) -> str:
        if not self.rows:
            return "fgattn: no attention site has been compiled."
        table = tabulate([row.cells() for row in self.rows], COLUMNS, disable_numparse=True)
        return "\n".join((self.headline, table, *self.notes))

    __repr__ = __str__


def _rich_table(report: Report):
    """The columns that differ from site to site, decisions in colour."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=report.headline, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("site", "kind", "query", "decision", "density", "notes"):
        table.add_column(name, overflow="fold", no_wrap=name not in ("site", "notes"))
    for row in report:
        cells = dict(zip(COLUMNS, row.cells(), strict=True))
        cells["site"] = cells["site"] or f"#{row.site.index}"
        if row.site.key != row.site.query:
            cells["notes"] = f"key {row.site.key}; {cells['notes']}"
        style = "green" if row.site.rewritten else "yellow" if row.site.video else "dim"
        table.add_row(*(escape(cells[column.header]) for column in table.columns), style=style)
    return table


def summary(settings: Settings, slice_: str) -> str:
    """What decides the mask, in few words: ``pooled 128x16, density 0.3``."""
    keep = ""
    if len(settings.stages) > 1:
        keep = ", density " + ", ".join(f"{stage.density:g} from {start:g}" for start, stage in settings.stages)
    elif settings.mask in ("pooled", "observed", "dfs"):
        rule = next((name for name in ("alpha", "top_p") if getattr(settings, name) is not None), None)
        keep = f", {rule} {_number(getattr(settings, rule))}" if rule else f", density {_number(settings.share)}"
    tail = "" if settings.tail_kind == "none" else f", {settings.tail_kind} tail"
    steps = settings.refresh if isinstance(settings.refresh, str) else f"at {', '.join(map(str, settings.refresh))}"
    again = f", refreshed {steps}" if settings.mask == "observed" else ""
    sites = "" if settings.sites is None else ", sites by fgattn.sites"
    return f"{settings.mask} {slice_}{keep}{tail}{again}{sites}"


def _number(x: float | tuple[float, ...]) -> str:
    return f"{x:g}" if isinstance(x, float) else f"{min(x):g} to {max(x):g} by head, {sum(x) / len(x):.3g} on average"


class Meter:
    """Sums the kept density of a graph's sites on their devices, so that no call waits for one."""

    def __init__(self, sites: list[int]):
        self.sites = sites
        self.totals: list[Tensor] = []
        self.calls = 0

    def wrap(self, compiled: Callable) -> Callable:
        """The compiled function without the extra outputs that ``passes.density`` appended."""
        if not self.sites:
            return compiled

        def run(*args):
            results = compiled(*args)
            cut = len(results) - len(self.sites)
            self._add(results[cut:])
            return results[:cut]

        return run

    @torch.no_grad()
    def _add(self, densities: Sequence[Tensor]) -> None:
        if any(isinstance(d, FakeTensor) for d in densities):
            return  # DDP's graph splitter runs compiled code for its shapes
        # Grad and inference mode are guarded, so that a graph always runs in the one in which its sums began.
        self.totals = self.totals or [torch.zeros_like(d) for d in densities]
        torch._foreach_add_(self.totals, list(densities))
        self.calls += 1

    def means(self) -> dict[int, float]:
        """Site index -> mean density. Waits for the devices."""
        return {i: t.item() / self.calls for i, t in zip(self.sites, self.totals, strict=False)}


# A frame can be compiled twice under one id (Dynamo restarts), and DDP splits one frame into several graphs: so a row
# is known by graph, path and index, and a second one with the same three takes the place of the first.
_rows: dict[tuple[str, str, int], tuple[Row, Meter | None]] = {}
_sites: dict[Sites, dict[str, None]] = {}  # settings by site -> the paths of the sites compiled with them, in order
_announced: set[tuple[Settings, bool]] = set()


def reset() -> None:
    """Forget all rows, measured densities and which lines were printed. ``fg_inductor.reset`` forgets more."""
    _rows.clear()
    _sites.clear()
    _announced.clear()


def report() -> Report:
    """The attention sites of everything compiled with ``backend="fgattn"`` since the last reset."""
    means = {meter: meter.means() for _, meter in _rows.values() if meter}
    rows = (_as_of_now(row, means.get(meter, {})) for row, meter in _rows.values())
    return Report(rows, filter(None, (unmatched_note(sites, paths) for sites, paths in _sites.items())))


def unmatched_note(sites: Sites | None, paths: Iterable[str]) -> str:
    """A line about the entries of ``fgattn.sites`` that name none of the sites; empty where all do."""
    text = "" if sites is None else unmatched_text(sites, paths)
    return text and f"fgattn.sites: no site is named {text}"


def note_sites(graph: str, rows: list[Row], settings: Settings) -> None:
    """Warn of entries of ``fgattn.sites`` that no site has had so far, once there is a graph with sparse sites."""
    if settings.sites is None or not rows:
        return
    paths = _sites.setdefault(settings.sites, {})
    before = settings.sites.unmatched(paths)
    paths.update(dict.fromkeys(row.site.path for row in rows))
    after = settings.sites.unmatched(paths)
    if after and (not paths or after != before or len(before) == len(settings.sites.entries)):
        log.warning(
            "fgattn: up to graph %s, no site is named as these entries of fgattn.sites: %s. Unless another graph has "
            "them, correct them; print(fg_inductor.report()) lists the sites.", graph,
            unmatched_text(settings.sites, paths),
        )  # fmt: skip


def _as_of_now(row: Row, densities: dict[int, float]) -> Row:
    note = "; ".join(filter(None, (row.note, state.problem(row.graph) if row.site.rewritten else "")))
    held = state.held(row.graph, row.site.index)
    return dataclasses.replace(row, density=densities.get(row.site.index), note=note, held=held)


def record(rows: list[Row], meter: Meter | None) -> None:
    """Add the rows of one graph to the report, the counters and the log."""
    from torch._dynamo.utils import counters

    counts = counters["fgattn"]
    for row in rows:
        key = (row.graph, row.site.path, row.site.index)
        if key in _rows:
            counts[_counter(_rows[key][0])] -= 1
        counts[_counter(row)] += 1
        _rows[key] = (row, meter)
        log.info(
            "graph %s, site %s: %s",
            row.graph,
            row.site.path or row.site.index,
            " | ".join(filter(None, row.cells()[2:])),
        )
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "fgattn_report", "encoding": "json"},
        payload_fn=lambda: Report(rows).to_json(),
    )


def _counter(row: Row) -> str:
    return "rewritten" if row.site.rewritten else f"skipped: {row.site.reason}"


def announce(graph: str, rows: list[Row], settings: Settings) -> None:
    """Say once for each settings that attention has become approximate; or, as often, that nothing was rewritten."""
    done = Report(rows).rewritten
    if settings.quiet or not _announced.isdisjoint({(settings, True), (settings, done > 0)}):
        return
    _announced.add((settings, done > 0))
    if done:
        slice_ = next(row.site.slice for row in rows if row.site.rewritten)
        fact = f"now run sparse, which is approximate: {summary(settings, slice_)}"
    elif rows:
        reason, count = collections.Counter(row.site.reason for row in rows).most_common(1)[0]
        fact = f"run sparse; the most common reason ({count}): {reason}"
    else:
        fact = "run sparse: it calls no scaled_dot_product_attention"
    log.warning(
        "fgattn: %d of %d attention sites of graph %s %s. print(fg_inductor.report()) lists them; "
        "options={'fgattn.quiet': True} silences this line.", done, len(rows), graph, fact,
    )  # fmt: skip
