"""Which kernel computes an attention call: the operator and the report ask the same function.

    "reference"  PyTorch, on CPU
    "hopper"     Gluon, on cards of compute capability 9.0, for calls that it does not refuse
    "portable"   Triton, on every other CUDA card and for every other call

The choice reads metadata only. What depends on the card and on the installed Triton is found out once for each device.
"""

import functools
import importlib
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

from fg_inductor.kernels.checks import fail


def choose(
    kernel_name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    tail: str,
) -> str:
    """The kernel for a call with these arguments, fake tensors as well; ``kernel_name`` forces one unless it is "auto".

    Raises ValueError where the forced kernel can't run them.
    """
    if q.device.type == "cpu":
        if kernel_name != "auto":
            _fail(kernel_name, f"q is on {q.device}, and it runs on CUDA")
        return "reference"
    if kernel_name == "portable":
        return "portable"
    hopper = _hopper(q.device)
    refused = hopper
    if isinstance(hopper, ModuleType):
        refused = hopper.refusal(q, k, v, mask, key_bias, order, scale, m, n, tail)
    if refused is None:
        return "hopper"
    if kernel_name == "hopper":
        _fail(kernel_name, refused.rstrip("."))
    return "portable"


def choose_backward(kernel_name: str, q: Tensor, scale: float, m: int) -> str:
    """The kernel that makes gradients by slices, as ``choose`` names them.

    ``kernel_name`` is that of the forward pass: "portable" holds for the backward pass too. "hopper" asks for no more
    than "auto", since Hopper's forward kernel takes slices of any size and its backward kernel does not.
    """
    if kernel_name == "portable":
        return "portable"
    hopper = _hopper(q.device, "attention_backward_hopper")
    return "hopper" if isinstance(hopper, ModuleType) and hopper.refusal(q, scale, m) is None else "portable"


@functools.cache
def _hopper(device: torch.device, name: str = "attention_forward_hopper") -> ModuleType | str:
    """A Hopper kernel's module, or why this device or this Triton can't run it."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "there is no NVIDIA GPU here"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        major, minor = capability
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, not 9.0"
    try:
        return importlib.import_module(f"fg_inductor.kernels.{name}")
    except (ImportError, AttributeError) as error:  # Gluon's names change between versions of Triton
        return f"the installed Triton lacks what it needs of Gluon ({error})"


def _fail(kernel_name: str, reason: str) -> NoReturn:
    advice = "pass kernel_name='auto', or leave the backend's option fgattn.kernel at 'auto'"
    fail("attention", f"the {kernel_name} kernel can't run this call: {reason}; {advice}.")
