"""The observed masks that are carried from step to step: who owns them, and which one a call is given.

A mask belongs to a site, a layer, a branch of guidance and a shape. The layer is told by the Parameter object of its
projection: layers share compiled code, a second expert reuses the graphs of the first, and addresses move when weights
are offloaded. The masks outlive a run, so that the next one finds the same addresses, but nothing else of them:
whatever was observed for another video is observed anew.
"""

import logging
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import TensorWeakRef

from fg_inductor.denoising import Call, Run
from fg_inductor.kernels import fetch, host_memory
from fg_inductor.passes.state import Stateful
from fg_inductor.settings import Settings
from fg_inductor.state_budget import Budget

log = logging.getLogger(__name__)


@dataclass
class _Entry:
    """The mask of one site of one layer in one branch."""

    weight: TensorWeakRef
    mask: Tensor
    drift: Tensor | None  # as ``begin_observed_`` has it
    graph: str
    site: int
    n: int  # keys in a group
    video: object = None  # during which it was observed
    step: int = 0  # and when
    stage: int = 0  # and in which stage of the density
    call: Call | None = None  # that used it last
    refreshes: int = 0  # told by the host
    slots: Tensor | None = None  # which of the masks each head has, where heads share them
    in_host_memory: bool = False


@dataclass(frozen=True)
class Held:
    """The observed masks that a site of a compiled graph holds, over all layers and branches."""

    bytes: int = 0
    n: int = 0  # keys in a group; 0 without a mask
    refreshes: int = 0  # how often one was observed
    heads: int = 0  # of each site, and
    masks: int = 0  # how many masks they share
    in_host_memory: bool = False


# (path and index of the site, settings, level of the budget, id of the weight, branch) -> its mask
_entries: dict[tuple, _Entry] = {}
_flags: dict[torch.device, tuple[Tensor, list[bool]]] = {}  # device -> the flag that graphs read, and what it says
_problems: dict[str, str] = {}  # graph -> why a call of it was stateless
_said: set[tuple[Settings, str]] = set()
_budgets: dict[Settings, Budget] = {}


def forget(model: nn.Module | None = None) -> None:
    """Free the masks of a model, or all of them."""
    fetch.forget()
    if model is None:
        for known in (_entries, _flags, _problems, _said, _budgets):
            known.clear()
        return
    weights = {id(p) for p in model.parameters()}
    for key in [key for key, entry in _entries.items() if id(entry.weight()) in weights]:
        del _entries[key]


def held(graph: str, site: int) -> Held:
    """What a site of a compiled graph holds. Waits for the device where refreshes are told by drift."""
    found = [e for e in _entries.values() if (e.graph, e.site) == (graph, site)]
    refreshes = sum(e.refreshes if e.drift is None else int(e.drift[2]) for e in found)
    size = sum(e.mask.numel() * e.mask.element_size() for e in found)
    if not found:
        return Held()
    masks = found[0].mask.shape[1]
    heads = masks if found[0].slots is None else found[0].slots.shape[1]
    return Held(size, found[0].n, refreshes, heads, masks, found[0].in_host_memory)


def problem(graph: str) -> str:
    """Why calls of a graph had no state; empty where all had."""
    return _problems.get(graph, "")


def say_reasons(settings: Settings, stateful: Stateful) -> None:
    """Say once why sites of a graph select their masks anew in each call."""
    for reason in dict.fromkeys(stateful.reasons.values()):
        if not settings.quiet and (settings, reason) not in _said:
            _said.add((settings, reason))
            log.warning("fgattn: 'observed' masks are selected anew in each call, as 'pooled' does: %s.", reason)


def is_due(refresh: str | tuple[int, ...], step: int, last: int) -> bool:
    """Whether a mask observed at step ``last`` is to be observed again at ``step``: ``fgattn.refresh``.

    Never where drift decides, which is measured on the device.
    """
    if isinstance(refresh, tuple):
        return any(last < listed <= step for listed in refresh)
    rule, number = refresh.split()
    return rule == "every" and step - last >= int(number)


