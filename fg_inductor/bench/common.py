"""What every benchmark shares: shapes, arguments, environment, timing, records."""

import argparse
import functools
import itertools
import json
import math
import os
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from fg_inductor.kernels import ops
from fg_inductor.kernels.mask import GROUPS, SLICES
from fg_inductor.settings import Settings

# Self-attention of published models: heads, tokens (video, and text where the site is joint), head dim, token grid.
# Heads, head dims and patches are those of the models' configurations for diffusers; the clip is the pipeline's default
# or the one named: Wan 81 frames, HunyuanVideo 129, CogVideoX 49, LTX-Video 704x512x161 (2B) and 121 frames of 720p
# (13B), Allegro 88.
PRESETS = {
    "wan2.1-1.3b-480p": {"heads": 12, "tokens": 32_760, "dim": 128, "grid": (21, 30, 52)},
    "wan2.1-1.3b-720p": {"heads": 12, "tokens": 75_600, "dim": 128, "grid": (21, 45, 80)},
    "wan2.1-14b-480p": {"heads": 40, "tokens": 32_760, "dim": 128, "grid": (21, 30, 52)},
    "wan2.1-14b-720p": {"heads": 40, "tokens": 75_600, "dim": 128, "grid": (21, 45, 80)},
    "hunyuanvideo-720p": {"heads": 24, "tokens": 118_800 + 256, "dim": 128, "grid": (33, 45, 80)},
    "cogvideox-5b": {"heads": 48, "tokens": 17_550 + 226, "dim": 64, "grid": (13, 30, 45)},
    "ltx-2b": {"heads": 32, "tokens": 7_392, "dim": 64, "grid": (21, 16, 22)},
    "ltx-13b-720p": {"heads": 32, "tokens": 14_080, "dim": 128, "grid": (16, 22, 40)},
    "allegro-720p": {"heads": 24, "tokens": 79_200, "dim": 96, "grid": (22, 45, 80)},
}


# Types of arguments


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def share(text: str) -> float:
    """A number in (0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in (0, 1]")
    return number


def mask_slice(text: str) -> tuple[int, int]:
    """M and N of "128x8"."""
    found = re.fullmatch(r"(\d+)x(\d+)", text, re.ASCII)
    m, n = map(int, found.groups()) if found else (0, 0)
    if m not in SLICES or n not in GROUPS:
        raise argparse.ArgumentTypeError(f"{text!r} is not MxN, M in {SLICES} and N in {GROUPS}")
    return m, n


# Environment, times, records


def environment() -> dict:
    """Card, versions and commit, for every record. FGATTN_COMMIT stands in where there is no git checkout."""
    import triton

    commit = os.environ.get("FGATTN_COMMIT", "")
    if not commit:
        shown = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        commit = shown.stdout.strip() or "unknown"
    return {
        "card": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": commit,
    }


class Timing(NamedTuple):
    """Milliseconds of one call: the median and the spread."""

    median: float
    p20: float
    p80: float

    def fields(self, name: str = "") -> dict[str, float]:
        """As entries of a record: ``median_ms`` or, with a name, ``name_ms``; and ``p20_ms``, ``p80_ms`` likewise."""
        prefix = f"{name}_" if name else ""
        return {f"{name or 'median'}_ms": self.median, f"{prefix}p20_ms": self.p20, f"{prefix}p80_ms": self.p80}


def measure(calls: Sequence[Callable[[], Any]], warmup_ms: float = 25, repeat_ms: float = 150) -> Timing:
    """Time calls that do the same on different inputs, in turns, by device events; 5 to 1000 times in all.

    Give as many as it takes for their inputs to pass the L2 cache (``sets_past_l2``): then each finds it cold.
    """
    for call in calls:  # whatever is compiled or allocated at the first call
        call()
    turns = itertools.cycle(calls)
    once = _elapsed(turns, 1)[0]
    _elapsed(turns, min(math.ceil(warmup_ms / once), 1000))
    times = _elapsed(turns, min(max(round(repeat_ms / once), 5), 1000))
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), p20, p80)


def measure_graph(calls: Sequence[Callable[[], Any]], turns: int) -> Timing:
    """``measure`` for calls that Python may launch slower than the device runs them: ``turns`` of each as a CUDA graph.

    Times are of one call; their spread is that of averages.
    """
    for call in calls:  # whatever is compiled at the first call, which no graph may hold
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * turns:
            call()
    return Timing(*(ms / (len(calls) * turns) for ms in measure([graph.replay])))


def _elapsed(turns: Iterator[Callable[[], Any]], count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        next(turns)()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def sets_past_l2(bytes_of_one: int) -> int:
    """How many sets of inputs of that size are twice the L2 cache."""
    return math.ceil(2 * torch.cuda.get_device_properties().L2_cache_size / bytes_of_one)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes of device memory that ``run()`` allocates at most, its result included; None on CPU, which counts none."""
    if device.type == "cpu":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def save(records: list[dict], path: str | None) -> None:
    """Write records as JSON, where a path was given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(records, indent=1) + "\n")


def collect(rows: Iterable[dict], path: str | None, each: Callable[[dict], None] | None = None) -> list[dict]:
    """The records of ``rows``, written to ``path`` after each one: a later row may fail, or take the process down."""
    records = []
    for record in rows:
        records.append(record)
        save(records, path)
        if each:
            each(record)
    return records


def where(record: dict) -> str:
    """Card and versions of a record, as a line."""
    return f"{record['card']}, " + ", ".join(
        f"{name} {record[name]}" for name in ("torch", "triton", "cudnn", "commit")
    )


def show(records: list[dict], columns: list[str]) -> None:
    """Print those of the columns that some record fills, as a table."""
    columns = [name for name in columns if any(record.get(name) is not None for record in records)]
    print(tabulate([[r.get(c) for c in columns] for r in records], headers=columns, floatfmt=".4g"))


def select(
    q: Tensor, k: Tensor, order: Tensor | None, m: int, n: int, density: float | None, top_p: float = 1.0
) -> Tensor:
    """A mask as the backend's default selector makes it; q and k [B, H, S, D], ``order`` that of the queries.

    It keeps ``density`` of the groups, or where that is None the fewest that hold ``top_p`` of the mass.
    """
    rule = (_queries_per_mean(m, n), top_p, density, 1.0, [], [])
    return ops.select_pooled(q, k, None, order, q.shape[-1] ** -0.5, m, n, *rule, 0)


@functools.cache
def _queries_per_mean(m: int, n: int) -> int:
    return Settings.parse({"fgattn.slice": f"{m}x{n}"}).queries_per_mean
