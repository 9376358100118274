"""How much of the attention mass a stored mask still keeps: a sample of it, and what follows (portable Triton).

    kept = the mean, over the sampled queries i, of the share of softmax_j(logit[i, j]) that lies on the kept keys j
    flag = refresh, or kept has fallen more than ``bound`` below what it was right after the last refresh

q, k, order, bias  as in ``observe``
mask     [B, Hq, T, W]  int32; with slots [B, K, T, W]
slots    [B, Hq]        int32, which mask each head has; or None
refresh  bool scalar    the host's word that the mask is to be observed anyhow
drift    float32 [3]    kept right after the last refresh; kept at the last call; refreshes so far
parts    [B * heads, splits, 3, SAMPLES]   float32 workspace: maximum, sum, sum of the kept, over a part of the keys
flag     bool scalar    what is decided; ``observe`` reads it

SAMPLES queries, evenly spread over the query order, of at most HEADS heads, evenly spread too: the keys of a head are
read once, and that is what it costs, 8 * Sk * D elements (20 us of an H100's memory at 32,760 keys of 128; 0.43% of
dense attention with 12 heads, as measured). Of these queries the shares are exact. They are formed before the mask is
observed, where the host has not spoken, and again behind it, where it was. Meaning:
``reference_observed.update_observed``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels import observe
from fg_inductor.kernels.observe import load_keys, load_queries
from fg_inductor.kernels.reference_observed import SAMPLED_HEADS as HEADS
from fg_inductor.kernels.reference_observed import SAMPLED_QUERIES as SAMPLES
from fg_inductor.kernels.sizes import cdiv, next_power_of_2

KEYS = 128
PROGRAMS = 512  # enough to keep the memory of a GPU busy


@triton.jit
def _sample(
    flag_ptr, q_ptr, k_ptr, mask_ptr, slots_ptr, order_ptr, bias_ptr, part_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_bb, stride_mb, stride_mh, stride_mt,
    stride_sb,
    heads, Hq, SHARE, Sq, Sk, blocks, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SAMPLES: tl.constexpr, KEYS: tl.constexpr,
    UNLESS: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.load(flag_ptr).to(tl.int32) == UNLESS:
        return
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads * Hq // heads).to(tl.int64)
    place = ((2 * tl.arange(0, SAMPLES) + 1).to(tl.int64) * Sq // (2 * SAMPLES)).to(tl.int32)
    q, _row = load_queries(q_ptr, order_ptr, b, h, place, stride_qb, stride_qh, stride_qs, Sq, D, BLOCK_D, HAS_ORDER)
    k_ptr += b * stride_kb + (h // SHARE) * stride_kh
    if HAS_BIAS:
        bias_ptr += b * stride_bb
    if HAS_SLOTS:
        h = tl.load(slots_ptr + b * stride_sb + h).to(tl.int64)
    words_ptr = mask_ptr + b * stride_mb + h * stride_mh + (place // M).to(tl.int64) * stride_mt

    m_i = tl.full([SAMPLES], float("-inf"), tl.float32)
    l_i = tl.zeros([SAMPLES], tl.float32)
    kept_i = tl.zeros([SAMPLES], tl.float32)
    start = tl.program_id(0) * blocks * KEYS
    for first in range(start, tl.minimum(start + blocks * KEYS, Sk), KEYS):
        k, bias = load_keys(k_ptr, bias_ptr, first, stride_ks, Sk, D, BLOCK_D, KEYS, True, HAS_BIAS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
        s = tl.where((bias > float("-inf"))[None, :], s + bias[None, :], float("-inf"))
        key = first + tl.arange(0, KEYS)
        if 32 * N >= KEYS:
            words = tl.load(words_ptr + first // (32 * N))[:, None]
        else:
            words = tl.load(words_ptr[:, None] + (key // (32 * N))[None, :])
        kept = (words >> (key // N % 32)[None, :]) & 1
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
        decay = tl.exp2(m_i - m_safe)
        l_i = l_i * decay + tl.sum(p, 1)
        kept_i = kept_i * decay + tl.sum(tl.where(kept != 0, p, 0.0), 1)
        m_i = m_new
    part_ptr += (bh.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 3 * SAMPLES + tl.arange(0, SAMPLES)
    tl.store(part_ptr, m_i)
    tl.store(part_ptr + SAMPLES, l_i)
    tl.store(part_ptr + 2 * SAMPLES, kept_i)


@triton.jit
def _kept_share(part_ptr, entries, splits, SAMPLES: tl.constexpr, SPLITS: tl.constexpr):
    """The mean share of all sampled queries; 1 for one that has no keys."""
    split = tl.arange(0, SPLITS)
    offset = split[:, None] * 3 * SAMPLES + tl.arange(0, SAMPLES)[None, :]
    inside = (split < splits)[:, None]
    total = tl.zeros([SAMPLES], tl.float32)
    for entry in range(entries):
        place = part_ptr + entry * splits * 3 * SAMPLES + offset
        m = tl.load(place, mask=inside, other=float("-inf"))
        top = tl.max(m, 0)
        weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top)[None, :])
        mass = tl.sum(weight * tl.load(place + SAMPLES, mask=inside, other=0.0), 0)
        kept = tl.sum(weight * tl.load(place + 2 * SAMPLES, mask=inside, other=0.0), 0)
        total += tl.where(mass == 0.0, 1.0, kept / mass)
    return tl.sum(total) / (entries * SAMPLES)


@triton.jit(do_not_specialize=["entries"])  # 1 would be a Python int, without methods
def _decide(
    refresh_ptr, flag_ptr, drift_ptr, part_ptr, entries, splits, bound, SAMPLES: tl.constexpr, SPLITS: tl.constexpr
):
    refresh = tl.load(refresh_ptr).to(tl.int32)
    if refresh == 0:
        kept = _kept_share(part_ptr, entries, splits, SAMPLES, SPLITS)
        holds = kept >= tl.load(drift_ptr) - bound  # not where it is NaN
        tl.store(drift_ptr + 1, kept)
        refresh = tl.where(holds, 0, 1)
    tl.store(flag_ptr, refresh.to(tl.int1))


@triton.jit(do_not_specialize=["entries"])
def _note(flag_ptr, drift_ptr, part_ptr, entries, splits, SAMPLES: tl.constexpr, SPLITS: tl.constexpr):
    if tl.load(flag_ptr) == 0:
        return
    kept = _kept_share(part_ptr, entries, splits, SAMPLES, SPLITS)
    tl.store(drift_ptr, kept)
    tl.store(drift_ptr + 1, kept)
    tl.store(drift_ptr + 2, tl.load(drift_ptr + 2) + 1.0)


def _prepare(q, k, mask, key_bias, order, scale, m, n, slots):
    """Workspace, how many parts it has, and what samples into it: ``sample(flag, unless)``."""
    B, Hq, Sq, D = q.shape
    Sk = k.shape[2]
    bias, heads, tiles = observe.bias_of_keys(key_bias), min(Hq, HEADS), cdiv(Sk, KEYS)
    entries = B * heads
    blocks = cdiv(tiles, max(1, min(tiles, PROGRAMS // entries)))
    splits = cdiv(tiles, blocks)
    parts = torch.empty(entries, splits, 3, SAMPLES, dtype=torch.float32, device=q.device)

    def sample(flag: Tensor, unless: int) -> None:
        _sample[(splits, entries)](
            flag, q, k, mask, slots, order, bias, parts,
            *q.stride()[:3], *k.stride()[:3], 0 if bias is None else bias.stride(0), *mask.stride()[:3],
            0 if slots is None else slots.stride(0),
            heads, Hq, Hq // k.shape[1], Sq, Sk, blocks, scale * observe.LOG2_E,
            D=D, BLOCK_D=next_power_of_2(D), M=m, N=n, SAMPLES=SAMPLES, KEYS=KEYS, UNLESS=unless,
            HAS_SLOTS=slots is not None, HAS_ORDER=order is not None, HAS_BIAS=bias is not None,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **configuration(q.dtype, D),
        )  # fmt: skip

    return (parts, entries, splits), dict(SAMPLES=SAMPLES, SPLITS=next_power_of_2(splits)), sample


def decide(
    q, k, mask, key_bias, order, scale, m, n, refresh: Tensor, drift: Tensor, bound: float, slots: Tensor | None = None
) -> Tensor:
    """Whether the mask is to be observed: a bool scalar on the device. Arguments as in ``kernels.ops``."""
    parts, summary, sample = _prepare(q, k, mask, key_bias, order, scale, m, n, slots)
    flag = torch.empty((), dtype=torch.bool, device=q.device)
    sample(refresh, unless=1)
    _decide[(1,)](refresh, flag, drift, *parts, bound, **summary)
    return flag


def note(q, k, mask, key_bias, order, scale, m, n, due: Tensor, drift: Tensor, slots: Tensor | None = None) -> None:
    """Where the mask was observed, what it keeps, and that it was. Arguments as in ``kernels.ops``."""
    parts, summary, sample = _prepare(q, k, mask, key_bias, order, scale, m, n, slots)
    sample(due, unless=0)
    _note[(1,)](due, drift, *parts, **summary)


def configuration(dtype: torch.dtype, dim: int) -> dict:
    """Warps and stages of ``_sample``."""
    return {"num_warps": 4, "num_stages": 1 if dim * dtype.itemsize > 256 else 3}
