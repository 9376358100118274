"""One attention call: dense cuDNN against fine-grained attention, its parts and other kernels, in one process.

    python -m fg_inductor bench attention --preset wan2.1-1.3b-480p --density 0.3 --slice 128x1 --kernel hopper portable

Every combination of --slice, --density, --lists, --tail and --kernel is a row. Queries, keys and values are random, in
BSHD storage, and as many sets of them take turns as fill the L2 cache twice. The mask is given (--lists) and its kept
work is what counts: "kept" is the measured density, "TFLOP" the useful work of a call, "rate" the kept share of dense
work over the share of cuDNN's time. Times are medians, JSON holds their 20th and 80th percentiles too. Errors are
relative L2 against float64, over a few slices of the last head. "union" is what a tile of several slices computes over
what they keep (1 would be slices that agree); random lists hardly agree, those of a model do (kernels/query_order.py).
"union_as_is" and "union_matched" are what it is for the slices as they are and matched by their masks, which a call
does that has no query order (kernels/alike_slices.py); "as_is_ms" and "matched_ms" are the times, and "alike_ms" that
of matching alone, as CUDA graphs.

--qkv FILE takes q, k and v of a model instead ([1, H, S, D], safetensors; examples/quality.py --qkv writes them), of a
video of --grid tokens. Then the mask is the backend's own: queries in query order, groups selected by the default rule,
and keys in that order too where N is not 1; with --no-order as for a model whose grid is not known.

--phases adds what goes with it: "lists_ms" expands the mask to column lists (a part of "median_ms"), "tail_ms" is what
the pooled tail adds, "together_ms" selects and attends, both launched from Python. "select_ms" is what making a mask
from q and k costs the device, as a CUDA graph of several selections, since Python launches cheap ones slower than they
run; "select_share" is its share of cuDNN's time. With --top-p the same of a selection by mass ("select_top_p_ms",
"select_top_p_share"). Queries are selected in query order where the token grid is known (of a preset, or of --qkv), and
"order_ms" is what it costs where it is chosen by the queries of each call, as the default does.
"select_memory" is what a selection allocates while it runs, its mask included, and "mask_memory" the mask alone, both
in bytes over those of q, k and v.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fg_inductor.bench import tiles
from fg_inductor.bench.common import (
    PRESETS,
    collect,
    environment,
    mask_slice,
    measure,
    measure_graph,
    peak_bytes,
    positive,
    select,
    sets_past_l2,
    share,
    show,
    where,
)
from fg_inductor.bench.masks import LISTS, make_mask
from fg_inductor.kernels import ops, reference
from fg_inductor.kernels.checks import HEAD_DIMS, KERNELS, TAILS
from fg_inductor.kernels.mask import group_count, unpack
from fg_inductor.passes.selector import chooses_order, order_of_calls
from fg_inductor.settings import Settings

COLUMNS = [
    "variant", "slice", "lists", "tail", "kept", "union", "union_as_is", "union_matched", "tflop", "median_ms",
    "tflops", "ratio", "rate", "as_is_ms", "matched_ms", "alike_ms", "lists_ms", "tail_ms", "order_ms", "select_ms",
    "select_share", "select_top_p_ms", "select_top_p_share", "select_memory", "mask_memory", "together_ms", "error",
]  # fmt: skip
DENSE = {"fa2": ("FlashAttention-2 dense", SDPBackend.FLASH_ATTENTION)}
BASELINES = ("cudnn", *DENSE, "flex")
DEFAULT_PRESET = "wan2.1-1.3b-480p"
SELECTIONS = 10  # of each set of inputs, in a graph
Inputs = list[tuple[Tensor, Tensor, Tensor]]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with ``preset`` (None for sizes given one by one), ``heads``, ``seq`` and ``dim`` filled in."""
    parser = argparse.ArgumentParser(prog="python -m fg_inductor bench attention", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", choices=PRESETS, help=f"a model's self-attention; default {DEFAULT_PRESET}")
    parser.add_argument("--seq", type=positive, help="tokens; with --heads and --dim, instead of a preset")
    parser.add_argument("--heads", type=positive)
    parser.add_argument("--dim", type=int, choices=HEAD_DIMS)
    parser.add_argument("--qkv", metavar="FILE", help="safetensors with q, k and v, instead of sizes and --lists")
    parser.add_argument("--grid", nargs=3, type=positive, metavar=("T", "H", "W"), help="tokens of the video of --qkv")
    parser.add_argument("--no-order", action="store_true", help="leave the tokens of --qkv in their order")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--slice", nargs="+", type=mask_slice, default=[(128, 8)], metavar="MxN")
    parser.add_argument("--density", nargs="+", type=share, default=[0.3], help="share of the groups to keep")
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=["random"], help="see fg_inductor/bench/masks.py")
    parser.add_argument("--tail", nargs="+", choices=TAILS, default=["none"])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=["auto"])
    parser.add_argument(
        "--baselines", nargs="*", choices=BASELINES, default=["cudnn"],
        help="cudnn (ratios are to it); fa2: FlashAttention-2, dense; flex: FlexAttention, where M is 128, N 64 or 128",
    )  # fmt: skip
    parser.add_argument("--phases", action="store_true", help="time lists, tail and selection as well")
    parser.add_argument("--top-p", type=share, metavar="P", help="one share of the mass; time that selection as well")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    sizes = (args.seq, args.heads, args.dim)
    if args.preset and any(sizes):
        parser.error(f"--preset {args.preset} has its own --seq, --heads and --dim; leave out one or the others")
    if any(sizes) and not all(sizes):
        parser.error("--seq, --heads and --dim go together; give all three, or a --preset")
    if args.top_p and not args.phases:
        parser.error("--top-p is timed with the phases; give --phases too")
    if (args.qkv is None) != (args.grid is None):
        parser.error("--qkv and --grid go together")
    if args.qkv:
        if args.preset or any(sizes):
            parser.error("--qkv has its own sizes; leave out --preset, --seq, --heads and --dim")
        if "flex" in args.baselines:
            parser.error("--baselines flex knows no query order; leave it out beside --qkv")
        args.lists = ["selected"]
    elif not any(sizes):
        args.preset = args.preset or DEFAULT_PRESET
        args.heads, args.seq, args.dim = (PRESETS[args.preset][name] for name in ("heads", "tokens", "dim"))
    return args


