"""Operator contracts: schema, checks, shape rule, one implementation per device. Imports torch only.

The CUDA implementations are imported when they first run, so that a graph can be traced, and the reference run, on a
machine without Triton. Shapes: B batch, Hq query heads, Hkv KV heads (query head h uses KV head h // (Hq / Hkv)), Sq
and Sk tokens, D head dim; T, W of the block mask as in ``kernels.mask``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fg_inductor.kernels import reference
from fg_inductor.kernels.mask import GROUPS, SLICES, slice_count, word_count

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 96, 128, 256)
TAILS = ("none", "pooled")
POOLS = (8, 16, 32, 64, 128)

SCHEMAS = {
    "select_pooled": "(Tensor q, Tensor k, Tensor? key_bias, Tensor? order, float scale, int m, int n, int pool, "
    "float top_p, float? density, float max_density, SymInt[] dense_keys, SymInt[] dense_queries, SymInt min_seq) "
    "-> Tensor",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? key_bias, Tensor? order, float scale, "
    "int m, int n, str tail, SymInt min_seq) -> (Tensor out, Tensor lse)",
    "attention_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor mask, "
    "Tensor? key_bias, Tensor? order, float scale, int m, int n, str tail, SymInt min_seq) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    "query_order": "(SymInt t, SymInt h, SymInt w, SymInt before, SymInt after, int m, Device device) -> Tensor",
    "kept_density": "(Tensor mask, Tensor? key_bias, SymInt queries, SymInt keys, int m, int n) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"fgattn::{_name}", _schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))


# Checks. Sizes are compared only where both are plain ints: comparing SymInts would add a guard to the user's graph.


def _differ(a, b) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _require(ok: bool, op: str, message: str) -> None:
    if not ok:
        raise ValueError(f"fgattn::{op}: {message}")


def _check(op, q, k, v, mask, key_bias, order, m, n):
    tensors = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, x in tensors.items():
        _require(x.dim() == 4, op, f"{name} must be [B, H, S, D], got {tuple(x.shape)}; add the missing dimensions.")
        sizes = [size for size in x.shape if isinstance(size, int)]
        _require(0 not in sizes, op, f"{name} {tuple(x.shape)} is empty; leave such calls out.")
        _require(
            x.dtype == q.dtype and x.device == q.device, op,
            f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; give them one dtype and device.",
        )  # fmt: skip
        _require(
            not _differ(x.shape[3], q.shape[3]) and not _differ(x.shape[0], q.shape[0]), op,
            f"{name} {tuple(x.shape)} must share batch and head dim with q {tuple(q.shape)}.",
        )  # fmt: skip
        if name != "q":
            _require(
                not _differ(x.shape[1], k.shape[1]) and not _differ(x.shape[2], k.shape[2]), op,
                f"v {tuple(x.shape)} must have the heads and the length of k {tuple(k.shape)}.",
            )  # fmt: skip
    allowed = DTYPES if q.device.type != "cpu" else (*DTYPES, torch.float64)
    _require(q.dtype in allowed, op, f"dtype {q.dtype} is not supported; cast q, k and v to one of {allowed}.")
    dim = q.shape[3]
    on_cuda = q.device.type == "cuda"
    _require(
        not on_cuda or not isinstance(dim, int) or dim in HEAD_DIMS, op,
        f"head dim {dim} has no kernel; the kernels have {HEAD_DIMS}: pad q, k and v with zeros to the next one.",
    )  # fmt: skip
    heads, kv_heads = q.shape[1], k.shape[1]
    if isinstance(heads, int) and isinstance(kv_heads, int):
        _require(
            kv_heads > 0 and heads % kv_heads == 0, op,
            f"{heads} query heads are not a multiple of {kv_heads} KV heads; repeat k and v.",
        )  # fmt: skip
    _require(m in SLICES, op, f"m={m} queries a slice; choose one of {SLICES}.")
    _require(n in GROUPS, op, f"n={n} keys a group; choose one of {GROUPS}.")
    if mask is not None:
        expected = (q.shape[0], q.shape[1], slice_count(q.shape[2], m), word_count(k.shape[2], n))
        _require(
            mask.dtype == torch.int32 and mask.dim() == 4 and mask.device == q.device, op,
            f"mask must be int32 [B, Hq, T, W] on {q.device}, got {mask.dtype} {tuple(mask.shape)} on {mask.device}.",
        )  # fmt: skip
        _require(
            not any(map(_differ, mask.shape, expected)), op,
            f"mask has shape {tuple(mask.shape)}, but {tuple(q.shape)} queries and {k.shape[2]} keys with m={m}, n={n} "
            f"need {expected}; make it with the same m and n.",
        )  # fmt: skip
    if key_bias is not None:
        _require(
            key_bias.dim() == 2 and (key_bias.dtype == torch.bool or key_bias.is_floating_point())
            and not _differ(key_bias.shape[0], q.shape[0]) and not _differ(key_bias.shape[1], k.shape[2])
            and key_bias.device == q.device, op,
            f"key_bias must be bool (True = attend) or float [B, Sk] = [{q.shape[0]}, {k.shape[2]}] on {q.device}, got "
            f"{key_bias.dtype} {tuple(key_bias.shape)} on {key_bias.device}.",
        )  # fmt: skip
    if order is not None:
        _require(
            order.dim() == 1 and order.dtype == torch.int32 and not _differ(order.shape[0], q.shape[2])
            and order.device == q.device, op,
            f"order must be an int32 permutation of the {q.shape[2]} queries on {q.device}, got {order.dtype} "
            f"{tuple(order.shape)} on {order.device}.",
        )  # fmt: skip


def _check_select(q, k, key_bias, order, m, n, pool, top_p, density, max_density, dense_keys, dense_queries):
    op = "select_pooled"
    _check(op, q, k, None, None, key_bias, order, m, n)
    _require(pool in POOLS, op, f"pool={pool} queries a mean; choose one of {POOLS}.")
    for name, x in {"top_p": top_p, "density": density, "max_density": max_density}.items():
        _require(x is None or 0 < x <= 1, op, f"{name}={x} must lie in (0, 1].")
    for name, x in {"dense_keys": dense_keys, "dense_queries": dense_queries}.items():
        _require(len(x) % 2 == 0, op, f"{name} must hold [start, end) pairs, got {len(x)} numbers.")


def _check_attention(q, k, v, mask, key_bias, order, m, n, tail):
    _check("attention", q, k, v, mask, key_bias, order, m, n)
    _require(tail in TAILS, "attention", f"tail={tail!r}; choose one of {TAILS}.")


def _unit_stride(*tensors):
    """Kernels take any strides but a contiguous last dimension."""
    return (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


# select_pooled


@torch.library.register_fake("fgattn::select_pooled")
def _select_pooled_fake(
    q, k, key_bias, order, scale, m, n, pool, top_p, density, max_density, dense_keys, dense_queries, min_seq
):
    _check_select(q, k, key_bias, order, m, n, pool, top_p, density, max_density, dense_keys, dense_queries)
    return q.new_empty(q.shape[0], q.shape[1], slice_count(q.shape[2], m), word_count(k.shape[2], n), dtype=torch.int32)


def _select_pooled(select):
    def run(q, k, key_bias, order, scale, m, n, pool, top_p, density, max_density, dense_keys, dense_queries, min_seq):
        _check_select(q, k, key_bias, order, m, n, pool, top_p, density, max_density, dense_keys, dense_queries)
        if min(q.shape[2], k.shape[2]) < min_seq:
            return reference.full_mask(q, k, m, n)
        pool = min(pool, m)
        return select(
            q, k, key_bias, order, scale, m, n, pool, top_p, density, max_density, list(dense_keys), list(dense_queries)
        )

    return run


def _select_pooled_cuda(q, k, *rest):
    from fg_inductor.kernels import select_pooled

    return select_pooled.launch(*_unit_stride(q, k), *rest)


torch.library.impl("fgattn::select_pooled", "CPU", _select_pooled(reference.select_pooled))
torch.library.impl("fgattn::select_pooled", "CUDA", _select_pooled(_select_pooled_cuda))
# The mask is not differentiated.
torch.library.register_autograd("fgattn::select_pooled", lambda ctx, grad: (None,) * 14)


# attention


def _empty_out(q: Tensor) -> Tensor:
    """BSHD storage seen as BHSD: what a following ``transpose(1, 2).flatten(2)`` takes as a view."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


