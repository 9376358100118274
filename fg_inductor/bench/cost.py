"""The cost model against measurements: is what ``fgattn.when="faster"`` decides right?

    python -m fg_inductor bench cost

At each point (heads, tokens, head dim, kept density, slice, tail) it asks the model, which measures its constants if no
file holds them (``--anew``: in any case), and then times dense attention as scaled_dot_product_attention runs it, and
selection and attention as the rewritten graph does, in calls that follow each other. A decision is wrong where the
sparse call is slower and the model would rewrite, or faster and it would not; between 0.97x and 1.03x either is right.
The exit code is 1 where one is wrong. The points were chosen before anything was measured: sites of published models,
short and long, and densities on both sides of where sparse attention pays.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from fg_inductor import cost, device_constants
from fg_inductor.bench.common import Timing, collect, environment, measure, show, where
from fg_inductor.kernels import ops
from fg_inductor.passes.selector import order_of_calls
from fg_inductor.settings import Settings

COLUMNS = [
    "shape", "slice", "tail", "density", "baseline_ms", "expected_baseline_ms", "median_ms", "expected_ms", "ratio",
    "expected_ratio", "decision", "right",
]  # fmt: skip
ROW_MS = 10.0  # calls that follow each other without a pause
UNDECIDED = (0.97, 1.03)  # here either decision is right
# heads, token grid, head dim, density, options
POINTS = {
    "cuda": [
        (12, (21, 30, 52), 128, 0.3, {}),
        (12, (21, 30, 52), 128, 0.95, {}),
        (12, (21, 30, 52), 128, 1.0, {}),
        (12, (21, 45, 80), 128, 0.8, {}),
        (40, (21, 30, 52), 128, 0.5, {}),
        (2, (4, 32, 32), 128, 0.3, {}),
        (12, (4, 32, 32), 128, 0.3, {}),
        (12, (8, 32, 32), 128, 0.7, {}),
        (48, (13, 30, 45), 64, 0.3, {}),
        (48, (13, 30, 45), 64, 0.85, {}),
        (12, (21, 30, 52), 128, 0.3, {"slice": "128x1"}),
        (12, (21, 30, 52), 128, 0.75, {"slice": "64x8", "tail": "pooled"}),
    ],
    "cpu": [
        (2, (8, 16, 16), 128, 0.1, {}),
        (2, (8, 16, 16), 128, 0.9, {}),
        (4, (3, 20, 20), 64, 0.2, {"tail": "pooled"}),
    ],
}


def rows(device: str = "cuda", points: list | None = None) -> Iterator[dict]:
    """A record for each point."""
    head = environment() | {"bench": "cost", "baseline": "dense, SDPA's choice"}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for heads, grid, dim, density, options in points or POINTS[device]:
        settings = Settings.parse({**options, "density": density, "when": "faster", "quiet": True}).with_order(True)
        tokens = grid[0] * grid[1] * grid[2]
        on = torch.device(device)
        constants = device_constants.constants(settings, dim, dtype, on)
        if constants is None:
            raise SystemExit("bench cost: FGATTN_DEVICE_CONSTANTS is off, or no memory is left; nothing to check.")
        tail = int(settings.tail_kind == "pooled")
        shape = cost.Shape(1, heads, tokens, tokens, dim, settings.m, settings.n, density, tail)
        expected_dense, expected_sparse = cost.expected_ms(shape, constants)
        decision = cost.forecast(shape, constants).worth
        dense, sparse = _measure(heads, grid, dim, dtype, settings, on)
        ratio = dense.median / sparse.median
        undecided = UNDECIDED[0] <= ratio <= UNDECIDED[1]
        yield head | {
            "shape": [1, heads, tokens, dim], "slice": settings.slice, "tail": settings.tail_kind, "density": density,
            **dense.fields("baseline"), "expected_baseline_ms": expected_dense, **sparse.fields(),
            "expected_ms": expected_sparse, "ratio": ratio, "expected_ratio": expected_dense / expected_sparse,
            "decision": "sparse" if decision else "dense", "right": undecided or decision == (ratio > 1),
        }  # fmt: skip


@torch.no_grad()
def _measure(heads: int, grid: tuple[int, int, int], dim: int, dtype: torch.dtype, settings: Settings, device):
    """Timings of dense attention, and of selection and attention."""
    tokens = grid[0] * grid[1] * grid[2]
    q, k, v = (torch.randn(1, tokens, heads, dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
    scale, m, n = dim**-0.5, settings.m, settings.n
    choose = (scale, m, n, settings.queries_per_mean, settings.mass, settings.share, 1.0, [], [], 0)

    order_of = order_of_calls(settings, grid, device)

    def sparse():
        order = order_of(q)
        values = ops.reorder(v, order) if n > 1 else v  # k is put in query order by what makes it
        mask = ops.select_pooled(q, k, None, order, *choose)
        return ops.attention(q, k, values, mask, None, order, scale, m, n, settings.tail_kind, 0, settings.kernel)

    return _in_a_row(lambda: F.scaled_dot_product_attention(q, k, v)), _in_a_row(sparse)


def _in_a_row(call: Callable[[], object]) -> Timing:
    """Of a call among others, as in a model: while the device works on one, Python launches the next."""
    count = max(1, min(16, round(ROW_MS / measure([call]).median)))
    timing = measure([lambda: [call() for _ in range(count)]])
    return Timing(*(ms / count for ms in timing))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fg_inductor bench cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--anew", action="store_true", help="measure the constants again, and keep them nowhere")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench cost: no CUDA device here; the times of a CPU that others share decide nothing.")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = {"FGATTN_CACHE_DIR": folder} if args.anew else {}
        with mock.patch.dict("os.environ", elsewhere):
            records = collect(rows(), args.json)
        seconds = sum(_seconds(Path(folder))) if args.anew else None
    first = records[0]
    print(where(first))
    if seconds is not None:
        print(f"the constants took {seconds:.1f} s in all")
    show(records, COLUMNS)
    wrong = sum(not record["right"] for record in records)
    print(f"{len(records) - wrong} of {len(records)} decisions are right")
    if wrong:
        raise SystemExit(1)


def _seconds(folder: Path) -> list[float]:
    import json

    return [json.loads(path.read_text())["seconds"] for path in folder.glob("*.json")]


if __name__ == "__main__":
    main()