# The benchmark


def rows(args: argparse.Namespace, device: str = "cuda") -> Iterator[dict]:
    """Measure; a record for each row of the table."""
    dtype = getattr(torch, args.dtype)
    inputs = _of_a_model(args, dtype, device) if args.qkv else _random(args, dtype, device)
    args.batch, args.heads, args.seq, args.dim = inputs[0][0].shape
    dense_work = 4 * args.batch * args.heads * args.seq**2 * args.dim / 1e12
    head = environment() | {"bench": "attention", "preset": args.preset, "shape": list(inputs[0][0].shape)}
    head["dtype"] = args.dtype
    dense = None
    if "cudnn" in args.baselines:
        timing = _dense(inputs, SDPBackend.CUDNN_ATTENTION)
        dense = timing.median
        head |= {"baseline": "cuDNN dense", **timing.fields("baseline"), "baseline_tflops": dense_work / dense * 1000}

    def row(timing, kept: float, **what) -> dict:
        ms, work = timing.median, kept * dense_work
        record = head | what | {"kept": kept, "tflop": work, **timing.fields(), "tflops": work / ms * 1000}
        return record | ({"ratio": dense / ms, "rate": kept * dense / ms} if dense else {})

    for name, (variant, backend) in DENSE.items():
        if name in args.baselines:
            yield row(_dense(inputs, backend), 1.0, variant=variant)
    for (m, n), density, lists in itertools.product(args.slice, args.density, args.lists):
        if args.qkv:
            sparse, mask, order = _selected(inputs, None if args.no_order else args.grid, m, n, density)
        else:
            sparse, order = inputs, None
            mask = make_mask(lists, args.batch, args.heads, args.seq, args.seq, m, n, density, device)
        kept = ops.kept_density(mask, None, args.seq, args.seq, m, n).item()
        what = {"slice": f"{m}x{n}", "lists": lists, "density": density}
        if args.qkv:
            what["order"] = "order of the tokens" if args.no_order else "query order"
        if "flex" in args.baselines and m == 128 and n in (64, 128):
            timing, out = _flex(inputs, mask, n)
            found = {"error": error(out, *inputs[0], mask, None, None, args.dim**-0.5, m, n, "none")}
            yield row(timing, kept, variant="FlexAttention", **what) | found
        phases = {}
        if args.phases:
            phases = _selection(args, sparse, mask, m, n, density, dense)
        for tail in args.tail:
            call = (mask, None, order, args.dim**-0.5, m, n, tail, 0)
            for variant, kernel in _kernels(args.kernel, sparse[0], call).items():
                timing = _attention(sparse, call, kernel)
                extra = phases | _phases(sparse, call, kernel, timing.median, density) if args.phases else {}
                found = {"error": error(ops.attention(*sparse[0], *call, kernel)[0], *sparse[0], *call[:-1])}
                if (slices := tiles.slices_of_a_tile(args.dim, m, variant)) > 1:
                    found |= tiles.matched(sparse, call, slices)
                yield row(timing, kept, variant=variant, tail=tail, **what) | extra | found


