"""Cross attention to the text."""

from typing import Any

import torch
from model_cases import (
    AUDIO,
    CAUSAL,
    CROSS,
    FRAMES,
    HEIGHT,
    MIXED,
    SELF,
    SHORT,
    TEXT,
    VIDEO,
    WIDTH,
    Build,
    Model,
    common,
    latents,
    padded_text,
)

MODELS: dict[str, Model] = {}


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
