"""HunyuanVideo, text to video: dense against sparse attention, with timings and PSNR.

    python examples/hunyuan_video.py --out hunyuan
    python examples/hunyuan_video.py --height 544 --width 960 --options '{"fgattn.density": 0.4}'

Downloads the weights of --model, or takes them from a folder. Needs diffusers, transformers and a GPU of 60 GB.
"""

import os
import sys

# The modules beside this file are found under `python -P` too.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import compare_pipelines
import torch


def load(model: str, device: str):
    """The pipeline in bfloat16; its VAE in float16 and in tiles, as a whole video would not fit."""
    from diffusers import HunyuanVideoPipeline

    pipe = HunyuanVideoPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    pipe.vae.to(torch.float16)
    pipe.vae.enable_tiling()
    return pipe.to(device)


def token_grid(pipe, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Tokens in time, height and width: the VAE's compression, then patches."""
    config = pipe.transformer.config
    time, space = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial * config.patch_size
    return (((frames - 1) // time + 1) // config.patch_size_t, height // space, width // space)


def main() -> None:
    args = compare_pipelines.arguments(
        __doc__, model="hunyuanvideo-community/HunyuanVideo", height=720, width=1280, frames=129, steps=50
    )
    pipe = load(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    call = {
        "prompt": args.prompt, "height": args.height, "width": args.width, "num_frames": args.frames,
        "num_inference_steps": args.steps,
    }  # fmt: skip
    grid = token_grid(pipe, args.frames, args.height, args.width)
    result = compare_pipelines.compare(pipe, call, grid, args.options, args.seed)
    compare_pipelines.save(result, args.out, fps=15)


if __name__ == "__main__":
    main()
