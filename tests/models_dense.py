"""Models in which there is nothing to rewrite."""

from typing import Any

import torch
from model_cases import (
    CONVOLUTIONAL,
    CROSS,
    FACTORISED,
    FLEX,
    FRAMES,
    HEIGHT,
    MASKED,
    WIDTH,
    Build,
    Model,
    common,
    latents,
    padded_text,
)
from models_cross import KANDINSKY, kandinsky_inputs
from torch import nn

MODELS: dict[str, Model] = {}

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
