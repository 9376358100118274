"""Masks that say the same to every query and head become one value per key; all others keep their site dense."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fg_inductor.passes.graph import shape_text, value
from fg_inductor.testing_passes import run_pass

BATCH, HEADS, LENGTH, DIM = 3, 2, 40, 32
SDPA = F.scaled_dot_product_attention


class Masked(nn.Module):
    """Self attention over [B, S, C] under ``make(valid)``; valid [B, S] says which keys hold a token."""

    def __init__(self, make):
        super().__init__()
        self.make, self.qkv = make, nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def forward(self, x, valid):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)
        return SDPA(q, k, v, attn_mask=self.make(valid)).transpose(1, 2).flatten(2)


def inputs(batch=BATCH, length=LENGTH):
    valid = torch.arange(length) < torch.tensor([length, length - 9, 17])[:batch, None]
    return torch.randn(batch, length, HEADS * DIM), valid


def bias(valid):
    return torch.where(valid, 0.0, -torch.inf)


def repeated_as_in_diffusers(valid):
    """``Attention.prepare_attention_mask``: repeat over the heads in the batch dimension, then split it."""
    return bias(valid)[:, None].repeat_interleave(HEADS, dim=0).view(valid.shape[0], HEADS, -1, valid.shape[1])


def sum_of_lengths(valid):
    """As HunyuanVideo: everything behind the number of valid tokens is masked."""
    mask = torch.ones(valid.shape[0], valid.shape[1], dtype=torch.bool)
    ends = valid.sum(1)
    return mask.masked_fill(torch.arange(valid.shape[1]) >= ends[:, None], False)[:, None, None]


def float_after_repeat(valid):
    mask = valid[:, None, None].float().repeat_interleave(HEADS, 1)
    return ((1 - mask.to(torch.float64)) * -10000.0).to(mask.dtype)


# Reduced to [B, S] or an expand of [1, S].
REDUCED = {
    "bool": lambda valid: valid[:, None, None],
    "float": lambda valid: bias(valid)[:, None, None],
    "one batch": lambda valid: bias(valid[:1])[:, None, None],
    "three dimensions": lambda valid: bias(valid[:1])[None],
    "two dimensions": lambda valid: valid[:1],
    "one value a batch": lambda valid: valid[:, :1, None, None],
    "expanded over heads": lambda valid: valid[:, None, None].expand(-1, HEADS, -1, -1),
    "expanded over heads and queries": lambda valid: valid[:, None, None].expand(-1, HEADS, LENGTH, -1),
    "expanded, then copied": lambda valid: bias(valid)[:, None, None].expand(-1, HEADS, LENGTH, -1).clone() + 0.5,
    "repeated over heads": lambda valid: bias(valid)[:, None, None].repeat(1, HEADS, 1, 1),
    "repeat_interleave over heads": lambda valid: bias(valid)[:, None, None].repeat_interleave(HEADS, dim=1),
    "repeated as in diffusers": repeated_as_in_diffusers,
    "arithmetic after the repeat": float_after_repeat,
    "sum of lengths": sum_of_lengths,
}


@pytest.mark.parametrize("name", REDUCED)
def test_reduced_mask(name):
    model = Masked(REDUCED[name])
    x, valid = inputs()
    done = run_pass(model, (x, valid), density=1.0)
    assert [site.decision for site in done.sites] == ["rewritten"]
    (arguments,) = done.attention()
    key_bias = value(arguments["key_bias"])
    assert key_bias.shape == (BATCH, LENGTH) and done.sites[0].details["key_mask"]
    expected = model(x, valid)
    torch.testing.assert_close(done.result, expected)
    assert not torch.allclose(expected, Masked.forward(Masked(lambda valid: None).requires_grad_(False), x, valid))


def rows_differ(valid):
    return valid[:, None, None] & (torch.arange(LENGTH)[:, None] >= torch.arange(LENGTH))


def outer_product(valid):
    return valid[:, None, None] & valid[:, None, :, None]


def heads_differ(valid):
    return bias(valid)[:, None, None] * torch.arange(1, HEADS + 1)[:, None, None]


def one_row_written(valid):
    mask = bias(valid)[:, None, None].repeat(1, HEADS, 1, 1)
    mask[:, 1] = 0
    return mask


def swapped_repeat(valid):
    """Heads outermost in the repeat: the view mixes batch and heads."""
    return bias(valid).repeat(HEADS, 1).view(valid.shape[0], HEADS, 1, valid.shape[1])


REFUSED = {
    "rows differ": rows_differ,
    "outer product": outer_product,
    "heads differ": heads_differ,
    "one head written in place": one_row_written,
    "repeat in another order": swapped_repeat,
    "relative positions": lambda valid: torch.rand(1, HEADS, LENGTH, LENGTH),
    "gathered": lambda valid: bias(valid)[:, None, None].expand(-1, HEADS, -1, -1)[torch.arange(3), :],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_mask(name):
    done = run_pass(Masked(REFUSED[name]), inputs())
    (site,) = done.sites
    assert (site.decision, site.reason, site.video) == ("dense", "mask is not a key mask", True)
    assert site.detail.startswith("shape ") and done.before == done.after


def test_a_learned_mask_is_refused():
    model = Masked(lambda valid: model.bias)
    model.bias = nn.Parameter(torch.randn(1, 1, 1, LENGTH))
    (site,) = run_pass(model, inputs()).sites
    assert (site.decision, site.reason) == ("dense", "mask needs gradients")
    with torch.no_grad():
        (site,) = run_pass(model, inputs()).sites
    assert site.reason == "mask needs gradients"  # the value says so, whatever the mode


@pytest.mark.parametrize("name", ["bool", "one batch", "repeated over heads", "repeated as in diffusers"])
def test_symbolic_sizes(name):
    """No guard (PassBackend checks), and the bias is right for another batch and length."""
    model, done = Masked(REDUCED[name]), None
    for batch, length in ((2, 40), (3, 48)):
        x, valid = inputs(batch, length)
        for tensor in (x, valid):
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(tensor, dim)
        if done is None:
            done = run_pass(model, (x, valid), density=1.0)
            compiled = torch.compile(model, backend=done, fullgraph=True)
        torch.testing.assert_close(compiled(x, valid), model(x, valid))
    assert len(done.graphs) == 1 and all(site.rewritten for site in done.sites)
    assert shape_text(value(done.attention()[0]["key_bias"])).count("s") == 2
