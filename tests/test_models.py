"""Whole video models of diffusers, tiny and random: the decision on each attention site, and what it found."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fg_inductor.settings import Settings
from fg_inductor.testing_passes import SMALL, PassBackend, run_pass

diffusers = pytest.importorskip("diffusers")

FRAMES, HEIGHT, WIDTH, TEXT = 3, 4, 5, 7  # tokens after patches were made: 60 of video, 7 of text
VIDEO = FRAMES * HEIGHT * WIDTH
MIN_SEQ = 40  # video sites are longer, text and audio sites shorter

SELF = ("self", "")
JOINT = ("joint", "")
CROSS = ("cross", "cross attention")
SHORT = ("self", "shorter than min_seq")
FACTORISED = ("self", "factorised attention")
CONVOLUTIONAL = ("self", "convolutional projections")


@dataclasses.dataclass
class Case:
    """A model, the keyword arguments of one call, and what is expected of its sites in order."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    sites: list[tuple[str, str]]  # kind, reason ("" for a rewritten site)
    counts: tuple[int, int, int, int]  # calls of dense SDPA, select_pooled, attention, query_order
    text: str = ""  # of the rewritten sites: where the dense tokens lie, the first four letters of it
    key_mask: bool = False


def latents(channels=4, batch=1):
    return torch.randn(batch, channels, FRAMES, 2 * HEIGHT, 2 * WIDTH)


def common(text_width=16, batch=1):
    return {
        "encoder_hidden_states": torch.randn(batch, TEXT, text_width),
        "timestep": torch.full((batch,), 500),
        "return_dict": False,
    }


def padded_text(batch=1):
    """A mask of the valid text tokens: two are padding."""
    return (torch.arange(TEXT) < TEXT - 2).expand(batch, -1).float()


def wan(**config):
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32, **config,
    )  # fmt: skip


def wan_image():
    return wan(image_dim=24, added_kv_proj_dim=64)


def wan_inputs(batch=1):
    return {"hidden_states": latents(batch=batch), **common(batch=batch)}


def wan_image_inputs():
    """257 image tokens are split off 512 text tokens, whatever their number."""
    inputs = wan_inputs() | {"encoder_hidden_states_image": torch.randn(1, 9, 24)}
    return inputs | {"encoder_hidden_states": torch.randn(1, 512, 16)}


def hunyuan():
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(8, 12, 12),
    )  # fmt: skip


def hunyuan_inputs():
    more = {"pooled_projections": torch.randn(1, 8), "encoder_attention_mask": padded_text()}
    return {"hidden_states": latents(), **common(), **more}


def cogvideox():
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=2 * WIDTH, sample_height=2 * HEIGHT,
        sample_frames=4 * (FRAMES - 1) + 1, max_text_seq_length=TEXT,
    )  # fmt: skip


def ltx():
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, cross_attention_dim=64,
        num_layers=1, caption_channels=16,
    )  # fmt: skip


def ltx_inputs():
    size = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    return {"hidden_states": torch.randn(1, VIDEO, 4), **common(), "encoder_attention_mask": padded_text(), **size}


def mochi():
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4, max_sequence_length=TEXT,
    )  # fmt: skip


def mochi_inputs():
    return {"hidden_states": latents(), **common(), "encoder_attention_mask": padded_text().bool()}


def allegro():
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=48, sample_width=2 * WIDTH, sample_height=2 * HEIGHT, sample_frames=FRAMES,
        caption_channels=16,
    )  # fmt: skip


def allegro_inputs():
    """With the mask of padded latents, which the pipeline leaves out: repeated over the heads."""
    axes = [torch.arange(size) for size in (FRAMES, HEIGHT, WIDTH)]
    angles = tuple((torch.rand(size, 8).cos(), torch.rand(size, 8).sin()) for size in (FRAMES, HEIGHT, WIDTH))
    positions = tuple(torch.cartesian_prod(*axes).T[:, None].contiguous())
    masks = {"attention_mask": torch.ones(1, FRAMES, 2 * HEIGHT, 2 * WIDTH), "encoder_attention_mask": padded_text()}
    return {"hidden_states": latents(), **common(), **masks, "image_rotary_emb": (angles, positions)}


