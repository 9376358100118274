"""Bits of mask words (portable Triton)."""

import triton
import triton.language as tl


@triton.jit
def popcount(x):
    """Bits of each int32 that are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (((x * 0x01010101) >> 24) & 0xFF).to(tl.int32)