@torch.library.register_fake("fgattn::attention")
def _attention_fake(q, k, v, mask, key_bias, order, scale, m, n, tail, min_seq):
    _check_attention(q, k, v, mask, key_bias, order, m, n, tail)
    return _empty_out(q), q.new_empty(q.shape[0], q.shape[1], q.shape[2], dtype=torch.float32)


def _dense(q, k, v, key_bias, scale):
    """Dense SDPA into fresh storage. lse is NaN: nothing reads it, and no dense kernel returns it for every input."""
    bias = reference.normalise_key_bias(key_bias, q.dtype)
    bias = None if bias is None else bias[:, None, None]
    gqa = q.shape[1] != k.shape[1]
    out = _empty_out(q).copy_(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=gqa))
    return out, q.new_full((q.shape[0], q.shape[1], q.shape[2]), torch.nan, dtype=torch.float32)


def _attention(forward):
    def run(q, k, v, mask, key_bias, order, scale, m, n, tail, min_seq):
        _check_attention(q, k, v, mask, key_bias, order, m, n, tail)
        if min(q.shape[2], k.shape[2]) < min_seq:
            return _dense(q, k, v, key_bias, scale)
        return forward(q, k, v, mask, key_bias, order, scale, m, n, tail)

    return run


def _attention_cuda(q, k, v, *rest):
    from fg_inductor.kernels import attention_forward

    return attention_forward.launch(*_unit_stride(q, k, v), *rest)


