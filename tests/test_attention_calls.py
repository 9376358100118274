"""Attention through other libraries' operators, registered here with their schemas, and through PyTorch's own calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from fg_inductor.testing_passes import run_pass

BATCH, HEADS, LENGTH, DIM = 2, 2, 40, 32
SDPA = F.scaled_dot_product_attention
WINDOW = "int window_size_left=-1, int window_size_right=-1"
# As in flash_attn 2.8, FlashAttention-3 and xformers 0.0.32.
SCHEMAS = {
    "flash_attn::_flash_attn_forward": "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, "
    "bool causal, int window_size_left, int window_size_right, float softcap, Tensor? alibi_slopes, "
    "bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)",
    "flash_attn::_flash_attn_varlen_forward": "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
    f"{WINDOW}, float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, "
    "Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "flash_attn_3::_flash_attn_forward": "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, "
    "Tensor? qv=None, Tensor? out_=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, SymInt? max_seqlen_q=None, "
    "SymInt? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, bool causal=False, "
    f"{WINDOW}, int attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True, "
    "Tensor? scheduler_metadata=None, int num_splits=1, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "xformers_flash::flash_fwd": "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seqused_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float p, float softmax_scale, "
    "bool is_causal, int window_left, int window_right, bool return_softmax, Tensor? block_tables) "
    "-> (Tensor, Tensor, Tensor)",
}


def attend(q, k, v, softmax_scale=None, causal=False, sequences=None):
    """What those operators compute, without their extras."""
    if sequences:
        q, k, v = (x.unflatten(0, (sequences, -1)) for x in (q, k, v))
    gqa = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = SDPA(q, k, v, scale=softmax_scale, is_causal=causal, enable_gqa=gqa).transpose(1, 2).contiguous()
    return out.flatten(0, 1) if sequences else out


@pytest.fixture(scope="module", autouse=True)
def operators():
    libraries = []
    for full_name, schema in SCHEMAS.items():
        namespace, name = full_name.split("::")
        if hasattr(getattr(torch.ops, namespace), name):
            continue  # the library is installed
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        results = schema.partition("->")[2].count("Tensor")

        def run(*args, full_name=full_name, results=results, **kwargs):
            schema = getattr(torch.ops, full_name.split("::")[0])
            names = [a.name for a in getattr(schema, full_name.split("::")[1]).default._schema.arguments]
            given = dict(zip(names, args, strict=False)) | kwargs
            starts = given.get("cu_seqlens_q")
            causal = given.get("causal", given.get("is_causal", False))
            q = args[0]
            out = attend(*args[:3], given["softmax_scale"], causal, None if starts is None else len(starts) - 1)
            return (out, *(q.new_zeros(1) for _ in range(results - 1)))

        library.impl(name, run, "CompositeExplicitAutograd")
        libraries.append(library)
    yield
    for library in libraries:
        library._destroy()


class Attention(nn.Module):
    """[B, S, C] -> [B, S, C]; ``call(q, k, v)`` attends in [B, S, H, D]."""

    def __init__(self, call, heads=HEADS, kv_heads=None):
        super().__init__()
        self.call, self.heads, self.kv_heads = call, heads, kv_heads or heads
        self.to_q = nn.Linear(64, heads * DIM)
        self.to_k, self.to_v = (nn.Linear(64, self.kv_heads * DIM) for _ in range(2))
        for linear in (self.to_q, self.to_k, self.to_v):
            nn.init.normal_(linear.weight, std=0.3)

    def forward(self, x):
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        k, v = (f(x).unflatten(-1, (self.kv_heads, -1)) for f in (self.to_k, self.to_v))
        return self.call(q, k, v).flatten(2)


def tokens(batch=BATCH, length=LENGTH):
    return torch.randn(batch, length, 64)


def flash_2(q, k, v, causal=False, window=-1, softcap=0.0, dropout_p=0.0):
    op = torch.ops.flash_attn._flash_attn_forward
    return op(q, k, v, dropout_p, 0.25, causal, window, -1, softcap, None, False)[0]


def flash_2_overload(q, k, v):
    op = torch.ops.flash_attn._flash_attn_forward.default
    out, _lse, _mask, _rng = op(q, k, v, 0.0, 0.25, False, -1, -1, 0.0, alibi_slopes=None, return_softmax=False)
    return out


def starts(batch, length):
    """As Wan's original code: a list of lengths, summed."""
    lengths = torch.tensor([length] * batch, dtype=torch.int32)
    return torch.cat([lengths.new_zeros([1]), lengths]).cumsum(0, dtype=torch.int32)


