"""The meaning of the selection by mass, in plain PyTorch: the pooled scores, and which groups are kept by a score.

It belongs to the specification and is never tuned; arithmetic and letters as in ``kernels.reference``.
"""

import math

import torch
from torch import Tensor

from fg_inductor.kernels.mask import group_count, pack, slice_count, word_count
from fg_inductor.kernels.reference import accumulate_dtype, group_means, group_statistics, normalise_key_bias


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
