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
        if kernel == "_attention_fwd_hopper":
            assert row["HGMMA"] >= 12 and row["HMMA"] == 0, variant
        if kernel == "_attention_fwd":
            small = variant.startswith(("16x", "32x"))
            assert (row["HMMA"] if small else row["HGMMA"]) > 0, variant


def test_exact_masses_run_two_programs_a_multiprocessor(rows):
    """Products of one beside exponentials of the other: 65,536 registers and 227 KB for two of 128 threads."""
    for (kernel, variant), row in rows.items():
        if kernel == "_column_mass" and "x128 " not in variant and "D 256" not in variant:
            assert row["HGMMA"] > 0 and row["HMMA"] == 0, variant
            assert row["registers"] <= 255 and row["spill loads"] == 0 and row["shared"] <= 113 * 1024, variant


def test_hopper_backward_overlaps_its_products(rows):
    """Five products of 8 instructions a tile; dq alone has three. Where registers lack, each instruction is waited for.

    So it is where Triton 3.9 compiles slices of 64.
    """
    for (kernel, variant), row in rows.items():
        if kernel == "_attention_bwd_hopper":
            assert row["HGMMA"] >= 20 and row["HMMA"] == 0, variant
            assert row["waits"] <= row["HGMMA"] / 4 or variant.startswith("64x"), variant


def test_backward_runs_on_hoppers_tensor_cores(rows):
    """All five products where a slice has 64 queries or more, dk and dv of smaller ones; D 256 by keys does without."""
    for (kernel, variant), row in rows.items():
        if kernel.startswith("_attention_bwd") and (kernel, variant) != ("_attention_bwd_keys", "128x128 D 256"):
            assert row["HGMMA"] > 0, variant
            assert row["HMMA"] == 0 or variant.startswith(("16x", "32x")), variant


def test_keys_are_copied_16_bytes_at_a_time(rows):
    for (kernel, variant), row in rows.items():
        if kernel == "_attention_fwd" and "D 96" not in variant:
            assert row["copies"] > 0, variant


def test_hot_loops_do_not_spill(rows):
    """A few reloads of addresses are free beside 24 wgmma; the query order once cost 40 and a third of the speed."""
    budgets = {
        ("_attention_fwd", "128x8 D 128 tail"): 40,
        ("_attention_bwd_slices", "128x8 D 128 bias"): 20,
        ("_attention_bwd_slices", "128x8 D 128 tail"): 20,
        ("_attention_bwd_slices", "128x8 D 96"): 12,
        ("_attention_bwd_slices", "128x8 D 256"): 20,
        ("_attention_bwd_hopper", "64x8 D 128"): 64,
        # Counted over the loop around, which fills the pipeline anew for each query head.
        ("_attention_bwd_keys", "128x64 D 128"): 32,
        ("_attention_bwd_keys", "128x8 D 128"): 48,
        # A long row of groups fills the register file: Triton 3.6 reloads nothing in the loop, 3.9 up to a tenth of it.
        ("_cut", "32760 groups top-p"): 16,
        ("_cut", "75600 groups top-p"): 80,
    }
    for (kernel, variant), row in rows.items():
        # Three accumulators fill the file: beside 40 wgmma and 32 vector atomics Triton 3.6 reloads 16, 3.9 32.
        budget = budgets.get((kernel, variant), 36 if kernel == "_attention_bwd_hopper" else 8)
        assert row["spill loads"] <= budget, (kernel, variant, row)
