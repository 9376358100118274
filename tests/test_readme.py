"""README.md and docs/ hold what they promise: generated sections are up to date, commands and files exist."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "examples/benchmarks/tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_sections_are_up_to_date(tables):
    for path, parts in tables.sections().items():
        text = path.read_text()
        assert tables.updated(path, text, parts) == text, "run python examples/benchmarks/tables.py"


def test_a_lost_marker_is_named(tables):
    with pytest.raises(ValueError, match="summary: end"):
        tables.updated(tables.README, README.replace("<!-- summary: end -->", ""), {"summary": ""})


def test_the_summary_takes_one_record_each(tables, tmp_path):
    record = {"card": "NVIDIA A1 80GB", "torch": "2.11", "triton": "3.6", "preset": "p", "density": 0.3}
    times = {"baseline": "dense", "baseline_ms": 8.0, "median_ms": 4.0, "ratio": 2.0}
    (tmp_path / "a.json").write_text(json.dumps([{**record, **times}, {**record, **times, "density": 1.0}]))
    table = tables.summary_table(tmp_path, [("attention", "a.json", {"density": 0.3})])
    assert "| attention | p | A1 | dense | 8 | 4 | 2.00x |" in table
    assert "NVIDIA A1 80GB, torch 2.11, Triton 3.6." in table
    with pytest.raises(ValueError, match="2 records of a"):
        tables.summary_table(tmp_path, [("attention", "a.json", {"preset": "p"})])


def test_tables_say_shared_values_once(tables, tmp_path):
    head = {"bench": "attention", "card": "A card", "torch": "2.11", "triton": "3.6", "commit": "abc", "dtype": "half"}
    rows = [
        {**head, "slice": "128x1", "baseline_ms": 8.0, "median_ms": 4.0, "p80_ms": 4.1, "ratio": 2.0, "error": None},
        {**head, "slice": "128x8", "baseline_ms": 8.0, "median_ms": 3.0, "ratio": 8 / 3, "error": 0.0021},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert tables.measured_tables(tmp_path).splitlines() == [
        "**attention** on A card, torch 2.11, Triton 3.6, commit abc (`a.json`): dtype half; baseline, ms 8.",
        "",
        "| M x N | error | ms | speed-up |",
        "| --- | ---: | ---: | ---: |",
        "| 128x1 |  | 4 | 2.00x |",
        "| 128x8 | 0.0021 | 3 | 2.67x |",
    ]


def test_tables_of_selection(tables, tmp_path):
    """Shares of a time in percent; memory, which may pass 1, in three digits at most."""
    head = {"bench": "attention", "card": "A card", "torch": "2.11", "triton": "3.6", "commit": "abc"}
    rows = [
        {**head, "select_ms": 0.3712, "select_share": 0.02484, "top_p": 0.9, "select_top_p_share": 0.1234,
         "select_memory": 1.2345, "mask_memory": 0.0052083, "median_ms": 4.0},
        {**head, "select_ms": 12.345, "select_share": 1.05, "top_p": 0.9, "select_top_p_share": None,
         "select_memory": None, "mask_memory": 0.052083, "median_ms": 3.0},
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(rows))
    first, _, names, _, *lines = tables.measured_tables(tmp_path).splitlines()
    assert first.endswith(": top-p 0.9.")
    assert names == (
        "| selection, ms | selection of dense | top-p selection of dense | selection's memory of q, k, v "
        "| mask of q, k, v | ms |"
    )
    assert lines == ["| 0.371 | 2.48% | 12.3% | 1.23 | 0.00521 | 4 |", "| 12.35 | 105% |  |  | 0.0521 | 3 |"]


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"[(`]((?:examples|tests|passes|kernels|fg_inductor)/[\w./]*)", README)))
)
def test_paths_exist(path):
    assert (ROOT / path).exists()


def test_videos_become_records(tables, tmp_path):
    """What examples/quality.py writes is a file of results, a record for each method and density."""
    what = {name: name for name in ("card", "torch", "triton", "cudnn", "commit")}
    what |= {"frames": 5, "side": 64, "steps": 6, "dense_first": 0.25, "weights": "toy_dit.safetensors"}
    rows = [{"method": m, "density": 0.3, "kept": k, "videos": 2, "psnr_db": 30.0} for m, k in (("a", 0.3), ("b", 0.4))]
    (tmp_path / "q.json").write_text(json.dumps({"what": what, "summary": rows, "videos": [], "layers": []}))
    first, _ = tables.load(tmp_path / "q.json")
    assert (first["variant"], first["model"]) == ("a", "toy, 5x64x64, 6 steps, 2 dense")
    table = tables.quality_table(["q.json"], {"a": "one", "b": "two"}, tmp_path)
    assert table.splitlines()[2:4] == ["| one | 30.0 |", "| two | 30.0 (0.40) |"]
    with pytest.raises(ValueError, match="variant 'c'"):
        tables.quality_table(["q.json"], {"c": "three"}, tmp_path)


def test_peers_that_failed_are_no_rows(tables, tmp_path):
    head = {"card": "GPU", "torch": "2", "triton": "3", "shape": [1, 2, 3, 4]}
    rows = [
        head | {"variant": "a dense", "density": 1.0, "median_ms": 2.0},
        head | {"variant": "b", "density": 0.3, "median_ms": 1.0, "error": 0.5},
        head | {"variant": "c", "failed": "ImportError"},
    ]
    (tmp_path / "peers.json").write_text(json.dumps(rows))
    table = tables.peers_table(tmp_path / "peers.json")
    assert table.splitlines()[2:3] == ["| b | 1 | 0.5 |"] and "ImportError" not in table