def _random(args: argparse.Namespace, dtype: torch.dtype, device: str) -> Inputs:
    shape = (args.batch, args.seq, args.heads, args.dim)
    count = sets_past_l2(3 * torch.Size(shape).numel() * dtype.itemsize) if device == "cuda" else 1
    return [
        tuple(torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)) for _ in range(count)
    ]


def _of_a_model(args: argparse.Namespace, dtype: torch.dtype, device: str) -> Inputs:
    """q, k and v of a file in BSHD storage, copied so often that the copies pass the L2 cache."""
    from safetensors.torch import load_file

    found = load_file(args.qkv)
    qkv = [found[name].transpose(1, 2).to(device, dtype).contiguous().transpose(1, 2) for name in ("q", "k", "v")]
    if len({x.shape for x in qkv}) > 1 or qkv[0].shape[2] != math.prod(args.grid):
        raise SystemExit(
            f"bench attention: {args.qkv} holds q {list(qkv[0].shape)}, k {list(qkv[1].shape)}; give self-attention "
            f"over the {math.prod(args.grid):,} tokens of --grid."
        )
    count = sets_past_l2(3 * qkv[0].numel() * dtype.itemsize) if device == "cuda" else 1
    return [tuple(qkv), *(tuple(torch.clone(x) for x in qkv) for _ in range(count - 1))]


def _selected(inputs: Inputs, grid: list[int] | None, m: int, n: int, density: float) -> tuple:
    """What attention is given by the backend: q, k and v, keys in query order where n is not 1; mask; query order."""
    if grid is None:
        return inputs, select(*inputs[0][:2], None, m, n, density), None
    order = order_of_calls(_settings(m, n), tuple(grid), inputs[0][0].device)(inputs[0][0])
    if n > 1:
        inputs = [(q, *(ops.reorder(x, order) for x in (k, v))) for q, k, v in inputs]
    q, k, _ = inputs[0]
    return inputs, select(q, k, order, m, n, density), order


def _kernels(names: list[str], qkv: tuple[Tensor, Tensor, Tensor], call: tuple) -> dict[str, str]:
    """The kernels to time: what runs -> the name that asks for it. Says which of them can't run the call."""
    found = {}
    for name in names:
        try:
            found.setdefault(ops.attention_kernel(*qkv, *call, name), name)
        except ValueError as refused:
            print(f"skipped: {refused}")
    return found


def _in_turns(inputs: Inputs, run: Callable[[Tensor, Tensor, Tensor], object]):
    return measure([lambda qkv=qkv: run(*qkv) for qkv in inputs])


def _dense(inputs: Inputs, backend: SDPBackend):
    with sdpa_kernel(backend):
        return _in_turns(inputs, F.scaled_dot_product_attention)


def _attention(inputs: Inputs, call: tuple, kernel: str):
    return _in_turns(inputs, lambda q, k, v: ops.attention(q, k, v, *call, kernel))


def _flex(inputs: Inputs, mask: Tensor, n: int):
    """FlexAttention, compiled, and its first result."""
    from torch.nn.attention.flex_attention import flex_attention

    blocks = flex_blocks(mask, inputs[0][0].shape[2], inputs[0][1].shape[2], n)
    flex = torch.compile(flex_attention, dynamic=False)
    options = {"BLOCK_N": n} if n < 128 else None  # of its own accord it takes 128 keys at a time for head dim 64

    def run(q, k, v):
        return flex(q, k, v, block_mask=blocks, kernel_options=options)

    return _in_turns(inputs, run), run(*inputs[0])


def flex_blocks(mask: Tensor, queries: int, keys: int, n: int):
    """A block mask with m = 128 as FlexAttention's, its groups full blocks, so that no score is masked."""
    from torch.nn.attention.flex_attention import BlockMask

    keep = unpack(mask, group_count(keys, n))
    counts = keep.sum(-1, dtype=torch.int32)
    order = keep.int().argsort(dim=-1, descending=True, stable=True).int()
    none = torch.zeros_like(counts)
    return BlockMask.from_kv_blocks(none, order, counts, order, BLOCK_SIZE=(128, n), seq_lengths=(queries, keys))


def _settings(m: int, n: int) -> Settings:
    return Settings.parse({"slice": f"{m}x{n}"})


