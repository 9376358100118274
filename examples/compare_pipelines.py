"""A diffusers pipeline twice from the same seed, dense and sparse: seconds, PSNR, and what became of each attention.

The two examples beside this file load a pipeline and call ``compare``; any pipeline with a ``transformer`` will do.
"""

import argparse
import json
import time
from typing import Any, NamedTuple

import torch
import video_metrics
from torch import Tensor

import fg_inductor

DEFAULTS = {"fgattn.density": 0.3, "fgattn.dense_first": 0.2}


class Result(NamedTuple):
    """Videos [frames, 3, H, W] in [0, 1], seconds of a whole call, and how near sparse is to dense."""

    dense: Tensor
    sparse: Tensor
    dense_seconds: float
    sparse_seconds: float
    metrics: dict[str, float]


def compare(
    pipe: Any, call: dict[str, Any], grid: tuple[int, int, int], options: dict[str, Any], seed: int = 0,
    warm_up: int | None = 2, dense: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Run the pipeline dense and sparse, and print what came of it.

    call      arguments of the pipeline; its ``num_inference_steps`` too
    grid      tokens of the video in time, height and width. The blocks of the model are compiled one for all, as
              diffusers recommends, and a block alone doesn't show them
    options   of ``backend="fgattn"``
    warm_up   steps of a first call that compiles and is not timed; None: the compilation is timed with the rest
    dense     how the dense one is compiled: arguments of torch.compile; Inductor by default
    """
    reference, dense_seconds = _run(pipe, call, seed, warm_up, dense or {})
    print(f"dense : {dense_seconds:.1f} s")
    torch._dynamo.reset()
    sparse_options = {"backend": "fgattn", "options": {"fgattn.token_grid": grid, **options}}
    sparse, sparse_seconds = _run(pipe, call, seed, warm_up, sparse_options)
    metrics = video_metrics.compare(sparse, reference)
    print(fg_inductor.report())
    print(f"sparse: {sparse_seconds:.1f} s, {dense_seconds / sparse_seconds:.2f}x")
    print("sparse against dense: " + ", ".join(f"{name} {value:.3g}" for name, value in metrics.items()))
    return Result(reference, sparse, dense_seconds, sparse_seconds, metrics)


def transformers(pipe: Any) -> list[torch.nn.Module]:
    """The denoising models of a pipeline: Wan 2.2 has two."""
    return [x for x in (pipe.transformer, getattr(pipe, "transformer_2", None)) if x is not None]


def _run(pipe, call: dict, seed: int, warm_up: int | None, how: dict) -> tuple[Tensor, float]:
    for model in transformers(pipe):
        model.compile_repeated_blocks(**how)
    if warm_up is not None:
        # At least one dense and one sparse step, so that both are compiled.
        _call(pipe, call | {"num_inference_steps": warm_up}, seed)
    start = time.perf_counter()
    video = _call(pipe, call, seed)
    return video, time.perf_counter() - start


def _call(pipe, call: dict, seed: int) -> Tensor:
    with fg_inductor.denoising(pipe):  # says which step it is; a dense model doesn't ask
        frames = pipe(**call, generator=torch.Generator("cpu").manual_seed(seed), output_type="pt").frames[0]
    return frames.float().clamp(0, 1).cpu()


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """The command line that both examples share; ``defaults`` of model, height, width, frames and steps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--prompt", default="A cat walks on the grass, realistic style.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default=DEFAULTS, help=f"JSON; default {json.dumps(DEFAULTS)}")
    parser.add_argument("--out", help="write the videos to OUT_dense.mp4 and OUT_sparse.mp4")
    return parser.parse_args()


def save(result: Result, out: str | None, fps: int) -> None:
    """Write both videos, where a name was given."""
    if not out:
        return
    from diffusers.utils import export_to_video

    for name in ("dense", "sparse"):
        frames = getattr(result, name).permute(0, 2, 3, 1).numpy()
        export_to_video(list(frames), f"{out}_{name}.mp4", fps=fps)
        print(f"{out}_{name}.mp4")
