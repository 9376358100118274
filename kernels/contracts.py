"""The operators' schemas, which define them, and what their implementations share. Imports torch only."""

import torch

# Inductor passes arguments that have a default by name, to functions of its own: none may be called ``kernel``.
SCHEMAS = {
    "select_pooled": "(Tensor q, Tensor k, Tensor? key_bias, Tensor? order, float scale, int m, int n, int pool, "
    "float top_p, float? density, float max_density, SymInt[] dense_keys, SymInt[] dense_queries, SymInt min_seq, "
    'str reduce="sum", float? gamma=None, float? alpha=None, float[]? head_density=None) -> Tensor',
    "begin_observed_": "(Tensor q, Tensor k, Tensor(a!) mask, Tensor? key_bias, Tensor? order, float scale, int m, "
    "int n, SymInt min_seq, Tensor refresh, Tensor(b!)? drift=None, float? bound=None, Tensor? slots=None) -> Tensor",
    "update_observed_": "(Tensor q, Tensor k, Tensor lse, Tensor(a!) mask, Tensor? key_bias, Tensor? order, "
    "float scale, int m, int n, str reduce, float top_p, float? density, float max_density, SymInt[] dense_keys, "
    "SymInt[] dense_queries, SymInt min_seq, Tensor due, Tensor(b!)? drift=None, float[]? head_density=None, "
    "Tensor(c!)? slots=None) -> ()",
    "expand_heads": "(Tensor mask, Tensor slots) -> Tensor",
    "fetch": "(Tensor mask, bool ahead=True) -> Tensor",
    "put_back_": "(Tensor(a!) mask, Tensor staged, Tensor due) -> ()",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? key_bias, Tensor? order, float scale, "
    'int m, int n, str tail, SymInt min_seq, str kernel_name="auto") -> (Tensor out, Tensor lse)',
    "attention_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor mask, "
    "Tensor? key_bias, Tensor? order, float scale, int m, int n, str tail, SymInt min_seq, "
    'bool[3] wanted=[True, True, True], str kernel_name="auto") -> (Tensor dq, Tensor dk, Tensor dv)',
    "select_dfs": "(Tensor q, Tensor k, Tensor? key_bias, Tensor order, float scale, int m, int n, float? density, "
    "float[]? head_density=None) -> Tensor",
    "select_static": "(Tensor q, Tensor k, Tensor order, int m, int n, SymInt[] grid, SymInt before, int[] tile, "
    "int[] window, float radius, SymInt[] ranges) -> Tensor",
    "keep_dense": "(Tensor mask, Tensor? order, SymInt queries, SymInt keys, int m, int n, SymInt[] dense_keys, "
    "SymInt[] dense_queries) -> Tensor",
    "query_order": "(SymInt t, SymInt h, SymInt w, SymInt before, SymInt after, int m, Device device, "
    'str curve="rods", float time=0.5) -> Tensor',
    "choose_order": "(Tensor q, SymInt t, SymInt h, SymInt w, SymInt before, SymInt after, int m) -> Tensor",
    "reorder": "(Tensor x, Tensor order, bool inverse=False) -> Tensor",
    "kept_density": "(Tensor mask, Tensor? key_bias, SymInt queries, SymInt keys, int m, int n) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"fgattn::{_name}", _schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))


def unit_stride(*tensors):
    """Kernels take any strides but a contiguous last dimension."""
    return (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
