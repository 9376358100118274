"""Test utilities: the error budget, poison, and awkward inputs.

    with poison():
        actual = kernel(*make_qkv(dtype=torch.bfloat16))
    assert_as_accurate(actual, plain, exact)

``testing_cases`` has the table of cases that every attention kernel must pass.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fg_inductor.kernels.mask import group_count, pack, slice_count, word_count

SUMMARY = 128  # keys in one block of the pooled tail
LAYOUTS = ("contiguous", "bshd", "fused", "mixed")


# The error budget


@dataclass(frozen=True)
class Problem:
    """What problems of attention and of selection share; a row of a table states only what is unusual about it."""

    id: str
    m: int = 64
    n: int = 8
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 150
    keys: int = 150
    dim: int = 64
    bias: str | None = None  # kind of ``make_key_bias``
    ordered: bool = False
    spread: float = 1.0

    def __str__(self) -> str:
        return self.id


def _same_non_finite(actual: Tensor, exact: Tensor, label: str) -> Tensor:
    """Raises unless NaN, +Inf and -Inf lie at the same places; returns where both are finite."""
    for what, is_it in {"NaN": torch.isnan, "+Inf": torch.isposinf, "-Inf": torch.isneginf}.items():
        wrong = (is_it(actual) != is_it(exact)).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{label}: {what} at {len(wrong)} wrong or missing places of {exact.numel()}; first at {at}: "
                f"got {actual[at].item():.6g}, exact {exact[at].item():.6g}"
            )
    return exact.isfinite()


def _promoted(actual: Tensor, plain: Tensor, exact: Tensor, label: str) -> tuple[Tensor, Tensor, Tensor, float]:
    if not actual.shape == plain.shape == exact.shape:
        raise AssertionError(f"{label}: shapes {[tuple(x.shape) for x in (actual, plain, exact)]} differ")
    if exact.dtype != torch.float64:
        raise AssertionError(f"{label}: exact must be float64, got {exact.dtype}")
    actual64, plain64, exact = (x.detach().to(exact.device, torch.float64) for x in (actual, plain, exact))
    finite = _same_non_finite(actual64, exact, label)
    zero = exact.new_zeros(())
    # A place where only plain overflows says nothing about it; a place where exact is not finite has no error.
    usable = finite & plain64.isfinite()
    values = torch.where(finite, actual64, zero), torch.where(usable, plain64, torch.where(finite, exact, zero))
    return *values, torch.where(finite, exact, zero), torch.finfo(actual.dtype).eps


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor, label: str = "result") -> None:
    """The largest error of ``actual`` is within twice that of ``plain``, plus one rounding band.

    actual  what is tested
    plain   the same from plain PyTorch in the same dtype, such as SDPA with the equivalent dense mask
    exact   float64, from the same (already rounded) inputs

    The budget is 2 * max|plain - exact| + eps * max|exact|, eps of actual's dtype. NaN and Inf must be where exact has
    them. Raises AssertionError with both errors, the budget and the worst coordinate.
    """
    if exact.numel() == 0:
        return
    actual64, plain64, exact64, eps = _promoted(actual, plain, exact, label)
    error = (actual64 - exact64).abs()
    plain_error = (plain64 - exact64).abs().max().item()
    budget = 2 * plain_error + eps * exact64.abs().max().item()
    worst = error.max().item()
    if worst > budget:
        at = tuple(x.item() for x in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{label}: error {worst:.3e} exceeds the budget {budget:.3e} (plain PyTorch has {plain_error:.3e}); "
            f"{(error > budget).sum().item()} of {error.numel()} elements do, the worst at {at}: "
            f"got {actual64[at].item():.6g}, exact {exact64[at].item():.6g}"
        )


def l2_error(x: Tensor, exact: Tensor) -> float:
    """Relative L2 error against float64; the norm itself where ``exact`` is 0."""
    return (x.detach().double() - exact).norm().item() / (exact.norm().item() or 1.0)


def assert_l2_as_accurate(
    actual: Tensor, plain: Tensor, exact: Tensor, label: str = "result", plain_error: float = 0.0
) -> None:
    """``assert_as_accurate`` for large tensors: relative L2 error within twice plain's, plus eps.

    ``plain_error`` is a relative error that plain PyTorch is known to have in such results, where its own in this one
    may be small by chance.
    """
    actual64, plain64, exact64, eps = _promoted(actual, plain, exact, label)
    error, plain_error = l2_error(actual64, exact64), max(plain_error, l2_error(plain64, exact64))
    if error > 2 * plain_error + eps:
        at = tuple(x.item() for x in torch.unravel_index((actual64 - exact64).abs().argmax(), exact64.shape))
        raise AssertionError(
            f"{label}: relative L2 error {error:.3e} exceeds the budget {2 * plain_error + eps:.3e} (plain PyTorch "
            f"has {plain_error:.3e}); the worst element is {at}: got {actual64[at].item():.6g}, "
            f"exact {exact64[at].item():.6g}"
        )


# Poison


def _poisoned(allocate):
    def run(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or x.device.type == "meta" or x.numel() == 0:
            return x
        with torch.no_grad():
            if x.dtype == torch.bool:
                return x.fill_(True)
            return x.fill_(math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max // 3)

    return run


@contextlib.contextmanager
def poison():
    """Uninitialised memory reads as NaN (floats), garbage (integers) or True: an output left unwritten shows.

    Covers what Python code allocates with torch.empty, empty_like, empty_strided and Tensor.new_empty,
    new_empty_strided; compiled code is left alone.
    """
    places = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    places += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]
    saved = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        for owner, name, original in saved:
            setattr(owner, name, _poisoned(original))
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


# Inputs


def _bshd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _fused(*parts: Tensor) -> tuple[Tensor, ...]:
    """Slices of one [B, S, H1 + H2 + ..., D] projection, seen as [B, H, S, D]."""
    return torch.cat(parts, 1).transpose(1, 2).contiguous().transpose(1, 2).split([x.shape[1] for x in parts], 1)


def _followed_by_nan(x: Tensor, rows: int = 128) -> Tensor:
    """[B, H, S, D] whose every head is followed by rows of NaN in memory: an unmasked read past the end shows."""
    storage = x.new_full((x.shape[0], x.shape[1], x.shape[2] + rows, x.shape[3]), math.nan)
    storage[:, :, : x.shape[2]] = x
    return storage[:, :, : x.shape[2]]


def make_qkv(
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    queries: int = 150,
    keys: int | None = None,
    dim: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "mixed",
    spread: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q [B, Hq, Sq, D] and k, v [B, Hkv, Sk, D], the same numbers on every device; ``spread`` multiplies q.

    layout  "contiguous"; "bshd": BSHD storage seen as BHSD; "fused": slices of one qkv projection (of one kv projection
            where the lengths differ); "mixed": three different ones (q BSHD, k a fused slice, v followed by NaN)
    """
    kv_heads, keys = kv_heads or heads, keys or queries
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    q, k, v = ((x * s).to(device, dtype) for x, s in ((q, spread), (k, 1.0), (v, 1.0)))
    if layout == "contiguous":
        return q, k, v
    if layout == "bshd":
        return _bshd(q), _bshd(k), _bshd(v)
    if layout == "fused":
        return _fused(q, k, v) if queries == keys else (_bshd(q), *_fused(k, v))
    if layout == "mixed":
        return _bshd(q), _fused(k, v)[0], _followed_by_nan(v)
    raise ValueError(f"make_qkv: layout {layout!r}; choose one of {LAYOUTS}.")


