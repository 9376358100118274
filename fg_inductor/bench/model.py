"""A whole video transformer: one forward and one video, compiled by Inductor and by fgattn, in one process.

    python -m fg_inductor bench model --preset wan2.1-14b-720p --density 0.3 --tail none pooled --steps 50 --dense 10

The model is the published architecture at its real width and sequence, random bfloat16 weights, made on the device: no
download. Its forward is timed with --layers of its layers, by default 1 and 3; what a layer adds is a difference of two
such times, and the full number of layers is reached by adding it as often as it takes ("scaled", in the records).
--layers with the full number times that. --compile says what is compiled: the repeated blocks, as diffusers' regional
compilation does, or the model as a whole.

Dense is Inductor with cuDNN's attention; where scaled_dot_product_attention picks another kernel, it is timed as well
and the faster one is the baseline (--baselines best leaves it out, where it takes minutes). Where a model calls
attention with a mask that says nothing (HunyuanVideo), dense runs without it too. Sparse is fgattn at a fixed density,
selection and pooled tail included: random weights say nothing about how dense a mask has to be, and their kept keys are
scattered, the worst case for a gather. --mask observed times a step that makes its masks anew ("refresh") and one that
keeps them.

"attention" is the share of the dense forward that long self-attention takes, by its time alone at the same shape, and
"ceiling" the speed-up if it took no time. A run of --steps steps, --dense of them dense, takes

    dense * forward + sparse * sparse forward (+ refreshes * (refresh forward - sparse forward))

with one refresh in --refresh sparse steps. Text encoder and VAE are not counted. Guidance by a second forward doubles
both sides.
"""

import argparse
import contextlib
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fg_inductor
from fg_inductor.bench.architectures import ARCHITECTURES, Architecture, make
from fg_inductor.bench.common import (
    PRESETS,
    Timing,
    collect,
    environment,
    mask_slice,
    measure,
    positive,
    select,
    share,
    show,
    where,
)
from fg_inductor.kernels import ops
from fg_inductor.kernels.checks import TAILS
from fg_inductor.settings import Settings