def cosmos():
    return diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=1, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 32, 32), patch_size=(1, 2, 2), concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )  # fmt: skip


def cosmos3():
    return diffusers.Cosmos3OmniTransformer(
        head_dim=32, hidden_size=64, intermediate_size=24, latent_channel=2, latent_patch_size=1, num_attention_heads=2,
        num_hidden_layers=1, num_key_value_heads=1, patch_latent_dim=2, rms_norm_eps=1e-5, rope_axes_dim=[4, 6, 6],
        vocab_size=32,
    )  # fmt: skip


def cosmos3_inputs():
    """Text, then video: grouped queries of the video attend to both."""
    length = TEXT + VIDEO
    video = torch.arange(TEXT, length)
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.zeros(3, length, dtype=torch.long),
        "und_len": TEXT,
        "sequence_length": length,
        "vision_tokens": [torch.randn(1, 2, FRAMES, HEIGHT, WIDTH)],
        "vision_token_shapes": [(FRAMES, HEIGHT, WIDTH)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.ones(VIDEO),
        "vision_noisy_frame_indexes": [torch.arange(FRAMES)],
        "return_dict": False,
    }


def latte():
    return diffusers.LatteTransformer3DModel(
        sample_size=16, num_layers=1, patch_size=2, attention_head_dim=16, num_attention_heads=2, caption_channels=16,
        in_channels=4, cross_attention_dim=32, out_channels=8, attention_bias=True, norm_elementwise_affine=False,
        norm_type="ada_norm_single", num_embeds_ada_norm=1000, video_length=48,
    )  # fmt: skip


def latte_inputs():
    """64 positions and 48 frames: each of its attentions is long enough."""
    return {"hidden_states": torch.randn(1, 4, 48, 16, 16), **common()}


def wan_decoder():
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    return vae.decoder


