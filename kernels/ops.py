"""Operator contracts: checks, shape rule, one implementation per device; schemas in ``contracts``. Imports torch only.

The CUDA implementations are imported when they first run, so that a graph can be traced, and the reference run, on a
machine without Triton. Shapes: B batch, Hq query heads, Hkv KV heads (query head h uses KV head h // (Hq / Hkv)), Sq
and Sk tokens, D head dim; T, W of the block mask as in ``kernels.mask``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fg_inductor.kernels import choice, ops_observed, reference, reference_select
from fg_inductor.kernels.checks import (
    check_attention,
    check_dfs,
    check_order,
    check_ranges,
    check_reorder,
    check_select,
    check_static,
    fail,
    joined_density,
)
from fg_inductor.kernels.choose_order import choose_order as choose_among_orders
from fg_inductor.kernels.contracts import unit_stride
from fg_inductor.kernels.mask import slice_count, word_count
from fg_inductor.kernels.query_order import TIME, kept

# select_pooled


def _new_mask(q, k, m, n):
    return q.new_empty(q.shape[0], q.shape[1], slice_count(q.shape[2], m), word_count(k.shape[2], n), dtype=torch.int32)


@torch.library.register_fake("fgattn::select_pooled")
def _select_pooled_fake(
    q, k, key_bias, order, scale, m, n, pool, top_p, density, max_density, dense_keys, dense_queries, min_seq,
    reduce="sum", gamma=None, alpha=None, head_density=None,
):  # fmt: skip
    density = joined_density("select_pooled", density, head_density)
    limits = (top_p, density, max_density, dense_keys, dense_queries, reduce, gamma, alpha)
    check_select(q, k, key_bias, order, m, n, pool, *limits)
    return _new_mask(q, k, m, n)


def _select_pooled(select):
    def run(
        q, k, key_bias, order, scale, m, n, pool, top_p, density, max_density, dense_keys, dense_queries, min_seq,
        reduce="sum", gamma=None, alpha=None, head_density=None,
    ):  # fmt: skip
        density = joined_density("select_pooled", density, head_density)
        limits = (top_p, density, max_density, list(dense_keys), list(dense_queries), reduce, gamma, alpha)
        check_select(q, k, key_bias, order, m, n, pool, *limits)
        if min(q.shape[2], k.shape[2]) < min_seq:
            return reference.full_mask(q, k, m, n)
        return select(q, k, key_bias, order, scale, m, n, min(pool, m), *limits)

    return run


def _select_pooled_cuda(q, k, *rest):
    from fg_inductor.kernels import select_pooled

    return select_pooled.launch(*unit_stride(q, k), *rest)


torch.library.impl("fgattn::select_pooled", "CPU", _select_pooled(reference_select.select_pooled))
torch.library.impl("fgattn::select_pooled", "CUDA", _select_pooled(_select_pooled_cuda))
# The mask is not differentiated.
torch.library.register_autograd("fgattn::select_pooled", lambda ctx, grad: (None,) * 18)


# select_dfs, select_static, keep_dense: plain PyTorch on every device


@torch.library.register_fake("fgattn::select_dfs")
def _select_dfs_fake(q, k, key_bias, order, scale, m, n, density, head_density=None):
    density = joined_density("select_dfs", density, head_density)
    check_dfs(q, k, key_bias, order, m, n, density)
    return _new_mask(q, k, m, n)


def _select_dfs(q, k, key_bias, order, scale, m, n, density, head_density=None):
    from fg_inductor.kernels import select_dfs

    density = joined_density("select_dfs", density, head_density)
    check_dfs(q, k, key_bias, order, m, n, density)
    return select_dfs.select_dfs(q, k, key_bias, order, scale, m, n, density)


@torch.library.register_fake("fgattn::select_static")
def _select_static_fake(q, k, order, m, n, grid, before, tile, window, radius, ranges):
    check_static(q, k, order, m, n, grid, before, tile, window, radius, ranges)
    return _new_mask(q, k, m, n)


def _select_static(q, k, order, m, n, grid, before, tile, window, radius, ranges):
    from fg_inductor.kernels import select_static

    check_static(q, k, order, m, n, grid, before, tile, window, radius, ranges)
    return select_static.select_static(
        q, k, order, m, n, list(grid), before, list(tile), list(window), radius, list(ranges)
    )


@torch.library.register_fake("fgattn::keep_dense")
def _keep_dense_fake(mask, order, queries, keys, m, n, dense_keys, dense_queries):
    check_ranges("keep_dense", dense_keys, dense_queries)
    return torch.empty_like(mask, memory_format=torch.contiguous_format)


def _keep_dense(mask, order, queries, keys, m, n, dense_keys, dense_queries):
    check_ranges("keep_dense", dense_keys, dense_queries)
    ranges = list(dense_keys), list(dense_queries)
    return reference_select.keep_dense(mask, order, queries, keys, m, n, *ranges).contiguous()


for _name, _run, _inputs in (
    ("select_dfs", _select_dfs, 9),
    ("select_static", _select_static, 11),
    ("keep_dense", _keep_dense, 8),
):
    torch.library.impl(f"fgattn::{_name}", "CPU", _run)
    torch.library.impl(f"fgattn::{_name}", "CUDA", _run)
    torch.library.register_autograd(f"fgattn::{_name}", lambda ctx, grad, inputs=_inputs: (None,) * inputs)


# attention


def _empty_out(q: Tensor) -> Tensor:
    """BSHD storage seen as BHSD: what a following ``transpose(1, 2).flatten(2)`` takes as a view."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


