"""What sparse attention changes in a video: PSNR, SSIM and motion against dense attention, by method and density.

    python examples/quality.py --out quality
    python examples/quality.py --weights FOLDER/mini_dit.safetensors --frames 17 --side 256 --steps 20 --out mini
    python examples/quality.py --plot quality.json more.json --out together

A trained model draws the same seeds with dense attention and with each method at each density, all with the same dense
first steps; the figures compare each video with the dense one. Beside that, for each layer and density, the relative
error of its attention output at one noise level, with the dense run's own queries, keys and values. Writes OUT.json and
OUT.png, and prints the mean over the videos with the range.

Without --weights it takes the model that comes with the examples; a file holds a Wan trained in pixel space, as
``examples/train_video_dit.py`` makes it or stored like ``assets/tiny_dit.safetensors``. These are small models that
know their few training clips partly by heart: the figures rank methods, and don't say how sparse a production model
may be. For that, run ``examples/wan_text_to_video.py``, which prints the same figures.

Seconds are not reported: graphs run without Inductor here, so that many settings take little time.
"""

import os
import sys

# The modules beside this file are found under `python -P` too.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import argparse
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import tiny_dit
import torch
import torch.nn.functional as F
import video_metrics
from diffusers import WanTransformer3DModel
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import fg_inductor

# Name -> options. Each keeps the density that is asked for. The default is "means", with the tail below 0.25.
METHODS = {
    "means": {"fgattn.tail": "none"},
    "means, tail": {"fgattn.tail": "pooled"},
    "observed": {"fgattn.mask": "observed", "fgattn.refresh": "every 4", "fgattn.tail": "none"},
    "observed, tail": {"fgattn.mask": "observed", "fgattn.refresh": "every 4", "fgattn.tail": "pooled"},
    "dfs": {"fgattn.mask": "dfs"},
    "128x1, one mean, no order": {
        "fgattn.slice": "128x1", "fgattn.pool": 128, "fgattn.token_grid": None, "fgattn.tail": "none",
    },
    "64x64 blocks": {"fgattn.slice": "64x64", "fgattn.pool": 64, "fgattn.token_grid": None, "fgattn.tail": "none"},
}  # fmt: skip
# Not run unless asked for: what longer periods cost.
PERIODS = {"every 8": "every 8", "every 16": "every 16", "every 32": "every 32", "once": "every 1000"}
METHODS_BY_PERIOD = {
    f"observed, {name}": METHODS["observed"] | {"fgattn.refresh": rule} for name, rule in PERIODS.items()
}
# Nor these: what fewer bytes for the masks cost, by masks that heads share and by larger key groups.
FEWER_BYTES = {
    **{f"{heads} heads a mask": {"fgattn.heads_per_mask": heads} for heads in (2, 4)},
    **{f"128x{n}": {"fgattn.slice": f"128x{n}"} for n in (32, 64)},
}
METHODS_BY_BYTES = {f"observed, {name}": METHODS["observed"] | options for name, options in FEWER_BYTES.items()}
# Nor these: how far slices reach in time as one number, where the default lets the queries choose.
METHODS_BY_ORDER = {
    f"{name}, time step {time:g}": METHODS[name] | {"fgattn.time_step": time}
    for name in ("means", "means, tail")
    for time in (0.5, 0.125)
}
ALL_METHODS = METHODS | METHODS_BY_ORDER | METHODS_BY_PERIOD | METHODS_BY_BYTES
SHIFT = 3.0  # of the noise levels towards noise
HEAD_DIM = 128
METRICS = {"psnr_db": "PSNR, dB", "ssim": "SSIM", "motion_error": "motion error", "flicker": "flicker"}


# The model


