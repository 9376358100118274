"""Kept density of a block mask (portable Triton): kept pairs over all pairs.

    pairs[t] = rows of slice t * sum over its kept groups of the keys that are not masked

mask        [B, H, T, W]   int32
group_keys  [B, G]         float32, keys of a group that are not masked; None: all keys count
pairs       [B, H, T]      float32, exact below 2**24
Grid        (T, B * H)

``fgattn.stats`` asks for it at every call, so it is one small kernel and a sum. Meaning: ``reference.kept_density``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels.mask import group_count
from fg_inductor.kernels.reference import group_statistics, normalise_key_bias

BLOCK = 1024


@triton.jit
def _kept_pairs(
    mask_ptr, group_keys_ptr, pairs_ptr,
    stride_mb, stride_mh, stride_mt,
    H, T, W, G, Sq, Sk,
    M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    words_ptr = mask_ptr + b * stride_mb + h * stride_mh + t * stride_mt
    kept = 0.0
    for first in range(0, G, BLOCK):
        word = first // 32 + tl.arange(0, BLOCK // 32)
        words = tl.load(words_ptr + word, mask=word < W, other=0)
        bits = tl.reshape((words[:, None] >> tl.arange(0, 32)[None, :]) & 1, [BLOCK])
        group = first + tl.arange(0, BLOCK)
        keys = tl.minimum(tl.maximum(Sk - group * N, 0), N).to(tl.float32)
        if HAS_BIAS:
            keys = tl.load(group_keys_ptr + b * G + group, mask=group < G, other=0.0)
        kept += tl.sum(bits * keys)
    rows = tl.minimum(Sq - t * M, M)
    tl.store(pairs_ptr + bh * T + t, kept * rows)


def launch(mask: Tensor, key_bias: Tensor | None, queries: int, keys: int, m: int, n: int) -> Tensor:
    """A float32 scalar; arguments as in ``kernels.ops``."""
    B, H, T, W = mask.shape
    G = group_count(keys, n)
    bias = normalise_key_bias(key_bias, torch.float32)
    group_keys = None if bias is None else group_statistics(bias, keys, n, bias)[0]
    pairs = torch.empty(B, H, T, dtype=torch.float32, device=mask.device)
    _kept_pairs[(T, B * H)](
        mask, group_keys, pairs,
        *mask.stride()[:3],
        H, T, W, G, queries, keys,
        M=m, N=n, BLOCK=BLOCK, HAS_BIAS=bias is not None,
        num_warps=4,
    )  # fmt: skip
    visible = B * keys if bias is None else group_keys.sum(dtype=torch.float64)
    return (pairs.sum(dtype=torch.float64) / (visible * H * queries)).to(torch.float32)
