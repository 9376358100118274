"""Observed masks: what a step that makes its mask anew costs, and what the others pay to find out that they do not.

    python -m fg_inductor bench observed --preset wan2.1-1.3b-480p --slice 128x8 --density 0.3

For each --slice and --density a row for each kind of "work":

    refresh      attention of a refresh step: dense, with lse, then the mass of every key group, and the best of them
    of it, mask  the masses and the choice alone
    other step   all that another step adds to attention by the stored mask
    drift        the same where each layer decides for itself (refresh="drift X"): its sample of the kept mass included
    fetch        the copy of a mask that lies in host memory (state_memory="host"), where attention waits for it
    put back     and what writes it there again

"of dense" is the share of cuDNN's dense attention, timed before and after each row. Queries, keys and values are
random, in BSHD storage, in sets that fill the L2 cache twice. "other step" and "drift" take the device some
microseconds, and Python longer: they are timed as a CUDA graph of many.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fg_inductor.bench.common import (
    PRESETS,
    Timing,
    collect,
    environment,
    mask_slice,
    measure,
    measure_graph,
    sets_past_l2,
    share,
    show,
    where,
)
from fg_inductor.kernels import host_memory, ops
from fg_inductor.kernels.mask import slice_count, word_count

COLUMNS = ["work", "slice", "density", "median_ms", "baseline_ms", "of dense"]
SHORT, MANY = ("other step", "drift"), 20
NEVER = 0.999  # a fall of the kept mass that does not happen: what is timed is finding that out


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fg_inductor bench observed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", choices=PRESETS, default="wan2.1-1.3b-480p", help="a model's self-attention")
    parser.add_argument("--slice", nargs="+", type=mask_slice, default=[(128, 8)], metavar="MxN")
    parser.add_argument("--density", nargs="+", type=share, default=[0.3], help="share of the groups to keep")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    return parser.parse_args(argv)


@torch.no_grad()
def rows(args: argparse.Namespace, device: str = "cuda") -> Iterator[dict]:
    """Measure; a record for each row of the table."""
    preset = PRESETS[args.preset]
    shape = (1, preset["tokens"], preset["heads"], preset["dim"])
    count = sets_past_l2(3 * torch.Size(shape).numel() * 2) if device == "cuda" else 1
    inputs = [
        tuple(torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        for _ in range(count)
    ]

    def timed(run: Callable, short: bool = False) -> Timing:
        calls = [lambda qkv=qkv: run(*qkv) for qkv in inputs]
        return measure_graph(calls, MANY) if short else measure(calls)

    def dense_ms() -> float:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return timed(F.scaled_dot_product_attention).median

    head = environment() | {"bench": "observed", "preset": args.preset, "shape": list(inputs[0][0].shape)}
    head |= {"dtype": "bfloat16", "baseline": "cuDNN dense"}
    dense_ms()  # a rested card is faster than any that works
    for (m, n), density in itertools.product(args.slice, args.density):
        q, k = inputs[0][:2]
        words = (*q.shape[:2], slice_count(q.shape[2], m), word_count(k.shape[2], n))
        mask = torch.zeros(words, dtype=torch.int32, device=device)
        for work, run in steps(inputs[0], mask, m, n, density).items():
            before, timing, after = dense_ms(), timed(run, work in SHORT), dense_ms()
            dense = (before + after) / 2
            what = {"work": work, "slice": f"{m}x{n}", "density": density, "baseline_ms": dense}
            yield head | what | timing.fields() | {"of dense": timing.median / dense}


def steps(qkv: tuple, mask: Tensor, m: int, n: int, density: float) -> dict[str, Callable]:
    """Kind of work -> what does it to ``mask`` with q, k and v like those of ``qkv``."""
    q, k, v = qkv
    device, scale = q.device, q.shape[-1] ** -0.5
    order = ops.query_order(1, 1, q.shape[2], 0, 0, m, device)  # tokens are random: any order costs the same
    yes, no = (torch.tensor(flag, device=device) for flag in (True, False))
    drift, there = torch.zeros(3, device=device), host_memory.zeros(mask.shape, device)
    choice = ("sum", 1.0, density, 1.0, [], [], 0)

    def begin(q, k, flag, *more):
        return ops.begin_observed_(q, k, mask, None, order, scale, m, n, 0, flag, *more)

    def update(q, k, lse, due, *more):
        ops.update_observed_(q, k, lse, mask, None, order, scale, m, n, *choice, due, *more)

    def attend(q, k, v):
        return ops.attention(q, k, v, mask, None, order, scale, m, n, "none", 0)

    def refresh(q, k, v):
        due = begin(q, k, yes)
        update(q, k, attend(q, k, v)[1], due)

    begin(q, k, yes)
    lse = attend(q, k, v)[1]
    update(q, k, lse, yes, drift)  # a mask, and the mass that it keeps

    return {
        "refresh": refresh,
        "of it, mask": lambda q, k, v: update(q, k, lse, yes),
        "other step": lambda q, k, v: update(q, k, lse, begin(q, k, no)),
        "drift": lambda q, k, v: update(q, k, lse, begin(q, k, no, drift, NEVER), drift),
        "fetch": lambda q, k, v: ops.fetch(there, False),
        "put back": lambda q, k, v: ops.put_back_(there, mask, yes),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench observed: no CUDA device here; this benchmark measures GPU kernels.")
    torch.manual_seed(0)
    records = collect(rows(args), args.json)
    first = records[0]
    print(f"{where(first)}; {args.preset} {' x '.join(map(str, first['shape']))}")
    show(records, COLUMNS)


if __name__ == "__main__":
    main()
