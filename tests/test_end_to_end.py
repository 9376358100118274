"""The trained tiny video transformer, compiled with the backend, against the same model with dense attention."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import fg_inductor
from fg_inductor.testing import assert_l2_as_accurate

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def tiny_dit():
    spec = importlib.util.spec_from_file_location("tiny_dit", EXAMPLES / "tiny_dit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tiny_dit):
    return tiny_dit.load_model("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def inputs(tiny_dit, device):
    frames, side = (16, 256) if device == "cuda" else (5, 64)
    clip = tiny_dit.add_noise(tiny_dit.load_clip(frames, side), 0.7).to(device)
    return clip, torch.tensor([700.0], device=device), tiny_dit.prompt().to(device)


def compiled(model, **options):
    ours = {"inner": "eager", "quiet": True, "when": "always", "min_seq": 200, **options}
    torch._dynamo.reset()
    return torch.compile(
        model, backend="fgattn", fullgraph=True, options={f"fgattn.{name}": value for name, value in ours.items()}
    )


@torch.no_grad()
def predict(model, inputs, dtype=torch.bfloat16):
    with torch.autocast(inputs[0].device.type, dtype, enabled=dtype != torch.float32):
        return model(*inputs, return_dict=False)[0]


def assert_rewritten(sites=4):
    report = fg_inductor.report()
    assert report.rewritten == sites, str(report)


INDUCTOR = pytest.param("128x8", "inductor", marks=pytest.mark.gpu)


@pytest.mark.parametrize(("slice", "inner"), [("128x8", "eager"), ("128x1", "eager"), ("16x128", "eager"), INDUCTOR])
def test_density_one_is_dense_attention(model, inputs, slice, inner):
    """The budget: twice the error that the model has in bfloat16 with SDPA, against float32."""
    ours = predict(compiled(model, slice=slice, density=1.0, inner=inner), inputs)
    assert_rewritten()
    exact = predict(model, inputs, torch.float32)
    assert_l2_as_accurate(ours, predict(model, inputs), exact.double())


@pytest.mark.parametrize("tail", ["none", "pooled"])
def test_error_falls_with_density(model, inputs, tail):
    """What is kept decides the result: the more, the closer to dense, and all of it is dense."""
    dense = predict(model, inputs, torch.float32)
    errors = []
    for density in (0.1, 0.4, 1.0):
        ours = predict(compiled(model, density=density, tail=tail), inputs, torch.float32)
        assert_rewritten()
        errors.append(((ours - dense).norm() / dense.norm()).item())
    assert errors[0] > errors[1] > 100 * errors[2], errors


def test_one_graph_for_all_steps_prompts_and_branches(model, inputs, device):
    run = compiled(model, density=0.3)
    clip, _, text = inputs
    for step in (900.0, 500.0, 10.0):
        for prompt in (text, torch.zeros_like(text)):
            predict(run, (clip * 0.9, torch.tensor([step], device=device), prompt))
    assert counters["stats"]["unique_graphs"] == 1
    assert_rewritten()


def test_gradients_at_density_one_are_dense(tiny_dit, inputs, device):
    def gradients(run, model, dtype):
        model.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = run(*inputs, return_dict=False)[0].float().square().mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model = tiny_dit.load_model(device)
    ours = gradients(compiled(model, density=1.0), model, torch.bfloat16)
    assert_rewritten()
    exact = gradients(model, model, torch.float32)
    plain = gradients(model, model, torch.bfloat16)
    assert_l2_as_accurate(ours, plain, exact.double())


@pytest.mark.gpu
def test_cuda_graphs(model, inputs, device):
    plain = predict(compiled(model, density=0.3), inputs)
    torch._dynamo.reset()
    run = torch.compile(
        model,
        backend="fgattn",
        fullgraph=True,
        options={"mode": "reduce-overhead", "fgattn.density": 0.3, "fgattn.quiet": True},
    )
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        ours = predict(run, inputs).clone()
    assert_rewritten()
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert (ours - plain).norm() / plain.norm() < 0.02


@pytest.mark.gpu
def test_no_host_sync(model, inputs):
    """Between the inputs and the output of a compiled model nothing waits for the device."""
    run = compiled(model, density=0.3)
    predict(run, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        predict(run, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("refresh", ["every 3", "drift 0.02"])
def test_observed_masks_in_cuda_graphs(model, inputs, refresh):
    """Masks lie at fixed addresses and are updated where a graph replays: every step as without CUDA graphs."""

    def steps(**options):
        torch._dynamo.reset()
        ours = {"mask": "observed", "refresh": refresh, "density": 0.2, "dense_first": 0.2, "quiet": True}
        ours = {f"fgattn.{name}": value for name, value in ours.items()}
        run_model = torch.compile(model, backend="fgattn", fullgraph=True, options=ours | options)
        outs, (clip, _, text) = [], inputs
        with fg_inductor.denoising(run_model, steps=10) as run:
            for i in range(10):
                torch.compiler.cudagraph_mark_step_begin()
                with run.branch("text"), torch.compiler.set_stance("default" if i < 3 else "fail_on_recompile"):
                    level = torch.tensor([900.0 - 80 * i], device=clip.device)
                    outs.append(predict(run_model, (clip * (1 - 0.05 * i), level, text)).float().clone())
                run.step()
        assert_rewritten()
        return torch.stack(outs), str(fg_inductor.report())

    plain, report = steps()
    counters["inductor"].clear()
    replayed, replayed_report = steps(mode="reduce-overhead")
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert replayed_report == report  # the same refreshes
    for i, (a, b) in enumerate(zip(replayed, plain, strict=True)):
        assert (a - b).norm() / b.norm() < 0.02, i
