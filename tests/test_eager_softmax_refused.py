"""Attention written by hand that can't be rewritten says why; what only looks like it stays as it is."""

import pytest
import torch
import torch.nn.functional as F
from handwritten_attention import HEADS, LENGTH, SCALE, Attention, tokens, valid_keys

from fg_inductor.testing_passes import run_pass


def scores(q, k):
    return q @ k.mT * SCALE


def returned_map(m, q, k, v):
    weights = scores(q, k).softmax(-1)
    m.map = weights
    return weights @ v


def map_in_a_loss(m, q, k, v):
    weights = scores(q, k).softmax(-1)
    return weights @ v + weights.mean()


def scores_used_twice(m, q, k, v):
    s = scores(q, k)
    return s.softmax(-1) @ v + s.logsumexp(-1, keepdim=True)


def two_softmaxes_of_one_product(m, q, k, v):
    s = scores(q, k)
    return s.softmax(-1) @ v - (2 * s).softmax(-1) @ v


def position_bias(m, q, k, v):
    return (scores(q, k) + m.bias).softmax(-1) @ v


def causal_mask(m, q, k, v):
    return scores(q, k).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(-1) @ v


def small_fill(m, q, k, v):
    return scores(q, k).masked_fill(~valid_keys(q)[:, None, None], -5.0).softmax(-1) @ v


def null_keys(m, q, k, v):
    """As phenaki: learned keys and values beside those of the tokens."""
    k, v = (torch.cat([m.null.expand(q.shape[0], -1, -1, -1), x], dim=-2) for x in (k, v))
    return scores(q, k).softmax(-1) @ v


def soft_cap(m, q, k, v):
    return (scores(q, k) / 30).tanh().mul(30).softmax(-1) @ v


def talking_heads(m, q, k, v):
    mixed = torch.einsum("bhij,hg->bgij", scores(q, k), m.mix)
    return mixed.softmax(-1) @ v


def head_gate(m, q, k, v):
    return (scores(q, k).softmax(-1) * m.mix[:, :1, None]) @ v


def learned_temperature(m, q, k, v):
    return (q @ k.mT * m.mix[0, 0]).softmax(-1) @ v


def softmax_over_queries(m, q, k, v):
    return scores(q, k).softmax(-2) @ v


def inverted(m, q, k, v):
    """Slot attention: normalised over the keys, summed over the queries."""
    return torch.einsum("bhij,bhid->bhjd", scores(q, k).softmax(-1), v)


def written_in_between(m, q, k, v):
    s = scores(q, k)
    k.zero_()
    return s.softmax(-1) @ v + k


def dropout(m, q, k, v):
    return F.dropout(scores(q, k).softmax(-1), 0.5, training=True) @ v


def grouped_in_five_dimensions(m, q, k, v):
    weights = torch.einsum("bghid,bhjd->bghij", q[:, None], k).softmax(-1)
    return torch.einsum("bghij,bhjd->bghid", weights, v)[:, 0]


# attend -> reason, part of the detail
REFUSED = {
    returned_map: ("attention probabilities are used elsewhere", ""),
    map_in_a_loss: ("attention probabilities are used elsewhere", "by mean"),
    scores_used_twice: ("attention scores are used elsewhere", "by logsumexp"),
    position_bias: ("mask needs gradients", ""),
    causal_mask: ("mask is not a key mask", ""),
    small_fill: ("attention of an unknown form", "masked_fill between"),
    null_keys: ("learned keys", ""),
    soft_cap: ("attention of an unknown form", "tanh between"),
    head_gate: ("attention of an unknown form", "mul between softmax"),
    learned_temperature: ("scale is not a constant", ""),
    softmax_over_queries: ("attention of an unknown form", "another dimension"),
    written_in_between: ("tensors are written in place inside of it", "by zero_"),
    dropout: ("dropout", "0.5"),
}


@pytest.mark.parametrize("attend", REFUSED, ids=lambda f: f.__name__)
def test_refused(attend):
    reason, detail = REFUSED[attend]
    model, x = Attention(attend), tokens()
    torch.manual_seed(1)
    done = run_pass(model, (x,))
    assert [(site.decision, site.reason, site.video) for site in done.sites] == [("dense", reason, True)]
    assert detail in done.sites[0].detail and done.before == done.after
    torch.manual_seed(1)
    torch.testing.assert_close(done.result, model(x))


def test_two_sites_of_one_product():
    done = run_pass(Attention(two_softmaxes_of_one_product), (tokens(),))
    assert {site.reason for site in done.sites} == {"attention scores are used elsewhere"} and len(done.sites) == 2
    assert done.before == done.after


def test_bias_without_gradients():
    model, x = Attention(position_bias).requires_grad_(False), tokens()
    (site,) = run_pass(model, (x,)).sites
    assert (site.reason, site.video) == ("mask is not a key mask", True)


# No sites at all


def linear_attention(m, q, k, v):
    q, k = q.softmax(-1), k.softmax(-2)
    return torch.einsum("bhde,bhnd->bhne", torch.einsum("bhnd,bhne->bhde", k, v), q)


def router(m, q, k, v):
    gates = F.linear(q, m.null[0, 0]).softmax(-1)
    return gates @ m.null[0, 0] + v


def pooled_map_that_is_sorted(m, q, k, v):
    """As NABLA chooses its blocks: softmax of a product, and no product with v."""
    weights = scores(q, k).softmax(-1)
    values, _ = weights.sort(-1)
    return v * values.cumsum(-1)[..., :1]


@pytest.mark.parametrize(
    "attend",
    [linear_attention, router, pooled_map_that_is_sorted],
    ids=lambda f: f.__name__,
)
def test_no_site(attend):
    model, x = Attention(attend), tokens()
    done = run_pass(model, (x,))
    assert done.sites == [] and done.before == done.after


@pytest.mark.parametrize("attend", [talking_heads, inverted, grouped_in_five_dimensions], ids=lambda f: f.__name__)
def test_unknown_forms_are_reported(attend):
    """Products that are no q k^T or no P v: there is nothing to decide on, but a row says that something was seen."""
    done = run_pass(Attention(attend), (tokens(),))
    assert [(site.decision, site.reason) for site in done.sites] == [("dense", "attention of an unknown form")]
    assert done.before == done.after


def plain(m, q, k, v):
    return scores(q, k).softmax(-1) @ v


def test_cross_and_short_sites_stay_as_written():
    class Cross(Attention):
        def forward(self, x, text):
            q, k = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f, y in ((self.to_q, x), (self.to_k, text)))
            return plain(self, q, k, k)

    done = run_pass(Cross(None), (tokens(), tokens()))
    assert [site.reason for site in done.sites] == ["cross attention"] and done.before == done.after
    done = run_pass(Attention(plain), (tokens(),), min_seq=41)
    assert [site.reason for site in done.sites] == ["shorter than min_seq"] and done.before == done.after
