"""The meaning of every operator, in plain PyTorch. This is the specification: it is never tuned.

Here attention, its gradient, and what the files beside it build on: ``reference_select`` has the meaning of the
selectors, ``reference_observed`` that of observed masks. Arithmetic is float32 (float64 for float64 inputs). On CPU the
operators run these functions: attention gathers only the kept keys of each query slice, so it does the sparse amount of
work too.

    B batch   Hq, Hkv query and KV heads   Sq, Sk queries and keys   D head dim   T query slices   G key groups
"""

import math

import torch
from torch import Tensor

from fg_inductor.kernels.mask import group_count, pack, slice_count, unpack, word_count

SUMMARY = 128  # keys in one block of the pooled tail
# A float key_bias below this masks its key. Model code writes -inf, finfo.min or -10000 (-9984 in bfloat16), and no
# score outweighs a bias of -1000.
MASKED_BELOW = -1000.0


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalise_key_bias(key_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, Sk] bool (True = attend) or float -> [B, Sk] in ``dtype``, -inf where the key is masked."""
    if key_bias is None:
        return None
    if key_bias.dtype == torch.bool:
        return torch.zeros_like(key_bias, dtype=dtype).masked_fill(~key_bias, -math.inf)
    return key_bias.to(dtype).masked_fill(key_bias < MASKED_BELOW, -math.inf)


def group_statistics(bias: Tensor | None, keys: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Per group of n keys: how many are not masked, and the mean bias of those. ``like`` gives batch, device and dtype.

    bias [B, Sk] from ``normalise_key_bias`` -> count [B, G], mean bias [B, G] (0 where the count is 0).
    """
    groups = group_count(keys, n)
    if bias is None:
        bias = like.new_zeros(like.shape[0], keys)
    bias = torch.nn.functional.pad(bias, (0, groups * n - keys), value=-math.inf).unflatten(-1, (groups, n))
    valid = bias != -math.inf
    count = valid.sum(-1).to(bias.dtype)
    return count, bias.masked_fill(~valid, 0).sum(-1) / count.clamp_min(1)


