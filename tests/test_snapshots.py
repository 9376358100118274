"""The graph of small modules before and after the pass, as text. ``EXPECTTEST_ACCEPT=1 pytest`` rewrites the texts."""

# ruff: noqa: E501  (a line of the text is a node, however long)

import torch
import torch.nn.functional as F
from expecttest import TestCase
from torch import nn
from torch.utils.checkpoint import checkpoint

from fg_inductor.testing_passes import run_pass

HEADS, WIDTH = 2, 128  # head dim 64: a scale of 0.125


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Layers(nn.Module):
    """``body(layers, *inputs)``; the projections have no bias, so that the texts stay short."""

    def __init__(self, body, key_width=WIDTH):
        super().__init__()
        self.body = body
        self.q, self.text = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv = nn.Linear(WIDTH, key_width, bias=False)

    def forward(self, *inputs):
        return self.body(self, *inputs)


def self_attention(m, x):
    q, k = heads(m.q(x)), heads(m.kv(x))
    return F.scaled_dot_product_attention(query=q, key=k, value=k, attn_mask=None, dropout_p=0.0, is_causal=False)


def joint_text_last(m, x, text):
    q, k = (torch.cat([heads(f(x)), heads(m.text(text))], 2) for f in (m.q, m.kv))
    return F.scaled_dot_product_attention(q, k, k)


def joint_text_first(m, x, text):
    """The concatenation above the projections, a convolution that shows the token grid, any length."""
    y = torch.cat([text, x.flatten(2).transpose(1, 2)], dim=1)
    q, k = heads(m.q(y)), heads(m.kv(y))
    return F.scaled_dot_product_attention(q, k, k)


def key_padding(m, x, valid):
    q, k = heads(m.q(x)), heads(m.kv(x))
    mask = valid[:, None, None, :].expand(-1, HEADS, -1, -1)
    return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)


def grouped_queries(m, x):
    q, k = heads(m.q(x)), m.kv(x).unflatten(-1, (1, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k, enable_gqa=True, scale=0.5)


def checkpointed_region(m, x):
    return checkpoint(self_attention, m, x, use_reentrant=False).transpose(1, 2) * 2


def nothing_to_rewrite(m, x, text):
    """Cross attention, and causal attention."""
    q = heads(m.q(x))
    k = heads(m.text(text))
    x = F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)
    q = heads(m.q(x))
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def tokens(length=80):
    return torch.randn(1, length, WIDTH)