def load_model(path: str | None, device: str) -> nn.Module:
    """The trained transformer in float32, in eval mode; its sizes follow from those of its weights."""
    if path is None:
        return tiny_dit.load_model(device)
    state = dict(tiny_dit.dequantised(load_file(path)))
    width, channels, *patch = state["patch_embedding.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    model = WanTransformer3DModel(
        patch_size=tuple(patch), num_attention_heads=width // HEAD_DIM, attention_head_dim=HEAD_DIM, num_layers=layers,
        ffn_dim=state["blocks.0.ffn.net.0.proj.weight"].shape[0], in_channels=channels, out_channels=channels,
        text_dim=state["condition_embedder.text_embedder.linear_1.weight"].shape[1],
        freq_dim=state["condition_embedder.time_embedder.linear_1.weight"].shape[1],
        cross_attn_norm="blocks.0.norm2.weight" in state, qk_norm="rms_norm_across_heads", rope_max_seq_len=1024,
    )  # fmt: skip
    model.load_state_dict(state)
    return model.to(device).eval()


def text_of(source: str, model: nn.Module, device: str) -> Tensor:
    """[1, 8, text_dim]: the fixed random embedding that stands for a clip's source, in training and here."""
    generator = torch.Generator().manual_seed(int(hashlib.md5(source.encode()).hexdigest()[:8], 16))
    return torch.randn(1, 8, model.config.text_dim, generator=generator).to(device)


# Sampling


@torch.no_grad()
def sample(model: nn.Module, run_model, text: Tensor, seed: int, args) -> Tensor:
    """A video [frames, C, side, side] in [0, 1] by Euler steps from noise. ``run_model``: the model, maybe compiled."""
    device, patch = text.device.type, model.config.patch_size
    shape = (1, model.config.in_channels, args.frames, args.side, args.side)
    if any(size % by for size, by in zip(shape[2:], patch, strict=True)):
        raise SystemExit(f"quality: {args.frames} frames of {args.side} pixels don't divide into patches of {patch}.")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    with fg_inductor.denoising(run_model, steps=args.steps) as run:
        for level, lower in itertools.pairwise(levels(args.steps)):
            timestep = torch.full((1,), 1000 * level, device=device)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), run.branch("text"):
                velocity = run_model(x, timestep, text, return_dict=False)[0]
            x = x + (lower - level) * velocity.float()
            run.step()
    return (x[0].transpose(0, 1).clamp(-1, 1) + 1) / 2


def levels(steps: int) -> list[float]:
    """Noise levels from 1 to 0, steps + 1 of them."""
    even = [1 - i / steps for i in range(steps + 1)]
    return [SHIFT * u / (1 + (SHIFT - 1) * u) for u in even]


def rows(model: nn.Module, args) -> Iterator[dict]:
    """A record for each method, density, source and seed."""
    dense = videos(model, model, args)
    cases = list(itertools.product(args.methods, args.density))
    for method, density in tqdm(cases, desc="videos"):
        for found in against(dense, model, options_of(method, density, args), args):
            yield {"method": method, "density": density} | found


def videos(model: nn.Module, run_model, args) -> dict[tuple[str, int], Tensor]:
    """A video for each source and seed."""
    texts = {source: text_of(source, model, args.device) for source in args.source}
    return {
        (source, seed): sample(model, run_model, text, seed, args)
        for source, text in texts.items()
        for seed in args.seeds
    }


def against(dense: dict, model: nn.Module, options: dict, args) -> Iterator[dict]:
    """The figures of each video with these options of the backend, beside the dense one; and the density kept."""
    torch._dynamo.reset()
    found = videos(model, torch.compile(model, backend="fgattn", options=options), args)
    kept = [row.density for row in fg_inductor.report() if row.density is not None]
    if not kept:
        raise SystemExit(f"quality: nothing was rewritten.\n{fg_inductor.report()}")
    for (source, seed), video in found.items():
        figures = video_metrics.compare(video, dense[source, seed])
        yield {"source": source, "seed": seed, "kept": sum(kept) / len(kept)} | figures


def options_of(method: str, density: float, args) -> dict:
    common = {"inner": "eager", "stats": True, "quiet": True, "when": "always", "min_seq": 1}
    options = {f"fgattn.{name}": value for name, value in common.items()}
    return {
        **options,
        "fgattn.density": density,
        "fgattn.dense_first": args.dense_first,
        **ALL_METHODS[method],
    }


# Layers


class SelfAttentionInputs(TorchFunctionMode):
    """Keeps q, k and v [B, H, S, D] of every self-attention that runs inside the ``with``."""

    def __init__(self):
        super().__init__()
        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs["query"].shape == kwargs["key"].shape:
            self.inputs.append(tuple(kwargs[name].detach() for name in ("query", "key", "value")))
        return func(*args, **kwargs)


