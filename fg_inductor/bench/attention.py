"""One attention call: dense cuDNN against selection and fine-grained attention, in one process.

    python -m fg_inductor bench attention --preset wan2.1-1.3b-480p --slices 128x1 128x8 --densities 0.3 0.15

Queries, keys and values are random, and so is the mask that ``attention`` is timed with: every slice keeps its own
random groups, the worst case for a gather. ``select_pooled`` is timed on the same tensors. The column "rate" is the
kept share of dense work over the share of cuDNN's time. Errors are relative L2 against float64, over a few slices of
one head.
"""

import argparse

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fg_inductor.bench.common import PRESETS, environment, median_ms, save, show
from fg_inductor.kernels import column_lists, ops, reference
from fg_inductor.kernels.checks import TAILS
from fg_inductor.kernels.mask import group_count, pack, slice_count, unpack, word_count


def random_mask(
    batch: int, heads: int, queries: int, keys: int, m: int, n: int, density: float, device
) -> torch.Tensor:
    """A block mask whose groups are kept independently with probability ``density``."""
    groups, words = group_count(keys, n), word_count(keys, n)
    shape = (batch, slice_count(queries, m), groups)
    rows = [pack(torch.rand(shape, device=device) < density, words) for _ in range(heads)]
    return torch.stack(rows, 1)


def error(out, q, k, v, mask, m: int, n: int, scale: float, slices=(0, -1)) -> float:
    """Relative L2 error of a few slices of the last head against float64."""
    wrong = right = 0.0
    for t in slices:
        t = range(mask.shape[2])[t]
        rows = slice(t * m, (t + 1) * m)
        keep = unpack(mask[0, -1, t], group_count(k.shape[2], n)).repeat_interleave(n)[: k.shape[2]]
        exact = reference.attention(
            q[:1, -1:, rows].double(), k[:1, -1:, keep].double(), v[:1, -1:, keep].double(),
            reference.full_mask(q[:1, -1:, rows], k[:1, -1:, keep], m, 1), None, None, scale, m, 1,
        )[0]  # fmt: skip
        wrong += (out[:1, -1:, rows].double() - exact).square().sum().item()
        right += exact.square().sum().item()
    return (wrong / right) ** 0.5


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fg_inductor bench attention", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", choices=PRESETS, default="wan2.1-1.3b-480p")
    parser.add_argument("--slices", nargs="+", default=["128x1", "128x8"], help="MxN")
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.3, 0.15])
    parser.add_argument("--tail", nargs="+", choices=TAILS, default=["none"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--out", help="a JSON file for the records")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; this benchmark compares GPU kernels")

    torch.manual_seed(0)
    shape = PRESETS[args.preset]
    heads, tokens, dim = shape["heads"], shape["tokens"], shape["dim"]
    dtype, scale = getattr(torch, args.dtype), dim**-0.5
    q, k, v = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        dense = median_ms(lambda: F.scaled_dot_product_attention(q, k, v))
    rate = 4 * heads * tokens**2 * dim / dense / 1e9
    print(f"{args.preset}: cuDNN dense {dense:.3f} ms, {rate:.0f} TFLOP/s on {torch.cuda.get_device_name()}")

    head = environment() | {"bench": "attention", "preset": args.preset, "shape": [1, heads, tokens, dim]}
    head |= {"dtype": args.dtype, "baseline": "cuDNN dense", "baseline_ms": dense}
    records = []
    for text in args.slices:
        m, n = map(int, text.split("x"))
        for density in args.densities:
            choose = (q, k, None, None, scale, m, n, 16, 0.9, density, 1.0, [], [], 0)
            select_ms = median_ms(lambda choose=choose: ops.select_pooled(*choose))
            mask = random_mask(1, heads, tokens, tokens, m, n, density, q.device)
            lists_ms = median_ms(lambda mask=mask, n=n: column_lists.launch(mask, group_count(tokens, n), n))
            kept = ops.kept_density(mask, None, tokens, tokens, m, n).item()
            for tail in args.tail:
                call = (q, k, v, mask, None, None, scale, m, n, tail, 0)
                out, _ = ops.attention(*call)
                ms = median_ms(lambda call=call: ops.attention(*call))
                records.append(
                    head
                    | {"variant": "portable", "slice": text, "tail": tail, "kept": kept, "median_ms": ms}
                    | {"ratio": dense / ms, "rate": kept * dense / ms, "lists_ms": lists_ms, "select_ms": select_ms}
                    | {"error": error(out, q, k, v, mask, m, n, scale) if tail == "none" else None}
                )
    show(
        records,
        ["variant", "slice", "tail", "kept", "median_ms", "ratio", "rate", "lists_ms", "select_ms", "error"],
    )
    save(records, args.out)


if __name__ == "__main__":
    main()
