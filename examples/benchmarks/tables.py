"""Write what is generated from results/*.json: docs/benchmarks.md, and README.md's summary; and its table of options.

    python examples/benchmarks/tables.py            rewrite them
    python examples/benchmarks/tables.py --check    fail if one is out of date

A file of results is a list of records, or what ``examples/quality.py`` writes. A record has ``bench``, ``card``,
``torch``, ``triton``, ``commit``, ``variant``, ``median_ms``, ``baseline``, ``baseline_ms``, ``ratio`` and whatever
else that benchmark measures. One table is made for each file and environment. A value that all its records share is
said once, above the table. The spread of a time, and the density that was asked for beside the one that was kept, stay
in the file. The summary takes the records that ``SUMMARY`` names, and no number of its own.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

from fg_inductor.settings import options_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
DENOISING = ROOT / "docs" / "denoising.md"
ENVIRONMENT = ("bench", "card", "torch", "triton", "cudnn", "commit")
LABELS = {
    "median_ms": "ms", "baseline_ms": "baseline, ms", "ratio": "speed-up", "kept": "kept density", "rate": "rate kept",
    "slice": "M x N", "psnr_db": "PSNR, dB", "lists_ms": "lists, ms", "select_ms": "selection, ms",
    "select_share": "selection of dense", "cut_ms": "cut, ms", "scores_ms": "scores, ms",
    "normaliser_ms": "normaliser, ms", "means_ms": "means, ms", "top_p": "top-p",
    "union_as_is": "union as it is", "union_matched": "union, matched", "as_is_ms": "as it is, ms",
    "matched_ms": "matched, ms", "alike_ms": "matching, ms",
    "select_top_p_ms": "top-p selection, ms", "order_ms": "order, ms",
    "select_top_p_share": "top-p selection of dense", "select_memory": "selection's memory of q, k, v",
    "mask_memory": "mask of q, k, v",
    "lists": "kept groups", "tail_ms": "tail, ms", "together_ms": "selection and attention, ms",
    "tflop": "TFLOP kept", "tflops": "TFLOP/s kept", "baseline_tflops": "baseline, TFLOP/s",
    "peak_gb": "peak, GB", "baseline_peak_gb": "baseline peak, GB", "attention": "attention's share",
}  # fmt: skip
PERCENT = {"select_share", "select_top_p_share"}
MEMORY = {"select_memory", "mask_memory"}  # shares that may pass 1
HIDDEN = {"density", "p20_ms", "p80_ms", "baseline_p20_ms", "baseline_p80_ms"}
WAN = "attention_hopper_wan2.1-1.3b-480p.json"
LARGE = "attention_hopper_selection_14b-720p.json"
PLAIN = {"variant": "hopper", "tail": "none"}
# What it is, the file, and the values that pick one record in it.
SUMMARY = (
    ("attention, 30% kept in groups of 16 keys, the default", WAN, {**PLAIN, "slice": "128x16", "density": 0.3}),
    ("the same", LARGE, {**PLAIN, "slice": "128x16", "density": 0.3}),
    ("attention, 30% kept in groups of 8 keys", WAN, {**PLAIN, "slice": "128x8", "density": 0.3}),
    ("attention, 30% kept key by key", WAN, {**PLAIN, "slice": "128x1", "density": 0.3}),
    ("attention, 10% kept in groups of 16 keys", WAN, {**PLAIN, "slice": "128x16", "density": 0.1}),
    ("attention, everything kept", WAN, {**PLAIN, "slice": "128x16", "density": 1.0}),
    ("backward of attention, 30% kept key by key", "training_attention.json", {"work": "backward", "slice": "128x1"}),
    (
        "forward, backward and selection, the default slice",
        "training_attention.json",
        {"work": "selection, forward and backward", "slice": "128x16"},
    ),
    ("a training step of 4 layers of the transformer, 30% kept", "training_step.json", {"variant": "fgattn"}),
    ("a denoising step of the transformer, 30% kept", "model_wan2.1-1.3b-720p.json", {"variant": "fgattn, pooled"}),
    ("a denoising step of the transformer, 30% kept", "model_wan2.1-14b-720p.json", {"variant": "fgattn, pooled"}),
    (
        "a denoising step of the transformer, 30% kept",
        "model_hunyuanvideo-720p.json",
        {"variant": "fgattn, pooled"},
    ),
)
QUALITY_FILES = ("quality_mini.json", "quality_tiny.json")
# A method of examples/quality.py, and what it is called in the tables.
QUALITY = {
    "128x1, one mean, no order": "FG-Attn's rule: one mean of 128 queries, single keys, raster order",
    "64x64 blocks": "64x64 blocks, raster order",
    "dfs": "DFSAttn's rule",
    "means": "means (**default** from a density of 0.25 on)",
    "means, tail": "means, pooled tail (**default** below)",
    "means, time step 0.5": "means, slices that reach as far in time whatever the queries",
    "means, tail, time step 0.5": "the same, pooled tail",
    "observed": "observed, made anew every 4 steps",
    "observed, tail": "observed, pooled tail",
}
# The curves are older than the choice of the order by the queries.
CURVES = {name: label for name, label in QUALITY.items() if name not in ("means", "means, tail")}
PERIODS = {
    "means, time step 0.5": "at every call, from means",
    "observed": "every 4 steps",
    "observed, every 8": "every 8 steps",
    "observed, every 16": "every 16 steps",
    "observed, once": "once",
}
LAST = ("baseline", "baseline_ms", "median_ms", "ratio")  # in this order at the right of each table


def load(path: Path) -> list[dict]:
    """The records of a file of results."""
    found = json.loads(path.read_text())
    if isinstance(found, list):
        return found
    what = found["what"]
    head = {"bench": "video quality", **{name: what[name] for name in ENVIRONMENT if name != "bench"}}
    dense = max(1, math.floor(what["dense_first"] * what["steps"] + 0.5)) if what["dense_first"] else 0
    size = f"{what['frames']}x{what['side']}x{what['side']}"
    head["model"] = f"{what['weights'].partition('_')[0]}, {size}, {what['steps']} steps, {dense} dense"
    return [head | {"variant": row.pop("method")} | row for row in map(dict, found["summary"])]


def measured_tables(folder: Path = HERE / "results") -> str:
    """All result files as Markdown, in the order of their names."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        records = load(path)
        for _, rows in itertools.groupby(records, lambda r: [r.get(name) for name in ENVIRONMENT]):
            parts.append(_table(path.name, list(rows)))
    return "\n\n".join(parts)