COLUMNS = [
    "variant", "slice", "density", "kept", "tail", "median_ms", "ratio", "run_s", "run_ratio", "attention_ms",
    "peak_gb", "compile_s",
]  # fmt: skip
MASKS = ("pooled", "observed")
FAR = 1_000_000  # steps between refreshes, so that they happen where the benchmark skips as many
DEFAULT_SLICE = (Settings().with_order(True).m, Settings().with_order(True).n)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, ``layers`` sorted."""
    parser = argparse.ArgumentParser(prog="python -m fg_inductor bench model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", choices=ARCHITECTURES, default="wan2.1-1.3b-480p")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--layers", nargs="+", type=positive, default=[1, 3], help="one number or two")
    parser.add_argument("--compile", choices=["blocks", "whole"], default="blocks")
    parser.add_argument("--baselines", choices=["all", "best"], default="all", help="best: cuDNN's attention alone")
    parser.add_argument("--mask", nargs="+", choices=MASKS, default=["pooled"])
    parser.add_argument("--slice", nargs="+", type=mask_slice, default=[DEFAULT_SLICE], metavar="MxN")
    parser.add_argument("--density", nargs="+", type=share, default=[0.3], help="share of the key groups to keep")
    parser.add_argument("--tail", nargs="+", choices=TAILS, default=["none"])
    parser.add_argument("--steps", type=positive, default=50, help="of a run")
    parser.add_argument("--dense", type=int, default=10, help="the first steps of a run, which are dense")
    parser.add_argument("--refresh", type=positive, default=20, help="sparse steps in which masks are observed once")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    args.layers = sorted(set(args.layers))
    full = ARCHITECTURES[args.preset].units
    if len(args.layers) > 2 or args.layers[-1] > full or (len(args.layers) == 1 and args.layers != [full]):
        parser.error(f"--layers: give two numbers up to {full}, to be scaled, or {full}, the full number")
    if not 0 <= args.dense <= args.steps:
        parser.error(f"--dense {args.dense}: the dense steps are some of the {args.steps}")
    return args


class Forward(NamedTuple):
    """What was measured of one way to run the model. Milliseconds by number of layers; of its full size: ``full``."""

    layers: dict[int, Timing]
    full: float
    compile_s: float
    peak_gb: float | None


def rows(args: argparse.Namespace, device: str = "cuda") -> Iterator[dict]:
    """Measure; a record for each row of the table, dense first."""
    architecture, preset = ARCHITECTURES[args.preset], PRESETS[args.preset]
    head = environment() | {"bench": "model", "preset": args.preset, "dtype": "bfloat16", "batch": args.batch}
    head["shape"] = {"layers": architecture.units, "heads": preset["heads"], "tokens": preset["tokens"]}
    if args.layers != [architecture.units]:
        head["scaled"] = f"from {' and '.join(map(str, args.layers))} layers"
    attention = _AttentionAlone(args, device)
    calls = architecture.attention_calls(architecture.units)
    bench = _Bench(args, architecture, device)
    dense = {}
    ways = _dense_ways(architecture, attention.picked, device)
    for name, how in list(ways.items())[: 1 if args.baselines == "best" else None]:
        dense[name] = bench.forward(**how)
    baseline = min(dense, key=lambda name: dense[name].full)
    dense_ms = dense[baseline].full
    head |= {"baseline": baseline, "baseline_ms": dense_ms, "picked": attention.picked, "steps": args.steps}
    part = calls * attention.dense_ms / dense_ms
    head |= {"attention": part, "ceiling": 1 / (1 - part) if part < 1 else None}
    for name, found in dense.items():
        what = {"variant": name, "attention_ms": attention.dense_ms}
        yield head | what | _record(found, dense_ms, found.full * args.steps, args)
    cases = itertools.product(args.mask, args.slice, args.density, args.tail)
    for mask, (m, n), density, tail in cases:
        kept, alone_ms = attention.sparse(m, n, density, tail)
        options = {"mask": mask, "slice": f"{m}x{n}", "density": density, "tail": tail}
        what = {"variant": f"fgattn, {mask}", **options, "kept": kept, "attention_ms": alone_ms}
        found = bench.sparse(options)
        sparse_ms, refresh_ms = found["keep"].full, found["refresh"].full if "refresh" in found else None
        run_ms, formula = run_time(args.steps, args.dense, dense_ms, sparse_ms, refresh_ms, args.refresh)
        print(f"{what['variant']} {m}x{n}, density {density}, tail {tail}: {formula}", flush=True)
        more = {"dense_steps": args.dense}
        if refresh_ms:
            more |= {"refresh_ms": refresh_ms, "refresh_every": args.refresh}
        yield head | what | more | _record(found["keep"], dense_ms, run_ms, args)


def _record(found: Forward, dense_ms: float, run_ms: float, args) -> dict:
    times = {f"layers_{count}": timing.fields() for count, timing in found.layers.items()}
    memory = {} if found.peak_gb is None else {"peak_gb": found.peak_gb}
    run = {"run_s": run_ms / 1000, "run_ratio": args.steps * dense_ms / run_ms}
    return {
        "compile_s": found.compile_s,
        **memory,
        **times,
        **run,
        "median_ms": found.full,
        "ratio": dense_ms / found.full,
    }


def run_time(
    steps: int, dense: int, dense_ms: float, sparse_ms: float, refresh_ms: float | None = None, every: int = 1
) -> tuple[float, str]:
    """Milliseconds of a whole run, and the sum in words. ``refresh_ms``: of a forward that observes its masks."""
    sparse = steps - dense
    refreshes = math.ceil(sparse / every) if refresh_ms is not None else 0
    terms = [(dense, dense_ms, "dense"), (sparse - refreshes, sparse_ms, "sparse")]
    if refresh_ms is not None:
        terms.append((refreshes, refresh_ms, "refresh"))
    total = sum(count * ms for count, ms, _ in terms)
    words = " + ".join(f"{count} {name} x {ms:.4g} ms" for count, ms, name in terms)
    speed = f"{steps * dense_ms / total:.2f}x" if total else ""
    return total, f"{words} = {total / 1000:.4g} s, {speed} of {steps} x {dense_ms:.4g} ms dense"


def scaled(times: dict[int, float], full: int) -> float:
    """The time with ``full`` layers from that of one or two smaller numbers, as a line. ValueError if it falls."""
    (first, low), (last, high) = min(times.items()), max(times.items())
    if last == full:
        return high
    layer = (high - low) / (last - first)
    if layer <= 0:
        raise ValueError(f"bench model: {last} layers took {high} ms and {first} took {low} ms; measure again.")
    return high + (full - last) * layer


# Attention alone


class _AttentionAlone:
    """Long self-attention of a preset, outside of the model: dense, and sparse with its selection."""

    def __init__(self, args, device: str):
        preset = PRESETS[args.preset]
        self.shape, self.device = (args.batch, preset["tokens"], preset["heads"], preset["dim"]), device
        q, k, v = self._inputs()
        masked = ARCHITECTURES[args.preset].masked
        valid = torch.ones(args.batch, 1, 1, preset["tokens"], dtype=torch.bool, device=device) if masked else None
        self.picked = SDPBackend(torch._fused_sdp_choice(q, k, v, valid)).name
        with _cudnn(device):
            self.dense_ms = measure([lambda: F.scaled_dot_product_attention(q, k, v)]).median

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, S, D] in BSHD storage, made anew, so that they take no memory beside a model."""
        made = (torch.randn(self.shape, device=self.device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        return tuple(made)

    def sparse(self, m: int, n: int, density: float, tail: str) -> tuple[float, float]:
        """Kept density, and milliseconds of selection and attention."""
        q, k, v = self._inputs()
        scale, tokens = q.shape[-1] ** -0.5, q.shape[2]

        def make_mask() -> Tensor:
            return select(q, k, None, m, n, density)

        kept = ops.kept_density(make_mask(), None, tokens, tokens, m, n).item()
        ms = measure([lambda: ops.attention(q, k, v, make_mask(), None, None, scale, m, n, tail, 0)]).median
        return kept, ms


# The model


def _cudnn(device: str) -> contextlib.AbstractContextManager:
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device == "cuda" else contextlib.nullcontext()


def _dense_ways(architecture: Architecture, picked: str, device: str) -> dict[str, dict]:
    """Name of a dense baseline -> how it is compiled and run."""
    as_is = {f"Inductor dense, SDPA's choice ({picked})": {}}
    if device != "cuda":
        return as_is
    backend = {"backend": without_mask_then("inductor")} if architecture.masked else {}
    best = {"Inductor dense, cuDNN" + (", mask left out" if architecture.masked else ""): backend | {"cudnn": True}}
    return best if picked == SDPBackend.CUDNN_ATTENTION.name and not architecture.masked else best | as_is


def without_mask_then(inner: str) -> Callable:
    """A backend: ``inner``, behind the removal of every attention mask, for inputs of which all is valid."""

    def backend(gm, example_inputs):
        for node in gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
            node.kwargs = {**node.kwargs, "attn_mask": None}
        gm.recompile()
        return torch._dynamo.lookup_backend(inner)(gm, example_inputs)

    return backend


class _Bench:
    """One model, compiled and timed in several ways."""

    def __init__(self, args, architecture: Architecture, device: str):
        self.args, self.architecture, self.device = args, architecture, device
        torch.compile(torch.neg)(torch.ones(1, device=device))  # Inductor's workers start before anything is timed

    def forward(self, cudnn: bool = False, **how) -> Forward:
        """Time the model compiled with the arguments ``how`` of torch.compile."""
        return self._run(how, _cudnn(self.device) if cudnn else contextlib.nullcontext(), [None])[None]

    def sparse(self, options: dict) -> dict[str, Forward]:
        """ "keep": the forward at these options of fgattn; "refresh": where observed, that which makes the masks."""
        observed = options["mask"] == "observed"
        grid = PRESETS[self.args.preset]["grid"]
        ours = options | {"token_grid": grid, "min_seq": math.prod(grid), "when": "always", "quiet": True}
        if observed:
            ours["refresh"] = f"every {FAR}"
        how = {"backend": "fgattn", "options": {f"fgattn.{name}": value for name, value in ours.items()}}
        return self._run(how, contextlib.nullcontext(), ["refresh", "keep"] if observed else ["keep"])

    @torch.no_grad()
    def _run(self, how: dict, context: contextlib.AbstractContextManager, kinds: list) -> dict:
        """Time each kind of call, with each number of layers; the largest first, and then fewer of the same."""
        args, architecture = self.args, self.architecture
        layers, times = sorted(args.layers, reverse=True), {kind: {} for kind in kinds}
        peaks, compile_s = {}, None
        model, inputs = make(args.preset, layers[0], args.batch, self.device)
        weights = _size(model)
        with context, fg_inductor.denoising(model) if len(kinds) > 1 else contextlib.nullcontext() as run:
            for count in layers:
                architecture.shorten(model, count)
                if count == layers[0] or args.compile == "whole":
                    torch._dynamo.reset()
                    _compile(model, architecture, args.compile, how)
                call = _caller(model, inputs, run)
                start = _now(self.device)
                out = call()
                compile_s = compile_s or _now(self.device) - start
                if not out.isfinite().all():
                    raise RuntimeError(f"bench model: the output with {how} holds NaN or Inf.")
                self._check(how, count)
                for kind in kinds:
                    times[kind][count] = _measured(call, run, kind)
                peaks[count] = _peak(call, self.device)
        most = layers[0]
        per_layer = (weights - _size(model)) / (most - layers[-1]) if most > layers[-1] else 0
        peak = None if peaks[most] is None else (peaks[most] + (architecture.units - most) * per_layer) / 1e9
        found = {}
        for kind in kinds:
            full = scaled({count: timing.median for count, timing in times[kind].items()}, architecture.units)
            found[kind] = Forward(times[kind], full, compile_s, peak)
        del model, inputs, call
        torch._dynamo.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return found

    def _check(self, how: dict, count: int) -> None:
        """Every long attention was rewritten: else the times would be of something else."""
        if how.get("backend") != "fgattn":
            return
        kinds, report = len(self.architecture.blocks), fg_inductor.report()
        expected = kinds if self.args.compile == "blocks" else self.architecture.attention_calls(count)
        left = any(row.site.video and not row.site.rewritten for row in report)
        if left or report.rewritten < expected:  # a kind of block may be compiled twice, for other strides
            raise RuntimeError(f"bench model: {report.rewritten} of {expected} sites are sparse.\n{report}")


def _compile(model: nn.Module, architecture: Architecture, what: str, how: dict) -> None:
    parts = [model] if what == "whole" else itertools.chain(*(getattr(model, name) for name in architecture.blocks))
    for part in parts:
        part.compile(**how)


def _caller(model: nn.Module, inputs: dict, run) -> Callable[[], Tensor]:
    def call() -> Tensor:
        if run is None:
            return model(**inputs)[0]
        with run.branch("one"):
            out = model(**inputs)[0]
        run.step()
        return out

    return call


def _measured(call: Callable, run, kind: str | None) -> Timing:
    """Time one kind of call: in a run, a refresh is a call after ``FAR`` steps."""

    def after_skipping():
        run.index += FAR
        return call()

    return measure([after_skipping if kind == "refresh" else call])


def _size(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak(call: Callable, device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench model: no CUDA device here; this benchmark runs models at their real size.")
    torch.manual_seed(0)
    records = collect(rows(args), args.json)
    first = records[0]
    print(f"{where(first)}; {args.preset}, {first['shape']}, {first.get('scaled', 'all layers timed')}")
    print(f"dense forward: {first['baseline_ms']:.1f} ms ({first['baseline']})")
    if first["ceiling"]:
        print(f"attention is {first['attention']:.0%} of it; with none of that left, {first['ceiling']:.2f}x")
    show(records, COLUMNS)


if __name__ == "__main__":
    main()
