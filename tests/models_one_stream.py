"""Text and video in one stream of tokens."""

from typing import Any

import torch
from model_cases import (
    CROSS,
    FACES,
    FRAMES,
    HEIGHT,
    JOINT,
    SELF,
    TEXT,
    WIDTH,
    Build,
    Model,
    common,
    latents,
    padded_text,
)

MODELS: dict[str, Model] = {}

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