@torch.library.register_fake("fgattn::attention")
def _attention_fake(q, k, v, mask, key_bias, order, scale, m, n, tail, min_seq, kernel_name="auto"):
    check_attention(q, k, v, mask, key_bias, order, m, n, tail, kernel_name)
    return _empty_out(q), q.new_empty(q.shape[0], q.shape[1], q.shape[2], dtype=torch.float32)


def _sdpa(q, k, v, key_bias, scale):
    bias = reference.normalise_key_bias(key_bias, q.dtype)
    bias = None if bias is None else bias[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _dense(q, k, v, key_bias, scale):
    """Dense SDPA into fresh storage. lse is NaN: nothing reads it, and no dense kernel returns it for every input."""
    out = _empty_out(q).copy_(_sdpa(q, k, v, key_bias, scale))
    return out, q.new_full((q.shape[0], q.shape[1], q.shape[2]), torch.nan, dtype=torch.float32)


def attention_kernel(q, k, v, mask, key_bias, order, scale, m, n, tail, min_seq, kernel_name="auto") -> str:
    """What runs these arguments where it is not dense: ``kernels.choice``. Fake tensors will do."""
    return choice.choose(kernel_name, *unit_stride(q, k, v), mask, key_bias, order, scale, m, n, tail)


# The dispatcher leaves out an argument that equals its default.
def _attention(q, k, v, mask, key_bias, order, scale, m, n, tail, min_seq, kernel_name="auto"):
    check_attention(q, k, v, mask, key_bias, order, m, n, tail, kernel_name)
    if min(q.shape[2], k.shape[2]) < min_seq:
        return _dense(q, k, v, key_bias, scale)
    arguments = (*unit_stride(q, k, v), mask, key_bias, order, scale, m, n, tail)
    chosen = choice.choose(kernel_name, *arguments)
    if chosen == "reference":
        return reference.attention(*arguments)
    if chosen == "hopper":
        from fg_inductor.kernels import attention_forward_hopper as schedule
    else:
        from fg_inductor.kernels import attention_forward as schedule
    return schedule.launch(*arguments)


torch.library.impl("fgattn::attention", "CPU", _attention)
torch.library.impl("fgattn::attention", "CUDA", _attention)


def _grads(wanted, tensors, grads=(None,) * 3) -> tuple[Tensor, ...]:
    """In BSHD storage, as out is; an empty tensor where a gradient is not wanted."""
    results = tuple(_empty_out(x) if want else x.new_empty(0) for x, want in zip(tensors, wanted, strict=True))
    return tuple(x if g is None or not want else x.copy_(g) for x, g, want in zip(results, grads, wanted, strict=True))


@torch.library.register_fake("fgattn::attention_backward")
def _attention_backward_fake(
    dout, q, k, v, out, lse, mask, key_bias, order, scale, m, n, tail, min_seq, wanted=(True,) * 3, kernel_name="auto"
):
    return _grads(wanted, (q, k, v))


def _attention_backward(backward):
    def run(
        dout, q, k, v, out, lse, mask, key_bias, order, scale, m, n, tail, min_seq, wanted=(True,) * 3,
        kernel_name="auto",
    ):  # fmt: skip
        if min(q.shape[2], k.shape[2]) < min_seq:
            # Forward was dense, whatever the mask. It kept nothing for SDPA's own backward, so it runs once more.
            _, pull = torch.func.vjp(lambda *qkv: _sdpa(*qkv, key_bias, scale), q, k, v)
            return _grads(wanted, (q, k, v), pull(dout))
        return backward(dout, q, k, v, out, lse, mask, key_bias, order, scale, m, n, tail, wanted, kernel_name)

    return run


def _attention_backward_reference(
    dout, q, k, v, out, lse, mask, key_bias, order, scale, m, n, tail, wanted, kernel_name
):  # fmt: skip
    grads = reference.attention_backward(dout, q, k, v, mask, key_bias, order, scale, m, n, tail)
    return _grads(wanted, (q, k, v), grads)


def _attention_backward_kernels(*arguments):
    from fg_inductor.kernels import attention_backward

    return attention_backward.launch(*arguments)


torch.library.impl("fgattn::attention_backward", "CPU", _attention_backward(_attention_backward_reference))
torch.library.impl("fgattn::attention_backward", "CUDA", _attention_backward(_attention_backward_kernels))


def _attention_setup(ctx, inputs, output):
    q, k, v, mask, key_bias, order, *ctx.parameters, ctx.kernel_name = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, mask, key_bias, order)


