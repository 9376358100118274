"""Sparse attention kernels side by side: same q, k and v, one importance score, each at its own granularity.

    python -m fg_inductor bench peers --density 0.1 0.2 0.3 0.5 --json peers.json --png peers.png

The score is exact: the attention mass that the queries of a slice give each key. Each kernel keeps, for each slice and
head, the same share of its own groups of keys, those with most mass; so what granularity costs shows as error at equal
density. "median_ms" has the mask given in the kernel's own format, "mask_ms" makes that from a bool block mask on the
device (choosing the groups is the same work for all, and not in it), "together_ms" is the sum. "graph_ms" is
"median_ms" as a CUDA graph of many calls: the device without Python, which small inputs wait for; empty for a kernel
that can't be captured, with the reason in the JSON's "graph_failed". "error" is the relative
L2 error of the output against dense attention in float32, over --rows queries of each head. A dense kernel is a row
too. Then each kernel's times are compared where its error is that of the first one at the lowest --at, and its errors
where its time is.

q, k and v are --qkv FILE (safetensors with q, k, v of [1, H, S, D]), or made: "fields", in which tokens near each other
in the token grid attend to each other, with another range for each head; "random": every key counts alike, so that no
mask can be good. Packages that are not installed, and kernels that fail, are rows with their error.
"""

import argparse
import bisect
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fg_inductor.bench.common import collect, environment, measure, measure_graph, positive, share, show, where
from fg_inductor.bench.peer_kernels import PEERS, Kind, version
from fg_inductor.kernels.query_order import query_order

