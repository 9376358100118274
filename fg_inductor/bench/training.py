"""Training: backward of attention, and a whole training step of a Wan, dense against fine-grained, in one process.

    python -m fg_inductor bench training --preset wan2.1-1.3b-480p --density 0.3 --slice 128x8 --layers 4

``--parts attention`` times self-attention of the preset on random q, k and v, as ``bench attention`` does: forward,
backward, both, and both with the selection of the mask; each beside the same of cuDNN's dense attention. The mask of
the first three is given (``--lists``). ``--schedule`` times backward's schedules beside the one that is chosen. Errors
are relative L2 of dq, dk and dv together against float64, for an output gradient that is zero outside a few slices of
the last head.

``--parts step`` times a step of AdamW on ``WanTransformer3DModel`` with the preset's width and tokens, but only
``--layers`` of its layers: random float32 weights, bfloat16 autocast, compiled by Inductor and by fgattn at a fixed
density. The backend's patches of Inductor are used for the dense step too, whose gradients are wrong without them.
"attention" is the share of the dense step that self-attention takes, by cuDNN's times. "peak_gb" is the device memory
that was in use at most: of the step with its weights and optimizer, of an attention call without its inputs.
"""

import argparse
import gc
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fg_inductor
from fg_inductor import inner
from fg_inductor.bench.common import (
    PRESETS,
    Timing,
    collect,
    environment,
    mask_slice,
    measure,
    positive,
    select,
    sets_past_l2,
    share,
    show,
    where,
)
from fg_inductor.bench.masks import LISTS, make_mask
from fg_inductor.kernels import ops, reference
from fg_inductor.kernels.checks import TAILS

COLUMNS = [
    "work", "slice", "lists", "tail", "kept", "variant", "median_ms", "baseline_ms", "ratio", "peak_gb",
    "baseline_peak_gb", "attention", "error",
]  # fmt: skip
PARTS = ("attention", "step")
SCHEDULES = {"auto": None, "slices": False, "keys": True}  # -> ``split`` of the launcher
# What the configurations of these models for diffusers say beyond heads and head dim.
WAN = {"wan2.1-1.3b": {"ffn_dim": 8960, "num_layers": 30}, "wan2.1-14b": {"ffn_dim": 13_824, "num_layers": 40}}
TEXT = (512, 4096)  # tokens and width of the text
CHANNELS, PATCH = 16, (1, 2, 2)
Inputs = list[tuple[Tensor, Tensor, Tensor, Tensor]]
Measured = tuple[Timing, float | None]  # with the peak of memory in GB, which only a GPU has


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fg_inductor bench training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", choices=PRESETS, default="wan2.1-1.3b-480p", help="whose heads, tokens and width")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--slice", nargs="+", type=mask_slice, default=[(128, 8)], metavar="MxN")
    parser.add_argument("--density", nargs="+", type=share, default=[0.3], help="share of the groups to keep")
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=["random"], help="see fg_inductor/bench/masks.py")
    parser.add_argument("--tail", nargs="+", choices=TAILS, default=["none"])
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=["auto"], help="of backward, on a GPU")
    parser.add_argument("--layers", type=positive, default=4, help="of the step's model, instead of all")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the step's layers in backward")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    if "step" in args.parts and _model_name(args.preset) not in WAN:
        known = ", ".join(name for name in PRESETS if _model_name(name) in WAN)
        parser.error(f"--preset {args.preset} has no model for the step; give --parts attention, or one of {known}")
    return args


def _model_name(preset: str) -> str:
    return preset.rpartition("-")[0]


def rows(args: argparse.Namespace, device: str = "cuda") -> Iterator[dict]:
    """Measure; a record for each row of the table."""
    heads, tokens, dim = (PRESETS[args.preset][name] for name in ("heads", "tokens", "dim"))
    shape = (args.batch, tokens, heads, dim)
    head = environment() | {"bench": "training", "preset": args.preset, "dtype": "bfloat16"}
    inputs = _inputs(shape, device)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if device == "cuda" else SDPBackend.FLASH_ATTENTION):
        dense = _passes(inputs, F.scaled_dot_product_attention)
    if "attention" in args.parts:
        yield from _attention_rows(args, inputs, dense, head | {"baseline": "cuDNN dense"})
    if "step" in args.parts:
        q, k, *_ = inputs[0]
        settings = {}
        for (m, n), density in itertools.product(args.slice, args.density):
            mask = select(q, k, None, m, n, density)
            settings[m, n, density] = ops.kept_density(mask, None, tokens, tokens, m, n).item()
        del inputs, q, k, mask  # the memory of a step is the step's
        forward, both = (dense[work][0].median for work in ("forward", "forward and backward"))
        attention_ms = args.layers * (both + forward if args.checkpointing else both)
        yield from _step_rows(args, settings, attention_ms, head, device)


