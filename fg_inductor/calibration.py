"""Calibration: for each site and head the density that meets an error budget, measured on inputs of the user's own.

A model runs eagerly, once for each input. At each site attention is computed densely, which is what the rest of the
model goes on with, and again at each density of LADDER with the selector and tail of the options; all heads at once.
Errors are relative to the dense output of the head, in L2 over all tokens and inputs. What is held is one layer's
outputs and a few numbers for each site, however many inputs there are.
"""

import contextlib
import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fg_inductor.backend import read_options
from fg_inductor.forms import rewrite_graph
from fg_inductor.kernels import ops, reference
from fg_inductor.report import Report, Row
from fg_inductor.settings import BY_HEAD, Settings

# At 1 attention is exact, so that it needs no measurement.
LADDER = tuple(round(2 ** (-i / 4), 3) for i in range(1, 21))
# Sparse attention of so many pairs costs what dense attention does, its selection included (README, "Measured").
DENSE_ABOVE = 0.85
MEASURED_WITH = ("mask", "slice", "pool", "reduce", "gamma", "tail", "time_step")
FOUND = ("density", "top_p", "max_density", "alpha", "sites")
NEVER_SPARSE = 1 << 62  # a min_seq


@dataclass
class Curve:
    """Squared errors [densities of LADDER, H] and squared dense outputs [H] of a site, summed over its calls."""

    errors: Tensor
    norms: Tensor

    def relative(self) -> Tensor:
        """Relative L2 error [densities, H]; 0 for a head that gives nothing."""
        return (self.errors / self.norms.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()

    def densities(self, budget: float) -> list[float]:
        """For each head the least density from which on the error stays within the budget; 1 where none is."""
        within = (self.relative() <= budget).int().cumprod(0).sum(0)
        return [1.0 if count == 0 else LADDER[count - 1] for count in within.tolist()]


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` measured.

    sites    what ``fgattn.sites`` takes: site path -> {"density": one for each head} or {"dense": True}
    curves   site path -> its errors at each density of LADDER
    skipped  site path -> why a site that would run sparse was not measured
    error    the budget
    inputs   how many calls of the model were measured
    options  what they were measured with, and hold for
    """

    sites: dict[str, dict[str, Any]]
    curves: dict[str, Curve]
    skipped: dict[str, str]
    error: float
    inputs: int
    options: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON and for ``fgattn.sites``."""
        return {"error": self.error, "inputs": self.inputs, "options": self.options, "sites": self.sites}

    def save(self, path: str | Path) -> None:
        """Write the file that ``options={"fgattn.sites": path}`` reads."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        rows = []
        for path, curve in self.curves.items():
            found = curve.densities(self.error)
            kept = "dense" if "dense" in self.sites[path] else f"{sum(found) / len(found):.3f}"
            rows.append((path, len(found), kept, f"{min(found):.3f}", f"{max(found):.3f}"))
        table = tabulate(rows, ("site", "heads", "density", "least", "most"), disable_numparse=True)
        head = f"fgattn: {len(rows)} sites within {self.error:g} of dense attention, on {self.inputs} inputs"
        return "\n".join((head, table, *(f"{path or 'a site'}: {reason}" for path, reason in self.skipped.items())))


def calibrate(
    model: Callable,
    inputs: Iterable,
    error: float = 0.05,
    *,
    options: dict[str, Any] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Calibration:
    """Measure which density each head of each site needs, for ``options={"fgattn.sites": ...}``.

        calibration = fg_inductor.calibrate(model, inputs, error=0.05, out="settings.json")
        model = torch.compile(model, backend="fgattn", options={"fgattn.sites": "settings.json"})

    model   a module, or any function of the inputs; run without gradients, as it is otherwise (weights, mode, device)
    inputs  calls of it, read one at a time: a tuple of arguments, a dict of keyword arguments, or (tuple, dict)
    error   bound on the relative L2 error of a head's attention output against dense attention, in (0, 1)
    options the options that the model will be compiled with, but those that say how much to keep
    out     a JSON file for the result
    progress  a bar on stderr

    Sites are known by module path; calls of one path share a density. The whole model is traced: layers that are
    compiled block by block share one graph, and can't have settings of their own. Raises ValueError or TypeError for
    options and inputs that can't be used, and where no site was measured.
    """
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not 0 < error < 1:
        raise ValueError(f"fg_inductor.calibrate: error={error!r} must be a number between 0 and 1.")
    settings = _settings(options)
    model = getattr(model, "_orig_mod", model)  # of what torch.compile returned
    total = len(inputs) if hasattr(inputs, "__len__") else None
    with _bar(total, progress) as bar, torch.no_grad():
        meter = _Meter(settings, bar)

        def run(args, kwargs):
            return model(*args, **kwargs)

        # Dynamo caches, and counts towards its recompile limit, by code object: a fresh one leaves the model's alone.
        run.__code__ = run.__code__.replace()
        compiled = torch.compile(run, backend=meter.trace, dynamic=False)
        calls = 0
        for item in inputs:
            compiled(*_call_of(item))
            calls += 1
            bar.next_input()
    if not meter.curves:
        raise ValueError(
            f"fg_inductor.calibrate: no attention site was measured, in {calls} calls.\n{Report(meter.rows.values())}"
        )
    sites = {}
    for path, curve in meter.curves.items():
        found = curve.densities(error)
        sites[path] = {"dense": True} if sum(found) / len(found) > DENSE_ABOVE else {"density": found}
    used = {f"fgattn.{name}": getattr(settings, name) for name in MEASURED_WITH} | {"fgattn.tail": settings.tail_kind}
    result = Calibration(sites, meter.curves, meter.skipped(), float(error), calls, used)
    if out is not None:
        result.save(out)
    return result


def _settings(options: dict[str, Any] | None) -> Settings:
    settings, _ = read_options(None, options)
    given = [name for name in FOUND if name in settings.changed()]
    if given:
        names = ", ".join(f"fgattn.{name}" for name in given)
        raise ValueError(f"fg_inductor.calibrate finds how much to keep: leave out {names}.")
    if settings.mask not in BY_HEAD or settings.mask == "dense":
        raise ValueError(
            f"fg_inductor.calibrate: the mask {settings.mask!r} has no density to find; "
            f"there are {', '.join(repr(x) for x in BY_HEAD if x != 'dense')}."
        )
    # Whether a site pays is asked when it is compiled, with the densities that are found here.
    return dataclasses.replace(settings, when="always")


def _call_of(item: Any) -> tuple[tuple, dict]:
    """The arguments of one call."""
    if isinstance(item, dict):
        return (), item
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], tuple) and isinstance(item[1], dict):
        return item
    if isinstance(item, tuple):
        return item, {}
    raise TypeError(
        "fg_inductor.calibrate: each of the inputs must be a tuple of arguments, a dict of keyword arguments, or a "
        f"(tuple, dict) of both; got {type(item).__name__}."
    )


# Measuring


@dataclass
class _Meter:
    """A backend that runs rewritten graphs with dense attention and measures what sparse attention would change."""

    settings: Settings
    bar: "_Bar"
    curves: dict[str, Curve] = field(default_factory=dict)
    rows: dict[tuple[str, int], Row] = field(default_factory=dict)

    def trace(self, gm: GraphModule, example_inputs: list[Any]) -> Callable:
        graph = str(torch._guards.CompileContext.current_compile_id())
        weights = {id(x): x for x in (*gm.parameters(), *gm.buffers())}
        rewritten = copy.deepcopy(gm, weights)
        paths = {}
        for row in rewrite_graph(rewritten, self.settings, graph):
            self.rows[graph, row.site.index] = row
            if row.site.rewritten:
                paths[row.site.index] = row.site.path
        self.bar.add_sites(paths.values())
        return lambda *inputs: _Measuring(rewritten, self, paths).run(*inputs)

    def skipped(self) -> dict[str, str]:
        """Sites that would run sparse and were not measured, with the reason."""
        found = {}
        for row in self.rows.values():
            if row.site.rewritten and not row.site.path:
                found[""] = "it has no module path, so that settings can't name it"
            elif row.site.rewritten and row.site.path not in self.curves:
                found[row.site.path] = "inside a checkpointed region; calibrate with checkpointing off"
        return found

    def add(self, path: str, errors: Tensor, norms: Tensor) -> None:
        """Add what one call of a site gave."""
        curve = self.curves.setdefault(path, Curve(torch.zeros_like(errors), torch.zeros_like(norms)))
        curve.errors += errors
        curve.norms += norms


class _Measuring(Interpreter):
    """Runs a rewritten graph: attention dense, and at each site with a path what sparse attention would give."""

    def __init__(self, gm: GraphModule, meter: _Meter, paths: dict[int, str]):
        super().__init__(gm)
        self.meter, self.paths = meter, paths
        self.selected: dict[Node, tuple] = {}  # selectors -> their arguments

    def run_node(self, n: Node) -> Any:
        if n.target in (ops.select_pooled, ops.select_dfs, ops.keep_dense):
            self.selected[n] = self.fetch_args_kwargs_from_env(n)[0]
        if n.target is not ops.attention or "fgattn_site" not in n.meta:
            return super().run_node(n)
        arguments = _by_name(n, self.fetch_args_kwargs_from_env(n)[0])
        dense, lse = ops.attention(**arguments | {"min_seq": NEVER_SPARSE})
        if path := self.paths[n.meta["fgattn_site"]]:
            self._measure(path, n.args[3], arguments, dense)
        self.selected.clear()  # which holds a layer's q and k
        return dense, lse

    def _measure(self, path: str, selector: Node, arguments: dict[str, Any], dense: Tensor) -> None:
        errors, lse = [], None
        if self.meter.settings.mask == "observed":  # its masks are made with the normalisers of dense attention
            names = ("q", "k", "m", "n")
            everything = reference.full_mask(*(arguments[name] for name in names))
            _, lse = ops.attention(**arguments | {"mask": everything, "min_seq": 0})
        for density in LADDER:
            mask = self._mask(selector, density, lse)
            sparse, _ = ops.attention(**arguments | {"mask": mask, "min_seq": 0})
            errors.append(_squares(sparse, dense))
        self.meter.add(path, torch.stack(errors).cpu(), _squares(dense).cpu())
        self.meter.bar.next_site(path)

    def _mask(self, node: Node, density: float, lse: Tensor | None) -> Tensor:
        """What the selector at ``node`` makes at this density; ``lse`` of dense attention for observed masks."""
        given = _by_name(node, self.selected[node])
        if node.target is ops.keep_dense:
            return ops.keep_dense(**given | {"mask": self._mask(node.args[0], density, lse)})
        changed = given | {"density": density, "head_density": None}
        if node.target is ops.select_dfs:
            return ops.select_dfs(**changed)
        changed |= {"min_seq": 0}
        if self.meter.settings.mask != "observed":
            return ops.select_pooled(**changed)
        mask = torch.empty_like(ops.select_pooled(**changed))
        for name in ("pool", "gamma", "alpha"):
            del changed[name]
        due = torch.ones((), dtype=torch.bool, device=mask.device)
        ops.update_observed_(**changed, lse=lse, mask=mask, due=due)
        return mask


def _by_name(node: Node, args: tuple) -> dict[str, Any]:
    return dict(zip((a.name for a in node.target._schema.arguments), args, strict=True))


def _squares(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Squared norms of the heads of x, or of x - y: [B, H, S, D] -> float64 [H]; one head in float32 at a time."""
    heads = range(x.shape[1])
    parts = ((x[:, h].float() if y is None else x[:, h].float() - y[:, h].float()) for h in heads)
    return torch.stack([part.square().sum(dtype=torch.float64) for part in parts])


# Progress


class _Bar:
    """Sites measured of all: tqdm's bar where it is installed, else a line for each input."""

    def __init__(self, inputs: int | None, bar: Any, shown: bool):
        self.inputs, self.bar, self.shown = inputs, bar, shown
        self.sites: set[str] = set()
        self.done = 0

    def add_sites(self, paths: Iterable[str]) -> None:
        self.sites.update(filter(None, paths))
        if self.bar is not None and self.inputs is not None:
            self.bar.total = self.inputs * len(self.sites)
            self.bar.refresh()

    def next_site(self, path: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(path, refresh=False)
            self.bar.update()

    def next_input(self) -> None:
        self.done += 1
        if self.bar is None and self.shown:
            of = "" if self.inputs is None else f" of {self.inputs}"
            print(f"calibrate: input {self.done}{of}, {len(self.sites)} sites", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(inputs: int | None, shown: bool) -> Iterator[_Bar]:
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if not shown or tqdm is None:
        yield _Bar(inputs, None, shown)
        return
    with tqdm(unit="site", desc="calibrate", dynamic_ncols=True) as bar:
        yield _Bar(inputs, bar, shown)