def _table(file: str, rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row if row[name] is not None))
    names = [n for n in names if n not in {*ENVIRONMENT, *LAST, *HIDDEN}] + [n for n in LAST if n in names]
    shared = {n for n in names if len(rows) > 1 and all(r.get(n) == rows[0].get(n) for r in rows)}
    facts = "; ".join(f"{LABELS.get(n, n)} {_text(rows[0][n], n)}" for n in names if n in shared)
    versions = {"torch": "torch", "triton": "Triton", "cudnn": "cuDNN", "commit": "commit"}
    env = ", ".join(f"{label} {rows[0][n]}" for n, label in versions.items() if rows[0].get(n))
    columns = [n for n in names if n not in shared]
    numbers = {n for n in columns if any(isinstance(r.get(n), (int, float)) for r in rows)}
    lines = [
        f"**{rows[0]['bench']}** on {rows[0]['card']}, {env} (`{file}`){': ' + facts if facts else ''}.",
        "",
        "| " + " | ".join(LABELS.get(n, n) for n in columns) + " |",
        "| " + " | ".join("---:" if n in numbers else "---" for n in columns) + " |",
        *("| " + " | ".join(_text(row.get(n), n) for n in columns) + " |" for row in rows),
    ]
    return "\n".join(lines)


def _text(value, name: str) -> str:
    if value is None:
        return ""
    if name == "ratio":
        return f"{value:.2f}x"
    if name in PERCENT:
        return f"{100 * value:.3g}%"
    if name in MEMORY:
        return f"{value:.3g}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return str(value)


def summary_table(folder: Path = HERE / "results", summary=SUMMARY) -> str:
    """The records that ``summary`` names, as Markdown. Raises ValueError where one is not there, or not alone."""
    lines = ["| what | where | card | baseline | baseline, ms | ms | speed-up |"]
    lines.append("| --- | --- | --- | --- | ---: | ---: | ---: |")
    cards = set()
    for what, file, values in summary:
        records = load(folder / file)
        found = [r for r in records if all(r.get(name) == value for name, value in values.items())]
        if len(found) != 1:
            raise ValueError(f"tables: {len(found)} records of {file} have {values}, not one; change SUMMARY.")
        (r,) = found
        cards.add(f"{r['card']}, torch {r['torch']}, Triton {r['triton']}")
        numbers = (_text(r[name], name) for name in LAST)
        place, card = r.get("preset") or _text(r["shape"], "shape"), r["card"].removeprefix("NVIDIA ").split()[0]
        lines.append(f"| {what} | {place} | {card} | " + " | ".join(numbers) + " |")
    return "\n".join([*lines, "", f"{'; '.join(sorted(cards))}."])


