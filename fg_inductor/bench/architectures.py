"""Video transformers of diffusers at their real size, with random weights, for the benchmarks of whole models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fg_inductor.bench.common import PRESETS

TEXT_WIDTH = 4096  # of T5 and of Llama, which write the text of all models here
CHANNELS, PATCH = 16, (1, 2, 2)  # of the latents; frames, rows and columns of latents in a token


@dataclass(frozen=True)
class Architecture:
    """A published transformer, as its configuration for diffusers describes it.

    name        the class of diffusers
    config      what differs from the defaults of the class, ``heads`` and ``layers`` apart
    layers      argument -> blocks of that kind in the published model; fewer are built in the same proportion
    blocks      where those blocks lie in the model, in the same order
    text        tokens of text
    inputs      architecture, preset, batch -> the arguments of one call by name
    masked      whether its attention is called with a mask, even where all text is valid
    """

    name: str
    config: dict[str, Any]
    layers: dict[str, int]
    blocks: tuple[str, ...]
    text: int
    inputs: Callable[["Architecture", dict, int], dict[str, Any]]
    masked: bool = False

    @property
    def units(self) -> int:
        """The published number of layers. A layer is one block of the first kind and its share of the others."""
        return next(iter(self.layers.values()))

    def attention_calls(self, layers: int) -> int:
        """Long self-attention calls in a model of that many layers."""
        return sum(count * layers // self.units for count in self.layers.values())

    def build(self, preset: dict, layers: int, device: str) -> nn.Module:
        """The model in bfloat16 and in eval mode, with what diffusers keeps in float32 in float32; random weights."""
        import diffusers

        cls = getattr(diffusers, self.name)
        counts = {argument: count * layers // self.units for argument, count in self.layers.items()}
        size = {"num_attention_heads": preset["heads"], "attention_head_dim": preset["dim"]}
        before = torch.get_default_dtype()
        # Made where and as they are used: 14 billion float32 weights on the host would take minutes and 57 GB.
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                model = cls(**size, **counts, **self.config)
        finally:
            torch.set_default_dtype(before)
        kept = tuple(getattr(cls, "_keep_in_fp32_modules", None) or ())
        for name, parameter in model.named_parameters():
            if any(part in kept for part in name.split(".")):
                parameter.data = parameter.data.float()
        return model.requires_grad_(False).eval()

    def shorten(self, model: nn.Module, layers: int) -> None:
        """Keep the first layers of a model that ``build`` made, and no others."""
        for name, count in zip(self.blocks, self.layers.values(), strict=True):
            setattr(model, name, getattr(model, name)[: count * layers // self.units])


def _latents(preset: dict, batch: int) -> Tensor:
    sizes = (size * patch for size, patch in zip(preset["grid"], PATCH, strict=True))
    return torch.randn(batch, CHANNELS, *sizes, dtype=torch.bfloat16)


def _common(architecture: Architecture, batch: int) -> dict[str, Any]:
    text = torch.randn(batch, architecture.text, TEXT_WIDTH, dtype=torch.bfloat16)
    return {"timestep": torch.full((batch,), 500), "encoder_hidden_states": text, "return_dict": False}


def _wan_inputs(architecture: Architecture, preset: dict, batch: int) -> dict[str, Any]:
    return {"hidden_states": _latents(preset, batch), **_common(architecture, batch)}


def _hunyuan_inputs(architecture: Architecture, preset: dict, batch: int) -> dict[str, Any]:
    """All text is valid. The model makes a mask of it all the same, which its attention is called with."""
    return _wan_inputs(architecture, preset, batch) | {
        "encoder_attention_mask": torch.ones(batch, architecture.text, dtype=torch.int64),
        "pooled_projections": torch.randn(batch, 768, dtype=torch.bfloat16),
        "guidance": torch.full((batch,), 6000.0, dtype=torch.bfloat16),
    }


def _cogvideox_inputs(architecture: Architecture, preset: dict, batch: int) -> dict[str, Any]:
    """Frames before channels, and rotary embeddings from outside."""
    t, h, w = preset["grid"]
    rotary = tuple(torch.randn(t * h * w, preset["dim"]) for _ in range(2))
    latents = _latents(preset, batch).transpose(1, 2).contiguous()
    return {"hidden_states": latents, **_common(architecture, batch), "image_rotary_emb": rotary}


def _wan(ffn_dim: int, layers: int) -> Architecture:
    return Architecture(
        "WanTransformer3DModel", {"ffn_dim": ffn_dim}, {"num_layers": layers}, ("blocks",), 512, _wan_inputs
    )


HUNYUAN = Architecture(
    "HunyuanVideoTransformer3DModel", {}, {"num_layers": 20, "num_single_layers": 40},
    ("transformer_blocks", "single_transformer_blocks"), 256, _hunyuan_inputs, masked=True,
)  # fmt: skip
COGVIDEOX = Architecture(
    "CogVideoXTransformer3DModel", {"use_rotary_positional_embeddings": True}, {"num_layers": 42},
    ("transformer_blocks",), 226, _cogvideox_inputs,
)  # fmt: skip
ARCHITECTURES = {
    "wan2.1-1.3b-480p": _wan(8960, 30),
    "wan2.1-1.3b-720p": _wan(8960, 30),
    "wan2.1-14b-480p": _wan(13_824, 40),
    "wan2.1-14b-720p": _wan(13_824, 40),
    "hunyuanvideo-720p": HUNYUAN,
    "cogvideox-5b": COGVIDEOX,
}


def make(name: str, layers: int, batch: int, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a preset with that many layers, and the arguments of one call."""
    architecture, preset = ARCHITECTURES[name], PRESETS[name]
    model = architecture.build(preset, layers, device)
    with torch.device(device):
        return model, architecture.inputs(architecture, preset, batch)
