"""The Wan family, and models with its blocks."""

from typing import Any

import torch
from model_cases import (
    CROSS,
    FLEX,
    FRAMES,
    GRID,
    HEIGHT,
    MASKED,
    SELF,
    TEXT,
    UNKNOWN,
    VIDEO,
    WIDTH,
    Build,
    Model,
    common,
    latents,
)

MODELS: dict[str, Model] = {}

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
