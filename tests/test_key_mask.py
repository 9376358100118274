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


def outer_product(valid):
    return valid[:, None, None] & valid[:, None, :, None]


def outer_product_as_in_hunyuan_video(valid):
    """HunyuanVideo-1.5: repeated to [B, 1, N, N], and with its transpose."""
    batch, length = valid.shape
    rows = valid.view(batch, 1, 1, length).repeat(1, 1, length, 1)
    return (rows & rows.transpose(2, 3)).bool()


def outer_product_of_matrices(valid):
    mask = torch.logical_and(valid.unsqueeze(-1), valid.unsqueeze(-2))
    return mask[:, None].expand(-1, HEADS, -1, -1).contiguous()


def outer_product_of_two_masks(valid):
    """Rows and columns are valid for different reasons; one of them is the product of two."""
    keys, queries = valid & (torch.arange(valid.shape[1]) != 3), valid | (torch.arange(valid.shape[1]) % 7 == 0)
    return (keys[:, None, None] & queries[:, None, :, None]) & keys[:1, None, None].repeat(1, HEADS, 1, 1)


def negated_twice(valid):
    return torch.logical_not(~outer_product(valid))


def valid_queries(valid):
    return valid[:, None, :, None].expand(-1, -1, -1, valid.shape[1])


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
    "permuted": lambda valid: valid.t().contiguous().permute(1, 0)[:, None, None],
    "outer product": outer_product,
    "outer product as in HunyuanVideo-1.5": outer_product_as_in_hunyuan_video,
    "outer product of matrices": outer_product_of_matrices,
    "outer product of two masks": outer_product_of_two_masks,
    "negated twice": negated_twice,
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


def heads_differ(valid):
    return bias(valid)[:, None, None] * torch.arange(1, HEADS + 1)[:, None, None]


def one_row_written(valid):
    mask = bias(valid)[:, None, None].repeat(1, HEADS, 1, 1)
    mask[:, 1] = 0
    return mask


def one_row_written_through_an_alias(valid):
    mask = bias(valid)[:, None, None].repeat(1, HEADS, 1, 1)
    alias = mask
    alias *= torch.arange(1, HEADS + 1)[:, None, None]
    return mask


def a_column_of_the_outer_product_written(valid):
    """As the text refiner of HunyuanVideo: the first key is never masked."""
    mask = outer_product_as_in_hunyuan_video(valid)
    mask[:, :, :, 0] = True
    return mask


def added_outer_product(valid):
    """The rows of masked queries attend to all keys alike: no mask of keys."""
    return torch.where(outer_product(valid), 0.0, -10000.0)


def alternatives(valid):
    return valid[:, None, None] | valid[:, None, :, None]


def not_the_outer_product(valid):
    return ~outer_product(valid)


def swapped_repeat(valid):
    """Heads outermost in the repeat: the view mixes batch and heads."""
    return bias(valid).repeat(HEADS, 1).view(valid.shape[0], HEADS, 1, valid.shape[1])


REFUSED = {
    "rows differ": rows_differ,
    "heads differ": heads_differ,
    "one head written in place": one_row_written,
    "written through an alias": one_row_written_through_an_alias,
    "a column written": a_column_of_the_outer_product_written,
    "outer product, added": added_outer_product,
    "keys or queries": alternatives,
    "not the outer product": not_the_outer_product,
    "repeat in another order": swapped_repeat,
    "relative positions": lambda valid: torch.rand(1, HEADS, LENGTH, LENGTH),
    "gathered": lambda valid: bias(valid)[:, None, None].expand(-1, HEADS, -1, -1)[torch.arange(3), :],
}


@pytest.mark.parametrize(
    "make",
    [outer_product, outer_product_as_in_hunyuan_video, outer_product_of_matrices, float_after_repeat],
    ids=lambda make: make.__name__,
)
def test_no_mask_of_queries_by_keys_is_built(make):
    """What attention reads has at most B * S elements, from the input of the graph on."""
    model, (x, valid) = Masked(make), inputs()
    done = run_pass(model, (x, valid), density=1.0)
    (arguments,) = done.attention()
    seen, stack = set(), [arguments["key_bias"]]
    while stack:
        node = stack.pop()
        seen.add(node)
        assert value(node) is None or value(node).numel() <= valid.numel()
        stack += (y for y in node.all_input_nodes if y not in seen)
    assert len(seen) > 1


def test_masked_queries_give_zero():
    model = Masked(outer_product_as_in_hunyuan_video)
    x, valid = inputs()
    done = run_pass(model, (x, valid), density=0.5)
    assert done.sites[0].rewritten
    assert torch.equal(done.result[~valid], torch.zeros_like(done.result[~valid])) and done.result[valid].all()


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


@pytest.mark.parametrize(
    "name",
    ["bool", "one batch", "repeated over heads", "repeated as in diffusers", "outer product as in HunyuanVideo-1.5"],
)
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
