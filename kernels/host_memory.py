"""Tensors of a GPU that lie in pinned host memory.

    mask = host_memory.zeros(shape, device)      a CUDA tensor; kernels read and write it over the bus
    host_memory.find(mask).pinned                the same memory as a CPU tensor

Pinned memory has one address for host and devices, so a CUDA tensor can be told to begin there
(``__cuda_array_interface__``). To a compiled graph it is a tensor like others, at an address that stays: AOTAutograd,
Inductor and CUDA graphs need to know nothing of it. Copies are made from the CPU tensor, so that they are known as
copies from host to device and leave the multiprocessors alone. On a CPU it is an ordinary tensor.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Block:
    """The memory behind a CUDA tensor. The storage of the tensor holds it, and nothing else does.

    pinned  the memory as a CPU tensor
    writes  how often it was written
    out     it was fetched, and is yet to be put back; where code was made functional it is put back into another tensor
            and copied from there, so that it stays out
    unseen  a captured CUDA graph uses it, which writes it without a word when it is replayed
    """

    def __init__(self, pinned: Tensor, device: torch.device):
        self.pinned, self.device = pinned, device
        self.writes = 0
        self.out = self.unseen = False

    def wrote(self) -> None:
        """It was put back."""
        self.writes += 1
        self.out = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self.pinned.data_ptr(), False)
        return {"shape": tuple(self.pinned.shape), "typestr": "<i4", "data": data, "strides": None, "version": 2}


# Address -> what lies there. A block goes with its tensor, so that an address which comes back is another block.
blocks: "weakref.WeakValueDictionary[int, Block]" = weakref.WeakValueDictionary()


def zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An int32 tensor of the device, of zeros, in pinned host memory. Raises RuntimeError where it can't be had."""
    if device.type != "cuda":
        return torch.zeros(shape, dtype=torch.int32, device=device)
    try:
        with torch.cuda.device(device):
            block = Block(torch.zeros(shape, dtype=torch.int32, device="cpu", pin_memory=True), device)
            weakref.finalize(block, _let_go, block.pinned, device).atexit = False
            result = torch.as_tensor(block, device=device)
    except RuntimeError as error:
        raise _refusal(shape, device, str(error)) from error
    if result.device != device or result.data_ptr() != block.pinned.data_ptr():
        raise _refusal(shape, device, f"PyTorch made a copy at {result.data_ptr():#x} on {result.device}")
    blocks[result.data_ptr()] = block
    return result


def find(x: Tensor) -> Block | None:
    """The block behind the whole of a tensor; None where it is an ordinary one."""
    block = blocks.get(x.data_ptr())
    return block if block is not None and block.pinned.shape == x.shape and x.is_contiguous() else None


def _refusal(shape: tuple[int, ...], device: torch.device, reason: str) -> RuntimeError:
    size = 4 * torch.Size(shape).numel()
    return RuntimeError(
        f"fgattn: fgattn.state_memory='host' needs {size / 1e6:.3g} MB of pinned host memory that {device} addresses, "
        f"for the mask {tuple(shape)}: {reason}. Use fgattn.state_memory='device', or free host memory."
    )


def _let_go(pinned: Tensor, device: torch.device) -> None:
    """Have the memory of a tensor that is gone wait for what the device has still to do with it.

    PyTorch reuses pinned memory behind the copies that it knows of. It knows of no kernel, so it is shown a copy.
    """
    with _disable_current_modes(), torch.cuda.device(device):  # it may go while a graph is traced
        if not torch.cuda.is_current_stream_capturing():
            first = pinned.flatten()[:1]
            torch.empty_like(first, device=device, pin_memory=False).copy_(first, non_blocking=True)
