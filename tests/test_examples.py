"""The examples with real pipelines, run with tiny random ones; and the figures that they print."""

import types

import pytest
import torch

import fg_inductor
from fg_inductor import toy_models

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

NAMES = ("video_metrics", "compare_pipelines", "wan_text_to_video", "hunyuan_video")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def examples(import_example):
    return types.SimpleNamespace(**{name: import_example(name) for name in NAMES})


# Figures


def moving(seed=0, frames=6):
    """Smooth pictures that move."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.rand(1, 3, 8, 8, generator=generator)
    large = torch.nn.functional.interpolate(picture, size=(32, 40), mode="bilinear")
    return torch.cat([large.roll(2 * i, -1) for i in range(frames)])


def test_a_video_against_itself(examples):
    found = examples.video_metrics.compare(moving(), moving())
    assert found == {"psnr_db": float("inf"), "ssim": pytest.approx(1), "motion_error": 0, "flicker": 1}


def test_psnr_by_hand(examples):
    assert examples.video_metrics.psnr(moving() + 0.1, moving()) == pytest.approx(20, abs=1e-3)


def test_ssim_by_hand(examples):
    """One window: its weighted moments, by the formula."""
    x, y = torch.rand(2, 1, 1, 11, 11, dtype=torch.float64)
    at = torch.arange(-5.0, 6, dtype=torch.float64)
    w = torch.exp(-(at[:, None] ** 2 + at**2) / 4.5)
    w /= w.sum()
    ex, ey = (w * x).sum(), (w * y).sum()
    vx, vy, c = (w * (x - ex) ** 2).sum(), (w * (y - ey) ** 2).sum(), (w * (x - ex) * (y - ey)).sum()
    expected = (2 * ex * ey + 1e-4) * (2 * c + 9e-4) / ((ex**2 + ey**2 + 1e-4) * (vx + vy + 9e-4))
    assert examples.video_metrics.ssim(x, y) == pytest.approx(expected.item())


def test_motion_sees_what_moves_alone(examples):
    metrics, video = examples.video_metrics, moving()
    assert metrics.motion_error(video + 0.1, video) == pytest.approx(0, abs=1e-5)  # a tint that stands still
    flickering = video + 0.1 * torch.tensor([1, -1] * 3)[:, None, None, None]
    assert metrics.motion_error(flickering, video) > 0.3 and metrics.flicker(flickering, video) > 1.3
    still = video[:1].expand_as(video)
    assert metrics.motion_error(still, video) == pytest.approx(1) and metrics.flicker(still, video) == 0


# Pipelines


def text_pipeline_parts():
    """A tokenizer and what it feeds are not what is tested: the pipelines are called with embeddings."""
    return {"tokenizer": None, "text_encoder": None}


def wan():
    torch.manual_seed(0)
    return diffusers.WanPipeline(
        **text_pipeline_parts(),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        ),
    )  # fmt: skip


def hunyuan():
    torch.manual_seed(0)
    return diffusers.HunyuanVideoPipeline(
        **text_pipeline_parts(), tokenizer_2=None, text_encoder_2=None,
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
            rope_axes_dim=(8, 12, 12),
        ),
    )  # fmt: skip


PIPELINES = {
    "wan_text_to_video": (wan, {"prompt_embeds": (1, 7, 16), "negative_prompt_embeds": (1, 7, 16)}, 1),
    "hunyuan_video": (hunyuan, {"prompt_embeds": (1, 7, 16), "pooled_prompt_embeds": (1, 8)}, 2),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_dense_against_sparse(name, examples, capsys, tmp_path):
    make, texts, kinds = PIPELINES[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 96}
    call = {"num_frames": 9, "num_inference_steps": 3, **size}
    call |= {text: torch.randn(shape) for text, shape in texts.items()}
    if name == "hunyuan_video":
        call["prompt_attention_mask"] = torch.ones(1, 7, dtype=torch.int64)
    grid = getattr(examples, name).token_grid(pipe, 9, 64, 96)
    assert grid == (3, 4, 6)
    options = {**toy_models.SHORT, "fgattn.min_seq": 70, "fgattn.density": 0.4, "fgattn.dense_first": 0.3}
    result = examples.compare_pipelines.compare(
        pipe, call, grid, options | {"fgattn.inner": "eager"}, warm_up=None, dense={"backend": "eager"}
    )
    assert result.dense.shape == result.sparse.shape == (9, 3, 64, 96)
    assert 5 < result.metrics["psnr_db"] < 90  # sparse, and the same video
    printed = capsys.readouterr().out
    assert "token_grid 3x4x6" in printed and fg_inductor.report().rewritten >= kinds
    examples.compare_pipelines.save(result, str(tmp_path / "video"), fps=8)
    assert all((tmp_path / f"video_{which}.mp4").stat().st_size for which in ("dense", "sparse"))
