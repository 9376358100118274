"""Operator contracts of observed masks: before and behind the attention of a step, and around a mask in host memory.

Part of ``ops``, which imports it; shapes as there.
"""

import torch
from torch import Tensor

from fg_inductor.kernels import contracts, reference_observed
from fg_inductor.kernels.checks import (
    check_begin,
    check_expand,
    check_fetch,
    check_observed,
    check_put_back,
    fail,
    joined_density,
)

# begin_observed_, update_observed_: before and behind the attention of a step


@torch.library.register_fake("fgattn::begin_observed_")
def _begin_observed_fake(
    q, k, mask, key_bias, order, scale, m, n, min_seq, refresh, drift=None, bound=None, slots=None
):  # fmt: skip
    check_begin(q, k, mask, key_bias, order, m, n, refresh, drift, bound, slots)
    return torch.empty_like(refresh)


def _begin_observed(begin):
    def run(q, k, mask, key_bias, order, scale, m, n, min_seq, refresh, drift=None, bound=None, slots=None):
        check_begin(q, k, mask, key_bias, order, m, n, refresh, drift, bound, slots)
        if min(q.shape[2], k.shape[2]) < min_seq:  # attention is dense, whatever the mask
            return refresh.clone()
        return begin(q, k, mask, key_bias, order, scale, m, n, refresh, drift, bound, slots)

    return run


def _begin_observed_cuda(q, k, mask, key_bias, order, scale, m, n, refresh, drift, bound, slots):
    from fg_inductor.kernels import drift as drifting
    from fg_inductor.kernels import observe

    if drift is not None:
        q, k = contracts.unit_stride(q, k)
        refresh = drifting.decide(q, k, mask, key_bias, order, scale, m, n, refresh, drift, bound, slots)
    return observe.launch_begin(mask, k.shape[2], n, refresh)


@torch.library.register_fake("fgattn::update_observed_")
def _update_observed_fake(
    q, k, lse, mask, key_bias, order, scale, m, n, reduce, top_p, density, max_density, dense_keys, dense_queries,
    min_seq, due, drift=None, head_density=None, slots=None,
):  # fmt: skip
    density = joined_density("update_observed_", density, head_density)
    selection = (reduce, top_p, density, max_density, dense_keys, dense_queries)
    check_observed(q, k, lse, mask, key_bias, order, m, n, *selection, due, drift, slots)


def _update_observed(observe):
    def run(
        q, k, lse, mask, key_bias, order, scale, m, n, reduce, top_p, density, max_density, dense_keys, dense_queries,
        min_seq, due, drift=None, head_density=None, slots=None,
    ):  # fmt: skip
        density = joined_density("update_observed_", density, head_density)
        selection = (reduce, top_p, density, max_density, list(dense_keys), list(dense_queries))
        check_observed(q, k, lse, mask, key_bias, order, m, n, *selection, due, drift, slots)
        if min(q.shape[2], k.shape[2]) >= min_seq:
            observe(q, k, lse, mask, key_bias, order, scale, m, n, *selection, due, drift, slots)

    return run


def _update_observed_cuda(q, k, lse, mask, *rest):
    from fg_inductor.kernels import drift as drifting
    from fg_inductor.kernels import observe, observe_heads

    *arguments, due, drift, slots = rest
    q, k = contracts.unit_stride(q, k)
    if slots is None:
        observe.launch(q, k, lse, mask, *arguments, due)
    else:
        observe_heads.launch(q, k, lse, mask, *arguments, due, slots)
    if drift is not None:
        drifting.note(q, k, mask, *arguments[:5], due, drift, slots)


torch.library.impl("fgattn::begin_observed_", "CPU", _begin_observed(reference_observed.begin_observed))
torch.library.impl("fgattn::begin_observed_", "CUDA", _begin_observed(_begin_observed_cuda))
torch.library.impl("fgattn::update_observed_", "CPU", _update_observed(reference_observed.update_observed))
torch.library.impl("fgattn::update_observed_", "CUDA", _update_observed(_update_observed_cuda))


# fetch, put_back_: a mask in host memory, around what stands before and behind the attention of a step


@torch.library.register_fake("fgattn::fetch")
def _fetch_fake(mask, ahead=True):
    check_fetch("fetch", mask)
    return torch.empty_like(mask, memory_format=torch.contiguous_format)


def _fetch(fetch):
    def run(mask, ahead=True):
        check_fetch("fetch", mask)
        return fetch(mask, ahead)

    return run


def _fetch_cpu(mask, ahead):
    return reference_observed.fetch(mask)


def _fetch_cuda(mask, ahead):
    from fg_inductor.kernels import fetch

    return fetch.launch(mask, ahead)


@torch.library.register_fake("fgattn::put_back_")
def _put_back_fake(mask, staged, due):
    check_put_back(mask, staged, due)


def _put_back(put_back):
    def run(mask, staged, due):
        check_put_back(mask, staged, due)
        if not mask.is_contiguous():
            fail("put_back_", f"mask must be contiguous, but has strides {mask.stride()}.")
        put_back(mask, staged, due)

    return run


def _put_back_cpu(mask, staged, due):
    reference_observed.put_back(mask, staged, due)


def _put_back_cuda(mask, staged, due):
    from fg_inductor.kernels import put_back

    put_back.launch(mask, staged.contiguous(), due)


torch.library.impl("fgattn::fetch", "CPU", _fetch(_fetch_cpu))
torch.library.impl("fgattn::fetch", "CUDA", _fetch(_fetch_cuda))
torch.library.impl("fgattn::put_back_", "CPU", _put_back(_put_back_cpu))
torch.library.impl("fgattn::put_back_", "CUDA", _put_back(_put_back_cuda))


# expand_heads


@torch.library.register_fake("fgattn::expand_heads")
def _expand_heads_fake(mask, slots):
    check_expand(mask, slots)
    return mask.new_empty(mask.shape[0], slots.shape[1], *mask.shape[2:])


def _expand_heads(mask, slots):
    check_expand(mask, slots)
    return expand_heads_decomposition(mask, slots).contiguous()


def expand_heads_decomposition(mask: Tensor, slots: Tensor) -> Tensor:
    """``fgattn::expand_heads`` in aten, for compilers: one kernel that copies."""
    entry = torch.arange(mask.shape[0], device=mask.device)[:, None]
    return torch.ops.aten.index.Tensor(mask, [entry, slots])


torch.library.impl("fgattn::expand_heads", "CompositeExplicitAutograd", _expand_heads)
torch.library.register_autograd("fgattn::expand_heads", lambda ctx, grad: (None,) * 2)

begin_observed_ = torch.ops.fgattn.begin_observed_.default
update_observed_ = torch.ops.fgattn.update_observed_.default
fetch = torch.ops.fgattn.fetch.default
put_back_ = torch.ops.fgattn.put_back_.default
expand_heads = torch.ops.fgattn.expand_heads.default