def _record(head: dict, measured: Measured, baseline: Measured, **what) -> dict:
    (timing, peak), (dense, dense_peak) = measured, baseline
    memory = {} if peak is None else {"peak_gb": peak, "baseline_peak_gb": dense_peak}
    times = {**dense.fields("baseline"), **timing.fields(), "ratio": dense.median / timing.median}
    return head | what | memory | times


def _peak(run: Callable[[], object], device: str, counted: int | None = None) -> float | None:
    """GB of device memory in use at most during ``run()``, above ``counted`` bytes (what is in use before)."""
    if device != "cuda":
        return None
    counted = torch.cuda.memory_allocated() if counted is None else counted
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - counted) / 1e9


# Attention


def _inputs(shape: tuple[int, ...], device: str) -> Inputs:
    """As many sets of q, k, v and the gradient of the output, [B, H, S, D] in BSHD storage, as pass the L2 cache."""
    count = sets_past_l2(4 * 2 * torch.Size(shape).numel()) if device == "cuda" else 1
    sets = []
    for _ in range(count):
        *qkv, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
        sets.append((*(x.requires_grad_() for x in qkv), dout))
    return sets


def _passes(inputs: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, Measured]:
    """What forward, backward and both of ``attend`` take."""
    device = inputs[0][0].device.type

    def measured(calls):
        return measure(calls), _peak(calls[0], device)

    def backward(out, q, k, v, dout, **keep):
        return torch.autograd.grad(out, (q, k, v), dout, **keep)

    found = {"forward": measured([lambda x=x: attend(*x[:3]) for x in inputs])}
    outs = [attend(*x[:3]) for x in inputs]
    found["backward"] = measured(
        [lambda out=out, x=x: backward(out, *x, retain_graph=True) for out, x in zip(outs, inputs, strict=True)]
    )
    del outs
    found["forward and backward"] = measured([lambda x=x: backward(attend(*x[:3]), *x) for x in inputs])
    return found


def _attention_rows(args, inputs: Inputs, dense: dict[str, Measured], head: dict) -> Iterator[dict]:
    q, k, v, _ = inputs[0]
    batch, heads, tokens, dim = q.shape
    head = head | {"shape": list(q.shape)}
    cases = itertools.product(args.slice, args.density, args.lists, args.tail)
    for (m, n), density, lists, tail in cases:
        mask = make_mask(lists, batch, heads, tokens, tokens, m, n, density, q.device)
        rest = (None, None, dim**-0.5, m, n, tail, 0)
        what = {"slice": f"{m}x{n}", "lists": lists, "tail": tail, "density": density}
        what["kept"] = ops.kept_density(mask, None, tokens, tokens, m, n).item()
        what["variant"] = ops.attention_kernel(q, k, v, mask, *rest)

        def given(q, k, v, mask=mask, rest=rest):
            return ops.attention(q, k, v, mask, *rest)[0]

        def selected(q, k, v, m=m, n=n, density=density, rest=rest):
            return ops.attention(q, k, v, select(q, k, None, m, n, density), *rest)[0]

        if "auto" in args.schedule:
            wrong = error(lambda dout, f=given: torch.autograd.grad(f(q, k, v), (q, k, v), dout), q, k, v, mask, *rest)
            for work, measured in _passes(inputs, given).items():
                found = {"error": wrong} if work == "backward" else {}
                yield _record(head, measured, dense[work], work=work, **what, **found)
            both = _passes(inputs, selected)["forward and backward"]
            work = "selection, forward and backward"
            yield _record(head, both, dense["forward and backward"], work=work, **what | {"lists": "selected"})
        for schedule in [name for name in args.schedule if name != "auto"]:
            measured, wrong = _schedule(inputs, mask, rest, SCHEDULES[schedule])
            found = {"variant": f"backward by {schedule}", "error": wrong}
            yield _record(head, measured, dense["backward"], work="backward", **what | found)


@torch.no_grad()
def _schedule(inputs: Inputs, mask: Tensor, rest: tuple, split: bool) -> tuple[Measured, float]:
    """Backward by one of its schedules, whichever the operator would choose, and its error."""
    from fg_inductor.kernels import attention_backward

    def backward(dout, *saved):
        return attention_backward.launch(dout, *saved, mask, *rest[:-1], split=split)

    saved = [(q, k, v, *ops.attention(q, k, v, mask, *rest)) for q, k, v, _ in inputs]
    wrong = error(lambda dout: backward(dout, *saved[0]), *inputs[0][:3], mask, *rest)
    calls = [lambda x=x, y=y: backward(x[3], *y) for x, y in zip(inputs, saved, strict=True)]
    return (measure(calls), _peak(calls[0], mask.device.type)), wrong