def _selection(args, inputs, mask, m, n, density, dense) -> dict[str, float | None]:
    """What selecting such masks takes of the device, whatever attention follows; ``dense``: milliseconds, or None."""
    top_p, order = args.top_p, None
    found = {"top_p": top_p} if top_p else {}
    if args.preset or (args.grid and not args.no_order):
        settings, grid = _settings(m, n), tuple(args.grid or PRESETS[args.preset]["grid"])
        order_of = order_of_calls(settings, grid, inputs[0][0].device, 0, args.seq - math.prod(grid))  # text at the end
        order = order_of(inputs[0][0])
        if chooses_order(settings, grid):
            found["order_ms"] = measure_graph([lambda q=q: order_of(q) for q, _, _ in inputs], SELECTIONS).median
    rules = {"select": (density,)} | ({"select_top_p": (None, top_p)} if top_p else {})
    for name, rule in rules.items():
        calls = [lambda q=q, k=k, rule=rule: select(q, k, order, m, n, *rule) for q, k, _ in inputs]
        ms = measure_graph(calls, SELECTIONS).median
        found |= {f"{name}_ms": ms} | ({f"{name}_share": ms / dense} if dense else {})
    (q, k, _), whole = inputs[0], sum(x.nbytes for x in inputs[0])
    peak = peak_bytes(lambda: select(q, k, order, m, n, density), q.device)
    return found | {"select_memory": None if peak is None else peak / whole, "mask_memory": mask.nbytes / whole}


def _phases(inputs: Inputs, call: tuple, kernel: str, attention_ms: float, density: float) -> dict[str, float]:
    mask, bias, order, scale, m, n, tail, min_seq = call
    found = {
        "lists_ms": _lists_ms(
            mask,
            order,
            inputs[0][1].shape[2],
            inputs[0][0].shape[3],
            m,
            n,
            ops.attention_kernel(*inputs[0], *call, kernel),
        ),
    }
    if tail != "none":
        without = _attention(inputs, (mask, bias, order, scale, m, n, "none", min_seq), kernel)
        found["tail_ms"] = attention_ms - without.median

    def together(q, k, v):
        return ops.attention(q, k, v, select(q, k, order, m, n, density), *call[1:], kernel)

    return found | {"together_ms": _in_turns(inputs, together).median}


def _lists_ms(mask: Tensor, order: Tensor | None, keys: int, dim: int, m: int, n: int, kernel: str) -> float | None:
    """Column lists, and for "hopper" the order of work, as the kernel makes them; None on CPU, where there are none."""
    if mask.device.type == "cpu":
        return None
    from fg_inductor.kernels import alike_slices, column_lists, work_order

    slices = tiles.slices_of_a_tile(dim, m, kernel)
    if kernel == "hopper":
        from fg_inductor.kernels import attention_forward_hopper as schedule
    else:
        from fg_inductor.kernels import attention_forward as schedule

    parts = mask.split(schedule.heads_at_once(mask, keys, n, slices), 1)

    def make():
        for part in parts:
            alike = alike_slices.launch(part, slices) if slices > 1 and order is None else None
            made = column_lists.launch(part, keys, n, slices, alike=alike)
            if kernel == "hopper":
                work_order.launch(made.keys, made.clean)

    return measure([make]).median


def error(out, q, k, v, mask, key_bias, order, scale, m, n, tail, slices=(0, -1)) -> float:
    """Relative L2 error of a few slices of the last head of the first batch entry against float64."""
    if order is not None:
        out, q = (ops.reorder(x, order) for x in (out, q))
    wrong = right = 0.0
    for t in slices:
        t = range(mask.shape[2])[t]
        at = slice(t * m, (t + 1) * m)
        head = (q[:1, -1:, at].double(), k[:1, -1:].double(), v[:1, -1:].double(), mask[:1, -1:, t : t + 1])
        exact = reference.attention(*head, key_bias, None, scale, m, n, tail)[0]
        wrong += (out[:1, -1:, at].double() - exact).square().sum().item()
        right += exact.square().sum().item()
    return (wrong / right) ** 0.5


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench attention: no CUDA device here; this benchmark compares GPU kernels.")
    torch.manual_seed(0)
    records = collect(rows(args), args.json)
    if not records:
        raise SystemExit("bench attention: no kernel could run any of the calls; see above.")
    first = records[0]
    print(f"{where(first)}; {args.preset or 'shape'} {' x '.join(map(str, first['shape']))}, {args.dtype}")
    if "baseline_ms" in first:
        print(f"{first['baseline']}: {first['baseline_ms']:.3f} ms, {first['baseline_tflops']:.0f} TFLOP/s")
    show(records, COLUMNS)


if __name__ == "__main__":
    main()
