"""Text segments, found wherever the concatenation stands, and tokens folded into the batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fg_inductor.testing_passes import run_pass

SDPA = F.scaled_dot_product_attention
HEADS, WIDTH, VIDEO, TEXT = 2, 64, 48, 7


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def tokens(x):
    return x.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """One residual layer of self attention, and projections for a second stream."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out, self.text = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        y = self.norm(x)
        return x + self.out(tokens(SDPA(heads(self.q(y)), heads(self.k(y)), heads(self.v(y)))))


class Model(nn.Module):
    """Runs ``body(blocks, x [B, 48, C], text [B, 7, C])``."""

    def __init__(self, body):
        super().__init__()
        self.body, self.blocks = body, nn.ModuleList(Block() for _ in range(2))

    def forward(self, *inputs):
        return self.body(self.blocks, *inputs)


def inputs(batch=2, text=TEXT):
    return torch.randn(batch, VIDEO, WIDTH), torch.randn(batch, text, WIDTH)


def text_last(blocks, x, text):
    b = blocks[0]
    q, k, v = (torch.cat([f(x), b.text(text)], 1) for f in (b.q, b.k, b.v))
    return tokens(SDPA(heads(q), heads(k), heads(v)))


def text_first(blocks, x, text):
    b = blocks[0]
    q, k, v = (torch.cat([heads(b.text(text)), heads(f(x))], dim=2) for f in (b.q, b.k, b.v))
    return tokens(SDPA(q, k, v))


def one_stream(blocks, x, text):
    return blocks[0](torch.cat((text, x), dim=-2))


def one_stream_two_layers(blocks, x, text):
    """The concatenation is a layer above: through residuals, norms and attention."""
    x = torch.cat([text, x], 1)
    for block in blocks:
        x = block(x)
    return x


def one_stream_in_checkpointed_layers(blocks, x, text):
    x = torch.cat([text, x], 1)
    for block in blocks:
        # The input of the region is named after this call, and calls nothing.
        x = checkpoint(block, x.permute(0, 1, 2), use_reentrant=False)
    return x


def split_and_joined_again(blocks, x, text):
    """As RoPE does that turns the video alone."""
    b, y = blocks[0], torch.cat([x, text], 1)
    q, k = heads(b.q(y)), heads(b.k(y))
    q, k = (torch.cat([z[:, :, :-TEXT] * 2, z[:, :, -TEXT:]], 2) for z in (q, k))
    return tokens(SDPA(q, k, heads(b.v(y))))


def written_in_place(blocks, x, text):
    b, y = blocks[0], torch.cat([text, x], 1)
    q, k = heads(b.q(y)) + 0, heads(b.k(y)) + 0
    q[:, :, TEXT:] = q[:, :, TEXT:] * 2
    return tokens(SDPA(q, k, heads(b.v(y))))


def through_reshapes(blocks, x, text):
    b, y = blocks[0], torch.cat([text, x], 1)
    y = y.transpose(0, 1).reshape(y.shape[1], -1).view(y.shape[1], -1, WIDTH).permute(1, 0, 2)
    q, k, v = torch.stack([b.q(y), b.k(y), b.v(y)], 0).unflatten(-1, (HEADS, -1)).permute(0, 1, 3, 2, 4).unbind(0)
    return tokens(SDPA(q[None].squeeze(0), k[..., :], v))


def unbound_behind_the_tokens(blocks, x, text):
    b, y = blocks[0], torch.cat([text, x], 1)
    q, k, v = torch.stack([f(y).unflatten(-1, (HEADS, -1)) for f in (b.q, b.k, b.v)], dim=2).unbind(2)
    return tokens(SDPA(*(z.transpose(1, 2) for z in (q, k, v))))


def transposed_and_back(blocks, x, text):
    y = torch.cat([text, x], 1).mT.contiguous().swapdims(1, 2)
    return blocks[0](y)


def three_segments(blocks, x, text):
    """Two texts on one side are one range; the third is its own."""
    return blocks[0](torch.cat([text, text[:, :3], x, text[:, :2]], 1))


def text_of_no_tokens(blocks, x, text):
    return blocks[0](torch.cat([text[:, :0], x], 1))


