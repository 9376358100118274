"""A row of the table of models: how to build and call a small random one, and what its attention sites must become.

The sites were worked out from the source of the model, not from what the pass did. The rows lie in models_*.py.
"""

import dataclasses
from collections.abc import Callable
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