def make_key_bias(kind: str | None, batch: int, keys: int, dtype: torch.dtype, seed: int = 0) -> Tensor | None:
    """key_bias [B, Sk]: the last fifth is padding, in the last entry the second block of 128 as well.

    kind  "padding" (bool), "float", "additive" (-10000), "entry" (bool, the last entry all masked); None gives None
    """
    if kind is None:
        return None
    masked = torch.zeros(batch, keys, dtype=torch.bool)
    if kind == "entry":
        masked[-1] = True
        return ~masked
    masked[:, keys - keys // 5 :] = True
    masked[-1, SUMMARY : 2 * SUMMARY] = True
    if kind == "padding":
        return ~masked
    if kind == "additive":
        return torch.zeros(batch, keys).masked_fill(masked, -10000.0)
    if kind == "float":
        values = 2 * torch.randn(batch, keys, generator=torch.Generator().manual_seed(seed + 1))
        return values.masked_fill(masked, -math.inf).to(dtype)
    raise ValueError(f"make_key_bias: unknown kind {kind!r}.")


def random_groups(shape: tuple[int, ...], density: float, seed: int = 0) -> Tensor:
    """bool of ``shape`` [B, Hq, T, G], each True with probability ``density``."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def random_mask(q: Tensor, k: Tensor, m: int, n: int, density: float, seed: int = 0) -> Tensor:
    """A block mask int32 [B, Hq, T, W] that keeps each group with probability ``density``."""
    shape = (q.shape[0], q.shape[1], slice_count(q.shape[2], m), group_count(k.shape[2], n))
    return pack(random_groups(shape, density, seed), word_count(k.shape[2], n)).to(q.device)


def dense_mask(mask: Tensor, order: Tensor | None, queries: int, keys: int, m: int, n: int) -> Tensor:
    """Block mask int32 [B, Hq, T, W] -> bool [B, Hq, Sq, Sk], queries in original order (True = attend)."""
    octets = mask.contiguous().view(torch.uint8)  # little endian: octet i holds groups 8 * i to 8 * i + 7
    groups = ((octets[..., None] >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1).bool().flatten(-2)
    place = torch.arange(queries, device=mask.device)
    if order is not None:
        place = torch.empty_like(place).scatter_(0, order.long(), place)
    return groups[:, :, place // m][..., torch.arange(keys, device=mask.device) // n]
