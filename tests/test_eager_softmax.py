"""Attention written by hand becomes a site like any other, in every spelling and with every key mask."""

import math

import pytest
import torch
import torch.nn.functional as F
from handwritten_attention import BATCH, DIM, HEADS, LENGTH, SCALE, Attention, tokens, valid_keys
from torch import nn
from torch.utils.checkpoint import checkpoint

from fg_inductor.passes import sdpa, stand_in
from fg_inductor.passes.printer import graph_text
from fg_inductor.settings import Settings
from fg_inductor.testing import assert_as_accurate
from fg_inductor.testing_passes import SMALL, run_pass


def fold(x):
    return x.reshape(-1, *x.shape[2:])


CASES = {}


def case(attend):
    CASES[attend.__name__] = attend
    return attend


@case
def operators(m, q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v


@case
def functions(m, q, k, v):
    scores = torch.matmul(q, torch.transpose(k, 2, 3)) / math.sqrt(DIM)
    return torch.matmul(torch.softmax(scores, dim=3), v)


@case
def scale_on_q(m, q, k, v):
    return ((q * SCALE) @ k.mT).softmax(dim=-1) @ v


@case
def scale_on_both(m, q, k, v):
    return F.softmax((q * DIM**-0.25) @ (k * DIM**-0.25).permute(0, 1, 3, 2), dim=-1) @ v


@case
def no_scale(m, q, k, v):
    return F.softmax(q @ k.mT, -1) @ v


@case
def divided_in_place(m, q, k, v):
    scores = q @ k.swapaxes(-1, -2)
    scores /= 4
    scores *= 0.5
    return scores.softmax(-1).matmul(v)


@case
def scaled_twice(m, q, k, v):
    return (2 * (q @ k.mT) / 8 * torch.tensor(0.5)).softmax(-1) @ v


@case
def batched(m, q, k, v):
    q, k, v = map(fold, (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * SCALE).softmax(-1), v).view(BATCH, HEADS, LENGTH, DIM)


@case
def baddbmm_as_in_diffusers(m, q, k, v):
    q, k, v = map(fold, (q, k, v))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(dim=-1).to(q.dtype), v).view(BATCH, HEADS, LENGTH, DIM)


@case
def heads_seen_only_behind(m, q, k, v):
    """Nothing before attention says how many heads were folded: a sum of two folds on either side."""
    q, k, v = (fold(x) + fold(x) * 0.5 for x in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).unflatten(0, (BATCH, HEADS))


@case
def einsum(m, q, k, v):
    weights = torch.einsum("b h i d, b h j d -> b h i j", q * SCALE, k).softmax(dim=-1)
    return torch.einsum("b h i j, b h j d -> b h i d", weights, v)


@case
def einsum_of_other_layouts(m, q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    weights = torch.einsum("nlhc,nshc->nhls", q, k).softmax(-1)
    return torch.einsum("nhls,nshc->nlhc", weights, v).transpose(1, 2)


@case
def einsum_with_keys_first(m, q, k, v):
    weights = torch.einsum("...jd,...id->...ij", k, q).softmax(-1)
    return torch.einsum("...jd,...ij->...id", v, weights)


@case
def einsum_of_channels_first(m, q, k, v):
    q, k, v = (x.transpose(-1, -2) for x in (q, k, v))
    weights = torch.einsum("b h d i, b h d j -> b h i j", q, k).softmax(-1)
    return torch.einsum("b h i j, b h d j -> b h i d", weights, v)


@case
def minus_its_maximum(m, q, k, v):
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k)
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    return scores.softmax(dim=-1) @ v


@case
def minus_the_values_of_max(m, q, k, v):
    scores = q @ k.mT
    return (scores - scores.max(-1, keepdim=True).values + 3.0).softmax(-1) @ v


@case
def float32_softmax(m, q, k, v):
    return F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@case
def float32_scores(m, q, k, v):
    return (q.float() @ k.float().transpose(2, 3) * SCALE).softmax(-1).type_as(v) @ v


@case
def cast_behind_the_product(m, q, k, v):
    return (q @ k.mT).float().softmax(-1).to(v.dtype) @ v


