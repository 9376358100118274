"""Self, joint, mixed or cross: what q and k are projected from, whatever lies between."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fg_inductor.testing_passes import run_pass

SDPA = F.scaled_dot_product_attention
HEADS, WIDTH = 2, 64


@torch.library.custom_op("fgattn_test::packed_linear", mutates_args=())
def packed_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A linear layer as quantisation libraries hide it: an operator of their own with packed weights."""
    return x @ (packed.to(x.dtype) * scale)


@packed_linear.register_fake
def _(x, packed, scale):
    return x.new_empty(*x.shape[:-1], packed.shape[1])


@torch.library.custom_op("fgattn_test::fused_norm", mutates_args=())
def fused_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A norm as kernel libraries hide it: an operator of their own too, and no projection."""
    return F.rms_norm(x, (x.shape[-1],), weight)


@fused_norm.register_fake
def _(x, weight):
    return torch.empty_like(x)


class Toy(nn.Module):
    """Runs ``body(self, x, text)`` with layers enough for every case below."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.q, self.k, self.v, self.text_q, self.text_k, self.text_v = (nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        self.norm_q, self.norm_k = nn.LayerNorm(WIDTH // HEADS), nn.RMSNorm(WIDTH // HEADS)
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.1)
        self.conv = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(3))
        self.register_buffer("packed", torch.randint(-8, 8, (WIDTH, WIDTH), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(WIDTH))
        self.position = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x, text, freqs):
        return self.body(self, x, text, freqs).transpose(1, 2).flatten(2)


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(m, q, k, v):
    return SDPA(heads(q), heads(k), heads(v))


CASES = {}


def case(kind):
    def add(body):
        CASES[body.__name__] = (body, kind)
        return body

    return add


@case("self")
def three_linears(m, x, text, freqs):
    return attend(m, m.q(x), m.k(x), m.v(x))


@case("self")
def fused_projection_chunked(m, x, text, freqs):
    return attend(m, *m.qkv(m.norm(x)).chunk(3, -1))


@case("self")
def fused_projection_unbound(m, x, text, freqs):
    q, k, v = m.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return SDPA(m.norm_q(q), m.norm_k(k), v)


@case("self")
def rotation(m, x, text, freqs):
    def rotate(x):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * freqs.cos() - b * freqs.sin(), b * freqs.cos() + a * freqs.sin()], -1).flatten(-2)

    return SDPA(rotate(m.norm_q(heads(m.q(x)))), rotate(m.norm_k(heads(m.k(x)))), heads(m.v(x)))


@case("self")
def rotation_into_an_empty_tensor(m, x, text, freqs):
    def rotate(x):
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * freqs.cos() - x[..., 1::2] * freqs.sin()
        out[..., 1::2] = x[..., 0::2] * freqs.sin() + x[..., 1::2] * freqs.cos()
        return out

    return SDPA(rotate(heads(m.q(x))), rotate(heads(m.k(x))), heads(m.v(x)))


@case("self")
def rotation_written_through_views(m, x, text, freqs):
    def rotate(x):
        out = x.new_empty(x.shape)
        out[..., 0::2].copy_(x[..., 0::2] * freqs.cos())
        out.unflatten(-1, (-1, 2))[..., 1].copy_(x[..., 1::2] * freqs.sin())
        return out.contiguous() + 0

    return SDPA(rotate(heads(m.q(x))), rotate(heads(m.k(x))), heads(m.v(x)))


@case("self")
def rotation_of_a_part(m, x, text, freqs):
    q, k = heads(m.q(x)) + 0, heads(m.k(x)) + 0
    q[:, :, 4:] = q[:, :, 4:] * 2
    k[:, :, 4:] = k[:, :, 4:] * 2
    return SDPA(q, k, heads(m.v(x)))


@case("self")
def complex_rotation(m, x, text, freqs):
    def rotate(x):
        turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(freqs), freqs)
        return torch.view_as_real(turned).flatten(3).type_as(x)

    return SDPA(rotate(heads(m.q(x))), rotate(heads(m.k(x))), heads(m.v(x)))