@torch.no_grad()
def attention_inputs(model: nn.Module, text: Tensor, args) -> tuple[list[tuple[Tensor, Tensor, Tensor]], tuple]:
    """q, k and v of each layer, at noise level ``args.level`` of a dense run's own video; and its token grid."""
    video = sample(model, model, text, args.seeds[0], args)
    clean = (video * 2 - 1).transpose(0, 1)[None]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).to(clean.device)
    timestep = torch.full((1,), 1000 * args.level, device=clean.device)
    with SelfAttentionInputs() as calls:
        model((1 - args.level) * clean + args.level * noise, timestep, text, return_dict=False)
    return calls.inputs, tuple(size // by for size, by in zip(clean.shape[2:], model.config.patch_size, strict=True))


@torch.no_grad()
def layer_errors(model: nn.Module, text: Tensor, args) -> Iterator[dict]:
    """The relative L2 error of each layer's attention.

    Of the stateless methods: a mask that is kept over steps has no meaning in a single call.
    """
    inputs, grid = attention_inputs(model, text, args)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(query=q, key=k, value=v)

    for method, density in itertools.product(args.methods, args.density):
        options = options_of(method, density, args) | {"fgattn.dense_first": 0.0, "fgattn.stats": False}
        if options.get("fgattn.mask") == "observed":
            continue
        torch._dynamo.reset()
        run = torch.compile(attend, backend="fgattn", options={"fgattn.token_grid": grid, **options})
        for layer, (q, k, v) in enumerate(inputs):
            exact = attend(q.float(), k.float(), v.float())
            error = ((run(q, k, v).float() - exact).norm() / exact.norm()).item()
            yield {"method": method, "density": density, "layer": layer, "error": error}


# What is shown


def summary(records: list[dict]) -> list[dict]:
    """Over the videos (seeds and sources): the mean of each figure, and its range."""
    found = []
    for (method, density), group in itertools.groupby(records, lambda r: (r["method"], r["density"])):
        group = list(group)
        row = {"method": method, "density": density, "kept": _mean(group, "kept"), "videos": len(group)}
        for name in METRICS:
            values = [r[name] for r in group]
            row |= {name: _mean(group, name), f"{name}_min": min(values), f"{name}_max": max(values)}
        found.append(row)
    return found


def _mean(group: list[dict], name: str) -> float:
    return sum(r[name] for r in group) / len(group)


def draw(rows: list[dict], layers: list[dict], title: str) -> Figure:
    """Four figures over the kept density, the range over videos shaded; and the error of each layer."""
    figure = Figure(figsize=(15, 7))
    axes = figure.subplots(2, 3).flat
    colour = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(row["method"] for row in rows))}
    for axis, (name, label) in zip(axes, METRICS.items(), strict=False):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            kept = [row["kept"] for row in own]
            axis.plot(kept, [row[name] for row in own], marker="o", label=method, color=colour[method])
            low, high = ([row[f"{name}_{end}"] for row in own] for end in ("min", "max"))
            axis.fill_between(kept, low, high, alpha=0.15, color=colour[method])
        axis.set(xlabel="kept density, dense steps apart", ylabel=label)
        axis.grid(alpha=0.3)
    axis = figure.axes[4]
    density = min({row["density"] for row in layers}, key=lambda d: abs(d - 0.3), default=math.nan)
    for method in dict.fromkeys(row["method"] for row in layers):
        own = [row for row in layers if row["method"] == method and row["density"] == density]
        axis.plot([row["layer"] for row in own], [row["error"] for row in own], marker="o", color=colour[method])
    axis.set(xlabel=f"layer, at density {density:g}", ylabel="relative error of attention")
    axis.grid(alpha=0.3)
    figure.axes[5].axis("off")
    figure.axes[5].legend(*figure.axes[0].get_legend_handles_labels(), loc="center")
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def main() -> None:
    args = parse_args()
    if args.qkv:
        return save_attention_inputs(args)
    result = together(args.plot) if args.plot else measured(args)
    for row in result["summary"]:
        figures = ", ".join(
            f"{label} {row[name]:.4g} ({row[f'{name}_min']:.4g} to {row[f'{name}_max']:.4g})"
            for name, label in METRICS.items()
        )
        print(f"{row['method']}, density {row['density']:g} (kept {row['kept']:.3f}): {figures}")
    Path(f"{args.out}.json").write_text(json.dumps(result, indent=1) + "\n")
    what = result["what"]
    title = "{weights}, {frames} x {side} x {side}, {steps} steps, {count} videos".format(
        **what, count=len(what["seeds"]) * len(what["source"])
    )
    draw(result["summary"], result["layers"], title).savefig(f"{args.out}.png", dpi=110)
    print(f"{args.out}.json, {args.out}.png")


