"""The meaning of every operator, in plain PyTorch. This file is the specification: it is never tuned.

Arithmetic is float32 (float64 for float64 inputs). On CPU the operators run these functions: attention gathers only the
kept keys of each query slice, so it does the sparse amount of work too.

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


def pool_queries(q: Tensor, m: int, pool: int) -> tuple[Tensor, Tensor]:
    """Means of ``pool`` consecutive queries: [B, H, Sq, D] -> means [B, H, T, P, D] and rows in each mean [T, P]."""
    queries, slices, means = q.shape[2], slice_count(q.shape[2], m), m // pool
    starts = torch.arange(slices * means, device=q.device).view(slices, means) * pool
    rows = (queries - starts).clamp(0, pool)
    total = torch.nn.functional.pad(q, (0, 0, 0, slices * m - queries)).unflatten(2, (slices, means, pool)).sum(4)
    return total / rows.clamp_min(1)[..., None], rows


def self_similarity(x: Tensor, valid: Tensor, size: int) -> Tensor:
    """Mean cosine of the rows of each run of ``size`` with their mean; 1 for a run without rows.

    x [B, H, S, D], valid bool [B, S] -> [B, H, ceil(S / size)]. It says whether a mean speaks for its tokens: the gate
    of SpargeAttn, which FG-Attn takes over.
    """
    runs = (x.shape[2] + size - 1) // size
    padding = runs * size - x.shape[2]
    valid = torch.nn.functional.pad(valid, (0, padding)).unflatten(-1, (runs, size))[:, None]
    x = torch.nn.functional.pad(x, (0, 0, 0, padding)).unflatten(2, (runs, size))
    count = valid.sum(-1)
    mean = torch.where(valid[..., None], x, 0).sum(3, keepdim=True) / count.clamp_min(1)[..., None, None]
    length = x.norm(dim=-1) * mean.norm(dim=-1)
    cosine = torch.where(valid, (x * mean).sum(-1) / length.clamp_min(torch.finfo(x.dtype).tiny), 0)
    return torch.where(count > 0, cosine.sum(-1) / count.clamp_min(1), 1)


def in_ranges(index: Tensor, ranges: list[int]) -> Tensor:
    """Which of ``index`` lie in the half-open ranges [start0, end0, start1, end1, ...]."""
    inside = torch.zeros_like(index, dtype=torch.bool)
    for start, end in zip(ranges[::2], ranges[1::2], strict=True):
        inside |= (index >= start) & (index < end)
    return inside


def any_in_chunks(flags: Tensor, size: int) -> Tensor:
    """bool [..., S] -> bool [..., ceil(S / size)]: whether any flag of each chunk is set."""
    chunks = (flags.shape[-1] + size - 1) // size
    return torch.nn.functional.pad(flags, (0, chunks * size - flags.shape[-1])).unflatten(-1, (chunks, size)).any(-1)


def ranking(mass: Tensor, forced: Tensor, valid: Tensor) -> Tensor:
    """Groups from best to worst, ties by index: forced ones before all others, masked ones behind."""
    rank_by = mass.masked_fill(forced, math.inf).masked_fill(~valid, -1)
    return rank_by.sort(dim=-1, descending=True, stable=True).indices


def keep_dense(
    mask: Tensor,
    order: Tensor | None,
    queries: int,
    keys: int,
    m: int,
    n: int,
    dense_keys: list[int],
    dense_queries: list[int],
) -> Tensor:
    """The block mask, and all groups with a key in ``dense_keys``, and all slices with a query in ``dense_queries``."""
    groups, words = group_count(keys, n), word_count(keys, n)
    column = any_in_chunks(in_ranges(torch.arange(keys, device=mask.device), dense_keys), n)
    tokens = torch.arange(queries, device=mask.device) if order is None else order.long()
    row = any_in_chunks(in_ranges(tokens, dense_queries), m)
    everything = pack(torch.ones(groups, dtype=torch.bool, device=mask.device), words)
    return mask | pack(column, words) | torch.where(row[:, None], everything, 0)


def probabilities(logits: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the last dimension where ``valid``, 0 elsewhere; NaN just where a logit is NaN or +inf."""
    top = logits.nan_to_num(-math.inf, math.inf, -math.inf).amax(-1, keepdim=True)
    weight = torch.exp(logits - top).masked_fill(~valid, 0)
    return weight / weight.nan_to_num(0, 0, 0).sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)


