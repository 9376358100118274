"""The constants of ``cost`` for a device: measured once in a few seconds, at compile time, and kept on disk.

A measurement belongs to a card, to versions of torch, Triton and the kernels here, and to what the constants depend on
(head dim, dtype, slice, tail, selector). Files lie in ``$FGATTN_CACHE_DIR``, else in ``fg_inductor`` under
``$XDG_CACHE_HOME`` or ``~/.cache``; deleting them is safe. ``FGATTN_DEVICE_CONSTANTS=off`` measures nothing: then
"faster" rewrites every eligible site, as "always" does. So does a device that has no memory left, and says so.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from fg_inductor import cost, kernels
from fg_inductor.cost import Constants, Shape
from fg_inductor.kernels import ops
from fg_inductor.passes.cache_key import source_hash
from fg_inductor.passes.selector import order_of_calls
from fg_inductor.settings import Settings

log = logging.getLogger(__name__)

# Heads and token grids that are timed: as many rows, so that what grows with pairs is told from what grows with rows.
SHAPES = {
    "cuda": ((16, (16, 32, 32)), (8, (32, 32, 32))),
    "cpu": ((4, (4, 16, 16)), (2, (8, 16, 16))),
}
DENSITIES = (0.1, 0.5)
OPTIONS = ("mask", "slice", "pool", "reduce", "gamma", "time_step", "kernel")  # that the constants depend on
CUT = 8  # tokens less for dense attention: that makes its lengths ragged
HOST_MARGIN = 1.25  # launches of the same calls took 15% to 25% longer in another process (H100 machine, virtual cores)
BUDGET_MS = {"cuda": 20.0, "cpu": 60.0}  # for one measurement, by which the number of calls is chosen; 3 to 20 calls
BUSY_MS = 30.0  # of attention in front of each measurement
HOT_MS = 1000.0  # of attention before the first measurement: a cool card runs at clocks that it can't hold

_found: dict[str, Constants | None] = {}


def constants(settings: Settings, dim: int, dtype: torch.dtype, device: torch.device) -> Constants | None:
    """The constants for sites with this head dim, dtype and device; None where they can't be had.

    Measures where no file holds them: for seconds, with a line that says so.
    """
    if os.environ.get("FGATTN_DEVICE_CONSTANTS") == "off":
        return None
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()):
        return None  # a graph for another machine; or nothing may run now
    device = torch.device(device.type, torch.cuda.current_device()) if _no_index(device) else device
    settings = settings.with_order(True)  # "auto" and the slice that it stands for are one measurement
    about = _about(settings, dim, dtype, device)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    if key not in _found:
        path = cache_folder() / f"{_slug(about['card'])}-{key}.json"
        _found[key] = _read(path) or _measure_and_write(path, about, settings, dim, dtype, device)
    return _found[key]


def _no_index(device: torch.device) -> bool:
    return device.type == "cuda" and device.index is None


def forget() -> None:
    """Forget what this process has read or measured; files stay."""
    _found.clear()


# Files


def cache_folder() -> Path:
    """Where measurements are kept."""
    if folder := os.environ.get("FGATTN_CACHE_DIR"):
        return Path(folder).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fg_inductor"


def _about(settings: Settings, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """What a measurement holds for."""
    on_gpu = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    options = {name: getattr(settings, name) for name in OPTIONS}
    options["tail"] = settings.tail_kind
    return {"card": card, "dim": dim, "dtype": str(dtype).removeprefix("torch."), **options, **_versions()}


@functools.cache
def _versions() -> dict[str, str | None]:
    from importlib import metadata

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    sources = source_hash(Path(kernels.__file__).parent)
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton, "kernels": sources}


def _slug(card: str) -> str:
    return re.sub(r"\W+", "_", card).strip("_")


def _read(path: Path) -> Constants | None:
    try:
        return Constants(**json.loads(path.read_text())["constants"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("fgattn: %s can't be read (%s: %s); it is measured anew.", path, type(error).__name__, error)
        return None


def _measure_and_write(path: Path, about: dict, settings: Settings, dim, dtype, device) -> Constants | None:
    start = time.perf_counter()
    what = f"head dim {dim}, {about['dtype']}, {settings.slice}, tail {settings.tail_kind}"
    try:
        found = measure(settings, dim, dtype, device)
    except torch.OutOfMemoryError:
        log.warning(
            "fgattn: %s has no memory left to measure what attention takes (%s), so 'fgattn.when' rewrites every "
            "eligible site.", about["card"], what,
        )  # fmt: skip
        return None
    except Exception:  # whatever it is, a forecast is no reason to stop a compilation, or to leave a site dense
        if settings.strict:
            raise
        log.exception(
            "fgattn: measuring attention on %s (%s) failed, so 'fgattn.when' rewrites every eligible site; please "
            "report this.", about["card"], what,
        )  # fmt: skip
        return None
    seconds = time.perf_counter() - start
    kept = _write(path, {"about": about, "seconds": seconds, "constants": asdict(found)})
    if not settings.quiet:
        log.warning(
            "fgattn: measured dense and sparse attention on %s (%s) for %.1f s, once, to leave sites dense where a "
            "rewrite gains nothing; %s. 'fgattn.when': 'always' does without.", about["card"], what, seconds, kept,
        )  # fmt: skip
    return found


def _write(path: Path, record: dict) -> str:
    """Write at once or not at all, as other processes may do the same; returns in words what became of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(record, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        return f"not kept, as {path} can't be written ({error.strerror})"
    return f"kept in {path}"


# Measuring


def measure(settings: Settings, dim: int, dtype: torch.dtype, device: torch.device) -> Constants:
    """Time dense attention, sparse attention and selection at the shapes of ``SHAPES``, and fit the constants."""
    from torch.utils._python_dispatch import _disable_current_modes

    settings = settings.with_order(True)
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), _disable_current_modes(), on_device, torch.autocast(device.type, enabled=False):
        dense, attention, selection = [], [], []
        load_ms = HOT_MS
        hosts = {"dense": [], "attention": [], "selection": []}
        for heads, grid in SHAPES[device.type]:
            tokens = grid[0] * grid[1] * grid[2]
            q, k, v = _random(heads, tokens, dim, dtype, device)
            order_of = order_of_calls(settings, grid, device)
            order = order_of(q)
            scale, m, n = dim**-0.5, settings.m, settings.n
            shape = Shape(1, heads, tokens, tokens, dim, m, n, 1.0, int(settings.tail_kind == "pooled"))

            def dense_call(q=q, k=k, v=v) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v)

            def note(found: list, name: str, shape: Shape, call: Callable, load: Callable = dense_call) -> None:
                took, host = device_and_host_ms(call, device, load)
                found.append((shape, took))
                hosts[name].append(host)

            if device.type == "cuda":
                _keep_busy(dense_call, load_ms)
                load_ms = BUSY_MS
            note(dense, "dense", shape, dense_call)
            ragged, cut = (
                dataclasses.replace(shape, Sq=tokens - CUT, Sk=tokens - CUT),
                [x[:, :, CUT:] for x in (q, k, v)],
            )
            note(dense, "dense", ragged, lambda cut=cut: F.scaled_dot_product_attention(*cut))
            for density in DENSITIES:
                choose = (scale, m, n, settings.queries_per_mean, settings.mass, density, 1.0, [], [], 0)
                rules = (settings.reduce, settings.gamma)

                def select(q=q, k=k, v=v, order_of=order_of, choose=choose, rules=rules) -> Tensor:
                    order = order_of(q)
                    if settings.n > 1:  # v is copied to query order; k likewise, by what makes it
                        ops.reorder(v, order)
                    return ops.select_pooled(q, k, None, order, *choose, *rules)

                mask = select()
                given = (mask, None, order, scale, m, n, settings.tail_kind, 0, settings.kernel)
                at = dataclasses.replace(shape, density=density)
                note(attention, "attention", at, lambda q=q, k=k, v=v, given=given: ops.attention(q, k, v, *given))
            note(selection, "selection", shape, select)
        fitted = {
            **_fit(cost.DENSE_TERMS, dense),
            **_fit(cost.ATTENTION_TERMS, attention),
            **_fit(cost.SELECTION_TERMS, selection),
        }
    host = {name: min(times) for name, times in hosts.items()}
    sparse_host = HOST_MARGIN * (host["attention"] + host["selection"])
    return Constants(**fitted, dense_host=host["dense"], sparse_host=sparse_host)


