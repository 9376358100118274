"""CUDA tensors in pinned host memory: what they are, how long they last, and what is said where they can't be had."""

import contextlib
import weakref

import pytest
import torch

from fg_inductor.kernels import host_memory


def test_on_a_cpu_it_is_a_tensor():
    mask = host_memory.zeros((2, 3), torch.device("cpu"))
    assert mask.dtype == torch.int32 and not mask.any() and host_memory.find(mask) is None


@pytest.mark.parametrize(
    ("pinned", "reason"),
    [(None, "out of memory"), (torch.zeros(2, 3, dtype=torch.int32), "PyTorch made a copy at 0x.* on cpu")],
    ids=["no-memory", "no-alias"],
)
def test_memory_that_can_not_be_had(pinned, reason, monkeypatch):
    def zeros(*args, **kwargs):
        if pinned is None:
            raise RuntimeError("CUDA error: out of memory")
        return pinned

    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch, "as_tensor", lambda *args, **kwargs: torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=rf"state_memory='host' needs 2.4e-05 MB .* \(2, 3\): .*{reason}.*Use fgatt"):
        host_memory.zeros((2, 3), torch.device("cuda:0"))


@pytest.mark.gpu
def test_one_memory_seen_from_both_sides():
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.memory_allocated()
    mask = host_memory.zeros((3, 1000, 1000), device)
    block = host_memory.find(mask)
    assert torch.cuda.memory_allocated() == before
    assert mask.device == device and mask.data_ptr() == block.pinned.data_ptr() and block.pinned.is_pinned()
    mask.add_(torch.arange(1000, dtype=torch.int32, device=device))
    torch.cuda.synchronize()
    assert (block.pinned == torch.arange(1000)).all()
    block.pinned.fill_(5)
    assert (mask == 5).all() and host_memory.find(mask[1:]) is None
    gone = weakref.ref(block)
    del block
    view = mask[1:]
    del mask
    assert gone() is not None and (view == 5).all()  # the storage holds it
    del view
    assert gone() is None


@pytest.mark.gpu
def test_memory_that_is_still_written_is_not_given_away():
    """A kernel that is yet to run writes a mask that is gone: whoever asks for pinned memory gets another."""
    from fg_inductor.kernels import put_back

    device = torch.device("cuda", torch.cuda.current_device())
    shape = (1 << 18,)
    mask, staged = host_memory.zeros(shape, device), torch.full(shape, 7, dtype=torch.int32, device=device)
    due = torch.tensor(True, device=device)
    put_back.launch(mask, staged, due)  # compiled
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    put_back.launch(mask, staged, due)
    del mask
    others = [torch.zeros(shape, dtype=torch.int32, pin_memory=True) for _ in range(3)]
    torch.cuda.synchronize()
    assert not any(x.any() for x in others)
