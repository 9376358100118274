"""Sparse attention in a trained video transformer, next to dense attention.

    python examples/quickstart.py

A real clip is buried in noise, and a small trained video transformer digs it out twice from the same noise: compiled as
usual, and compiled with ``backend="fgattn"``. You see what was rewritten and why the rest was not, how much of the
attention was computed, what that did to the video and to the time a step takes, and ``fgattn_quickstart.png``, a
picture of it all.

It uses a GPU where there is one. On two CPU cores it takes one to two minutes, most of them compiling.
"""

import os
import sys

# Before torch is imported: its CPU threads (libgomp's, on Linux) then spin for microseconds where they wait for each
# other, and sleep after that. By default they spin for milliseconds: where other work shares the cores, they take them
# from the thread that they wait for, and a sparse step took ten times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# The modules beside this file are found under `python -P` too.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import pictures
import tiny_dit
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import fg_inductor
from fg_inductor.kernels import ops
from fg_inductor.passes.selector import order_of_calls
from fg_inductor.settings import Settings

NOISE = 0.6  # the share of noise in the clip that is handed to the model
WARM_UP = 2  # steps that compile, or run for the first time; not timed


def main() -> None:
    args = parse_args()
    device = args.device
    model = tiny_dit.load_model(device)
    clip = tiny_dit.load_clip(args.frames, args.side).to(device)
    noisy = tiny_dit.add_noise(clip, NOISE)
    levels = torch.linspace(NOISE, 0, args.steps + 1).tolist()
    grid = (args.frames, args.side // tiny_dit.PATCH, args.side // tiny_dit.PATCH)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.frames} frames of {args.side}x{args.side} pixels = {grid[0] * grid[1] * grid[2]:,} tokens on {where}")

    # The same model twice. Both are compiled by Inductor; the second one attends sparsely.
    dense, dense_seconds = denoise("dense", torch.compile(model), noisy, levels)
    options = {"fgattn.stats": True, **args.options}
    sparse, seconds = denoise("fgattn", torch.compile(model, backend="fgattn", options=options), noisy, levels)

    # What was rewritten, why the other sites were not, and the kept density of each layer.
    report = fg_inductor.report()
    print(f"\n{report}\n")

    quality = tiny_dit.psnr(sparse, dense)
    times = f"{dense_seconds:.3f} s dense, {seconds:.3f} s sparse"
    print(f"a step takes   {times}: {dense_seconds / seconds:.2f}x (both compiled by Inductor)")
    print(f"sparse video   {quality:.1f} dB PSNR against the dense one")
    print(f"clean clip     {tiny_dit.psnr(sparse, clip):.1f} dB sparse, {tiny_dit.psnr(dense, clip):.1f} dB dense")

    # The mask is an ordinary value: make it once more, by hand, from the queries and keys of one layer.
    settings = Settings.parse({name: value for name, value in options.items() if name.startswith("fgattn.")})
    settings = settings.with_order(True)
    mask, order = mask_of_layer(model, args.layer, noisy, NOISE, grid, settings)
    picture = pictures.draw(
        clip, noisy, dense, sparse, mask[0, args.head].cpu(), order.cpu(), grid, settings,
        title=f"sparse against dense: {quality:.1f} dB PSNR; a step takes {times}",
        head=f"layer {args.layer}, head {args.head}",
    )  # fmt: skip
    picture.savefig(args.out, dpi=110)
    print(f"picture        {args.out}")
    if args.json:
        density = statistics.mean(row.density for row in report if row.density is not None)
        write_record(args, where, grid, dense_seconds, seconds, quality, density)


def denoise(name: str, model, noisy: Tensor, levels: list[float]) -> tuple[Tensor, float]:
    """The denoised clip, and the median seconds of a step once the model is warm. The first step compiles."""
    start = time.perf_counter()
    video, seconds = tiny_dit.denoise(model, noisy, levels, partial(tqdm, desc=f"{name:>6}", unit="step"))
    print(f"{name:>6}: {time.perf_counter() - start:.0f} s in all, {seconds[0]:.0f} s of them in the first step")
    return video, statistics.median(seconds[WARM_UP:])


def mask_of_layer(model, layer: int, noisy: Tensor, level: float, grid, settings: Settings) -> tuple[Tensor, Tensor]:
    """The block mask [1, H, T, W] that the backend makes in one layer at one noise level, and the order of tokens."""
    with SelfAttentionInputs() as calls:
        tiny_dit.denoise(model, noisy, [level, 0.0])
    q, k = calls.inputs[layer]
    order = order_of_calls(settings, grid, q.device)(q)
    k = ops.reorder(k, order)
    mask = ops.select_pooled(
        q, k, None, order, q.shape[-1] ** -0.5, settings.m, settings.n, settings.queries_per_mean,
        settings.mass, settings.share, settings.max_density, [], [], 0,
    )  # fmt: skip
    return mask, order


class SelfAttentionInputs(TorchFunctionMode):
    """Keeps the queries and keys [B, H, S, D] of every self-attention that runs inside the ``with``."""

    def __init__(self):
        super().__init__()
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:  # diffusers names every argument
            q, k = kwargs["query"], kwargs["key"]
            if q.shape == k.shape:
                self.inputs.append((q, k))
        return func(*args, **kwargs)


def write_record(args, where, grid, dense_seconds, seconds, quality, density) -> None:
    """One row for the README's tables, in the format of ``examples/benchmarks/tables.py``."""
    from fg_inductor.bench.common import environment

    row = {
        "bench": "quickstart", **environment(), "card": where,
        "shape": {"frames": args.frames, "side": args.side, "tokens": grid[0] * grid[1] * grid[2]},
        "variant": "fgattn", "kept": round(density, 3), "psnr_db": round(quality, 1), "median_ms": seconds * 1000,
        "baseline": "the same model, Inductor", "baseline_ms": dense_seconds * 1000, "ratio": dense_seconds / seconds,
    }  # fmt: skip
    Path(args.json).write_text(json.dumps([row], indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--frames", type=int, help="default: 10 on CPU, 64 on CUDA")
    parser.add_argument("--side", type=int, help="pixels, a multiple of 8; default: 192 on CPU, 256 on CUDA")
    parser.add_argument("--steps", type=int, help="denoising steps, 3 or more; default: 6 on CPU, 20 on CUDA")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, such as '{\"fgattn.density\": 0.2}'")
    parser.add_argument("--layer", type=int, default=2, help="whose mask is drawn, 0 to 3")
    parser.add_argument("--head", type=int, default=0, help="whose mask is drawn, 0 or 1")
    parser.add_argument("--out", default="fgattn_quickstart.png")
    parser.add_argument("--json", help="also write the measurements here")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    for name, cpu, gpu in (("frames", 10, 64), ("side", 192, 256), ("steps", 6, 20)):
        if getattr(args, name) is None:
            setattr(args, name, gpu if on_gpu else cpu)
    if args.side % tiny_dit.PATCH:
        parser.error(f"--side {args.side} is not a multiple of {tiny_dit.PATCH}")
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: the first {WARM_UP} are not timed, so ask for more")
    return args


if __name__ == "__main__":
    main()