def save_attention_inputs(args) -> None:
    """The q, k and v of a layer, or of several, for ``python -m fg_inductor bench attention`` and ``bench peers``."""
    model = load_model(args.weights, args.device).requires_grad_(False)
    inputs, grid = attention_inputs(model, text_of(args.source[0], model, args.device), args)
    qkv = [torch.cat(heads, 1).contiguous() for heads in zip(*(inputs[layer] for layer in args.layer), strict=True)]
    save_file(dict(zip("qkv", qkv, strict=True)), args.qkv)
    layers = " ".join(map(str, args.layer))
    print(f"{args.qkv}: layer {layers} of {len(inputs)}; --qkv {args.qkv} --grid {' '.join(map(str, grid))}")


def measured(args) -> dict:
    """What was asked for, the figures of each video and their summary, and the errors of layers."""
    from fg_inductor.bench.common import environment

    model = load_model(args.weights, args.device).requires_grad_(False)
    text = text_of(args.source[0], model, args.device)
    found = list(rows(model, args))
    names = ("frames", "side", "steps", "dense_first", "seeds", "level", "source")
    what = {name: getattr(args, name) for name in names}
    what |= {"weights": Path(args.weights).name if args.weights else "tiny_dit", **environment()}
    return {"what": what, "summary": summary(found), "videos": found, "layers": list(layer_errors(model, text, args))}


def together(paths: list[str]) -> dict:
    """Runs of the same videos with other methods or densities, as one. Raises SystemExit where they don't compare."""
    first, *rest = found = [json.loads(Path(path).read_text()) for path in paths]
    for path, other in zip(paths[1:], rest, strict=True):
        if differ := [name for name, value in first["what"].items() if other["what"].get(name) != value]:
            raise SystemExit(
                f"quality --plot: {paths[0]} and {path} differ in {', '.join(differ)}; give runs that agree."
            )
    return {
        "what": first["what"],
        **{key: [row for run in found for row in run[key]] for key in ("summary", "videos", "layers")},
    }


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", metavar="FILE", help="safetensors of a Wan in pixel space")
    parser.add_argument(
        "--source", nargs="+", default=[tiny_dit.CLIP_SOURCE], metavar="NAME",
        help="clip sources whose texts stand for prompts; each seed is drawn with each, layers compared with the first",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--frames", type=int, default=17 if cuda else 5)
    parser.add_argument("--side", type=int, default=192 if cuda else 96, help="pixels")
    parser.add_argument("--steps", type=int, default=16 if cuda else 6)
    parser.add_argument("--dense-first", type=float, default=0.2, help="share of the steps")
    parser.add_argument("--density", type=float, nargs="+", default=[0.1, 0.15, 0.2, 0.3, 0.5] if cuda else [0.15, 0.3])
    parser.add_argument("--methods", nargs="+", choices=ALL_METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2] if cuda else [0, 1])
    parser.add_argument("--level", type=float, default=0.6, help="noise level at which layers are compared")
    parser.add_argument("--plot", nargs="+", metavar="FILE", help="put OUT.json files together instead of sampling")
    parser.add_argument("--qkv", metavar="FILE", help="write q, k and v of --layer there, at noise --level, and stop")
    parser.add_argument("--layer", type=int, nargs="+", default=[1], help="of --qkv; heads of several are put together")
    parser.add_argument("--out", default="fgattn_quality", help="OUT.json and OUT.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