COLUMNS = ["variant", "density", "kept", "median_ms", "graph_ms", "mask_ms", "together_ms", "ratio", "error", "failed"]
INPUTS = ("fields", "random")
PEAK = 10.0  # score of neighbours in "fields", by which 90% of the mass lies in 20% to 45% of the keys
CALLS = 10  # of a kernel in a CUDA graph
STEP = 64  # queries whose mass is kept as one: every slice is a multiple


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fg_inductor bench peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--density", nargs="+", type=share, default=[0.05, 0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--inputs", choices=INPUTS, default="fields")
    parser.add_argument("--qkv", metavar="FILE", help="safetensors, instead of --inputs; S a multiple of 128")
    parser.add_argument("--heads", type=positive, default=12)
    parser.add_argument("--grid", nargs=3, type=positive, default=[32, 32, 32], metavar=("T", "H", "W"))
    parser.add_argument(
        "--order", action="store_true", help="put the tokens of --grid in query order first, for all peers"
    )
    parser.add_argument("--dim", type=positive, default=128)
    parser.add_argument("--rows", type=positive, default=512, help="queries of each head whose error is measured")
    parser.add_argument(
        "--at", type=share, default=0.3, help="density of the first sparse peer that others are held to"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--png", metavar="FILE", help="draw error over time there")
    args = parser.parse_args(argv)
    if not args.qkv and math.prod(args.grid) % 128:
        parser.error(
            f"--grid {args.grid}: {math.prod(args.grid)} tokens are not a multiple of 128, which some peers need"
        )
    return args


# Inputs


def load(args, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [1, H, S, D] in bfloat16, in query order where asked for: then blocks of tokens are compact."""
    found = _load(args, device)
    if not args.order:
        return found
    if found[0].shape[2] != math.prod(args.grid):
        raise SystemExit(f"bench peers: --order needs the --grid of the {found[0].shape[2]} tokens, not {args.grid}.")
    order = query_order(*args.grid, 0, 0, 128, found[0].device)
    return tuple(x[:, :, order.long()].contiguous() for x in found)


def _load(args, device: str) -> tuple[Tensor, Tensor, Tensor]:
    if args.qkv:
        from safetensors.torch import load_file

        found = load_file(args.qkv)
        q, k, v = (found[name].to(device, torch.bfloat16) for name in ("q", "k", "v"))
        if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape or q.shape[0] != 1 or q.shape[2] % 128:
            raise SystemExit(
                f"bench peers: {args.qkv} holds q {list(q.shape)}; give [1, H, S, D] with S a multiple of 128."
            )
        return q, k, v
    shape = (1, args.heads, math.prod(args.grid), args.dim)
    if args.inputs == "random":
        made = tuple(torch.randn(shape, device=device) for _ in range(3))
    else:
        made = fields(args.grid, args.heads, args.dim, device)
    return tuple(x.bfloat16() for x in made)


def fields(grid: list[int], heads: int, dim: int, device: str) -> tuple[Tensor, ...]:
    """q, k and v [1, H, S, D]. Products of q and k fall with the distance of their tokens, and v is smooth over places.

    Random Fourier features of places, with ranges from 2 to 8 tokens over the heads; a fifth of the power is noise.
    """
    axes = torch.meshgrid(*(torch.arange(size, device=device, dtype=torch.float32) for size in grid), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, 2)  # [S, 3]
    ranges = torch.logspace(1, 3, heads, base=2, device=device)
    waves = torch.randn(heads, 3, dim // 2, device=device) / ranges[:, None, None]
    phase = place @ waves  # [H, S, D / 2]
    features = torch.cat([phase.cos(), phase.sin()], -1)
    size = (PEAK * 2 / dim**0.5) ** 0.5  # the score of a token with itself is PEAK, noise apart
    q, k, v = (features + torch.randn_like(features) * (1 / 8) ** 0.5 for _ in range(3))
    return size * q[None], size * k[None], v[None]


@torch.no_grad()
def attention_mass(q: Tensor, k: Tensor) -> Tensor:
    """float32 [H, S / 64, S]: what the softmax gives each key, summed over each run of 64 queries."""
    heads, tokens = q.shape[1], q.shape[2]
    mass = torch.empty(heads, tokens // STEP, k.shape[2], device=q.device)
    at_once = 32 * STEP
    for head in range(heads):
        keys = k[0, head].float().mT * q.shape[-1] ** -0.5
        for start in range(0, tokens, at_once):
            part = (q[0, head, start : start + at_once].float() @ keys).softmax(-1)
            mass[head, start // STEP : (start + at_once) // STEP] = part.unflatten(0, (-1, STEP)).sum(1)
    return mass


def keep_most(mass: Tensor, m: int, n: int, density: float) -> Tensor:
    """bool [H, T, G]: the share ``density`` of the groups of n keys with most mass, for each slice of m queries."""
    score = mass.unflatten(1, (-1, m // STEP)).sum(2).unflatten(2, (-1, n)).sum(3)
    count = max(1, round(density * score.shape[-1]))
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(count, -1).indices, True)


class Exact:
    """Dense attention in float32 for some queries of each head."""

    @torch.no_grad()
    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rows: int):
        self.at = torch.randperm(q.shape[2], device=q.device)[:rows]
        scores = (q[0, :, self.at].float() @ k[0].float().mT) * q.shape[-1] ** -0.5
        self.out = scores.softmax(-1) @ v[0].float()

    def error(self, out: Tensor) -> float:
        """Relative L2 error of an output [1, H, S, D]."""
        if out.shape[1] != self.out.shape[0] or out.shape[-1] != self.out.shape[-1]:
            raise ValueError(f"the output has shape {list(out.shape)}")
        return ((out[0, :, self.at].float() - self.out).norm() / self.out.norm()).item()


def _name(args) -> str:
    return (Path(args.qkv).stem if args.qkv else args.inputs) + (", query order" if args.order else "")


# The benchmark


def rows(args: argparse.Namespace, device: str = "cuda") -> Iterator[dict]:
    """A record for each peer and density; of a peer that fails, one with "failed"."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # the score and the float32 result are exact
    q, k, v = load(args, device)
    _, heads, tokens, dim = q.shape
    head = environment() | {"bench": "peers", "shape": list(q.shape), "inputs": _name(args)}
    exact, mass = Exact(q, k, v, args.rows), attention_mass(q, k)
    baseline = None
    for name in args.peers:
        kind = PEERS[name]
        try:
            found = {"version": version(kind.module)} if kind.module else {}
            peer = kind.make(heads, tokens, dim)
            inputs = peer.layout(q, k, v)
            for record in _rows_of(kind, peer, inputs, mass, exact, args.density if kind.m else [1.0]):
                if kind.m is None and (baseline is None or record["median_ms"] < baseline["median_ms"]):
                    baseline = record | {"variant": name}
                against = {}
                if baseline:
                    against = {"baseline": baseline["variant"], "baseline_ms": baseline["median_ms"]}
                    against["ratio"] = baseline["median_ms"] / record["median_ms"]
                yield head | {"variant": name} | found | record | against
        except Exception as error:  # a peer's failure is a result of this benchmark
            print(f"{name} failed:\n{traceback.format_exc(limit=3)}", file=sys.stderr)
            yield head | {"variant": name, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


@torch.no_grad()
def _rows_of(kind: Kind, peer, inputs: tuple, mass: Tensor, exact: Exact, densities: list[float]) -> Iterator[dict]:
    for density in densities:
        what, prepared, mask_ms = {"density": density, "kept": 1.0}, None, 0.0
        if kind.m is not None:
            keep = keep_most(mass, kind.m, kind.n, density)
            what["kept"] = keep.float().mean().item()
            mask_ms = measure([lambda keep=keep: peer.prepare(keep)]).median
            prepared = peer.prepare(keep)
        error = exact.error(peer.bhsd(peer.run(inputs, prepared)))
        run = [lambda prepared=prepared: peer.run(inputs, prepared)]
        timing = measure(run)
        found = what | timing.fields() | {"mask_ms": mask_ms, "together_ms": timing.median + mask_ms, "error": error}
        yield found | _in_a_graph(run)


def _in_a_graph(run: list) -> dict:
    """The time of a call without Python, or why there is none."""
    try:
        return {"graph_ms": measure_graph(run, CALLS).median}
    except Exception as error:  # a kernel that waits for the device, or loads code at a call
        return {"graph_ms": None, "graph_failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


# Equal error, equal time


def interpolate(points: list[tuple[float, float]], x: float) -> float | None:
    """y at x on the line through the points (x, y), straight in logarithms; None outside of them."""
    points = sorted(points)
    i = bisect.bisect_left([px for px, _ in points], x)
    if i < len(points) and points[i][0] == x:
        return points[i][1]
    if i in (0, len(points)):
        return None
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    part = math.log(x / x0) / math.log(x1 / x0)
    return math.exp(math.log(y0) + part * math.log(y1 / y0))


def equal(records: list[dict], at: float) -> list[dict]:
    """For each sparse peer: its time where its error is that of the first one at density ``at``, and the converse."""
    curves: dict[str, list[dict]] = {}
    for record in records:
        if record.get("kept", 1.0) < 1 and not record.get("failed"):
            curves.setdefault(record["variant"], []).append(record)
    if not curves:
        return []
    first = next(iter(curves))
    own = min(curves[first], key=lambda record: abs(record["density"] - at))
    found = []
    for name, curve in curves.items():
        ms = interpolate([(r["error"], r["median_ms"]) for r in curve], own["error"])
        error = interpolate([(r["median_ms"], r["error"]) for r in curve], own["median_ms"])
        found.append({
            "variant": name, "ms at equal error": ms, "times the first": ms and ms / own["median_ms"],
            "error at equal time": error, "errors of the first": error and error / own["error"],
        })  # fmt: skip
    return found


def draw(records: list[dict], path: str) -> None:
    """Error over time, a line for each sparse peer; dense ones as vertical lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.5))
    colours = iter(pyplot.get_cmap("tab20").colors)
    for name in dict.fromkeys(record["variant"] for record in records):
        curve = [r for r in records if r["variant"] == name and not r.get("failed")]
        if not curve:
            continue
        if len(curve) == 1 and curve[0]["kept"] == 1:
            axes.axvline(curve[0]["median_ms"], linestyle=":", color="gray")
            place = (curve[0]["median_ms"], 0.5)
            axes.annotate(name, place, xycoords=("data", "axes fraction"), rotation=90, ha="right", va="center", size=8)
            continue
        style = {"linewidth": 2.5} if name.startswith("fgattn") else {"linewidth": 1.2, "linestyle": "--"}
        times, errors = zip(*((r["median_ms"], r["error"]) for r in curve), strict=True)
        axes.plot(times, errors, marker="o", label=name, color=next(colours), **style)
    axes.set(xlabel="ms, mask given", ylabel="relative error against float32 dense", xscale="log", yscale="log")
    first = records[0]
    shape = " x ".join(map(str, first["shape"]))
    axes.set_title(f"{first['card']}; {shape}, {first['inputs']}; torch {first['torch']}", fontsize=9)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def _tell(record: dict) -> None:
    line = record.get("failed") or f"{record['density']}: {record['median_ms']:.3f} ms, error {record['error']:.4f}"
    print(f"{record['variant']}: {line}", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench peers: no CUDA device here; this benchmark compares GPU kernels.")
    records = collect(rows(args), args.json, _tell)
    first = records[0]
    print(f"\n{where(first)}; {' x '.join(map(str, first['shape']))}, {first['inputs']}")
    show(records, COLUMNS)
    if compared := equal(records, args.at):
        print(f"\nheld to {compared[0]['variant']} at density {args.at}:")
        show(compared, list(compared[0]))
    if args.png:
        draw(records, args.png)


if __name__ == "__main__":
    main()
