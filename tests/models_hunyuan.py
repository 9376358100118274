"""HunyuanVideo and what followed it: text and video in one attention."""

from typing import Any

import torch
from model_cases import FRAMES, HEIGHT, JOINT, SELF, SHORT, VIDEO, WIDTH, Build, Model, common, latents, padded_text

MODELS: dict[str, Model] = {}

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
