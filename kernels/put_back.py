"""A mask back into host memory, where the device says so (portable Triton).

    mask = staged where due, else mask

due     bool scalar         where it is False every program ends at once
staged  int32, contiguous   in device memory
mask    int32, contiguous   in pinned host memory: the stores go over the bus
grid    PROGRAMS at most, each with blocks in turn: on most steps they do no more than read the flag

Rows of a mask are multiples of four words. The compiler is told so, and a thread stores four at once: writes over the
bus are fast in whole lines only. Meaning: ``reference_observed.put_back``.
"""

import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels import fetch
from fg_inductor.kernels.sizes import cdiv

BLOCK = 4096
PROGRAMS = 128


@triton.jit
def _put_back(due_ptr, staged_ptr, mask_ptr, parts, PART: tl.constexpr, BLOCK: tl.constexpr):
    if tl.load(due_ptr) == 0:
        return
    words = tl.cast(parts, tl.int64) * PART
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, words, step):
        word = first + tl.arange(0, BLOCK)
        inside = word < words
        tl.store(mask_ptr + word, tl.load(staged_ptr + word, mask=inside), mask=inside)


def launch(mask: Tensor, staged: Tensor, due: Tensor) -> None:
    """Writes ``mask`` where ``due`` says so; arguments as in ``kernels.ops``."""
    words = mask.numel()
    part = 1 if words % 4 else 4
    grid = (min(PROGRAMS, cdiv(words, BLOCK)),)
    _put_back[grid](due, staged, mask, words // part, PART=part, BLOCK=BLOCK, num_warps=8)
    fetch.wrote(mask)
