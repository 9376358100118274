"""Other sparse attention kernels behind one signature, for ``bench peers``. None is a dependency: each imports its own.

A peer takes q, k, v [1, H, S, D] and keep, bool [H, T, G]: which groups of ``n`` keys each slice of ``m`` queries
keeps. ``prepare`` turns keep into what the kernel takes; ``run`` attends by that, with q, k and v in the layout that it
likes best, made outside of what is timed.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fg_inductor.kernels import ops
from fg_inductor.kernels.mask import pack, word_count


def _as_it_is(out: Tensor) -> Tensor:
    return out


@dataclass
class Peer:
    """layout  q, k, v -> what ``run`` gets of them
    prepare  keep -> what ``run`` gets of it; None for a dense kernel
    run      inputs, prepared -> the output
    bhsd     the output -> [1, H, S, D]
    """

    layout: Callable[[Tensor, Tensor, Tensor], tuple]
    prepare: Callable[[Tensor], Any] | None
    run: Callable[..., Tensor]
    bhsd: Callable[[Tensor], Tensor] = _as_it_is


@dataclass(frozen=True)
class Kind:
    """A peer by name: m x n (None: dense), what to import, and how to make it from the shape (H, S, D)."""

    make: Callable[[int, int, int], Peer]
    m: int | None = None
    n: int | None = None
    module: str | None = None


def _bhsd(q, k, v):
    return tuple(x.contiguous() for x in (q, k, v))


def _bshd(q, k, v):
    return tuple(x.transpose(1, 2).contiguous() for x in (q, k, v))


def _hsd(q, k, v):
    return tuple(x[0].contiguous() for x in (q, k, v))


def listed(keep: Tensor) -> tuple[Tensor, Tensor]:
    """keep bool [H, T, G] -> int32 counts [1, H, T] and indices [1, H, T, G], kept ones first and in order."""
    order = keep.int().argsort(dim=-1, descending=True, stable=True).int()
    return keep.sum(-1, dtype=torch.int32)[None], order[None]


# Dense


def _sdpa(backend: SDPBackend):
    def run(inputs, _):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*inputs)

    return lambda H, S, D: Peer(_bhsd, None, run)


def _fa4_dense(H, S, D):
    from flash_attn.cute import flash_attn_func

    return Peer(_bshd, None, lambda inputs, _: _first(flash_attn_func(*inputs)), lambda out: out.transpose(1, 2))


def _first(result):
    return result[0] if isinstance(result, tuple) else result


# Sparse


def _ours(m: int, n: int, tail: str = "none"):
    def make(H, S, D):
        def prepare(keep):
            return pack(keep[None], word_count(S, n))

        def run(inputs, mask):
            return ops.attention(*inputs, mask, None, None, D**-0.5, m, n, tail, 0)[0]

        # BSHD storage seen as BHSD, as projections give it.
        return Peer(lambda *qkv: tuple(x.transpose(1, 2) for x in _bshd(*qkv)), prepare, run)

    return Kind(make, m, n)


def _flex(m: int, n: int):
    def make(H, S, D):
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        flex = torch.compile(flex_attention, dynamic=False)
        options = {"BLOCK_M": min(m, 128), "BLOCK_N": n} if n < 128 else None

        def prepare(keep):
            counts, order = listed(keep)
            none = torch.zeros_like(counts)
            return BlockMask.from_kv_blocks(none, order, counts, order, BLOCK_SIZE=(m, n), seq_lengths=(S, S))

        return Peer(_bhsd, prepare, lambda inputs, mask: flex(*inputs, block_mask=mask, kernel_options=options))

    return Kind(make, m, n)


def _fa4(m: int, n: int):
    def make(H, S, D):
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        def prepare(keep):
            counts, order = listed(keep)
            return BlockSparseTensorsTorch(torch.zeros_like(counts), order, counts, order, block_size=(m, n))

        def run(inputs, mask):
            return _first(flash_attn_func(*inputs, block_sparse_tensors=mask))

        return Peer(_bshd, prepare, run, lambda out: out.transpose(1, 2))

    return Kind(make, m, n, "flash_attn.cute")


def _flashinfer(m: int, n: int):
    """Variable blocks, whose masks differ by head; its plan waits for the device, and counts as preparation."""

    def make(H, S, D):
        from flashinfer import VariableBlockSparseAttentionWrapper

        wrapper = VariableBlockSparseAttentionWrapper(torch.empty(128 << 20, dtype=torch.uint8, device="cuda"))
        rows, columns = (torch.full((H, S // size), size, dtype=torch.int32, device="cuda") for size in (m, n))

        def prepare(keep):
            wrapper.plan(keep, rows, columns, H, H, D, q_data_type=torch.bfloat16)
            return None

        return Peer(_hsd, prepare, lambda inputs, _: wrapper.run(*inputs), lambda out: out[None])

    return Kind(make, m, n, "flashinfer")


def _vsa(H, S, D):
    """The wheel (0.3.2) brings a libcuda of its own (fastvideo_kernel.libs). Where the driver is of another version its
    kernels end in an illegal instruction; they run once that file is a link to the driver's libcuda.so.1.
    """
    from fastvideo_kernel.block_sparse_attn import _map_to_index, block_sparse_attn_from_indices

    sizes = torch.full((S // 64,), 64, dtype=torch.int32, device="cuda")

    def run(inputs, mask):
        return block_sparse_attn_from_indices(*inputs, *mask, sizes)[0]

    return Peer(_bhsd, lambda keep: _map_to_index(keep[None]), run)


def _sla(m: int):
    """The sparse part of Sparse-Linear Attention (github.com/thu-ml/SLA, installed by pip from there; on PyPI it is in
    no package of its own). Its Triton kernel keeps as many blocks in every row, which is a constant that it is compiled
    for; preparation waits for the device to read it.
    """

    def make(H, S, D):
        from sparse_linear_attention.kernel import _attention

        def prepare(keep):
            counts, order = listed(keep)
            blocks = int(counts[0, 0, 0])
            return keep.to(torch.int8)[None], order[..., :blocks].contiguous(), blocks

        return Peer(_bhsd, prepare, lambda inputs, mask: _attention.apply(*inputs, *mask, m, 64))

    return Kind(make, m, 64, "sparse_linear_attention")


# Those that may take the device down with them, or minutes to build, come last.
PEERS = {
    "cuDNN dense": Kind(_sdpa(SDPBackend.CUDNN_ATTENTION)),
    "FlashAttention-2 dense": Kind(_sdpa(SDPBackend.FLASH_ATTENTION)),
    "fgattn 128x16": _ours(128, 16),
    "fgattn 128x8": _ours(128, 8),
    "fgattn 128x1": _ours(128, 1),
    "fgattn 128x8, tail": _ours(128, 8, "pooled"),
    "fgattn 64x64": _ours(64, 64),
    "fgattn 128x128": _ours(128, 128),
    "FlexAttention 128x128": _flex(128, 128),
    "FlexAttention 64x64": _flex(64, 64),
    "SLA 128x64": _sla(128),
    "SLA 64x64": _sla(64),
    "VSA 64x64": Kind(_vsa, 64, 64, "fastvideo_kernel"),
    "FA4 dense": Kind(_fa4_dense, module="flash_attn.cute"),
    "FA4 128x128": _fa4(128, 128),
    "FA4 64x16": _fa4(64, 16),
    "FlashInfer 128x1": _flashinfer(128, 1),
    "FlashInfer 64x64": _flashinfer(64, 64),
}


def version(module: str) -> str:
    """The version of a peer's package. Raises ImportError, or whatever its import raises."""
    found = str(getattr(importlib.import_module(module), "__version__", "unknown"))
    if found not in ("unknown", "0.0.0"):
        return found
    # Of the distribution, where the package does not know its own.
    names = metadata.packages_distributions().get(module.partition(".")[0], [])
    return metadata.version(names[0]) if len(set(names)) == 1 else found