def quality_table(files=QUALITY_FILES, variants=QUALITY, folder: Path = HERE / "results") -> str:
    """PSNR against dense attention, the mean over the videos, as Markdown: a row for each of ``variants``.

    Raises ValueError where a variant has no record in ``files``.
    """
    records = [r for file in files for r in load(folder / file)]
    models = list(dict.fromkeys(r["model"] for r in records))
    columns = sorted({(r["model"], r["density"]) for r in records}, key=lambda c: (models.index(c[0]), c[1]))
    short = [f"{model.partition(',')[0]}, " if len(models) > 1 else "" for model, _ in columns]
    names = [f"{model}{density:g} kept" for model, (_, density) in zip(short, columns, strict=True)]
    lines = ["| mask | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for variant, label in variants.items():
        found = {(r["model"], r["density"]): r for r in records if r["variant"] == variant}
        if not found:
            raise ValueError(f"tables: no record of {', '.join(files)} has the variant {variant!r}; change the rows.")
        # Whole blocks of 128 keys can't be kept to any share: what was kept stands beside the figure then.
        near = {c for c, r in found.items() if abs(r["kept"] - r["density"]) < 0.01}
        cells = [
            "" if c not in found else f"{found[c]['psnr_db']:.1f}" + ("" if c in near else f" ({found[c]['kept']:.2f})")
            for c in columns
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    videos = "; ".join(f"{m}, {next(r['videos'] for r in records if r['model'] == m)} videos" for m in models)
    commits = ", ".join(dict.fromkeys(r["commit"] for r in records))
    where = f"{records[0]['card']}, torch {records[0]['torch']}, commit {commits}"
    return "\n".join([*lines, "", f"PSNR to dense attention in dB, the mean over the videos. {videos}. {where}."])


def peers_table(file: Path = HERE / "results" / "peers.json") -> str:
    """Times and errors of sparse attention kernels by density, as Markdown: a row for each kernel."""
    records = [r for r in load(file) if not r.get("failed")]
    densities = sorted({r["density"] for r in records if r["density"] < 1}, reverse=True)
    names = [f"{what}, {density:g} kept" for density in densities for what in ("ms", "error")]
    lines = ["| kernel, M x N | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]

    def label(r: dict) -> str:
        return " ".join(filter(None, (r["variant"], r.get("version"))))

    for variant in dict.fromkeys(r["variant"] for r in records if r["density"] < 1):
        found = {r["density"]: r for r in records if r["variant"] == variant}
        cells = (_text(found[density][name], name) for density in densities for name in ("median_ms", "error"))
        lines.append(f"| {label(found[densities[0]])} | " + " | ".join(cells) + " |")
    dense = [r for r in records if r["density"] == 1]
    times = ", ".join(f"{label(r).replace(' dense', '')} {_text(r['median_ms'], '')} ms" for r in dense)
    versions = f"torch {dense[0]['torch']}, Triton {dense[0]['triton']}"
    where = f"{dense[0]['card']}, {versions}; {_text(dense[0]['shape'], 'shape')}, bfloat16; dense: {times}"
    return "\n".join([*lines, "", f"{where}."])


def sections() -> dict[Path, dict[str, str]]:
    """The generated sections of each file."""
    return {
        README: {
            "summary": summary_table(),
            "quality": quality_table(variants={k: v for k, v in QUALITY.items() if k != "dfs"}),
            "curves": quality_table(["quality_curves.json"], CURVES),
            "peers": peers_table(),
            "options": options_table(),
        },
        DENOISING: {"periods": quality_table(["quality_refresh_period.json"], PERIODS)},
        BENCHMARKS: {"measured": measured_tables()},
    }


def updated(path: Path, text: str, parts: dict[str, str]) -> str:
    """The text of a file with its generated sections made anew. Raises ValueError where a marker is missing."""
    for name, body in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"tables: {path.name} has no section between {begin} and {end}; put the markers back.")
        text = f"{before}{begin}\n{body}\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if one is out of date")
    args = parser.parse_args()
    for path, parts in sections().items():
        old = path.read_text()
        new = updated(path, old, parts)
        if args.check and old != new:
            parser.exit(1, f"{path.name} is out of date: run python examples/benchmarks/tables.py\n")
        if not args.check:
            path.write_text(new)


if __name__ == "__main__":
    main()