@case("self")
def products_with_weights(m, x, text, freqs):
    q = torch.einsum("bsc,dc->bsd", x, m.q.weight)
    return attend(m, q, x @ m.k.weight.to(x.dtype).t(), torch.matmul(x, m.v.weight.t() * 2))


@case("self")
def adapter_on_q(m, x, text, freqs):
    """LoRA reads what the layer reads, through a cast and dropout of its own."""
    q = m.q(x) + m.b(m.a(m.dropout(x.to(m.a.weight.dtype)))) * 0.5
    return attend(m, q, m.k(x), m.v(x))


@case("self")
def adapter_alone(m, x, text, freqs):
    """Low-rank projections in place of full ones, with a norm between."""
    return attend(m, m.b(F.layer_norm(m.a(x), (4,))), m.k(x), m.v(x))


@case("self")
def adapter_in_the_weight(m, x, text, freqs):
    return attend(m, F.linear(x, m.q.weight + m.b.weight @ m.a.weight), m.k(x), m.v(x))


@case("self")
def opaque_projections(m, x, text, freqs):
    q, k = (fused_norm(packed_linear(x, m.packed, m.scale), m.norm.weight) for _ in range(2))
    return attend(m, q, k, packed_linear(x, m.packed, m.scale))


@case("self")
def dynamic_quantisation(m, x, text, freqs):
    """Each layer rounds x anew, by a scale taken from x."""

    def linear(x):
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        return ((x / scale).round().clamp(-128, 127) @ m.packed.to(x.dtype)) * scale * m.scale

    return attend(m, linear(x), linear(x), linear(x))


@case("self")
def norms_of_one_tensor(m, x, text, freqs):
    return attend(m, m.q(m.norm(x)), m.k(F.layer_norm(x, (WIDTH,))), m.v(x))


@case("joint")
def two_streams(m, x, text, freqs):
    q, k, v = (
        torch.cat(pair, 1) for pair in ((m.q(x), m.text_q(text)), (m.k(x), m.text_k(text)), (m.v(x), m.text_v(text)))
    )
    return attend(m, q, k, v)


@case("joint")
def text_written_into_the_sequence(m, x, text, freqs):
    q, k = heads(m.q(x)) + 0, heads(m.k(x)) + 0
    q[:, :, :8] = heads(m.text_q(text))
    k[:, :, :8] = heads(m.text_k(text))
    return SDPA(q, k, heads(m.v(x)))


@case("self")
def one_stream(m, x, text, freqs):
    x = torch.cat([text, x], 1)
    return attend(m, m.q(x), m.k(x), m.v(x))


@case("mixed")
def more_keys(m, x, text, freqs):
    return attend(m, m.q(x), torch.cat([m.k(x), m.text_k(text)], 1), torch.cat([m.v(x), m.text_v(text)], 1))


@case("mixed")
def more_keys_from_one_projection(m, x, text, freqs):
    both = torch.cat([x, text], 1)
    return attend(m, m.q(x), m.k(both), m.v(both))


@case("cross")
def two_inputs(m, x, text, freqs):
    return attend(m, m.q(x), m.k(text), m.v(text))


@case("cross")
def two_inputs_of_one_length(m, x, text, freqs):
    """As text that is padded to the length of the video."""
    text = F.pad(text, (0, 0, 0, x.shape[1] - text.shape[1]))
    return attend(m, m.q(x), m.k(text), m.v(text))


@case("cross")
def text_through_a_low_rank_projection(m, x, text, freqs):
    return attend(m, m.q(m.norm(x)), m.k(m.b(m.a(text))), m.v(text))


@case("cross")
def parts_of_one_sequence(m, x, text, freqs):
    return attend(m, m.q(x[:, 7:]), m.k(x[:, :7]), m.v(x[:, :7]))


@case("cross")
def chunks_of_one_sequence(m, x, text, freqs):
    first, second = x.chunk(2, 1)
    return attend(m, m.q(first), m.k(second), m.v(second))