def flash_2_packed(q, k, v, cu_seqlens=starts):
    batch, length = q.shape[:2]
    cu_seqlens = cu_seqlens(batch, length)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    op = torch.ops.flash_attn._flash_attn_varlen_forward
    out = op(q, k, v, cu_seqlens, cu_seqlens, length, length, 0.0, 0.25, False)[0]
    return out.unflatten(0, (batch, length))


def flash_3(q, k, v, **kwargs):
    return torch.ops.flash_attn_3._flash_attn_forward(q, k, v, softmax_scale=0.25, num_splits=1, **kwargs)[0]


def flash_3_packed(q, k, v):
    batch, length = q.shape[:2]
    places = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return flash_3(q, k, v, cu_seqlens_q=places, cu_seqlens_k=places).unflatten(0, (batch, length))


def xformers(q, k, v):
    op = torch.ops.xformers_flash.flash_fwd
    return op(q, k, v, None, None, None, LENGTH, LENGTH, 0.0, 0.25, False, -1, -1, False, None)[0]


def aten_kernel(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=0.25)[0].transpose(1, 2)


def aten_kernel_with_mask(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.where(torch.arange(q.shape[2]) < 30, 0.0, -torch.inf)[None, None, None].expand(q.shape[0], 1, 1, -1)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return op(q, k, v, attn_mask=mask.expand(-1, -1, q.shape[2], -1), scale=0.25)[0].transpose(1, 2)


def folded_heads(q, k, v):
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], DIM) for x in (q, k, v))
    return SDPA(q, k, v, scale=0.25).view(BATCH, HEADS, LENGTH, DIM).transpose(1, 2)


def folded_heads_with_mask(q, k, v):
    valid = torch.arange(q.shape[1]) < torch.tensor([[40], [29]])
    mask = torch.where(valid, 0.0, -torch.inf)[:, None].repeat_interleave(HEADS, dim=0)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return SDPA(q, k, v, attn_mask=mask, scale=0.25).unflatten(0, (BATCH, HEADS)).transpose(1, 2)


@pytest.mark.parametrize(
    "call",
    [
        flash_2, flash_2_overload, flash_2_packed, flash_3, flash_3_packed, xformers, aten_kernel,
        aten_kernel_with_mask, folded_heads, folded_heads_with_mask,
    ],
    ids=lambda call: call.__name__,
)  # fmt: skip
@torch.no_grad()
def test_rewritten(call):
    model, x = Attention(call), tokens()
    done = run_pass(model, (x,), density=1.0)
    (site,) = done.sites
    assert (site.kind, site.decision, site.query) == ("self", "rewritten", f"{BATCH}x{HEADS}x{LENGTH}x{DIM}")
    assert site.details["written as"] and ("key_mask" in site.details) == ("mask" in call.__name__)
    assert done.attention()[0]["scale"] == 0.25
    assert done.counts() == (0, 1, 1, 0) and "flash" not in done.after[0]
    torch.testing.assert_close(done.result, model(x))


@torch.no_grad()
def test_grouped_queries():
    model, x = Attention(flash_2, heads=4, kv_heads=2), tokens()
    done = run_pass(model, (x,), density=1.0)
    assert done.sites[0].rewritten and done.sites[0].key == f"{BATCH}x2x{LENGTH}x{DIM}"
    torch.testing.assert_close(done.result, model(x))


def with_lse(q, k, v):
    out, lse, *_ = torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False)
    return out + lse


def uneven(batch, length):
    return torch.tensor([0, length - 8, 2 * length], dtype=torch.int32)