def _random(heads: int, tokens: int, dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k and v [1, H, S, D] in BSHD storage, from a generator of their own: the user's random numbers stay his."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, tokens, heads, dim)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]


def device_and_host_ms(
    call: Callable[[], object], device: torch.device, load: Callable[[], object]
) -> tuple[float, float]:
    """Milliseconds that the device takes for a call, and that Python takes to launch it (0 on CPU).

    The best of several calls on CPU. On CUDA the mean of calls behind some of ``load``: attention draws all power that
    a card may draw, so that clocks fall while a model runs, and what a rested card reaches says little. The device is
    also busy while the calls are launched, and never waits for Python.
    """
    call()  # whatever is compiled at the first call
    budget = BUDGET_MS[device.type]
    if device.type != "cuda":
        once = _seconds(call) * 1000
        times = [_seconds(call) * 1000 for _ in range(min(max(round(budget / once), 2), 20))]
        return min(once, *times), 0.0
    torch.cuda.synchronize()
    once = _seconds(lambda: (call(), torch.cuda.synchronize())) * 1000
    count = min(max(round(budget / once), 3), 20)
    found = []
    for _ in range(2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _keep_busy(load, BUSY_MS)
        start.record()
        host = _seconds(lambda: [call() for _ in range(count)])
        end.record()
        torch.cuda.synchronize()
        found.append((start.elapsed_time(end) / count, host * 1000 / count))
    return sum(took for took, _ in found) / 2, min(host for _, host in found)


def _keep_busy(load: Callable[[], object], ms: float) -> None:
    """Queue ``load`` for about so many milliseconds of the device's time."""
    load()
    torch.cuda.synchronize()
    once = _seconds(lambda: (load(), torch.cuda.synchronize())) * 1000
    for _ in range(round(ms / once) + 1):
        load()


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _fit(terms: dict[str, sympy.Expr], measured: list[tuple[Shape, float]]) -> dict[str, float]:
    """The constants, none below zero, that fit times best: least squares of relative errors."""
    times = torch.tensor([time for _, time in measured], dtype=torch.float64)
    columns = {
        name: torch.tensor([float(term.subs(shape.values())) for shape, _ in measured], dtype=torch.float64) / times
        for name, term in terms.items()
    }
    left = dict(columns)
    while True:
        scales = {name: column.norm() for name, column in left.items()}
        matrix = torch.stack([column / scales[name] for name, column in left.items()], 1)
        solution = torch.linalg.lstsq(matrix, torch.ones_like(times)[:, None], driver="gelsd").solution[:, 0]
        found = {name: (x / scales[name]).item() for (name, x) in zip(left, solution, strict=True)}
        lowest = min(found, key=lambda name: found[name] * scales[name].item())
        if found[lowest] >= 0 or len(left) == 1:
            break
        del left[lowest]
    per_unit = {name: max(found.get(name, 0.0), 0.0) for name in terms}
    return {
        name.removeprefix("1/"): (1 / x if x else float("inf")) if name.startswith("1/") else x
        for name, x in per_unit.items()
    }