class TestSnapshots(TestCase):
    def run_pass(self, model, *inputs, **settings):
        done = run_pass(model, inputs, density=0.25, **settings)
        self.assertEqual(len(done.graphs), 1)
        return done.before[0], done.after[0]

    def test_self_attention(self):
        before, after = self.run_pass(Layers(self_attention), tokens())
        self.assertExpectedInline(
            before,
            """\
%0 = linear(in1, in0, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in1, in2, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = scaled_dot_product_attention(attn_mask=None, dropout_p=0.0, is_causal=False, key=%5, query=%2, value=%5)
return (%6)""",
        )
        self.assertExpectedInline(
            after,
            """\
%0 = linear(in1, in0, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in1, in2, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = fgattn.select_pooled.default(%2, %5, None, None, 0.125, 16, 8, 16, 1.0, 0.25, 1.0, (), (), 0, 'sum', None, None, None)
%7 = fgattn.attention.default(%2, %5, %5, %6, None, None, 0.125, 16, 8, 'none', 0, 'auto')
%8 = getitem(%7, 0)
return (%8)""",
        )

    def test_joint_text_last(self):
        before, after = self.run_pass(Layers(joint_text_last), tokens(), tokens(7))
        self.assertExpectedInline(
            before,
            """\
%0 = linear(in0, in1, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in2, in3, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = cat((%2, %5), 2)
%7 = linear(in0, in4, None)
%8 = .unflatten(%7, -1, (2, -1))
%9 = .transpose(%8, 1, 2)
%10 = linear(in2, in3, None)
%11 = .unflatten(%10, -1, (2, -1))
%12 = .transpose(%11, 1, 2)
%13 = cat((%9, %12), 2)
%14 = scaled_dot_product_attention(%6, %13, %13)
return (%14)""",
        )
        self.assertExpectedInline(
            after,
            """\
%0 = linear(in0, in1, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in2, in3, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = cat((%2, %5), 2)
%7 = linear(in0, in4, None)
%8 = .unflatten(%7, -1, (2, -1))
%9 = .transpose(%8, 1, 2)
%10 = linear(in2, in3, None)
%11 = .unflatten(%10, -1, (2, -1))
%12 = .transpose(%11, 1, 2)
%13 = cat((%9, %12), 2)
%14 = fgattn.select_pooled.default(%6, %13, None, None, 0.125, 16, 8, 16, 1.0, 0.25, 1.0, (80, 87), (80, 87), 0, 'sum', None, None, None)
%15 = fgattn.attention.default(%6, %13, %13, %14, None, None, 0.125, 16, 8, 'none', 0, 'auto')
%16 = getitem(%15, 0)
return (%16)""",
        )

    def test_joint_text_first(self):
        video = torch.randn(1, WIDTH, 4, 4, 5)
        before, after = self.run_pass(Layers(joint_text_first), video, tokens(7), token_grid=(4, 4, 5))
        self.assertExpectedInline(
            before,
            """\
%0 = .flatten(in0, 2)
%1 = .transpose(%0, 1, 2)
%2 = cat((in1, %1), dim=1)
%3 = linear(%2, in2, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = linear(%2, in3, None)
%7 = .unflatten(%6, -1, (2, -1))
%8 = .transpose(%7, 1, 2)
%9 = scaled_dot_product_attention(%5, %8, %8)
return (%9)""",
        )
        self.assertExpectedInline(
            after,
            """\
%0 = .flatten(in0, 2)
%1 = .transpose(%0, 1, 2)
%2 = cat((in1, %1), dim=1)
%3 = linear(%2, in2, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = linear(%2, in3, None)
%7 = .unflatten(%6, -1, (2, -1))
%8 = .transpose(%7, 1, 2)
%9 = fgattn.query_order.default(4, 4, 5, 7, 0, 16, device(type='cpu'))
%10 = fgattn.reorder.default(%8, %9)
%11 = fgattn.reorder.default(%8, %9)
%12 = fgattn.select_pooled.default(%5, %10, None, %9, 0.125, 16, 8, 16, 1.0, 0.25, 1.0, (80, 87), (0, 7), 0, 'sum', None, None, None)
%13 = fgattn.attention.default(%5, %10, %11, %12, None, %9, 0.125, 16, 8, 'none', 0, 'auto')
%14 = getitem(%13, 0)
return (%14)""",
        )

    def test_symbolic_length(self):
        """Text of any length behind a video of any length, dense below 64 tokens."""
        x, text = tokens(), tokens(7)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(text, 1)
        _, after = self.run_pass(Layers(joint_text_last), x, text, min_seq=64)
        self.assertExpectedInline(
            after,
            """\
%0 = linear(in1, in2, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in4, in5, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = cat((%2, %5), 2)
%7 = linear(in1, in6, None)
%8 = .unflatten(%7, -1, (2, -1))
%9 = .transpose(%8, 1, 2)
%10 = linear(in4, in5, None)
%11 = .unflatten(%10, -1, (2, -1))
%12 = .transpose(%11, 1, 2)
%13 = cat((%9, %12), 2)
%14 = aten.sym_size.int(%9, 2)
%15 = aten.sym_size.int(%12, 2)
%16 = add(%14, %15)
%17 = aten.sym_size.int(%2, 2)
%18 = aten.sym_size.int(%5, 2)
%19 = add(%17, %18)
%20 = fgattn.select_pooled.default(%6, %13, None, None, 0.125, 16, 8, 16, 1.0, 0.25, 1.0, (%14, %16), (%17, %19), 64, 'sum', None, None, None)
%21 = fgattn.attention.default(%6, %13, %13, %20, None, None, 0.125, 16, 8, 'none', 64, 'auto')
%22 = getitem(%21, 0)
return (%22)""",
        )

    def test_key_padding(self):
        before, after = self.run_pass(Layers(key_padding), tokens(), torch.ones(1, 80, dtype=torch.bool))
        self.assertExpectedInline(
            before,
            """\
%0 = linear(in1, in0, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in1, in2, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = getitem(in3, (::, None, None, ::))
%7 = .expand(%6, -1, 2, -1, -1)
%8 = scaled_dot_product_attention(%2, %5, %5, attn_mask=%7)
return (%8)""",
        )
        self.assertExpectedInline(
            after,
            """\
%0 = linear(in1, in0, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in1, in2, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = getitem(in3, (::, None, None, ::))
%7 = .expand(%6, -1, 2, -1, -1)
%8 = aten.select.int(%6, 2, 0)
%9 = aten.select.int(%8, 1, 0)
%10 = fgattn.select_pooled.default(%2, %5, %9, None, 0.125, 16, 8, 16, 1.0, 0.25, 1.0, (), (), 0, 'sum', None, None, None)
%11 = fgattn.attention.default(%2, %5, %5, %10, %9, None, 0.125, 16, 8, 'none', 0, 'auto')
%12 = getitem(%11, 0)
return (%12)""",
        )

    def test_grouped_queries(self):
        before, after = self.run_pass(Layers(grouped_queries, key_width=64), tokens(), tail="pooled")
        self.assertExpectedInline(
            before,
            """\
%0 = linear(in1, in0, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in1, in2, None)
%4 = .unflatten(%3, -1, (1, -1))
%5 = .transpose(%4, 1, 2)
%6 = scaled_dot_product_attention(%2, %5, %5, enable_gqa=True, scale=0.5)
return (%6)""",
        )
        self.assertExpectedInline(
            after,
            """\
%0 = linear(in1, in0, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in1, in2, None)
%4 = .unflatten(%3, -1, (1, -1))
%5 = .transpose(%4, 1, 2)
%6 = fgattn.select_pooled.default(%2, %5, None, None, 0.5, 16, 8, 16, 1.0, 0.25, 1.0, (), (), 0, 'sum', None, None, None)
%7 = fgattn.attention.default(%2, %5, %5, %6, None, None, 0.5, 16, 8, 'pooled', 0, 'auto')
%8 = getitem(%7, 0)
return (%8)""",
        )

    def test_checkpointed_region(self):
        before, after = self.run_pass(Layers(checkpointed_region), tokens())
        self.assertExpectedInline(
            before,
            """\
%0 = tag_activation_checkpoint(graph 1, in0, in1, in2, use_reentrant=False)
%1 = getitem(%0, 0)
%2 = .transpose(%1, 1, 2)
%3 = mul(%2, 2)
return (%3)

graph 1:
%0 = linear(in0, in1, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in0, in2, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = scaled_dot_product_attention(attn_mask=None, dropout_p=0.0, is_causal=False, key=%5, query=%2, value=%5)
return (%6)""",
        )
        self.assertExpectedInline(
            after,
            """\
%0 = tag_activation_checkpoint(graph 1, in0, in1, in2, use_reentrant=False)
%1 = getitem(%0, 0)
%2 = .transpose(%1, 1, 2)
%3 = mul(%2, 2)
return (%3)

graph 1:
%0 = linear(in0, in1, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in0, in2, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = fgattn.select_pooled.default(%2, %5, None, None, 0.125, 16, 8, 16, 1.0, 0.25, 1.0, (), (), 0, 'sum', None, None, None)
%7 = fgattn.attention.default(%2, %5, %5, %6, None, None, 0.125, 16, 8, 'none', 0, 'auto')
%8 = getitem(%7, 0)
return (%8)""",
        )

    def test_nothing_to_rewrite(self):
        before, after = self.run_pass(Layers(nothing_to_rewrite), tokens(), tokens(7))
        self.assertExpectedInline(
            before,
            """\
%0 = linear(in1, in0, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in3, in2, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = scaled_dot_product_attention(%2, %5, %5)
%7 = .transpose(%6, 1, 2)
%8 = .flatten(%7, 2)
%9 = linear(%8, in0, None)
%10 = .unflatten(%9, -1, (2, -1))
%11 = .transpose(%10, 1, 2)
%12 = scaled_dot_product_attention(%11, %11, %11, is_causal=True)
return (%12)""",
        )
        self.assertEqual(after, before)
