"""The video models of diffusers, tiny and random: how to build and call each, and what each attention site must become.

``python tests/models.py`` writes the table of models into README.md. A row of ``MODELS`` is one test in
``test_models.py``; its sites were worked out from the source of the model, not from what the pass did.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

FRAMES, HEIGHT, WIDTH, TEXT = 3, 4, 5, 7  # tokens after patches were made: 60 of video, 7 of text
VIDEO = FRAMES * HEIGHT * WIDTH
AUDIO = 9
GRID = f"{FRAMES}x{HEIGHT}x{WIDTH}"
MIN_SEQ = 40  # video sites are longer, text and audio sites shorter

SELF, JOINT, MIXED = ("self", ""), ("joint", ""), ("mixed", "")
UNKNOWN = ("unknown", "")  # rewritten, as its lengths are equal and it has no mask
CROSS = ("cross", "cross attention")
SHORT = ("self", "shorter than min_seq")
CAUSAL = ("self", "causal")
MASKED = ("self", "mask is not a key mask")
FACTORISED = ("self", "factorised attention")
CONVOLUTIONAL = ("self", "convolutional projections")
FLEX = ("unknown", "flex attention")
FACES = ("mixed", "shorter than min_seq")


@dataclasses.dataclass
class Model:
    """A model, the keyword arguments of one call, and what is expected.

    sites      (kind, reason) in the order of execution, flex attention last; the reason of a rewritten site is ""
    text       where the text of the rewritten sites lies, the beginning of it
    grids      the token grid that the pass finds for the rewritten sites, in order; one for all, none: ""
    key_mask   whether the rewritten sites are masked by keys
    fullgraph  whether Dynamo traces it as one graph
    blocks     whether diffusers names its repeated blocks, so that ``compile_repeated_blocks`` can compile them
    trains     whether it trains under AOTAutograd as it is, without this package
    float64    whether its own code runs in float64
    checkpoints whether Dynamo traces its gradient checkpointing, without this package
    by_default whether it belongs to the representative few that every run tests
    note       for the table of models
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    sites: list[tuple[str, str]]
    text: str = ""
    grids: tuple[str, ...] = (GRID,)
    key_mask: bool = False
    fullgraph: bool = True
    blocks: bool = True
    trains: bool = True
    float64: bool = True
    checkpoints: bool = True
    by_default: bool = False
    note: str = ""

    @property
    def rewritten(self) -> int:
        return sum(not reason for _, reason in self.sites)


MODELS: dict[str, Model] = {}


def diffusers():
    import diffusers

    return diffusers


@dataclasses.dataclass
class Build:
    """Builds a class of diffusers by its name, which an older version may not have: AttributeError when called."""

    name: str
    config: dict[str, Any]
    part: str = ""

    def __init__(self, name: str, part: str = "", **config: Any):
        self.name, self.part, self.config = name, part, config

    def __call__(self) -> nn.Module:
        model = getattr(diffusers(), self.name)(**self.config)
        return getattr(model, self.part) if self.part else model


def class_name(case: "Model") -> str:
    return case.build.name