def best_groups(
    score: Tensor,
    valid: Tensor,
    tokens: Tensor,
    keys: int,
    m: int,
    n: int,
    top_p: float,
    density: float | list[float] | None,
    max_density: float,
    dense_keys: list[int],
    dense_queries: list[int],
    bound: Tensor | None = None,
) -> Tensor:
    """The block mask [B, H, T, W] from the scores [B, H, T, G] of some slices: the rule of every selector by mass.

    valid   bool [B, G], False where all keys of the group are masked
    tokens  the original places of the queries of the slices, in query order
    density one number, or one for each head
    bound   [B, 1, T, 1], or None: keep the groups with a score above it, instead of ``top_p``

    Groups are ranked by score (ties: the lower index first), groups in ``dense_keys`` and groups with a NaN score
    before all others. A slice keeps the shortest prefix that holds ``top_p`` of the mass, but no more than
    round(max_density * groups); or, with ``bound``, the groups above it, with the same limit; or, with ``density``, the
    first round(density * groups). The first group and all groups ranked before the others are always kept; groups whose
    keys are all masked never are, and do not count. Slices with a query in ``dense_queries`` keep everything.
    """
    groups, device = score.shape[3], score.device
    valid = valid[:, None, None]
    forced = any_in_chunks(in_ranges(torch.arange(keys, device=device), list(dense_keys)), n) | score.isnan()
    mass = score.nan_to_num(0, 0, 0)
    share = max_density if density is None else density
    if isinstance(share, list):
        share = torch.tensor(share, dtype=torch.float64, device=device).view(-1, 1, 1)
    limit = (valid.sum(-1, keepdim=True).double() * share + 0.5).floor().clamp_min(1)
    ranked = ranking(mass, forced, valid)
    kept = torch.arange(groups, device=device) < limit
    ordered = mass.gather(-1, ranked)
    if bound is not None:
        kept = kept & ((ordered > bound) | (torch.arange(groups, device=device) == 0))
    elif density is None and top_p < 1:
        before = ordered.cumsum(-1) - ordered
        kept = kept & (before < top_p * mass.sum(-1, keepdim=True))
    keep = torch.zeros_like(forced & valid).scatter(-1, ranked, kept.expand_as(ranked).contiguous())
    keep = keep | forced
    keep = keep | any_in_chunks(in_ranges(tokens, list(dense_queries)), m)[:, None]
    return pack((keep & valid).expand_as(score), word_count(keys, n))


