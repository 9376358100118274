"""What every benchmark shares: shapes, environment, timing, records."""

import json
import os
import subprocess
from pathlib import Path

import torch
from tabulate import tabulate

# Self-attention of published models: heads, tokens of the video (with text where it is joint), head dim.
PRESETS = {
    "wan2.1-1.3b-480p": {"heads": 12, "tokens": 32_760, "dim": 128, "grid": (21, 30, 52)},
    "wan2.1-1.3b-720p": {"heads": 12, "tokens": 75_600, "dim": 128, "grid": (21, 45, 80)},
    "wan2.1-14b-480p": {"heads": 40, "tokens": 32_760, "dim": 128, "grid": (21, 30, 52)},
    "wan2.1-14b-720p": {"heads": 40, "tokens": 75_600, "dim": 128, "grid": (21, 45, 80)},
    "cogvideox-5b": {"heads": 48, "tokens": 17_550, "dim": 64, "grid": (13, 30, 45)},
}


def environment() -> dict:
    """Card, versions and commit, for every record. FGATTN_COMMIT stands in where there is no git checkout."""
    import triton

    commit = os.environ.get("FGATTN_COMMIT", "")
    if not commit:
        shown = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        commit = shown.stdout.strip() or "unknown"
    return {
        "card": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": commit,
    }


def median_ms(run, warmup: int = 50, rep: int = 300) -> float:
    """Median milliseconds of ``run()`` by device events."""
    from triton.testing import do_bench

    return do_bench(run, warmup=warmup, rep=rep, return_mode="median")


def save(records: list[dict], path: str | None) -> None:
    """Write records as JSON, where a path was given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(records, indent=1) + "\n")


def show(records: list[dict], columns: list[str]) -> None:
    """Print the columns of the records as a table."""
    print(tabulate([[r.get(c) for c in columns] for r in records], headers=columns, floatfmt=".4g"))