@case("cross")
def one_rotation_for_both(m, x, text, freqs):
    q, k = heads(m.q(x)), heads(m.k(F.pad(text, (0, 0, 0, x.shape[1] - text.shape[1]))))
    freqs = freqs.repeat_interleave(2, -1)
    return SDPA(q * freqs, k * freqs, k)


@case("cross")
def projections_in_a_checkpointed_region(m, x, text, freqs):
    """One region returns q and k: each has its own way through it."""
    q, k = checkpoint(lambda x, text: (m.q(x), m.k(text)), x, text, use_reentrant=False)
    return attend(m, q, k, m.v(text))


@case("self")
def a_parameter_added_in_place(m, x, text, freqs):
    """To an input of the graph, which stays one."""
    x += m.position
    return attend(m, m.q(x), m.k(x), m.v(x))


@case("unknown")
def inputs_of_the_graph(m, x, text, freqs):
    return attend(m, x, x * 2, x)


@pytest.mark.parametrize("name", CASES)
def test_kind(name):
    body, kind = CASES[name]
    x, text, freqs = torch.randn(2, 20, WIDTH), torch.randn(2, 8, WIDTH), torch.rand(20, WIDTH // HEADS // 2)
    (site,) = run_pass(Toy(body), (x, text, freqs)).sites
    assert site.kind == kind
    assert site.decision == ("dense" if kind == "cross" else "rewritten")


def test_projections_of_what_an_earlier_site_returns():
    """That site is rewritten when the next one is looked at."""

    def body(m, x, text, freqs):
        x = attend(m, m.q(x), m.k(x), m.v(x))
        return SDPA(*(F.linear(x, m.a.weight[:, : WIDTH // HEADS] * scale) for scale in (1, 2, 3)))

    x, text, freqs = torch.randn(2, 20, WIDTH), torch.randn(2, 8, WIDTH), torch.rand(20, WIDTH // HEADS // 2)
    assert [site.kind for site in run_pass(Toy(body), (x, text, freqs)).sites] == ["self", "self"]


def test_unknown_with_a_mask_is_refused():
    def body(m, x, text, freqs):
        return SDPA(heads(x), heads(x), heads(x), attn_mask=text)

    (site,) = run_pass(Toy(body), (torch.randn(2, 20, WIDTH), torch.randn(2, 1, 1, 20), torch.rand(1))).sites
    assert (site.kind, site.reason) == ("unknown", "no projection in the graph")


def test_convolutional_projections_are_refused():
    def body(m, x, text, freqs):
        return attend(m, *(conv(x.transpose(1, 2)).transpose(1, 2) for conv in m.conv))

    (site,) = run_pass(Toy(body), (torch.randn(2, 20, WIDTH), torch.rand(1), torch.rand(1))).sites
    assert (site.decision, site.reason, site.video) == ("dense", "convolutional projections", False)


def test_projections_outside_a_checkpointed_region():
    """The body of the region sees q, k and v as inputs; what they come from lies in the graph around it."""

    def body(m, x, text, freqs):
        q, k, text_k = heads(m.q(x)), heads(m.k(x)), heads(m.text_k(F.pad(text, (0, 0, 0, 12))))
        x = checkpoint(SDPA, q, k, k, use_reentrant=False)
        return x + checkpoint(SDPA, q, text_k, text_k, use_reentrant=False)

    done = run_pass(Toy(body), (torch.randn(2, 20, WIDTH), torch.randn(2, 8, WIDTH), torch.rand(1)))
    assert [site.kind for site in done.sites] == ["self", "cross"]


@pytest.mark.parametrize("targets", [["q"], ["q", "k", "v"], ["k"]])
def test_peft_adapters(targets):
    peft = pytest.importorskip("peft")
    model = Toy(three_linears).train()
    inputs = (torch.randn(2, 20, WIDTH), torch.randn(2, 8, WIDTH), torch.rand(1))
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=targets, init_lora_weights=False)
    done = run_pass(peft.inject_adapter_in_model(config, model), inputs)
    assert len(done.calls(F.linear) or done.calls(torch._C._nn.linear)) == 3 + 2 * len(
        targets
    )  # the adapters are there
    assert [(site.kind, site.decision) for site in done.sites] == [("self", "rewritten")]