def reference_video(blocks, x, text):
    """A second video is no text, however it is joined."""
    return blocks[0](torch.cat([text, x, x[:, :20]], 1))


def rotation_alone(blocks, x, text):
    """A concatenation of channels, as rotate_half makes, holds no tokens."""
    b = blocks[0]
    x = torch.cat([x, x], 1)[:, : WIDTH // HEADS]
    q, k = (torch.cat([-z[..., 16:], z[..., :16]], -1) for z in (heads(b.q(x)), heads(b.k(x))))
    return tokens(SDPA(q, k, heads(b.v(x))))


def reordered(blocks, x, text):
    """After a permutation of the tokens nobody knows where the text is."""
    y = torch.cat([text, x], 1)
    return blocks[0](y.index_select(1, torch.randperm(y.shape[1])))


def picked_by_a_list(blocks, x, text):
    y = torch.cat([text, x], 1)
    return blocks[0](y[:, list(reversed(range(y.shape[1])))])


def text_among_keys(blocks, x, text):
    b = blocks[0]
    k, v = (torch.cat([b.text(text), f(x)], 1) for f in (b.k, b.v))
    return tokens(SDPA(heads(b.q(x)), heads(k), heads(v)))


# body -> dense key ranges, dense query ranges of each site
SEGMENTS = {
    text_last: ([VIDEO, VIDEO + TEXT],) * 2,
    text_first: ([0, TEXT],) * 2,
    one_stream: ([0, TEXT],) * 2,
    one_stream_two_layers: ([0, TEXT],) * 2,
    one_stream_in_checkpointed_layers: ([0, TEXT],) * 2,
    split_and_joined_again: ([VIDEO, VIDEO + TEXT],) * 2,
    written_in_place: ([0, TEXT],) * 2,
    through_reshapes: ([0, TEXT],) * 2,
    unbound_behind_the_tokens: ([0, TEXT],) * 2,
    transposed_and_back: ([0, TEXT],) * 2,
    three_segments: ([0, 10, 58, 60],) * 2,
    text_of_no_tokens: ([],) * 2,
    reference_video: ([0, TEXT],) * 2,
    rotation_alone: ([],) * 2,
    reordered: ([],) * 2,
    picked_by_a_list: ([],) * 2,
    text_among_keys: ([0, TEXT], []),
}


@pytest.mark.parametrize("body", SEGMENTS, ids=lambda body: body.__name__)
def test_text_stays_dense(body):
    done = run_pass(Model(body), inputs())
    assert done.sites and all(site.rewritten for site in done.sites)
    for arguments in done.attention():
        assert (arguments["dense_keys"], arguments["dense_queries"]) == SEGMENTS[body]
    keys = SEGMENTS[body][0]
    expected = ", ".join(f"{a}:{b}" for a, b in zip(keys[::2], keys[1::2], strict=True))
    assert all(site.details.get("text", "") == expected for site in done.sites)


@pytest.mark.parametrize(
    "body", [text_last, text_first, one_stream_two_layers, text_among_keys], ids=lambda body: body.__name__
)
def test_symbolic_segments(body):
    """The ranges are read at run time: at density 1.0 the text is all the same, but its length must fit."""
    model, sizes = Model(body), []
    done = None
    for video, text in ((48, 7), (64, 9)):
        x, y = torch.randn(1, video, WIDTH), torch.randn(1, text, WIDTH)
        for z in (x, y):
            torch._dynamo.mark_dynamic(z, 1)
        if done is None:
            done = run_pass(model, (x, y), density=1.0)
            compiled = torch.compile(model, backend=done, fullgraph=True)
        sizes.append((compiled(x, y), model(x, y)))
    for actual, expected in sizes:
        torch.testing.assert_close(actual, expected)
    assert all(site.rewritten and site.details["text"] for site in done.sites)
    assert all(isinstance(arguments["dense_keys"][1], torch.fx.Node) for arguments in done.attention())


# Tokens in the batch


def attend(block, x):
    return tokens(SDPA(heads(block.q(x)), heads(block.k(x)), heads(block.v(x))))


def spatial(blocks, x, text):
    y = x.unflatten(1, (3, 16)).flatten(0, 1)
    return attend(blocks[0], y).unflatten(0, (-1, 3)).flatten(1, 2)


def temporal(blocks, x, text):
    y = x.unflatten(1, (3, 16)).transpose(1, 2).reshape(-1, 3, WIDTH)
    return attend(blocks[0], y)


def spatial_of_one_video(blocks, x, text):
    return attend(blocks[0], x[:1].view(1, 3, 16, WIDTH).squeeze(0))


def folded_after_the_projection(blocks, x, text):
    """As sparse attention of the model's own: every third token attends to its like."""
    b = blocks[0]
    q, k, v = (heads(f(x).unflatten(1, (16, 3)).transpose(1, 2).flatten(0, 1)) for f in (b.q, b.k, b.v))
    return tokens(SDPA(q, k, v))


def folded_before_a_fused_projection(blocks, x, text):
    """As timm and TimeSformer: the batch is the second dimension for a while."""
    y = x.reshape(-1, 16, WIDTH)
    weights = torch.cat([blocks[0].q.weight, blocks[0].k.weight, blocks[0].v.weight])
    qkv = F.linear(y, weights).reshape(y.shape[0], 16, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    return tokens(SDPA(qkv[0], qkv[1], qkv[2]))


def folded_layers_above(blocks, x, text):
    y = x.reshape(-1, 16, WIDTH)
    for block in blocks:
        y = checkpoint(block, y, use_reentrant=False) * 1.5
    return y


def windows(blocks, x, text):
    y = x.view(-1, 3, 4, 4, WIDTH).unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 1, 3, 5, 6)
    return attend(blocks[0], y.reshape(-1, 12, WIDTH))


def unfolded_again(blocks, x, text):
    """Patches are made frame by frame, attention is over all of them."""
    y = blocks[0].out(x.unflatten(1, (3, 16)).flatten(0, 1)).unflatten(0, (-1, 3)).flatten(1, 2)
    return blocks[1](y)


def guidance_stacked(blocks, x, text):
    return blocks[0](torch.stack([x, x * 0.5]).flatten(0, 1))


def guidance_expanded(blocks, x, text):
    return blocks[0](x[:, None].expand(-1, 2, -1, -1).reshape(-1, VIDEO, WIDTH))


def guidance_concatenated(blocks, x, text):
    return blocks[0](torch.cat([x, x * 0.5]))


def packed_projection(blocks, x, text):
    """Projections over [B * S, C], as packed sequences have them."""
    b, y = blocks[0], x.flatten(0, 1)
    return tokens(SDPA(*(heads(f(y).unflatten(0, (-1, VIDEO))) for f in (b.q, b.k, b.v))))


def batch_dimension_added_and_dropped(blocks, x, text):
    return blocks[0](x.unsqueeze(0).squeeze(0)[None].view(-1, VIDEO, WIDTH))


def sequence_first(blocks, x, text):
    b, y = blocks[0], x.transpose(0, 1)
    q, k, v = (f(y).unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3) for f in (b.q, b.k, b.v))
    return tokens(SDPA(q, k, v))


FOLDED = [
    spatial,
    temporal,
    spatial_of_one_video,
    folded_after_the_projection,
    folded_before_a_fused_projection,
    folded_layers_above,
    windows,
]
WHOLE = [
    unfolded_again,
    guidance_stacked,
    guidance_expanded,
    guidance_concatenated,
    packed_projection,
    batch_dimension_added_and_dropped,
    sequence_first,
]


@pytest.mark.parametrize("body", FOLDED + WHOLE, ids=lambda body: body.__name__)
def test_factorised_attention_is_refused(body):
    sites = run_pass(Model(body), inputs()).sites
    expected = ("dense", "factorised attention") if body in FOLDED else ("rewritten", "")
    assert sites and {(site.decision, site.reason) for site in sites} == {expected}


@pytest.mark.parametrize("body", [spatial, temporal, unfolded_again], ids=lambda body: body.__name__)
def test_symbolic_batch(body):
    x, text = inputs(batch=4)
    torch._dynamo.mark_dynamic(x, 0)
    sites = run_pass(Model(body), (x, text)).sites
    assert {site.decision for site in sites} == {"dense" if body in FOLDED else "rewritten"}