torch.library.impl("fgattn::attention", "CPU", _attention(reference.attention))
torch.library.impl("fgattn::attention", "CUDA", _attention(_attention_cuda))


@torch.library.register_fake("fgattn::attention_backward")
def _attention_backward_fake(dout, q, k, v, out, lse, mask, key_bias, order, scale, m, n, tail, min_seq):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _attention_backward(dout, q, k, v, out, lse, mask, key_bias, order, scale, m, n, tail, min_seq):
    if min(q.shape[2], k.shape[2]) < min_seq:  # forward was dense, whatever the mask
        mask, order, tail = reference.full_mask(q, k, m, n), None, "none"
    return reference.attention_backward(dout, q, k, v, mask, key_bias, order, scale, m, n, tail)


torch.library.impl("fgattn::attention_backward", "CPU", _attention_backward)
torch.library.impl("fgattn::attention_backward", "CUDA", _attention_backward)


def _attention_setup(ctx, inputs, output):
    q, k, v, mask, key_bias, order, *ctx.parameters = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, mask, key_bias, order)


def _attention_grad(ctx, dout, _):
    grads = (None, None, None)
    if dout is not None:
        grads = torch.ops.fgattn.attention_backward.default(dout, *ctx.saved_tensors, *ctx.parameters)
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *(None,) * 8


def _no_double_backward(ctx, *_):
    raise RuntimeError(
        "fgattn::attention: there is no double backward; keep create_graph=False, or use another backend."
    )


torch.library.register_autograd("fgattn::attention", _attention_grad, setup_context=_attention_setup)
torch.library.register_autograd("fgattn::attention_backward", _no_double_backward)


# query_order


@torch.library.register_fake("fgattn::query_order")
def _query_order_fake(t, h, w, before, after, m, device):
    _require(m in SLICES, "query_order", f"m={m} queries a slice; choose one of {SLICES}.")
    return torch.empty(before + t * h * w + after, dtype=torch.int32, device=device)


def _query_order(t, h, w, before, after, m, device):
    _require(m in SLICES, "query_order", f"m={m} queries a slice; choose one of {SLICES}.")
    _require(
        min(t, h, w) > 0 and min(before, after) >= 0,
        "query_order",
        f"token grid {(t, h, w)} with {before} tokens before and {after} after; sizes must be positive.",
    )
    return reference.query_order(t, h, w, before, after, m, device)


torch.library.impl("fgattn::query_order", "CompositeExplicitAutograd", _query_order)


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
    _register_autocast("attention", 3, _device, _key)

select_pooled = torch.ops.fgattn.select_pooled.default
attention = torch.ops.fgattn.attention.default
query_order = torch.ops.fgattn.query_order.default
kept_density = torch.ops.fgattn.kept_density.default
