"""A pipeline of diffusers, end to end: WanPipeline, tiny and random, with guidance, compiled block by block."""

import types

import pytest
import torch
from torch._dynamo.utils import counters

import fg_inductor
from fg_inductor import state
from fg_inductor.settings import Settings
from fg_inductor.testing_steps import EagerSchedule
from fg_inductor.toy_models import SHORT

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, STEPS = 2, 6
OPTIONS = {
    **SHORT, "fgattn.inner": "aot_eager", "fgattn.mask": "observed", "fgattn.density": 0.4, "fgattn.dense_first": 0.2,
    "fgattn.refresh": "every 2",
}  # fmt: skip


class Tokenizer:
    """One token a letter."""

    def __call__(self, prompts, max_length, **_):
        ids = [[*(ord(c) % 61 + 2 for c in text[: max_length - 1]), 1] for text in prompts]
        mask = torch.tensor([[1] * len(x) + [0] * (max_length - len(x)) for x in ids])
        ids = torch.tensor([x + [0] * (max_length - len(x)) for x in ids])
        return types.SimpleNamespace(input_ids=ids, attention_mask=mask)


def transformer():
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=16, out_channels=16, text_dim=32, freq_dim=16,
        ffn_dim=64, num_layers=LAYERS, rope_max_seq_len=32,
    )  # fmt: skip
    for block in model.blocks:  # attention that is far from uniform
        torch.nn.init.normal_(block.attn1.to_q.weight, std=0.3)
        torch.nn.init.normal_(block.attn1.to_k.weight, std=0.3)
        torch.nn.init.normal_(block.attn2.to_v.weight, std=1.0)  # and text that matters
    return model.requires_grad_(False)


def make_pipeline(experts=1):
    torch.manual_seed(0)
    text = transformers.UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = diffusers.WanPipeline(
        tokenizer=Tokenizer(),
        text_encoder=transformers.UMT5EncoderModel(text).eval(),
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer(),
        transformer_2=transformer() if experts == 2 else None,
        boundary_ratio=0.8 if experts == 2 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def experts_of(pipe):
    return [model for model in (pipe.transformer, pipe.transformer_2) if model is not None]


def video(pipe, prompt="a city at night", height=64, guard=False, **call):
    """Latents, or with ``output_type`` a video. ``guard``: whatever is compiled after the first step is an error."""

    def after_step(pipe, i, t, inputs):
        if guard and i == 0:
            torch.compiler.set_stance("fail_on_recompile")
        return {}

    try:
        return pipe(
            prompt, "blurred", height=height, width=96, num_frames=5, num_inference_steps=STEPS, guidance_scale=4.0,
            max_sequence_length=12, generator=torch.Generator().manual_seed(0), callback_on_step_end=after_step,
            **{"output_type": "latent", **call},
        ).frames  # fmt: skip
    finally:
        torch.compiler.set_stance("default")


def totals():
    return {name.removeprefix("masks "): n for name, n in counters["fgattn"].items() if name.startswith("masks")}


@pytest.mark.parametrize("experts", [1, 2])
def test_wan(experts):
    eager, pipe = make_pipeline(experts), make_pipeline(experts)
    schedule = EagerSchedule(*experts_of(eager), settings=Settings.parse(OPTIONS), steps=STEPS, branches=2)
    with schedule:
        expected = video(eager)
    dense = video(eager)
    for model in experts_of(pipe):
        model.compile_repeated_blocks(backend="fgattn", fullgraph=True, options=dict(OPTIONS))
    with fg_inductor.denoising(pipe) as run:
        actual = video(pipe, guard=True)
        assert (run.index, run.total) == (STEPS, STEPS)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, dense)

    # Step 0 is dense; steps 1, 3 and 5 observe, or where the second expert begins its own first, and so on.
    assert totals()["refreshed"] == schedule.refreshes
    assert totals()["refreshed"] + totals()["reused"] == (STEPS - 1) * LAYERS * 2
    assert totals()["made"] == len(state._entries) == experts * LAYERS * 2
    # Behind the first cross attention the branches see, and keep, different things.
    for model in experts_of(pipe):
        weight = model.blocks[-1].attn1.to_q.weight
        cond, uncond = (entry.mask for entry in state._entries.values() if entry.weight() is weight)
        assert not torch.equal(cond, uncond)
    assert counters["stats"]["unique_graphs"] == 1
    assert [row.site.decision for row in fg_inductor.report()] == ["rewritten", "dense"]  # self, cross
    assert type(pipe.scheduler) is diffusers.UniPCMultistepScheduler


def test_another_prompt_and_another_size():
    """In one run, without a word to it: the scheduler says that a new video begins."""
    eager, pipe = make_pipeline(), make_pipeline()
    videos = ({}, {"prompt": "a river"}, {"height": 96}, {})
    expected = []
    for call in videos:
        with EagerSchedule(eager.transformer, settings=Settings.parse(OPTIONS), steps=STEPS, branches=2):
            expected.append(video(eager, **call))
    pipe.transformer.compile_repeated_blocks(backend="fgattn", fullgraph=True, options=dict(OPTIONS))
    with fg_inductor.denoising(pipe):
        for call, latents in zip(videos, expected, strict=True):
            torch.testing.assert_close(video(pipe, guard=True, **call), latents)
    assert len(state._entries) == 2 * LAYERS


def test_decoded_video_of_the_whole_model_compiled():
    """torch.compile of the model itself, and the VAE behind it, whose attention stays as it is."""
    eager, pipe = make_pipeline(), make_pipeline()
    options = {**OPTIONS, "fgattn.token_grid": None}  # slices of raster order, as in the schedule in eager mode
    with EagerSchedule(eager.transformer, settings=Settings.parse(options), steps=STEPS, branches=2):
        expected = video(eager, output_type="pt")
    pipe.transformer.compile(backend="fgattn", fullgraph=True, options=options)
    with fg_inductor.denoising(pipe):
        actual = video(pipe, guard=True, output_type="pt")
    torch.testing.assert_close(actual, expected)
    assert actual.shape == (1, 5, 3, 64, 96)
    assert fg_inductor.report().rewritten == LAYERS
