"""Masks back into host memory: the operator, the kernel against the reference, and what is noted of its writes."""

import importlib.util

import pytest
import torch

from fg_inductor.kernels import fetch, host_memory, ops, reference_observed
from fg_inductor.kernels.host_memory import Block

kernels = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@kernels
@pytest.mark.parametrize("due", [True, False])
@pytest.mark.parametrize("words", [1, 3, 4, 4096, 4100, 129 * 4096 + 8], ids=str)  # the last: a program's second block
def test_put_back(words, due, device):
    """As the reference does, and not a word beyond."""
    from fg_inductor.kernels import put_back

    around = torch.full((words + 8,), 7, dtype=torch.int32, device=device)
    mask, staged = around[4:-4], torch.arange(words, dtype=torch.int32, device=device)
    expected = mask.clone()
    reference_observed.put_back(expected, staged, torch.tensor(due, device=device))
    put_back.launch(mask, staged, torch.tensor(due, device=device))
    assert torch.equal(mask, expected) and torch.equal(mask, staged) == due
    assert (around[:4] == 7).all() and (around[-4:] == 7).all()


@pytest.mark.parametrize("capturing", [False, True])
@kernels
def test_writes_are_noted(capturing, monkeypatch):
    """Behind the launch, and whether a CUDA graph will repeat them unseen."""
    from fg_inductor.kernels import put_back

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    mask = torch.zeros(4, dtype=torch.int32)
    block = Block(mask.detach(), mask.device)
    monkeypatch.setitem(host_memory.blocks, mask.data_ptr(), block)
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(block.writes)

    monkeypatch.setattr(put_back, "_put_back", Kernel())
    put_back.launch(mask, mask.clone(), torch.tensor(True))
    assert launched == [0] and (block.writes, block.unseen) == (1, capturing)


ERRORS = {
    "mask-dtype": ({"mask": torch.zeros(2, 4)}, "mask must be int32, got torch.float32"),
    "mask-strides": ({"mask": torch.zeros(4, 2).int().mT}, r"mask must be contiguous, but has strides \(1, 2\)"),
    "staged-shape": ({"staged": torch.zeros(2, 3).int()}, r"staged .* of mask, torch.int32 \(2, 4\) .* \(2, 3\)"),
    "staged-rank": ({"staged": torch.zeros(8).int()}, r"staged must be .* \(8,\) on cpu"),
    "staged-dtype": ({"staged": torch.zeros(2, 4)}, "staged must be what fetch gave of mask, .* got torch.float32"),
    "staged-device": ({"staged": torch.zeros(2, 4, device="meta").int()}, "staged must be .* on meta"),
    "due-number": ({"due": torch.tensor(1)}, r"due must be a bool scalar on cpu, got torch.int64 \(\)"),
    "due-vector": ({"due": torch.ones(1).bool()}, r"due must be a bool scalar .* \(1,\)"),
}


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_put_back_errors(changes, message):
    good = {"mask": torch.zeros(2, 4).int(), "staged": torch.ones(2, 4).int(), "due": torch.tensor(True)}
    ops.put_back_(**good)
    assert good["mask"].all()
    with pytest.raises(ValueError, match=f"fgattn::put_back_: {message}"):
        ops.put_back_(**good | changes)


@pytest.mark.gpu
def test_captured_by_a_cuda_graph():
    """A replay reads and writes the mask where it lies, and what is fetched outside of it is what it has written."""
    device = torch.device("cuda", torch.cuda.current_device())
    a, b = (host_memory.zeros((1 << 20,), device) for _ in range(2))
    due = torch.tensor(True, device=device)

    def step():
        for mask in (a, b):
            ops.put_back_(mask, ops.fetch(mask) + 1, due)

    for _ in range(2):
        step()  # now a copy of a is under way
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for told in (True, False, True):
        due.fill_(told)
        graph.replay()
    assert (ops.fetch(a) == 4).all() and (ops.fetch(b) == 4).all()
    graph.replay()
    assert (ops.fetch(a) == 5).all() and (ops.fetch(b) == 5).all()
    fetch.forget()
