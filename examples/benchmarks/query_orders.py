"""Which query order keeps a video closest to dense attention: whole videos by the constants of the order.

    python examples/benchmarks/query_orders.py --weights FOLDER/mini_dit.safetensors --side 256 --steps 20 \\
        --order 1,2 0.5,2 0.125,2 --slice auto 128x8 --tail none pooled --json orders.json

An order is TIME,ROWS as in ``kernels/query_order.py``: the steps in height or width that a step in time counts as, and
the rows of the runs of 16. The other arguments are those of ``examples/quality.py``, whose model and sampling this
uses. Records go to --json as they are made, so that several processes can each take a part (--part 0/4).
"""

import os
import sys

# The modules beside this file's folder are found under `python -P` too.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import itertools
import re
from typing import NamedTuple

import quality
import tiny_dit
import torch
from tqdm import tqdm

from fg_inductor.bench.common import environment, save
from fg_inductor.kernels import query_order


class Order(NamedTuple):
    """What ``kernels.query_order`` makes an order by."""

    time: float
    rows: int

    def use(self) -> dict:
        """Take the rows over, and return the options."""
        query_order.ROWS = self.rows
        query_order.cross_section.cache_clear()
        query_order._kept.clear()
        return {"fgattn.time_step": self.time}

    def __str__(self) -> str:
        return f"a step in time counts as {self.time:g}, runs of {self.rows} rows"


IN_USE = Order(query_order.TIME, query_order.ROWS)


def parse_order(text: str) -> Order:
    """Of "0.5,2"."""
    found = re.fullmatch(r"([0-9.]+),(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not TIME,ROWS, such as 0.5,2")
    return Order(float(found[1]), int(found[2]))


def main() -> None:
    args = parse_args()
    model = quality.load_model(args.weights, args.device).requires_grad_(False)
    dense = quality.videos(model, model, args)
    cases = list(itertools.product(args.order, args.slice, args.tail, args.density))
    part, of = map(int, args.part.split("/"))
    name = (args.weights or "tiny_dit").rpartition("/")[2].partition("_")[0]
    head = environment() | {"bench": "video quality, query order"}
    head["model"] = f"{name}, {args.frames}x{args.side}x{args.side}, {args.steps} steps"
    records = []
    for order, mask_slice, tail, density in tqdm(cases[part::of], desc="settings"):
        options = quality.options_of("means", density, args) | order.use()
        options |= {"fgattn.slice": mask_slice, "fgattn.tail": tail}
        found = list(quality.against(dense, model, options, args))
        psnr = [row["psnr_db"] for row in found]
        record = {
            "variant": str(order), "slice": mask_slice, "tail": tail, "density": density, "kept": found[0]["kept"],
            "psnr_db": sum(psnr) / len(psnr), "psnr_min_db": min(psnr), "psnr_max_db": max(psnr), "videos": len(psnr),
        }  # fmt: skip
        records.append(head | record)
        save(records, args.json)
        tqdm.write(f"{order}; {mask_slice}, tail {tail}, density {density:g}: {record['psnr_db']:.2f} dB")
    IN_USE.use()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", nargs="+", type=parse_order, default=[IN_USE], metavar="TIME,ROWS")
    parser.add_argument("--slice", nargs="+", default=["auto"], metavar="MxN")
    parser.add_argument("--tail", nargs="+", choices=["none", "pooled"], default=["none"])
    parser.add_argument("--density", type=float, nargs="+", default=[0.15, 0.3])
    parser.add_argument("--weights", metavar="FILE")
    parser.add_argument("--source", nargs="+", default=[tiny_dit.CLIP_SOURCE], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=192, help="pixels")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--dense-first", type=float, default=0.2, help="share of the steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every Nth setting, from the Ith on")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
