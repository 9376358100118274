"""DDP and FSDP2: two processes on CPU (gloo), one process on each card where there is a GPU (NCCL)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

SCRIPT = Path(__file__).with_name("train_with_processes.py")
SECONDS = 240  # on two busy cores it takes 20

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs a torch with torch.distributed")


@pytest.mark.parametrize("ways", [("ddp", "ddp_of_compiled"), ("fsdp", "fsdp_by_block")], ids=["ddp", "fsdp"])
def test_gradients_equal_dense_at_density_1(ways, tmp_path):
    count = min(torch.cuda.device_count(), 2) or 2
    command = [sys.executable, "-P", str(SCRIPT)] if sys.version_info >= (3, 11) else [sys.executable, str(SCRIPT)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(count), str(tmp_path / "store"), *ways],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        printed = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:  # one that failed leaves the others waiting
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * count, "\n".join(printed)
    assert all(f"{how}: " in text for how in ways for text in printed)
