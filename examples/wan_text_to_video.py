"""Wan 2.1 or 2.2, text to video: dense against sparse attention, with timings and PSNR.

    python examples/wan_text_to_video.py --out wan
    python examples/wan_text_to_video.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers --height 720 --width 1280
    python examples/wan_text_to_video.py --options '{"fgattn.density": 0.2, "fgattn.tail": "pooled"}'

Downloads the weights of --model, or takes them from a folder. Needs diffusers, transformers, ftfy and a GPU.
"""

import os
import sys

# The modules beside this file are found under `python -P` too.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import compare_pipelines
import torch

NEGATIVE = "blurry, worst quality, low quality, static, watermark"


def load(model: str, device: str):
    """The pipeline in bfloat16; its VAE in float32, as its authors advise."""
    from diffusers import AutoencoderKLWan, WanPipeline

    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    return WanPipeline.from_pretrained(model, vae=vae, torch_dtype=torch.bfloat16).to(device)


def token_grid(pipe, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Tokens in time, height and width: the VAE's compression, then patches."""
    patch = pipe.transformer.config.patch_size
    time, space = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    return (((frames - 1) // time + 1) // patch[0], height // space // patch[1], width // space // patch[2])


def main() -> None:
    args = compare_pipelines.arguments(
        __doc__, model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", height=480, width=832, frames=81, steps=50
    )
    pipe = load(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    call = {
        "prompt": args.prompt, "negative_prompt": NEGATIVE, "height": args.height, "width": args.width,
        "num_frames": args.frames, "num_inference_steps": args.steps,
    }  # fmt: skip
    grid = token_grid(pipe, args.frames, args.height, args.width)
    result = compare_pipelines.compare(pipe, call, grid, args.options, args.seed)
    compare_pipelines.save(result, args.out, fps=16)


if __name__ == "__main__":
    main()