@case
def dropout_that_is_off(m, q, k, v):
    weights = F.dropout((q @ k.mT).softmax(-1), p=0.5, training=False)
    return m.dropout(F.dropout(weights, 0.0)) @ v


@case
def fused_projection(m, q, k, v):
    """As timm and V-JEPA write it."""
    q, k, v = torch.stack([q, k, v]).unbind(0)
    attn = (q * SCALE) @ k.transpose(-2, -1)
    return F.dropout(attn.softmax(dim=-1), 0.1, m.training) @ v


@case
def scores_unfolded_for_a_while(m, q, k, v):
    """As in transformers: the mask is added with heads apart."""
    q3, k3, v3 = map(fold, (q, k, v))
    scores = torch.bmm(q3, k3.transpose(1, 2)).view(BATCH, HEADS, LENGTH, LENGTH)
    return torch.bmm(scores.view(-1, LENGTH, LENGTH).softmax(-1), v3).view(BATCH, HEADS, LENGTH, DIM)


@case
def result_is_viewed(m, q, k, v):
    return torch.einsum("bhij,bhjd->bhid", (q @ k.mT).softmax(-1), v).view(BATCH, -1).view(q.shape)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spelling(name, dtype):
    model, x = Attention(CASES[name]).to(dtype).eval(), tokens(dtype=dtype)
    done = run_pass(model, (x,), density=1.0)
    (site,) = done.sites
    assert (site.kind, site.decision, site.dtype) == ("self", "rewritten", str(dtype).removeprefix("torch."))
    assert (site.query, site.key) == (f"{BATCH}x{HEADS}x{LENGTH}x{DIM}",) * 2
    assert "softmax" not in done.after[0] and done.counts() == (0, 1, 1, 0)
    assert done.result.dtype == dtype
    expected = model(x)
    if dtype == torch.float32:
        torch.testing.assert_close(done.result, expected)
    else:
        exact = Attention(operators).double()
        exact.load_state_dict(model.state_dict())
        exact.attend = CASES[name]
        assert_as_accurate(done.result, expected, exact(x.double()))


# Masks