class Keeper:
    """Gives the calls of one compiled graph the masks of their layer and branch, and says whether to refresh them.

    forms  the graph with state, for each of ``settings.stages`` one for each of its ``levels``
    """

    def __init__(
        self, settings: Settings, graph: str, forms: list[list[Stateful]], paths: dict[int, str], example_inputs
    ):
        self.settings, self.graph, self.forms, self.paths = settings, graph, forms, paths
        self._symbols = {i: x.node.expr for i, x in enumerate(example_inputs) if isinstance(x, torch.SymInt)}
        self._shapes: dict[tuple, list[tuple[int, ...]]] = {}

    def arguments(self, call: Call, args: tuple, stage: int = 0) -> tuple[int, list[Tensor]] | None:
        """Which of ``forms`` runs, and what it takes behind ``args``; None where the call must be stateless.

        stage: of the density. A mask that was observed in another one is observed anew.
        """
        if call.branch is None:
            self._say_ambiguous(call.run)
            return None
        if any(isinstance(args[site.weight], FakeTensor) for site in self.forms[stage][0].sites):
            return None  # DDP's graph splitter runs compiled code for its shapes
        budget = _budgets.setdefault(self.settings, Budget(self.settings, _let_go))
        if not budget.fits(call, self, args):
            _problems[self.graph] = (
                "stateless: fgattn.state_bytes does not hold the masks, however large the groups, or few"
            )
            return None
        form = self.forms[stage][budget.level]
        entries = [
            self._entry(site, args[site.weight], call.branch, shape, budget.level)
            for site, shape in zip(form.sites, self.mask_shapes(args, form), strict=True)
        ]
        if any(entry.call is call for entry in entries):
            _problems[self.graph] = "stateless: a layer runs several times in one call of the model"
            return None
        video, step = call.run.video, call.run.index
        due = any(
            e.video is not video or e.stage != stage or is_due(self.settings.refresh, step, e.step) for e in entries
        )
        for entry in entries:
            entry.call = call
            if due:
                entry.video, entry.step, entry.stage = video, step, stage
                entry.refreshes += 1
        _count("refreshed" if due else "reused", len(entries))
        state = [entry.mask for entry in entries]
        state += [entry.slots for entry in entries if entry.slots is not None]
        state += [entry.drift for entry in entries if entry.drift is not None]
        return budget.level, [*state, *(_flag(device, due) for device in form.devices)]

    def _entry(self, site: Any, weight: Tensor, branch: Hashable, shape: tuple[int, ...], level: int) -> _Entry:
        key = (self.paths[site.index], site.index, self.settings, level, id(weight), branch)
        entry = _entries.get(key)
        if entry is not None and entry.weight() is weight and entry.mask.shape == shape:
            entry.graph, entry.site = self.graph, site.index  # a recompiled frame takes over
            return entry
        if entry is not None and entry.weight() is weight:
            log.info("%s: %s tokens in place of %s: its mask is made anew", key[0], shape, tuple(entry.mask.shape))
        for dead in [k for k, e in _entries.items() if e.weight() is None]:
            del _entries[dead]
        device, host = site.mask.device, self.settings.levels[level].state_memory == "host"
        with torch.inference_mode(False):
            zeros = host_memory.zeros if host else _zeros
            mask = zeros(shape, device)
            drift = None if self.settings.drift is None else torch.zeros(3, dtype=torch.float32, device=device)
            slots = None if site.slots is None else mask.new_zeros(shape[0], site.slots.shape[1])
        _entries[key] = _Entry(
            TensorWeakRef(weight), mask, drift, self.graph, site.index, site.n, slots=slots, in_host_memory=host
        )
        _count("made", 1)
        return _entries[key]

    def sizes(self, args: tuple) -> tuple[int, ...]:
        """The symbolic sizes of a call."""
        return tuple(args[i] for i in self._symbols)

    def mask_shapes(self, args: tuple, form: Stateful) -> list[tuple[int, ...]]:
        """Of each site's mask in one of ``forms``."""
        sizes = self.sizes(args)
        key = sizes, id(form)
        if key not in self._shapes:
            known = dict(zip(self._symbols.values(), map(sympy.Integer, sizes), strict=True))
            self._shapes[key] = [
                tuple(x if isinstance(x, int) else int(x.node.expr.xreplace(known)) for x in site.mask.shape)
                for site in form.sites
            ]
        return self._shapes[key]

    def _say_ambiguous(self, run: Run) -> None:
        """A branch that begins late is not known in its first step; in a second one the inputs do not tell it."""
        run.ambiguous.add(run.index)
        if len(run.ambiguous) != 2 or self.graph in _problems:
            return
        _problems[self.graph] = "stateless: the branch of guidance can't be told"
        if not self.settings.quiet:
            log.warning(
                "fgattn: which branch of guidance a call of the model belongs to can't be told from its inputs, as no "
                "other tensor stays the same from step to step: such calls select their masks anew. Call the model "
                "inside `with run.branch(name):`, run being what fg_inductor.denoising gives."
            )


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device)


def _let_go(settings: Settings, level: int) -> None:
    """Free the masks of these settings that are kept by less than ``level`` of the budget."""
    for key in [key for key in _entries if key[2] == settings and key[3] < level]:
        del _entries[key]


def _flag(device: torch.device, on: bool) -> Tensor:
    """The bool scalar that graphs on a device read: one, for the sake of its address, written where it changes."""
    if device not in _flags:
        with torch.inference_mode(False):
            _flags[device] = torch.zeros((), dtype=torch.bool, device=device), [False]
    flag, now = _flags[device]
    if now[0] != on:
        flag.fill_(on)
        now[0] = on
    return flag


def _count(what: str, number: int) -> None:
    from torch._dynamo.utils import counters

    counters["fgattn"][f"masks {what}"] += number