def group_means(x: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """Mean over the keys of each group that are not masked: x [B, H, Sk, D] -> [B, H, G, D] (0 for an empty group)."""
    groups = group_count(x.shape[2], n)
    valid = x.new_ones(x.shape[0], x.shape[2]) if bias is None else (bias != -math.inf).to(x.dtype)
    padding = groups * n - x.shape[2]
    valid = torch.nn.functional.pad(valid, (0, padding)).unflatten(-1, (groups, n))  # [B, G, n]
    x = torch.nn.functional.pad(x, (0, 0, 0, padding)).unflatten(2, (groups, n))  # [B, H, G, n, D]
    total = torch.where(valid[:, None, ..., None] > 0, x, 0).sum(3)
    return total / valid.sum(-1).clamp_min(1)[:, None, :, None]


def full_mask(q: Tensor, k: Tensor, m: int, n: int) -> Tensor:
    """The block mask that keeps everything."""
    groups = group_count(k.shape[2], n)
    row = pack(torch.ones(groups, dtype=torch.bool, device=q.device), word_count(k.shape[2], n))
    return row.expand(q.shape[0], q.shape[1], slice_count(q.shape[2], m), -1).contiguous()


def pooled_tail(k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summary keys and values of the blocks of 128 keys, [B, H, J, D] each, with count and mean bias [B, J]."""
    return group_means(k, bias, SUMMARY), group_means(v, bias, SUMMARY), *group_statistics(bias, k.shape[2], SUMMARY, k)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    tail: str = "none",
) -> tuple[Tensor, Tensor]:
    """Attention over the kept keys of each slice; ``kernels.ops`` documents arguments and results.

        out[i] = softmax over the kept keys j of (scale * q[i] . k[j] + key_bias[j]) @ v

    tail="pooled" adds one summary key for each block of 128 keys: the block's mean key and mean value, with the bias
    log(number of its keys that this slice dropped) + mean key_bias. Rows without any key give zeros and lse = -inf.
    """
    acc = accumulate_dtype(q.dtype)
    batch, heads, queries, dim = q.shape
    keys, share = k.shape[2], heads // k.shape[1]
    rows = torch.arange(queries, device=q.device) if order is None else order.long()
    bias = normalise_key_bias(key_bias, acc)
    keep = unpack(mask, group_count(keys, n)).repeat_interleave(n, -1)[..., :keys]  # [B, Hq, T, Sk]
    if bias is not None:
        keep &= (bias != -math.inf)[:, None, None]
    out = q.new_empty(batch, queries, heads, dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=acc)
    for b in range(batch):
        for h in range(heads):
            k_head, v_head = k[b, h // share].to(acc), v[b, h // share].to(acc)
            if tail == "pooled":
                row_bias = None if bias is None else bias[b : b + 1]
                summaries = pooled_tail(k_head[None, None], v_head[None, None], row_bias)
                tail_k, tail_v, count, tail_bias = (x[0] for x in summaries)
            for t, row in enumerate(rows.split(m)):
                kept = keep[b, h, t].nonzero()[:, 0]
                scores = q[b, h, row].to(acc) @ k_head[kept].T * scale
                if bias is not None:
                    scores = scores + bias[b, kept]
                values = v_head[kept]
                if tail == "pooled":
                    dropped = count - torch.bincount(kept // SUMMARY, minlength=len(count))
                    used = (dropped > 0).nonzero()[:, 0]
                    summary = q[b, h, row].to(acc) @ tail_k[0, used].T * scale + dropped[used].log() + tail_bias[used]
                    scores = torch.cat([scores, summary], 1)
                    values = torch.cat([values, tail_v[0, used]])
                top = scores.amax(1, keepdim=True) if scores.shape[1] else scores.new_full((len(row), 1), -math.inf)
                weight = torch.exp(scores - top.masked_fill(top == -math.inf, 0))
                total = weight.sum(1, keepdim=True)
                out[b, h, row] = (weight @ values / total.masked_fill(total == 0, 1)).to(q.dtype)
                lse[b, h, row] = (top + total.log())[:, 0]
    return out, lse.to(torch.float32)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    tail: str = "none",
    chunk_elements: int = 1 << 27,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention`` with respect to q, k and v, exact for the given mask, tail included.

    A few slices at a time against all keys, dropped ones masked: dense work, never the whole score matrix
    (``chunk_elements`` scores at once), and the same steps on every device with no host sync.
    """
    acc = accumulate_dtype(q.dtype)
    batch, heads, queries, dim = q.shape
    keys, share = k.shape[2], heads // k.shape[1]
    rows = torch.arange(queries, device=q.device) if order is None else order.long()
    bias = normalise_key_bias(key_bias, acc)
    k_all, v_all = (x.to(acc).repeat_interleave(share, 1) for x in (k, v))
    if bias is not None:  # a masked key may hold anything, and 0 * NaN would reach dq
        k_all, v_all = (torch.where((bias != -math.inf)[:, None, :, None], x, 0) for x in (k_all, v_all))
    if tail == "pooled":
        tail_k, tail_v, count, tail_bias = pooled_tail(k_all, v_all, bias)
        k_all, v_all = torch.cat([k_all, tail_k], 2), torch.cat([v_all, tail_v], 2)
    dq = torch.empty(batch, heads, queries, dim, dtype=q.dtype, device=q.device)
    dk, dv = torch.zeros_like(k_all), torch.zeros_like(v_all)
    slices = max(1, chunk_elements // (batch * heads * m * k_all.shape[2]))
    for words, row in zip(mask.split(slices, 2), rows.split(slices * m), strict=True):
        keep = unpack(words, group_count(keys, n)).repeat_interleave(n, -1)[..., :keys]
        shift = k_all.new_zeros(batch, 1, 1, keys)
        if bias is not None:
            keep = keep & (bias != -math.inf)[:, None, None]
            shift = bias[:, None, None].masked_fill(bias[:, None, None] == -math.inf, 0)
        shift = shift.expand_as(keep)
        if tail == "pooled":
            blocks = len(count[0])
            kept = torch.nn.functional.pad(keep, (0, blocks * SUMMARY - keys)).unflatten(-1, (blocks, SUMMARY)).sum(-1)
            dropped = count[:, None, None] - kept
            keep = torch.cat([keep, dropped > 0], -1)
            shift = torch.cat([shift, dropped.clamp_min(1).log() + tail_bias[:, None, None]], -1)
        keep, shift = (x.repeat_interleave(m, 2)[:, :, : len(row)] for x in (keep, shift))
        q_rows, dout_rows = q[:, :, row].to(acc), dout[:, :, row].to(acc)
        scores = (q_rows @ k_all.mT * scale + shift).masked_fill(~keep, -math.inf)
        p = torch.where(keep, scores.softmax(-1), 0)  # softmax of a row without keys is NaN
        dp = dout_rows @ v_all.mT
        ds = torch.where(keep, p * (dp - (p * dp).sum(-1, keepdim=True)), 0) * scale
        dq[:, :, row] = (ds @ k_all).to(q.dtype)
        dk += ds.mT @ q_rows
        dv += p.mT @ dout_rows
    if tail == "pooled":
        member = torch.ones(batch, keys, dtype=acc, device=q.device) if bias is None else (bias != -math.inf).to(acc)
        member = member / count.clamp_min(1).repeat_interleave(SUMMARY, 1)[:, :keys]
        dk, dv = (
            x[:, :, :keys] + x[:, :, keys:].repeat_interleave(SUMMARY, 2)[:, :, :keys] * member[:, None, :, None]
            for x in (dk, dv)
        )
    return dq, *(x.unflatten(1, (-1, share)).sum(2).to(k.dtype) for x in (dk, dv))


def kept_density(mask: Tensor, key_bias: Tensor | None, queries: int, keys: int, m: int, n: int) -> Tensor:
    """Kept pairs over all pairs, a float32 scalar; keys masked by ``key_bias`` are in neither count."""
    bias = normalise_key_bias(key_bias, torch.float32)
    like = mask.new_zeros(mask.shape[0], dtype=torch.float32)
    count = group_statistics(bias, keys, n, like)[0].to(torch.float64)  # [B, G]
    rows = (queries - torch.arange(mask.shape[2], device=mask.device) * m).clamp(0, m).to(torch.float64)
    kept = torch.stack([(unpack(words, count.shape[1]) * count[:, None]).sum(-1) for words in mask.unbind(1)], 1)
    return ((kept * rows).sum() / (count.sum() * rows.sum() * mask.shape[1])).to(torch.float32)