def _attention_grad(ctx, dout, _):
    grads = (None, None, None)
    if dout is not None:
        wanted = list(ctx.needs_input_grad[:3])
        parameters = (*ctx.parameters, wanted, ctx.kernel_name)
        grads = torch.ops.fgattn.attention_backward.default(dout, *ctx.saved_tensors, *parameters)
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *(None,) * 9


def _no_double_backward(ctx, *_):
    raise RuntimeError(
        "fgattn::attention: there is no double backward; keep create_graph=False, or use another backend."
    )


torch.library.register_autograd("fgattn::attention", _attention_grad, setup_context=_attention_setup)
torch.library.register_autograd("fgattn::attention_backward", _no_double_backward)


# query_order


@torch.library.register_fake("fgattn::query_order")
def _query_order_fake(t, h, w, before, after, m, device, curve="rods", time=TIME):
    check_order(m, curve, time)
    return torch.empty(before + t * h * w + after, dtype=torch.int32, device=device)


def _query_order(t, h, w, before, after, m, device, curve="rods", time=TIME):
    check_order(m, curve, time)
    if min(t, h, w) <= 0 or min(before, after) < 0:
        fail("query_order", f"token grid {(t, h, w)}, {before} tokens before and {after} after; give positive sizes.")
    return kept(t, h, w, before, after, m, device, curve, (time,))[0]


torch.library.impl("fgattn::query_order", "CompositeExplicitAutograd", _query_order)


# choose_order


@torch.library.register_fake("fgattn::choose_order")
def _choose_order_fake(q, t, h, w, before, after, m):
    check_order(m, "rods", TIME)
    return torch.empty(before + t * h * w + after, dtype=torch.int32, device=q.device)


def _choose_order(choose):
    def run(q, t, h, w, before, after, m):
        check_order(m, "rods", TIME)
        if min(t, h, w) <= 0 or min(before, after) < 0 or before + t * h * w + after != q.shape[2]:
            sizes = f"token grid {(t, h, w)}, {before} tokens before and {after} after"
            fail("choose_order", f"{sizes}, for {q.shape[2]} queries; give the sizes that they have.")
        return choose(q, t, h, w, before, after, m)

    return run