def error(
    backward: Callable[[Tensor], tuple[Tensor, ...]],
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, key_bias: Tensor | None, order: None, scale: float,
    m: int, n: int, tail: str, min_seq: int, slices: tuple[int, ...] = (0, -1),
) -> float:  # fmt: skip
    """Relative L2 error of ``backward(dout)`` = (dq, dk, dv) in the last head, for a dout on a few slices of it."""
    dout = torch.zeros_like(q, requires_grad=False)
    exact = torch.zeros(3, 1, 1, *q.shape[2:], dtype=torch.float64, device=q.device)
    for t in slices:
        t = range(mask.shape[2])[t]
        at = slice(t * m, (t + 1) * m)
        dout[-1:, -1:, at] = torch.randn_like(q[-1:, -1:, at])
        one = (x[-1:, -1:].detach().double() for x in (dout[:, :, at], q[:, :, at], k, v))
        dq, dk, dv = reference.attention_backward(*one, mask[-1:, -1:, t : t + 1], key_bias, order, scale, m, n, tail)
        exact[0, :, :, at] += dq
        exact[1:] += torch.stack([dk, dv])
    actual = torch.stack([x[-1:, -1:] for x in backward(dout)]).double()
    return ((actual - exact).norm() / exact.norm()).item()


# A training step


def _step_rows(args, settings: dict, attention_ms: float, head: dict, device: str) -> Iterator[dict]:
    """``settings``: (m, n, density asked for) -> density kept. ``attention_ms``: what it takes in the dense step."""
    model, inputs, target = _model(args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    preset, layers = PRESETS[args.preset], WAN[_model_name(args.preset)]["num_layers"]
    head = head | {"work": "training step", "baseline": "the same step, Inductor", "checkpointing": args.checkpointing}
    head["shape"] = {"layers": f"{args.layers} of {layers}", "heads": preset["heads"], "tokens": preset["tokens"]}

    def measured(**how) -> Measured:
        run = torch.compile(model, **how)

        def step():
            with torch.autocast(device, torch.bfloat16):
                velocity = run(**inputs, return_dict=False)[0]
            F.mse_loss(velocity.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()

        found = measure([step]), _peak(step, device, counted=0)
        if "backend" in how and (sites := fg_inductor.report().rewritten) != args.layers:
            raise RuntimeError(f"bench training: {sites} of {args.layers} sites are sparse.\n{fg_inductor.report()}")
        torch._dynamo.reset()
        gc.collect()
        return found

    dense = measured(options=inner.PATCHES)
    attention = attention_ms / dense[0].median
    for (m, n, density), kept in settings.items():
        for tail in args.tail:
            options = {
                "slice": f"{m}x{n}",
                "density": density,
                "tail": tail,
                "min_seq": 1,
                "when": "always",
                "quiet": True,
            }
            found = measured(backend="fgattn", options={f"fgattn.{name}": value for name, value in options.items()})
            what = {"slice": f"{m}x{n}", "tail": tail, "density": density, "kept": kept, "variant": "fgattn"}
            yield _record(head, found, dense, attention=attention, **what)


def _model(args, device: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The model in float32, its inputs by name, and what its output should be."""
    from diffusers import WanTransformer3DModel

    preset = PRESETS[args.preset]
    frames, height, width = (size * patch for size, patch in zip(preset["grid"], PATCH, strict=True))
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=preset["heads"], attention_head_dim=preset["dim"], in_channels=CHANNELS,
            out_channels=CHANNELS, patch_size=PATCH, text_dim=TEXT[1],
            **WAN[_model_name(args.preset)] | {"num_layers": args.layers},
        )  # fmt: skip
        latents, target = torch.randn(2, args.batch, CHANNELS, frames, height, width)
        timestep, text = torch.full((args.batch,), 500.0), torch.randn(args.batch, *TEXT)
    if args.checkpointing:
        model.enable_gradient_checkpointing()
    return (
        model.to(device).train(),
        {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text},
        target,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench training: no CUDA device here; this benchmark compares GPU kernels.")
    torch.manual_seed(0)
    records = collect(rows(args), args.json)
    first = records[0]
    print(f"{where(first)}; {args.preset}, bfloat16; attention beside cuDNN, the step beside Inductor")
    show(records, COLUMNS)


if __name__ == "__main__":
    main()
