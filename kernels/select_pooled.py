"""Run-time block mask from pooled queries and keys: the launcher of its kernels.

    score[t, g] = sum over the means p of slice t of softmax_g(scale * mean_q[t, p] . mean_k[g] + bias[g])
    mask[t]     = the shortest prefix of the groups, best score first, that holds top_p of the mass, at most max_density

Four launches: ``group_means`` of q and of k, the normalisers (unless the order of scores is all that counts) and the
scores (``select_scores``, one more for the bias of groups where there is a key_bias), and the cut (``select_cut``); the
last two again for each part of the heads whose scores fit the workspace. Nothing waits for the device. Meaning:
``reference_select.select_pooled``.
"""

import torch
from torch import Tensor

from fg_inductor.kernels import group_means, select_cut, select_scores
from fg_inductor.kernels.mask import group_count, slice_count, word_count


def launch(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    pool: int,
    top_p: float,
    density: float | list[float] | None,
    max_density: float,
    dense_keys: list[int],
    dense_queries: list[int],
    reduce: str = "sum",
    gamma: float | None = None,
    alpha: float | None = None,
) -> Tensor:
    """The block mask [B, Hq, T, W]; arguments as in ``kernels.ops``."""
    B, Hq, Sq, _ = q.shape
    Sk, P = k.shape[2], m // pool
    T, G, W = slice_count(Sq, m), group_count(Sk, n), word_count(Sk, n)
    bias = group_means.bias_pointer(key_bias)
    mean_q, mean_k = group_means.launch_both(q, pool, T * P, order, None if n == 1 else k, n, G, key_bias, gamma, m)
    if density is not None or alpha is not None or top_p == 1:
        top_p = None
    shares = max_density if density is None else density
    usual = sum(shares) / len(shares) if isinstance(shares, list) else shares
    keys, means = k if n == 1 else mean_k, group_count(Sq, pool)
    scores = select_scores.Scores(
        mean_q, keys, bias, scale, n, Sk, means, P, usual if top_p is None and alpha is None else None
    )
    score = scores.workspace()
    mask = torch.empty(B, Hq, T, W, dtype=torch.int32, device=q.device)
    heads = score.shape[0] // B
    for first in range(0, Hq, heads):
        part = min(heads, Hq - first)
        scores.of_heads(first, part, score, reduce)
        select_cut.launch(
            score, mask, first, part, G, m, n, Sq, Sk, order,
            top_p, shares, alpha, pool if reduce == "sum" else m,
            bias is not None, dense_keys, dense_queries, ranked=scores.ranked,
        )  # fmt: skip
    return mask