def _choose_order_cuda(q, *rest):
    from fg_inductor.kernels import order_spread

    return order_spread.launch(*unit_stride(q), *rest)


torch.library.impl("fgattn::choose_order", "CPU", _choose_order(choose_among_orders))
torch.library.impl("fgattn::choose_order", "CUDA", _choose_order(_choose_order_cuda))
torch.library.register_autograd("fgattn::choose_order", lambda ctx, grad: (None,) * 7)


# reorder


@torch.library.register_fake("fgattn::reorder")
def _reorder_fake(x, order, inverse=False):
    check_reorder(x, order)
    return x.new_empty(x.shape)


def _reorder(x, order, inverse=False):
    check_reorder(x, order)
    return reorder_decomposition(x, order, inverse)


def reorder_decomposition(x: Tensor, order: Tensor, inverse: bool = False) -> Tensor:
    """``fgattn::reorder`` in aten, for compilers: Inductor fuses it with what makes x."""
    if inverse:
        return torch.ops.aten.index_put(x.new_empty(x.shape), [None, None, order], x)
    return torch.ops.aten.index_select(x, 2, order)


def _reorder_setup(ctx, inputs, output):
    _, order, *rest = inputs
    ctx.inverse = bool(rest and rest[0])
    ctx.save_for_backward(order)


def _reorder_grad(ctx, grad):
    return torch.ops.fgattn.reorder.default(grad, *ctx.saved_tensors, not ctx.inverse), None, None


torch.library.impl("fgattn::reorder", "CompositeExplicitAutograd", _reorder)
torch.library.register_autograd("fgattn::reorder", _reorder_grad, setup_context=_reorder_setup)


# kept_density


@torch.library.register_fake("fgattn::kept_density")
def _kept_density_fake(mask, key_bias, queries, keys, m, n):
    return mask.new_empty((), dtype=torch.float32)


def _kept_density_cuda(mask, key_bias, queries, keys, m, n):
    from fg_inductor.kernels import kept_density

    return kept_density.launch(mask, key_bias, queries, keys, m, n)


torch.library.impl("fgattn::kept_density", "CPU", reference.kept_density)
torch.library.impl("fgattn::kept_density", "CUDA", _kept_density_cuda)
torch.library.register_autograd("fgattn::kept_density", lambda ctx, grad: (None,) * 6)


# Autocast. ``register_autocast`` casts to one fixed dtype; SDPA takes the ambient one, and so do these.

_AUTOCAST = torch.library.Library("fgattn", "IMPL")


def _register_autocast(name: str, tensors: int, device: str, key: str) -> None:
    op = getattr(torch.ops.fgattn, name).default
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(_, *args):
        dtype = torch.get_autocast_dtype(device)
        cast = (t if t.dtype == torch.float64 else t.to(dtype) for t in args[:tensors])
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*cast, *args[tensors:])

    _AUTOCAST.impl(name, run, key, with_keyset=True)


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _register_autocast("select_pooled", 2, _device, _key)
    _register_autocast("select_dfs", 2, _device, _key)
    _register_autocast("begin_observed_", 2, _device, _key)
    _register_autocast("update_observed_", 2, _device, _key)
    _register_autocast("attention", 3, _device, _key)
    _register_autocast("reorder", 1, _device, _key)

select_pooled = torch.ops.fgattn.select_pooled.default
begin_observed_ = ops_observed.begin_observed_
update_observed_ = ops_observed.update_observed_
fetch = ops_observed.fetch
put_back_ = ops_observed.put_back_
expand_heads = ops_observed.expand_heads
attention = torch.ops.fgattn.attention.default
query_order = torch.ops.fgattn.query_order.default
choose_order = torch.ops.fgattn.choose_order.default
reorder = torch.ops.fgattn.reorder.default
select_dfs = torch.ops.fgattn.select_dfs.default
select_static = torch.ops.fgattn.select_static.default
keep_dense = torch.ops.fgattn.keep_dense.default
kept_density = torch.ops.fgattn.kept_density.default