def randomise(model: nn.Module) -> nn.Module:
    """Random weights of usual size everywhere: models begin with zero gates and outputs, behind which all is equal."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# Inputs


def latents(channels: int = 4, batch: int = 1, frames: int = FRAMES) -> torch.Tensor:
    return torch.randn(batch, channels, frames, 2 * HEIGHT, 2 * WIDTH)


def common(text_width: int = 16, batch: int = 1, text: int = TEXT) -> dict[str, Any]:
    return {
        "encoder_hidden_states": torch.randn(batch, text, text_width),
        "timestep": torch.full((batch,), 500),
        "return_dict": False,
    }


def padded_text(batch: int = 1, length: int = TEXT) -> torch.Tensor:
    """A mask of the valid text tokens: two are padding."""
    return (torch.arange(length) < length - 2).expand(batch, -1).float()


# The Wan family

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip


def wan_inputs(batch: int = 1) -> dict[str, Any]:
    return {"hidden_states": latents(batch=batch), **common(batch=batch)}


def wan_image_inputs() -> dict[str, Any]:
    """257 image tokens are split off 512 text tokens, whatever their number."""
    inputs = wan_inputs() | {"encoder_hidden_states_image": torch.randn(1, 9, 24)}
    return inputs | {"encoder_hidden_states": torch.randn(1, 512, 16)}


MODELS["Wan 2.1/2.2 T2V"] = Model(Build("WanTransformer3DModel", **WAN), wan_inputs, [SELF, CROSS] * 2, by_default=True)
MODELS["Wan 2.1/2.2 T2V, batch of 2"] = Model(
    Build("WanTransformer3DModel", **WAN), lambda: wan_inputs(2), [SELF, CROSS] * 2
)
MODELS["Wan 2.2 TI2V"] = Model(
    Build("WanTransformer3DModel", **WAN), lambda: wan_inputs() | {"timestep": torch.full((1, VIDEO), 500.0)},
    [SELF, CROSS] * 2, note="a timestep for each token",
)  # fmt: skip
MODELS["Wan 2.1 I2V"] = Model(
    Build("WanTransformer3DModel", **WAN, image_dim=24, added_kv_proj_dim=64), wan_image_inputs,
    [SELF, CROSS, CROSS] * 2, by_default=True,
)  # fmt: skip
MODELS["Wan VACE"] = Model(
    Build("WanVACETransformer3DModel", **WAN, vace_layers=[0], vace_in_channels=12),
    lambda: wan_inputs() | {"control_hidden_states": latents(12)}, [SELF, CROSS] * 3,
)  # fmt: skip


def wan_animate_inputs() -> dict[str, Any]:
    return {
        **wan_image_inputs(), "hidden_states": latents(12, frames=FRAMES + 1), "pose_hidden_states": latents(),
        "face_pixel_values": torch.randn(1, 3, 4 * (FRAMES - 1) + 1, 16, 16),
    }  # fmt: skip


MODELS["Wan Animate"] = Model(
    Build(
        "WanAnimateTransformer3DModel", **WAN | {"in_channels": 12}, latent_channels=4, image_dim=24,
        added_kv_proj_dim=64, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16,
        motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16,
        face_encoder_num_heads=2, inject_face_latents_blocks=1,
    ),
    wan_animate_inputs, [SELF, CROSS, CROSS, CROSS] * 2, grids=("4x4x5",), trains=False,
    note="one reference frame beside the video",
)  # fmt: skip


def wan_animate2_inputs() -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [latents()[0]], "timestep": torch.tensor([1.0]), "condition_latents": [latents()[0]],
        "encoder_hidden_states": [torch.randn(TEXT, 16)], "encoder_hidden_states_image": torch.randn(1, 9, 1280),
        "kv_cache": WanAnimate2KVCache(1), "kv_cache_mode": "extract", "seq_len": VIDEO,
        "offset_grid_sizes": torch.tensor([[FRAMES, HEIGHT, WIDTH]]), "return_dict": False,
    }  # fmt: skip


MODELS["Wan Animate 2"] = Model(
    Build(
        "WanAnimate2Transformer3DModel", patch_size=(1, 2, 2), text_len=16, in_dim=8, dim=128, ffn_dim=64, freq_dim=64,
        text_dim=16, out_dim=4, num_heads=4, num_layers=1, use_img_emb=True,
    ),
    wan_animate2_inputs, [UNKNOWN, CROSS, CROSS], grids=("",), fullgraph=False, blocks=False, trains=False,
    note="graph breaks leave the projections out of the graph; its cached pass uses flex attention",
)  # fmt: skip
MODELS["SkyReels V2"] = Model(Build("SkyReelsV2Transformer3DModel", **WAN), wan_inputs, [SELF, CROSS] * 2)


def skyreels_inputs() -> dict[str, Any]:
    return wan_inputs() | {
        "hidden_states": latents(frames=4), "timestep": torch.full((1, 4), 500), "enable_diffusion_forcing": True,
        "fps": torch.tensor([0]),
    }  # fmt: skip


MODELS["SkyReels V2 DF"] = Model(
    Build("SkyReelsV2Transformer3DModel", **WAN, num_frame_per_block=2, inject_sample_info=True), skyreels_inputs,
    [MASKED, CROSS] * 2, note="causal from block of frames to block",
)  # fmt: skip
MODELS["ChronoEdit"] = Model(Build("ChronoEditTransformer3DModel", **WAN), wan_inputs, [SELF, CROSS] * 2)


def helios_inputs() -> dict[str, Any]:
    history = {"short": 1, "mid": 2, "long": 4}
    latent = {f"latents_history_{name}": latents(frames=size) for name, size in history.items()}
    places = {f"indices_latents_history_{name}": torch.arange(size)[None].float() for name, size in history.items()}
    return wan_inputs() | latent | places | {"indices_hidden_states": torch.arange(FRAMES)[None].float() + 9}


MODELS["Helios"] = Model(
    Build(
        "HeliosTransformer3DModel",
        **{name: x for name, x in WAN.items() if name != "rope_max_seq_len"} | {"attention_head_dim": 12},
        rope_dim=(4, 4, 4),
    ),
    helios_inputs, [SELF, CROSS] * 2, grids=("", GRID), note="history at several resolutions before the video",
)  # fmt: skip


def anyflow_inputs(frames: int = FRAMES, width: int = WIDTH) -> dict[str, Any]:
    return common() | {
        "hidden_states": torch.randn(1, frames, 4, 2 * HEIGHT, 2 * width), "timestep": torch.full((1, frames), 500.0),
        "r_timestep": torch.full((1, frames), 250.0),
    }  # fmt: skip


MODELS["AnyFlow"] = Model(Build("AnyFlowTransformer3DModel", **WAN), anyflow_inputs, [SELF, CROSS] * 2)
MODELS["AnyFlow FAR"] = Model(
    Build("AnyFlowFARTransformer3DModel", **WAN, compressed_patch_size=(1, 4, 4), full_chunk_limit=3),
    lambda: anyflow_inputs(4, 8) | {"chunk_partition": [2, 2]}, [CROSS, CROSS, FLEX, FLEX], trains=False,
    note="flex attention over causal chunks",
)  # fmt: skip

# HunyuanVideo and what followed it

HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": False,
    "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (8, 12, 12),
}  # fmt: skip


def hunyuan_inputs() -> dict[str, Any]:
    more = {"pooled_projections": torch.randn(1, 8), "encoder_attention_mask": padded_text()}
    return {"hidden_states": latents(), **common(), **more}


MODELS["HunyuanVideo"] = Model(
    Build("HunyuanVideoTransformer3DModel", **HUNYUAN), hunyuan_inputs, [SHORT, JOINT, SELF], "60:6", key_mask=True,
    by_default=True, note="padded text is masked",
)  # fmt: skip
MODELS["HunyuanVideo I2V"] = Model(
    Build("HunyuanVideoTransformer3DModel", **HUNYUAN, image_condition_type="token_replace"), hunyuan_inputs,
    [SHORT, JOINT, SELF], "60:6", key_mask=True, blocks=False,
)  # fmt: skip


def hunyuan15_inputs() -> dict[str, Any]:
    return {
        **common(), "hidden_states": torch.randn(1, 4, FRAMES, HEIGHT, WIDTH), "timestep": torch.tensor([1.0]),
        "encoder_attention_mask": padded_text(), "encoder_hidden_states_2": torch.randn(1, 4, 10),
        "encoder_attention_mask_2": padded_text(length=4), "image_embeds": torch.zeros(1, 3, 12),
    }  # fmt: skip


MODELS["HunyuanVideo 1.5"] = Model(
    Build(
        "HunyuanVideo15Transformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32,
        num_layers=2, num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16,
        text_embed_2_dim=10, image_embed_dim=12, rope_axes_dim=(8, 12, 12), target_size=16, task_type="t2v",
    ),
    hunyuan15_inputs, [SHORT, JOINT], "60:7", key_mask=True, fullgraph=False, grids=("",), by_default=True,
    note="the mask of N x N is never built; three graphs, one for all layers",
)  # fmt: skip


def framepack_inputs() -> dict[str, Any]:
    history = {"latents_clean": (2, "indices_latents_clean"), "latents_history_2x": (2, "indices_latents_history_2x"),
               "latents_history_4x": (8, "indices_latents_history_4x")}  # fmt: skip
    latent = {name: latents(frames=frames) for name, (frames, _) in history.items()}
    places = {places: torch.arange(frames) for frames, places in history.values()}
    more = {"image_embeds": torch.randn(1, 9, 16), "indices_latents": torch.arange(FRAMES) + 9}
    return hunyuan_inputs() | latent | places | more


MODELS["HunyuanVideo Framepack"] = Model(
    Build(
        "HunyuanVideoFramepackTransformer3DModel", **HUNYUAN, has_image_proj=True, image_proj_dim=16,
        has_clean_x_embedder=True,
    ),
    framepack_inputs, [SHORT, JOINT, SELF], "110:", grids=("",), blocks=False,
    note="history beside the video; valid text alone",
)  # fmt: skip
MODELS["Motif Video"] = Model(
    Build(
        "MotifVideoTransformer3DModel", in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=32,
        num_layers=1, num_single_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, image_embed_dim=None,
        rope_axes_dim=(8, 12, 12),
    ),
    lambda: {"hidden_states": latents(9), **common(), "encoder_attention_mask": padded_text()}, [JOINT, SELF], "60:6",
    key_mask=True, float64=False, note="padded text is masked",
)  # fmt: skip


JOY = {
    "in_channels": 4, "hidden_size": 64, "num_attention_heads": 2, "text_dim": 16, "mlp_width_ratio": 1.0,
    "num_layers": 2, "rope_dim_list": [8, 12, 12],
}  # fmt: skip


def joy_edit_plus_inputs() -> dict[str, Any]:
    """Patches of a target of 2 frames and of a reference image, which is padded by two."""
    sizes = [(2, HEIGHT, WIDTH), (1, HEIGHT, WIDTH)]
    return common() | {
        "hidden_states": torch.randn(1, VIDEO + 2, 4, 1, 2, 2), "shape_list": [sizes],
        "encoder_hidden_states_mask": padded_text(),
    }  # fmt: skip


MODELS["JoyImage Edit"] = Model(
    Build("JoyImageEditTransformer3DModel", **JOY), lambda: {"hidden_states": latents(), **common()}, [JOINT] * 2,
    "60:6", note="edits images, which are its frames",
)  # fmt: skip
MODELS["JoyImage Edit Plus"] = Model(
    Build("JoyImageEditPlusTransformer3DModel", **JOY), joy_edit_plus_inputs, [JOINT] * 2, "62:6", grids=("",),
    key_mask=True, note="edits images, each of its own size",
)  # fmt: skip

# Text and video in one stream

COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 16, "num_layers": 2, "sample_width": 2 * WIDTH, "sample_height": 2 * HEIGHT,
    "sample_frames": 4 * (FRAMES - 1) + 1, "max_text_seq_length": TEXT,
}  # fmt: skip


def cogvideox_inputs() -> dict[str, Any]:
    return {"hidden_states": latents().transpose(1, 2), **common()}


def cogvideox_rope_inputs() -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    rope = get_3d_rotary_pos_embed(64, ((0, 0), (HEIGHT, WIDTH)), (HEIGHT, WIDTH), FRAMES)
    return cogvideox_inputs() | {"image_rotary_emb": rope}


MODELS["CogVideoX 2B"] = Model(
    Build("CogVideoXTransformer3DModel", **COGVIDEOX),
    cogvideox_inputs,
    [SELF, SELF],
    "0:7",
    blocks=False,
    by_default=True,
)
MODELS["CogVideoX 5B, 1.5"] = Model(
    Build(
        "CogVideoXTransformer3DModel", **COGVIDEOX | {"attention_head_dim": 64}, use_rotary_positional_embeddings=True
    ),
    cogvideox_rope_inputs, [SELF, SELF], "0:7", blocks=False,
)  # fmt: skip
MODELS["ConsisID"] = Model(
    Build(
        "ConsisIDTransformer3DModel", **COGVIDEOX | {"num_layers": 1}, cross_attn_interval=1, is_train_face=True,
        cross_attn_dim_head=8, cross_attn_num_heads=1, LFE_id_dim=2, LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8,
        LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=3, LFE_output_dim=42, LFE_ff_mult=1, LFE_num_scale=1,
    ),
    lambda: cogvideox_inputs() | {"id_vit_hidden": [torch.ones(1, 2, 2)], "id_cond": torch.ones(1, 2)},
    [*[FACES] * 5, SELF, CROSS], "0:7", blocks=False, note="its attention to faces, written by hand, is short",
)  # fmt: skip
MODELS["EasyAnimate"] = Model(
    Build(
        "EasyAnimateTransformer3DModel", attention_head_dim=32, num_attention_heads=2, in_channels=4, mmdit_layers=1,
        num_layers=2, out_channels=4, patch_size=2, sample_height=60, sample_width=90, text_embed_dim=16,
        time_embed_dim=8,
    ),
    lambda: {"hidden_states": latents(), **common()}, [JOINT, SELF], "0:7", blocks=False,
)  # fmt: skip
MODELS["Mochi"] = Model(
    Build(
        "MochiTransformer3DModel", num_attention_heads=2, attention_head_dim=32, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=TEXT,
    ),
    lambda: {"hidden_states": latents(), **common(), "encoder_attention_mask": padded_text().bool()},
    [CROSS, JOINT, JOINT], "60:u", blocks=False, by_default=True,
    note="valid text alone, of a length known at run time; without `fullgraph=True` Dynamo breaks the graph there",
)  # fmt: skip
MODELS["Mochi, batch of 2"] = Model(
    MODELS["Mochi"].build,
    lambda: {
        "hidden_states": latents(batch=2), **common(batch=2),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor([[5], [3]]),
    },
    [CROSS, JOINT, JOINT, JOINT, JOINT], "60:u", blocks=False, note="one site for each batch entry",
)  # fmt: skip

# Cross attention to the text


def ltx_inputs() -> dict[str, Any]:
    size = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    return {"hidden_states": torch.randn(1, VIDEO, 4), **common(), "encoder_attention_mask": padded_text(), **size}


MODELS["LTX-Video"] = Model(
    Build(
        "LTXVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32,
        cross_attention_dim=64, num_layers=1, caption_channels=16,
    ),
    ltx_inputs, [SELF, CROSS], by_default=True,
)  # fmt: skip


def ltx2_inputs() -> dict[str, Any]:
    return {
        **ltx_inputs(), "timestep": torch.tensor([500.0]), "encoder_attention_mask": torch.ones(1, TEXT).bool(),
        "audio_hidden_states": torch.randn(1, AUDIO, 4), "audio_encoder_hidden_states": torch.randn(1, TEXT, 16),
        "audio_encoder_attention_mask": torch.ones(1, TEXT).bool(), "fps": 25.0, "audio_num_frames": AUDIO,
    }  # fmt: skip


MODELS["LTX-2"] = Model(
    Build(
        "LTX2VideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32,
        cross_attention_dim=64, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=16, audio_cross_attention_dim=32, num_layers=1, caption_channels=16,
        rope_double_precision=False,
    ),
    ltx2_inputs, [SELF, SHORT, CROSS, CROSS, CROSS, CROSS], by_default=True, note="audio is short and stays dense",
)  # fmt: skip


def sana_wm_inputs() -> dict[str, Any]:
    pose = torch.eye(4).flatten().expand(1, FRAMES, 16) + 0.1 * torch.randn(1, FRAMES, 16)
    return common() | {
        "hidden_states": torch.randn(1, 4, FRAMES, HEIGHT, WIDTH), "timestep": torch.full((1, 1, FRAMES), 500.0),
        "encoder_hidden_states": torch.randn(1, 1, TEXT, 16), "encoder_attention_mask": padded_text(),
        "camera_conditions": torch.cat([pose, torch.tensor([5.0, 5.0, 2.5, 2.0]).expand(1, FRAMES, 4)], dim=-1),
        "chunk_plucker": torch.randn(1, 6, FRAMES, HEIGHT, WIDTH),
    }  # fmt: skip


MODELS["Sana WM"] = Model(
    Build(
        "SanaWMTransformer3DModel", in_channels=4, num_layers=2, hidden_size=64, num_attention_heads=2,
        softmax_every_n=2, linear_head_dim=32, caption_channels=16, chunk_plucker_channels=6, mlp_ratio=1.0,
    ),
    sana_wm_inputs, [CROSS, SELF, SELF, CROSS], float64=False,
    note="every fourth layer: over tokens, and over the rays of the camera; the others are recurrent",
)  # fmt: skip


def sana_wm_refiner_inputs(mode: str | None = None) -> dict[str, Any]:
    """``mode`` "inject": the chunk attends to keys and values of earlier ones too."""
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    def angles(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.rand(1, tokens, 64)
        return x.cos(), x.sin()

    inputs = common() | {
        "hidden_states": torch.randn(1, VIDEO, 4), "timestep": torch.full((1, VIDEO), 500.0),
        "video_rotary_emb": angles(VIDEO), "encoder_attention_mask": padded_text(),
    }  # fmt: skip
    if mode is not None:
        cache = SanaWMRefinerKVCache(2)
        cache.sink_pe = angles(HEIGHT * WIDTH)
        for i in range(2):
            cache.get(i).store_sink(torch.randn(1, HEIGHT * WIDTH, 64), torch.randn(1, HEIGHT * WIDTH, 64))
            cache.get(i).store_history(torch.randn(1, 2 * HEIGHT * WIDTH, 64), torch.randn(1, 2 * HEIGHT * WIDTH, 64))
        inputs |= {"kv_cache": cache, "kv_cache_mode": mode}
    return inputs


SANA_WM_REFINER = Build(
    "SanaWMLTX2RefinerTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32,
    cross_attention_dim=64, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
    audio_attention_head_dim=16, audio_cross_attention_dim=32, num_layers=2, caption_channels=16,
    rope_double_precision=False,
)  # fmt: skip
MODELS["Sana WM refiner"] = Model(
    SANA_WM_REFINER, sana_wm_refiner_inputs, [SELF, CROSS] * 2, grids=("",),
    note="LTX-2 without audio, chunk by chunk",
)  # fmt: skip
MODELS["Sana WM refiner, later chunks"] = Model(
    SANA_WM_REFINER, lambda: sana_wm_refiner_inputs("inject"), [SELF, CROSS] * 2, grids=("",),
    note="a chunk attends to cached keys too",
)  # fmt: skip


def allegro_inputs() -> dict[str, Any]:
    """With the mask of padded latents, which the pipeline leaves out: repeated over the heads."""
    axes = [torch.arange(size) for size in (FRAMES, HEIGHT, WIDTH)]
    angles = tuple((torch.rand(size, 8).cos(), torch.rand(size, 8).sin()) for size in (FRAMES, HEIGHT, WIDTH))
    positions = tuple(torch.cartesian_prod(*axes).T[:, None].contiguous())
    masks = {"attention_mask": torch.ones(1, FRAMES, 2 * HEIGHT, 2 * WIDTH), "encoder_attention_mask": padded_text()}
    return {"hidden_states": latents(), **common(), **masks, "image_rotary_emb": (angles, positions)}


MODELS["Allegro"] = Model(
    Build(
        "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
        num_layers=1, cross_attention_dim=48, sample_width=2 * WIDTH, sample_height=2 * HEIGHT, sample_frames=FRAMES,
        caption_channels=16,
    ),
    allegro_inputs, [SELF, CROSS], key_mask=True, by_default=True, blocks=False,
)  # fmt: skip
MODELS["Cosmos Predict 1, 2"] = Model(
    Build(
        "CosmosTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32,
        num_layers=1, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 32, 32), patch_size=(1, 2, 2),
        concat_padding_mask=False, extra_pos_embed_type="learnable",
    ),
    lambda: {"hidden_states": latents(), **common(), "fps": 30}, [SELF, CROSS], blocks=False, float64=False,
)  # fmt: skip


def cosmos3_inputs() -> dict[str, Any]:
    """Text, then video: grouped queries of the video attend to both."""
    length = TEXT + VIDEO
    video = torch.arange(TEXT, length)
    return {
        "input_ids": torch.arange(TEXT), "text_indexes": torch.arange(TEXT), "und_len": TEXT, "sequence_length": length,
        "position_ids": torch.zeros(3, length, dtype=torch.long),
        "vision_tokens": [torch.randn(1, 2, FRAMES, HEIGHT, WIDTH)], "vision_token_shapes": [(FRAMES, HEIGHT, WIDTH)],
        "vision_sequence_indexes": video, "vision_mse_loss_indexes": video, "vision_timesteps": torch.ones(VIDEO),
        "vision_noisy_frame_indexes": [torch.arange(FRAMES)], "return_dict": False,
    }  # fmt: skip


MODELS["Cosmos 3"] = Model(
    Build(
        "Cosmos3OmniTransformer", head_dim=32, hidden_size=64, intermediate_size=24, latent_channel=2,
        latent_patch_size=1, num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=1, patch_latent_dim=2,
        rms_norm_eps=1e-5, rope_axes_dim=[4, 6, 6], vocab_size=32,
    ),
    cosmos3_inputs, [CAUSAL, MIXED], "0:7", checkpoints=False, by_default=True,
    note="video attends to text and video, grouped heads; its checkpointing calls `layer.__call__`, a graph break",
)  # fmt: skip

KANDINSKY = {
    "in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4, "model_dim": 64,
    "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (8, 12, 12),
}  # fmt: skip


def kandinsky_inputs(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    return {
        **common(), "hidden_states": torch.randn(1, frames, 2 * height, 2 * width, 4),
        "timestep": torch.tensor([500.0]), "pooled_projections": torch.randn(1, 8),
        "visual_rope_pos": [torch.arange(size) for size in (frames, height, width)],
        "text_rope_pos": torch.arange(TEXT),
    }  # fmt: skip


MODELS["Kandinsky 5"] = Model(
    Build("Kandinsky5Transformer3DModel", **KANDINSKY, patch_size=(1, 2, 2)),
    kandinsky_inputs,
    [SHORT, SELF, CROSS],
    float64=False,
)


def kandinsky6_inputs() -> dict[str, Any]:
    inputs = {name: x for name, x in kandinsky_inputs().items() if not name.endswith("rope_pos")}
    return inputs | {"audio_hidden_states": torch.randn(1, AUDIO, 4)}


MODELS["Kandinsky 6"] = Model(
    Build("Kandinsky6Transformer3DModel", **KANDINSKY, visual_cond=False, in_audio_dim=4, out_audio_dim=4),
    kandinsky6_inputs, [SHORT, SHORT, SELF, CROSS, SHORT, CROSS, CROSS, CROSS], note="with audio",
)  # fmt: skip


def minimax_inputs() -> dict[str, Any]:
    length = TEXT + AUDIO + VIDEO
    text, audio, video = torch.arange(length).split([TEXT, AUDIO, VIDEO])
    tags, timesteps = torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.long)
    tags[text], tags[audio], timesteps[audio] = 1, 2, 1
    return {
        "hidden_states": torch.randn(1, VIDEO, 16), "audio_hidden_states": torch.randn(1, AUDIO, 6),
        "encoder_hidden_states": torch.randn(1, TEXT, 8), "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": timesteps, "token_tags": tags, "position_ids": torch.zeros(length, 3),
        "video_indices": video, "audio_indices": audio, "text_indices": text, "return_dict": False,
    }  # fmt: skip


MODELS["MiniMax H3"] = Model(
    Build(
        "MiniMaxH3Transformer3DModel", num_attention_heads=2, attention_head_dim=32, hidden_size=48, num_layers=1,
        num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=6, patch_size=(1, 2, 2), text_dim=8,
        freq_dim=8, time_embed_hidden_dim=24, time_embed_dim=16, rope_freq_dim=4,
    ),
    minimax_inputs, [SHORT, SELF], grids=("",), note="text, audio and video packed by index tensors",
)  # fmt: skip

# Nothing to rewrite


MODELS["Latte"] = Model(
    Build(
        "LatteTransformer3DModel", sample_size=16, num_layers=1, patch_size=2, attention_head_dim=16,
        num_attention_heads=2, caption_channels=16, in_channels=4, cross_attention_dim=32, out_channels=8,
        attention_bias=True, norm_elementwise_affine=False, norm_type="ada_norm_single", num_embeds_ada_norm=1000,
        video_length=48,
    ),
    lambda: {"hidden_states": torch.randn(1, 4, 48, 16, 16), **common()},  # 64 positions, 48 frames: long enough
    [FACTORISED, CROSS, FACTORISED], by_default=True, blocks=False, note="factorised over frames and positions",
)  # fmt: skip
MODELS["Sana Video"] = Model(
    Build(
        "SanaVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=16, sample_size=8, rope_max_seq_len=32,
    ),
    lambda: {"hidden_states": latents(), **common(), "encoder_attention_mask": padded_text()}, [CROSS], blocks=False,
    note="linear attention",
)  # fmt: skip


class Nabla(Build):
    def __call__(self) -> nn.Module:
        model = super().__call__()
        model.set_attention_backend("flex")
        return model


def nabla_inputs() -> dict[str, Any]:
    sparse = {
        "attention_type": "nabla", "to_fractal": True, "sta_mask": torch.ones(1, 1, 4, 4).bool(), "P": 0.9, "wT": 11,
        "wW": 3, "wH": 3, "add_sta": True, "visual_shape": (2, 8, 16), "method": "topcdf",
    }  # fmt: skip
    return kandinsky_inputs(2, 8, 16) | {"sparse_params": sparse}


MODELS["Kandinsky 5 NABLA"] = Model(
    Nabla("Kandinsky5Transformer3DModel", **KANDINSKY, patch_size=(1, 2, 2), attention_type="nabla"),
    nabla_inputs,
    [FLEX, FLEX, FLEX],
    trains=False,
    float64=False,
    blocks=False,
    note="flex attention, sparse already",
)
MODELS["Kandinsky 6 SR"] = Model(
    Build(
        "Kandinsky6SRTransformer3DModel", in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=64, ff_dim=64,
        num_visual_blocks=2, axes_dims=(8, 12, 12), nabla_window=(3, 3, 3),
    ),
    lambda: {"hidden_states": torch.randn(1, 2, 8, 16, 9), "timestep": torch.tensor([500.0]), "return_dict": False},
    [FLEX, FLEX], trains=False, float64=False, note="flex attention, sparse already",
)  # fmt: skip
MODELS["Stable Video Diffusion"] = Model(
    Build(
        "UNetSpatioTemporalConditionModel", sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=32,
        num_attention_heads=(2, 4), projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
        layers_per_block=1,
    ),
    lambda: {
        "sample": torch.randn(1, 48, 8, 8, 8), "timestep": torch.tensor([5.0]),
        "encoder_hidden_states": torch.randn(1, 1, 32), "added_time_ids": torch.randn(1, 3), "return_dict": False,
    },
    [FACTORISED, CROSS] * 8, blocks=False, note="factorised over frames and positions",
)  # fmt: skip
MODELS["Wan VAE"] = Model(
    Build(
        "AutoencoderKLWan", part="decoder", base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1,
        temperal_downsample=[True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ),
    lambda: {"x": torch.randn(1, 4, 1, 8, 10)}, [CONVOLUTIONAL], blocks=False, by_default=True,
)  # fmt: skip
MODELS["HunyuanVideo VAE"] = Model(
    Build(
        "AutoencoderKLHunyuanVideo", part="decoder", block_out_channels=(16, 16),
        down_block_types=("HunyuanVideoDownBlock3D",) * 2, up_block_types=("HunyuanVideoUpBlock3D",) * 2,
        layers_per_block=1, norm_num_groups=4, latent_channels=4, spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ),
    lambda: {"hidden_states": torch.randn(1, 4, FRAMES, HEIGHT, WIDTH)}, [MASKED], blocks=False,
    note="causal from frame to frame",
)  # fmt: skip


def sites_text(case: Model) -> str:
    """``self, cross (2 layers)``: the sites in words, repeats folded."""
    counts: dict[tuple[str, str], int] = {}
    for site in case.sites:
        counts[site] = counts.get(site, 0) + 1
    kinds = {CONVOLUTIONAL: "convolutional", FACTORISED: "factorised", FLEX: "flex", CAUSAL: "causal", FACES: "faces"}
    kinds |= {SHORT: "short self", MASKED: "masked self", CROSS: "cross", UNKNOWN: "self by its lengths"}
    names = {site: kinds.get(site, site[0]) for site in counts}
    return ", ".join(f"**{names[site]}**" if not site[1] else names[site] for site in counts)


def table() -> str:
    """The models as a Markdown table; kinds of attention that are rewritten in bold."""
    lines = ["| model | class in diffusers | attention | notes |", "| --- | --- | --- | --- |"]
    for name, case in MODELS.items():
        if "batch of" not in name:
            lines.append(f"| {name} | `{class_name(case)}` | {sites_text(case)} | {case.note} |")
    return "\n".join(lines)


BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"


def updated(readme: str) -> str:
    """README with the table of models made anew. Raises ValueError where a marker is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs both {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "README.md"
    path.write_text(updated(path.read_text()))