def pooled_scores(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    pool: int,
    reduce: str = "sum",
    gamma: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimated probability mass of each key group for each query slice (FG-Attn v2, section on run-time masks).

        score[t, g] = sum over the means p of slice t of softmax_g(scale * mean_q[t, p] . mean_k[g] + bias[g])
        bias[g]     = log(keys of g that are not masked) + their mean key_bias

    reduce="max" takes the largest of the means instead of the sum. ``gamma`` is the self-similarity below which a mean
    says nothing: a group of N > 1 whose keys have less, and a slice whose queries have less with the means of their
    runs on average, get the score NaN and no part in the softmax.

    Returns score [B, Hq, T, G], NaN where a score is NaN and 0 where the group is masked, and valid bool [B, G].
    """
    acc = accumulate_dtype(q.dtype)
    q, k = q.to(acc), k.to(acc)
    if order is not None:
        q = q[:, :, order.long()]
    bias = normalise_key_bias(key_bias, acc)
    count, mean_bias = group_statistics(bias, k.shape[2], n, k)
    valid = count > 0
    group_bias = torch.where(valid, count.clamp_min(1).log() + mean_bias, -math.inf)
    mean_q, rows = pool_queries(q, m, min(pool, m))
    mean_k = group_means(k, bias, n)
    if gamma is not None:
        queries = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
        means = mean_q.shape[3]
        cosine = self_similarity(q, queries, m // means)
        cosine = torch.nn.functional.pad(cosine, (0, mean_q.shape[2] * means - cosine.shape[2])).unflatten(
            2, (-1, means)
        )
        blurred = (cosine * rows).sum(3) / rows.sum(1) < gamma
        mean_q = mean_q.masked_fill(blurred[..., None, None], math.nan)
        if n > 1:
            keys = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
            cosine = self_similarity(k, keys if bias is None else bias != -math.inf, n)
            mean_k = mean_k.masked_fill((cosine < gamma)[..., None], math.nan)
    mean_k = mean_k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("bhtpd,bhgd->bhtpg", mean_q, mean_k) * scale + group_bias[:, None, None, None]
    mass = probabilities(logits, valid[:, None, None, None])
    mass = mass.masked_fill((rows == 0)[..., None], 0)
    return mass.sum(3) if reduce == "sum" else mass.amax(3), valid


def select_pooled(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    pool: int = 16,
    top_p: float = 0.9,
    density: float | list[float] | None = None,
    max_density: float = 1.0,
    dense_keys: list[int] = (),
    dense_queries: list[int] = (),
    reduce: str = "sum",
    gamma: float | None = None,
    alpha: float | None = None,
) -> Tensor:
    """The block mask [B, Hq, T, W] made from pooled queries and keys, by the rule of ``best_groups``.

    With ``alpha``, a group's probability is its score divided by the means that it sums, or its score itself with
    reduce="max": with N = 1 and the means of whole slices p > alpha / Sk, the threshold of FG-Attn v1.
    """
    score, valid = pooled_scores(q, k, key_bias, order, scale, m, n, pool, reduce, gamma)
    tokens = torch.arange(q.shape[2], device=q.device) if order is None else order.long()
    bound = None
    if alpha is not None:
        most = m // min(pool, m)
        means = slice_count(q.shape[2], min(pool, m)) - torch.arange(score.shape[2], device=q.device) * most
        summed = means.clamp(max=most) if reduce == "sum" else torch.ones_like(means)
        bound = alpha * (summed[:, None] / valid[:, None, None].sum(-1, keepdim=True).clamp_min(1))
    selection = (top_p, density, max_density, dense_keys, dense_queries)
    return best_groups(score, valid, tokens, k.shape[2], m, n, *selection, bound)


def column_mass(
    q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, rows: Tensor, scale: float, m: int, n: int, reduce: str
) -> Tensor:
    """Exact probability mass of each key group for the slices of the queries ``rows`` [R]: [B, Hq, ceil(R / m), G].

        mass[t, g] = sum over the keys j of group g of reduce over the queries i of slice t of p[i, j]
        p[i, j]    = exp(logits[i, j] - lse[i])

    q, k, lse in the dtype of the arithmetic, bias from ``normalise_key_bias``. reduce is "sum", or "max" as in FG-Attn
    v1. NaN where a logit or the lse of the slice is NaN or +inf, 0 where a key is masked.
    """
    slices, groups = slice_count(len(rows), m), group_count(k.shape[2], n)
    logits = q[:, :, rows] @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if bias is not None:
        logits = logits + bias[:, None, None]
    p = torch.exp(logits - lse[:, :, rows, None])
    if bias is not None:
        p = p.masked_fill((bias == -math.inf)[:, None, None], 0)
    p = torch.nn.functional.pad(p, (0, groups * n - k.shape[2], 0, slices * m - len(rows))).unflatten(2, (slices, m))
    mass = p.sum(3) if reduce == "sum" else p.amax(3)
    return mass.unflatten(-1, (groups, n)).sum(-1)


def observed_mask(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    reduce: str = "sum",
    top_p: float = 0.9,
    density: float | list[float] | None = None,
    max_density: float = 1.0,
    dense_keys: list[int] = (),
    dense_queries: list[int] = (),
    chunk_elements: int = 1 << 27,
) -> Tensor:
    """The block mask [B, Hq, T, W] from the exact mass (``column_mass``) by the rule of ``best_groups``.

    lse [B, Hq, Sq] is that of dense attention, natural log. Some slices at a time (``chunk_elements`` probabilities):
    the masses of a layer are never held at once.
    """
    acc = accumulate_dtype(q.dtype)
    keys = k.shape[2]
    bias = normalise_key_bias(key_bias, acc)
    valid = group_statistics(bias, keys, n, k)[0] > 0
    rows = torch.arange(q.shape[2], device=q.device) if order is None else order.long()
    slices = max(1, chunk_elements // (q.shape[0] * q.shape[1] * m * keys))
    q, k, lse = q.to(acc), k.to(acc), lse.to(acc)
    selection = (top_p, density, max_density, dense_keys, dense_queries)
    masks = [
        best_groups(column_mass(q, k, lse, bias, part, scale, m, n, reduce), valid, part, keys, m, n, *selection)
        for part in rows.split(slices * m)
    ]
    return torch.cat(masks, 2)


SAMPLED_QUERIES, SAMPLED_HEADS = 32, 8


def kept_mass(
    q: Tensor, k: Tensor, mask: Tensor, key_bias: Tensor | None, order: Tensor | None, scale: float, m: int, n: int
) -> Tensor:
    """The share of the attention mass that a mask keeps, a float32 scalar: the mean over a sample of the queries.

    SAMPLED_QUERIES places, evenly spread over the query order, of at most SAMPLED_HEADS heads, evenly spread; of these
    it is exact. A query whose keys are all masked has lost nothing: 1.
    """
    acc = accumulate_dtype(q.dtype)
    (_, heads, queries, _), keys = q.shape, k.shape[2]
    count = min(heads, SAMPLED_HEADS)
    head = torch.arange(count, device=q.device) * heads // count
    place = (2 * torch.arange(SAMPLED_QUERIES, device=q.device) + 1) * queries // (2 * SAMPLED_QUERIES)
    row = place if order is None else order.long()[place]
    logits = q[:, head][:, :, row].to(acc) @ k[:, head // (heads // k.shape[1])].to(acc).mT * scale
    valid = torch.ones_like(logits[:, :1, :1], dtype=torch.bool)
    bias = normalise_key_bias(key_bias, acc)
    if bias is not None:
        logits = logits + bias[:, None, None]
        valid = (bias != -math.inf)[:, None, None]
    keep = unpack(mask[:, head][:, :, place // m], group_count(keys, n)).repeat_interleave(n, -1)[..., :keys]
    share = torch.where(keep, probabilities(logits, valid), 0).sum(-1)
    return torch.where(valid.any(-1), share, 1).mean().to(torch.float32)


def begin_observed(
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    refresh: Tensor,
    drift: Tensor | None = None,
    bound: float | None = None,
) -> Tensor:
    """Whether the mask is to be observed in this step, a bool scalar; where it is, every bit of it is set.

    It is where ``refresh`` says so, or where the mask has drifted: where the share of the mass that it keeps
    (``kept_mass``) has fallen more than ``bound`` below what it was right after the last refresh, or is NaN.

    drift is float32 [3], updated too: the share right after the last refresh, the share now, the number of refreshes.
    """
    due = refresh.clone()
    if drift is not None and not refresh:
        drift[1] = kept_mass(q, k, mask, key_bias, order, scale, m, n)
        due = ~(drift[1] >= drift[0] - bound)
    if due:
        mask.copy_(full_mask(q, k, m, n))
    return due


def update_observed(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    reduce: str,
    top_p: float,
    density: float | list[float] | None,
    max_density: float,
    dense_keys: list[int],
    dense_queries: list[int],
    due: Tensor,
    drift: Tensor | None = None,
) -> None:
    """Write ``observed_mask`` into ``mask`` where ``due`` says so; lse is that of attention with every bit set."""
    if not due:
        return
    shape = (key_bias, order, scale, m, n)
    mask.copy_(observed_mask(q, k, lse, *shape, reduce, top_p, density, max_density, dense_keys, dense_queries))
    if drift is not None:
        drift[:2] = kept_mass(q, k, mask, *shape)
        drift[2] += 1


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