CASES = {
    "Wan T2V": Case(wan, wan_inputs, [SELF, CROSS] * 2, (2, 2, 2, 1)),
    "Wan T2V, batch of 2": Case(wan, lambda: wan_inputs(2), [SELF, CROSS] * 2, (2, 2, 2, 1)),
    "Wan I2V": Case(
        lambda: wan(image_dim=24, added_kv_proj_dim=64), wan_image_inputs, [SELF, CROSS, CROSS] * 2, (4, 2, 2, 1)
    ),
    "HunyuanVideo": Case(hunyuan, hunyuan_inputs, [SHORT, JOINT, SELF], (1, 2, 2, 1), "60:6", key_mask=True),
    "CogVideoX": Case(
        cogvideox, lambda: {"hidden_states": latents().transpose(1, 2), **common()}, [SELF, SELF], (0, 2, 2, 1), "0:7"
    ),
    "LTX-Video": Case(ltx, ltx_inputs, [SELF, CROSS], (1, 1, 1, 1)),
    "Mochi": Case(mochi, mochi_inputs, [CROSS, JOINT, JOINT], (1, 2, 2, 2), "60:u"),
    "Allegro": Case(allegro, allegro_inputs, [SELF, CROSS], (1, 1, 1, 1), key_mask=True),
    "Cosmos": Case(cosmos, lambda: {"hidden_states": latents(), **common(), "fps": 30}, [SELF, CROSS], (1, 1, 1, 1)),
    "Cosmos3": Case(cosmos3, cosmos3_inputs, [("self", "causal"), ("mixed", "")], (1, 1, 1, 1), "0:7"),
    "Latte": Case(latte, latte_inputs, [FACTORISED, CROSS, FACTORISED], (3, 0, 0, 0)),
    "AutoencoderKLWan": Case(wan_decoder, lambda: {"x": torch.randn(1, 4, 1, 8, 10)}, [CONVOLUTIONAL], (1, 0, 0, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_sites(name):
    case = CASES[name]
    if name == "Cosmos3" and not hasattr(diffusers, "Cosmos3OmniTransformer"):
        pytest.skip(f"diffusers {diffusers.__version__} has no Cosmos3")
    model, inputs = case.model().eval(), case.inputs()
    with torch.no_grad():
        done = run_pass(model, inputs, density=1.0, min_seq=MIN_SEQ)
        expected = model(**inputs)
    assert [(site.kind, site.reason) for site in done.sites] == case.sites
    rewritten = [site for site in done.sites if site.rewritten]
    assert done.counts() == case.counts
    for site in rewritten:
        assert (site.details.get("text", "")[:4], site.details["token_grid"]) == (case.text, "3x4x5")
        assert ("key_mask" in site.details) == case.key_mask
    torch.testing.assert_close(done.result, expected)


def test_min_seq_alone_keeps_text_dense():
    """At ``min_seq`` 1 the refiner of the text is self attention like any other; cross attention stays dense."""
    with torch.no_grad():
        sites = run_pass(hunyuan().eval(), hunyuan_inputs()).sites
        assert [site.reason for site in sites] == ["mask is not a key mask", "", ""]
        sites = run_pass(wan().eval(), wan_inputs()).sites
    assert [site.reason for site in sites] == ["", "cross attention"] * 2


def test_one_graph_for_all_resolutions():
    """No recompile, and (PassBackend checks) no guard that the pass added."""
    model, backend = wan().eval(), PassBackend(Settings(**SMALL, density=1.0))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for frames, height, width in ((3, 8, 10), (4, 12, 14), (5, 6, 16), (6, 16, 18)):
            inputs = wan_inputs()
            inputs["hidden_states"] = torch.randn(1, 4, frames, height, width)
            for dim in (2, 3, 4):
                torch._dynamo.mark_dynamic(inputs["hidden_states"], dim)
            torch.testing.assert_close(compiled(**inputs), model(**inputs))
    assert len(backend.graphs) == 1
    assert [site.kind for site in backend.sites if site.rewritten] == ["self", "self"]
    assert len(backend.calls(torch.ops.fgattn.query_order.default)) == 1


def test_blocks_compiled_alone():
    """All layers are one graph; nothing in it shows the token grid, but it can be given."""
    model, inputs = wan().eval(), wan_inputs()
    with torch.no_grad():
        expected = model(**inputs)
        backend = PassBackend(Settings(**SMALL, density=1.0, token_grid=(FRAMES, HEIGHT, WIDTH)))
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
        torch.testing.assert_close(model(**inputs), expected)
    assert [(site.path, site.kind) for site in backend.sites] == [("attn1", "self"), ("attn2", "cross")]
    assert backend.sites[0].rewritten and backend.sites[0].details["token_grid"] == "3x4x5"


def test_gradient_checkpointing():
    model, inputs = wan().train(), wan_inputs()
    model.enable_gradient_checkpointing()
    done = run_pass(model, inputs, density=1.0)
    assert [(site.path, site.rewritten) for site in done.sites] == [
        ("blocks.0.attn1", True), ("blocks.0.attn2", False), ("blocks.1.attn1", True), ("blocks.1.attn2", False)
    ]  # fmt: skip
    assert {site.details.get("token_grid") for site in done.sites if site.rewritten} == {"3x4x5"}
    actual = torch.autograd.grad(done.result[0].square().sum(), list(model.parameters()), allow_unused=True)
    expected = torch.autograd.grad(model(**inputs)[0].square().sum(), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(actual, expected)


def test_adapters():
    peft = pytest.importorskip("peft")
    model, inputs = wan().eval(), wan_inputs()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))
    with torch.no_grad():
        done = run_pass(model, inputs, density=1.0)
        torch.testing.assert_close(done.result, model(**inputs))
    assert [(site.kind, site.decision) for site in done.sites] == [("self", "rewritten"), ("cross", "dense")] * 2


def test_fused_projections():
    model, inputs = wan().eval(), wan_inputs()
    model.fuse_qkv_projections()
    with torch.no_grad():
        sites = run_pass(model, inputs).sites
    assert [(site.kind, site.decision) for site in sites] == [("self", "rewritten"), ("cross", "dense")] * 2
