"""What the compiler makes of the kernels for sm_90; needs no GPU, but a process without Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("resources") / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "fg_inductor.bench.resources", "--out", str(path)]
    if sys.version_info < (3, 11):
        command.remove("-P")
    subprocess.run(command, check=True, cwd=path.parent, env=environment)
    return {(r["kernel"], r["variant"]): r for r in json.loads(path.read_text())}


def test_matrix_work_runs_on_hoppers_tensor_cores(rows):
    """Slices of 64 and 128 queries fill a warpgroup's instruction; smaller ones can't."""
    for (kernel, variant), row in rows.items():
        if kernel == "_attention_fwd":
            small = variant.startswith(("16x", "32x"))
            assert (row["HMMA"] if small else row["HGMMA"]) > 0, variant


def test_keys_are_copied_16_bytes_at_a_time(rows):
    for (kernel, variant), row in rows.items():
        if kernel == "_attention_fwd" and "D 96" not in variant:
            assert row["copies"] > 0, variant


def test_hot_loops_do_not_spill(rows):
    """A few reloads of addresses are free beside 24 wgmma; the query order once cost 40 and a third of the speed."""
    for (kernel, variant), row in rows.items():
        budget = {"128x8 D 128 tail": 40}.get(variant, 8)
        assert row["spill loads"] <= budget, (kernel, variant, row)