REFUSED = {
    "causal": (lambda q, k, v: flash_2(q, k, v, causal=True), "causal"),
    "window": (lambda q, k, v: flash_2(q, k, v, window=16), "flash_attn::_flash_attn_forward with window_size_left"),
    "soft cap": (lambda q, k, v: flash_2(q, k, v, softcap=30.0), "flash_attn::_flash_attn_forward with softcap"),
    "dropout": (lambda q, k, v: flash_2(q, k, v, dropout_p=0.1), "dropout"),
    "lse": (with_lse, "its log-sum-exp is used elsewhere"),
    "fp8 scales": (
        lambda q, k, v: flash_3(q, k, v, q_descale=q[:, 0, :, 0]), "flash_attn_3::_flash_attn_forward with q_descale"
    ),
    "uneven sequences": (lambda q, k, v: flash_2_packed(q, k, v, uneven), "packed sequences"),
    "flex": (lambda q, k, v: flex_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), "flex attention"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@torch.no_grad()
def test_refused(case):
    call, reason = REFUSED[case]
    done = run_pass(Attention(call), (tokens(),))
    assert [(site.decision, site.reason) for site in done.sites] == [("dense", reason)]
    assert done.before == done.after


@torch.no_grad()
def test_lengths_that_are_inputs():
    """Whether they are equal is known at run time only."""
    model = Attention(None)

    def run(x, places):
        model.call = lambda q, k, v: flash_2_packed(q, k, v, lambda *_: places)
        return model(x)

    (site,) = run_pass(run, (tokens(), starts(BATCH, LENGTH))).sites
    assert site.reason == "packed sequences"


# nn.MultiheadAttention


class MultiHead(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        separate = kwargs.pop("separate", False)
        self.attention = nn.MultiheadAttention(64, 2, **kwargs)
        if separate:  # as where keys have another width, which self attention can't have
            self.attention._qkv_same_embed_dim = False
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                setattr(self.attention, name, nn.Parameter(torch.empty(64, 64)))
        for weight in self.attention.parameters():
            nn.init.normal_(weight, std=0.3)

    def forward(self, x, text=None, **kwargs):
        text = x if text is None else text
        return self.attention(x, text, text, **{"need_weights": False, **kwargs})[0]


def padding(x):
    return torch.arange(x.shape[1]) >= torch.tensor([[40], [29]])


MULTI_HEAD = {
    "plain": ({"batch_first": True}, lambda x: {}),
    "sequence first": ({}, lambda x: {}),
    "no bias": ({"batch_first": True, "bias": False}, lambda x: {}),
    "separate projections": ({"batch_first": True, "separate": True}, lambda x: {}),
    "padding": ({"batch_first": True}, lambda x: {"key_padding_mask": padding(x)}),
    "map that is not used": ({"batch_first": True}, lambda x: {"need_weights": True}),
}


@pytest.mark.parametrize("case", MULTI_HEAD)
@pytest.mark.parametrize("training", [False, True])
def test_multi_head(case, training):
    config, inputs = MULTI_HEAD[case]
    model = MultiHead(**config).double().train(training)
    x = (tokens() if config.get("batch_first") else tokens(LENGTH, BATCH)).double()
    done = run_pass(model, {"x": x, **inputs(x)}, density=1.0)
    (site,) = done.sites
    assert (site.path, site.kind, site.decision) == ("attention", "self", "rewritten")
    assert site.query == f"{BATCH}x2x{LENGTH}x32" and ("key_mask" in site.details) == (case == "padding")
    torch.testing.assert_close(done.result, model(x, **inputs(x)))


MULTI_HEAD_REFUSED = {
    "cross": ({"text": tokens()}, {}, "cross attention"),
    "causal": ({"attn_mask": torch.ones(LENGTH, LENGTH).triu(1).bool()}, {}, "mask is not a key mask"),
    "mask of each head": ({"attn_mask": torch.randn(BATCH * 2, LENGTH, LENGTH)}, {}, "mask is not a key mask"),
    "learned keys": ({}, {"add_bias_kv": True}, "attention of an unknown form"),
    "dropout": ({}, {"dropout": 0.1}, "dropout"),
}


@pytest.mark.parametrize("case", MULTI_HEAD_REFUSED)
def test_multi_head_refused(case):
    inputs, config, reason = MULTI_HEAD_REFUSED[case]
    done = run_pass(MultiHead(batch_first=True, **config), {"x": tokens(), **inputs})
    assert [(site.decision, site.reason) for site in done.sites] == [("dense", reason)]
    assert done.before == done.after


def test_multi_head_map_that_is_used():
    model = nn.MultiheadAttention(64, 2, batch_first=True)
    done = run_pass(lambda x: model(x, x, x), (tokens(),))
    assert [site.reason for site in done.sites] == ["attention probabilities are used elsewhere"]


# diffusers' own backends


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@torch.no_grad()
def test_native_backends_of_diffusers(backend):
    """SDPA inside ``sdpa_kernel``, a choice among dense kernels: the rewrite takes its place."""
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    model, x = Attention(lambda q, k, v: dispatch.dispatch_attention_fn(q, k, v, backend=backend)), tokens()
    done = run_pass(model, (x,), density=1.0)
    assert [(site.kind, site.decision) for site in done.sites] == [("self", "rewritten")]
    model.call = attend
    torch.testing.assert_close(done.result, model(x))