MASKS = {
    "added": lambda s, valid: s + torch.where(valid, 0.0, -torch.inf)[:, None, None],
    "added as it is made": lambda s, valid: s + torch.where(valid[:, None, None], 0.0, -torch.inf),
    "added before the scale": lambda s, valid: (s + (1 - valid.float())[:, None, None] * -1e6) * 0.25,
    "added in place": lambda s, valid: s.add_(torch.where(valid, 0.0, -1e4)[:, None, None].expand(-1, HEADS, -1, -1)),
    "filled": lambda s, valid: s.masked_fill(~valid[:, None, None], -torch.inf),
    "filled with a large number": lambda s, valid: s.masked_fill(~valid[:, None, None], torch.finfo(s.dtype).min),
    "where kept": lambda s, valid: torch.where(valid[:, None, None], s, -torch.inf),
    "where masked": lambda s, valid: torch.where(~valid[:, None, None], torch.tensor(-1e9), s),
    "two of them": lambda s, valid: (s + valid[:, None, None]).masked_fill(~valid[:, None, None], -torch.inf),
    "three of them": lambda s, valid: (
        s.masked_fill(~valid[:1, None, None], -1e9) + valid[:, None, None] * 2.0
        + torch.where(valid, 0, -1e8)[:, None, None]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_key_mask(name):
    model = Attention(lambda m, q, k, v: MASKS[name](q @ k.mT * SCALE, valid_keys(q)).softmax(-1) @ v).eval()
    x = tokens()
    done = run_pass(model, (x,), density=1.0)
    assert [site.decision for site in done.sites] == ["rewritten"] and done.sites[0].details["key_mask"]
    torch.testing.assert_close(done.result, model(x))


def mask_of_folded_scores(m, q, k, v):
    """As diffusers' older processors: the mask is repeated over heads in the batch and goes in through baddbmm."""
    mask = torch.where(valid_keys(q), 0.0, -10000.0)[:, None].repeat_interleave(HEADS, dim=0)
    q, k, v = map(fold, (q, k, v))
    return torch.bmm(torch.baddbmm(mask, q, k.mT, beta=1, alpha=SCALE).softmax(-1), v).view(BATCH, HEADS, LENGTH, DIM)


def mask_of_unfolded_scores(m, q, k, v):
    q3, k3, v3 = map(fold, (q, k, v))
    scores = torch.bmm(q3, k3.transpose(1, 2)).view(BATCH, HEADS, LENGTH, LENGTH)
    scores = scores + torch.where(valid_keys(q), 0.0, -torch.inf)[:, None, None]
    return torch.bmm(scores.view(-1, LENGTH, LENGTH).softmax(-1), v3).view(BATCH, HEADS, LENGTH, DIM)


@pytest.mark.parametrize("attend", [mask_of_folded_scores, mask_of_unfolded_scores], ids=lambda f: f.__name__)
def test_key_mask_with_folded_heads(attend):
    model, x = Attention(attend).eval(), tokens()
    done = run_pass(model, (x,), density=1.0)
    assert [site.decision for site in done.sites] == ["rewritten"] and done.sites[0].details["key_mask"]
    torch.testing.assert_close(done.result, model(x))


# Around it


def test_training():
    model, x = Attention(einsum).double(), tokens(dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), (x, *model.to_q.parameters()))
    done = run_pass(model, (x,), density=1.0)
    assert done.sites[0].rewritten
    torch.testing.assert_close(torch.autograd.grad(done.result.square().sum(), (x, *model.to_q.parameters())), expected)


@pytest.mark.parametrize(
    "attend", [float32_scores, baddbmm_as_in_diffusers, dropout_that_is_off], ids=lambda f: f.__name__
)
def test_autocast(attend):
    model, x = Attention(attend).eval(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done, plain = run_pass(model, (x,), density=1.0), model(x)
    assert done.sites[0].rewritten and done.sites[0].dtype == "bfloat16"
    assert_as_accurate(done.result, plain, Attention.forward(model.double(), x.double()))


def test_symbolic_length():
    model, done = Attention(baddbmm_of_any_length).eval(), None
    for length in (40, 56):
        x = tokens(length=length)
        torch._dynamo.mark_dynamic(x, 1)
        if done is None:
            done = run_pass(model, (x,), density=1.0)
            compiled = torch.compile(model, backend=done, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(done.graphs) == 1 and done.sites[0].rewritten


def baddbmm_of_any_length(m, q, k, v):
    length = q.shape[2]
    q, k, v = map(fold, (q, k, v))
    empty = torch.empty(q.shape[0], length, length)
    return (torch.baddbmm(empty, q, k.mT, beta=0, alpha=SCALE).softmax(-1) @ v).view(-1, HEADS, length, DIM)


def test_checkpointed_and_exported():
    model, x = Attention(operators).eval(), tokens()
    done = run_pass(lambda x: checkpoint(model, x, use_reentrant=False), (x,), density=1.0)
    assert [site.decision for site in done.sites] == ["rewritten"]
    torch.testing.assert_close(done.result, model(x))
    gm = torch.export.export(model, (x,)).module()
    (site,) = sdpa.rewrite(gm, Settings(**SMALL, density=1.0))
    assert site.rewritten
    torch.testing.assert_close(gm(x), model(x))


def test_an_error_of_the_matcher_leaves_the_graph(monkeypatch):
    def fail(graph, heads):
        raise KeyError("a defect")

    model, seen = nn.Sequential(Attention(operators), Attention(einsum)), []
    monkeypatch.setattr(stand_in.Form, "_mask", lambda form, *rest: fail(*rest) if "einsum" in form.form else None)

    def backend(gm, example_inputs):
        before = graph_text(gm)
        with pytest.raises(KeyError, match="a defect"):
            sdpa.rewrite(gm, Settings(**SMALL))
        assert graph_text(gm) == before
        seen.append(gm)
        return gm.forward

    torch.compile(model, backend=backend)(tokens())
    assert len(seen) == 1
