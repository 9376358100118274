"""A small trained video transformer and a real clip, for examples and tests.

The model is diffusers' ``WanTransformer3DModel`` (Wan 2.1's architecture) with 4 layers of 2 heads x 128, 4.4 M
parameters, trained in pixel space by flow matching: a noisy clip is ``x = (1 - s) * clip + s * noise`` at noise level s
in [0, 1], the model is told ``timestep = 1000 * s`` and predicts ``noise - clip``. A token is a patch of 8x8 pixels of
one frame, so T frames of N x N pixels are T * (N / 8)^2 tokens.

It has seen few videos, this clip among them: good enough to show what sparse attention changes, nothing more.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

ASSETS = Path(__file__).resolve().parent / "assets"
PATCH = 8  # pixels, the side of a token
CLIP_SOURCE = "kivy_cityCC0"  # what the clip's source was called in training: the seed of its "text"


def load_model(device: str = "cpu") -> nn.Module:
    """The trained transformer in float32, in eval mode."""
    model = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH), num_attention_heads=2, attention_head_dim=128, num_layers=4, ffn_dim=768,
        in_channels=3, out_channels=3, text_dim=64, freq_dim=256, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=1024,
    )  # fmt: skip
    stored = load_file(ASSETS / "tiny_dit.safetensors")
    model.load_state_dict(dict(dequantised(stored)))
    return model.to(device).eval()


def dequantised(stored: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Large weights are stored as int8 with one float scale for each row, beside them as ``<name>.scale``."""
    for name, weight in stored.items():
        if name.endswith(".scale"):
            continue
        if weight.dtype == torch.int8:
            scale = stored[f"{name}.scale"].float()
            weight = weight.float() * scale.reshape(-1, *[1] * (weight.dim() - 1))
        yield name, weight


def load_clip(frames: int, side: int, start: int = 10) -> Tensor:
    """The city clip, scaled to ``side`` pixels in height and cropped: [1, 3, frames, side, side] float32 in [-1, 1].

    Raises ValueError where the file ends before ``start + frames`` frames.
    """
    video = cv2.VideoCapture(str(ASSETS / "city.mp4"))
    pictures = []
    while len(pictures) < start + frames:
        more, picture = video.read()
        if not more:
            raise ValueError(f"load_clip: city.mp4 has {len(pictures)} frames, not {start + frames}; ask for fewer.")
        height, width = picture.shape[:2]
        picture = cv2.resize(picture, (round(width * side / height), side), interpolation=cv2.INTER_AREA)
        left = round((picture.shape[1] - side) * 0.55)  # both towers are in view
        pictures.append(torch.from_numpy(picture[:, left : left + side, ::-1].copy()))  # BGR to RGB
    clip = torch.stack(pictures[start:]).permute(3, 0, 1, 2)[None]
    return clip.float() / 127.5 - 1


def prompt(tokens: int = 8, dim: int = 64) -> Tensor:
    """[1, tokens, dim]: the fixed random embedding that stood for the clip's source in training, in place of text."""
    seed = int(hashlib.md5(CLIP_SOURCE.encode()).hexdigest()[:8], 16)
    return torch.randn(1, tokens, dim, generator=torch.Generator().manual_seed(seed))


def add_noise(clip: Tensor, level: float, seed: int = 0) -> Tensor:
    """The clip at noise level ``level``, with noise made on the CPU so that every device starts alike."""
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    return (1 - level) * clip + level * noise.to(clip.device)


@torch.no_grad()
def denoise(
    model: nn.Module, noisy: Tensor, levels: Iterable[float], progress: Callable[[list], Iterable] = iter
) -> tuple[Tensor, list[float]]:
    """Euler steps down the noise levels: the clip in [-1, 1] and the seconds that each step took.

    ``noisy`` is at the first level; ``progress`` wraps the list of steps, as ``tqdm`` does. On CUDA the model runs
    under bfloat16 autocast.
    """
    device, text, seconds = noisy.device.type, prompt().to(noisy.device), []
    for level, lower in progress(list(itertools.pairwise(levels))):
        start = _now(device)
        timestep = torch.full((1,), 1000.0 * level, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            velocity = model(noisy, timestep, text, return_dict=False)[0]
        noisy = noisy + (lower - level) * velocity.float()
        seconds.append(_now(device) - start)
    return noisy.clamp(-1, 1), seconds


def _now(device: str) -> float:
    """Seconds, after all that was launched has run."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two clips in [-1, 1]."""
    error = (a - b).square().mean().item()
    return 10 * math.log10(4 / error) if error else math.inf
