"""What tests of denoising share: ways to compile a model, a loop with guidance, and what it must come to."""

import copy

import torch
from torch._dynamo.utils import counters

import fg_inductor
from fg_inductor.settings import Settings
from fg_inductor.testing_steps import EagerSchedule
from fg_inductor.toy_models import SHORT, Stack

OBSERVED = {**SHORT, "fgattn.inner": "eager", "fgattn.mask": "observed", "fgattn.density": 0.25}
STEPS = 6


class Guided(Stack):
    """A Stack that is told what to show."""

    def forward(self, x, text):
        return super().forward(x + text)


def compile_whole(model, options):
    return torch.compile(model, backend="fgattn", options=options, fullgraph=True)


def compile_in_place(model, options):
    model.compile(backend="fgattn", options=options, fullgraph=True)
    return model


def compile_forward(model, options):
    model.forward = torch.compile(model.forward, backend="fgattn", options=options, fullgraph=True)
    return model


def compile_blocks(model, options):
    for block in model.blocks:
        block.compile(backend="fgattn", options=options, fullgraph=True)
    return model


def denoise(
    models, length=128, batch=1, steps=STEPS, branches=2, after=lambda i: None, mark=None, known=False,
    dtype=torch.float32,
):  # fmt: skip
    """A loop with guidance, always the same; the second half of the steps may have another model.

    Anything but the first call of a model in a branch must run without a compilation, and with ``known`` all of them.
    """
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randn(batch, 1, 128, generator=generator).to(dtype) for _ in range(branches)]
    x, results = torch.randn(batch, length, 128, generator=generator).to(dtype), []
    for i in range(steps):
        model = models[i * len(models) // steps]
        noise = 0
        for text in texts:
            given = x.clone()
            if mark is not None:
                torch._dynamo.mark_dynamic(given, mark)
            first = i * len(models) % steps == 0 and not known
            with torch.compiler.set_stance("default" if first else "fail_on_recompile"):
                noise = noise - 0.5 * noise + model(given, text)
        x = x - 0.3 * noise
        results.append(x)
        after(i)
    return torch.stack(results)


def rounding(models, **loop):
    """By how much float32 errs in each step of the loop with dense attention, at most: [steps]."""
    exact = denoise([copy.deepcopy(model).double() for model in models], dtype=torch.float64, **loop)
    return (denoise(models, **loop) - exact).abs().flatten(1).amax(1)


def compare(compiled, exact, options, **loop):
    """The compiled models give what the schedule gives in eager mode. Returns the number of masks observed there.

    Both round, each step builds on the one before, and a group that differs costs a thousand times the budget.
    """
    settings = Settings.parse(options)
    branches, steps = loop.get("branches", 2), loop.get("steps", STEPS)
    plain = {k: v for k, v in loop.items() if k in ("length", "batch", "steps", "branches")}
    budget = 4 * rounding(exact, **plain)
    with EagerSchedule(*exact, settings=settings, steps=steps, branches=branches) as eager:
        expected = denoise(exact, **plain)
    pipe = compiled[0] if len(compiled) == 1 else Pair(compiled)
    with fg_inductor.denoising(pipe, steps=steps) as run:
        after = loop.pop("after", lambda i: None)
        actual = denoise(compiled, after=lambda i: (run.step(), after(i)), **loop)
    wrong = (actual - expected).abs().flatten(1).amax(1)
    assert (wrong <= budget).all(), f"by step off by {wrong.tolist()}, budget {budget.tolist()}"
    return eager.refreshes


class Pair:
    """A pipeline as far as two experts go."""

    def __init__(self, models):
        self.models = models
        self.scheduler = type("Scheduler", (), {"step": lambda self: None, "set_timesteps": lambda self: None})()

    @property
    def components(self):
        return dict(enumerate(self.models))


def totals():
    """How many masks were made, refreshed and reused since the counters were cleared."""
    return {name.removeprefix("masks "): n for name, n in counters["fgattn"].items() if name.startswith("masks")}


def pooled(model, x, text):
    """What the model gives where each call selects its masks."""
    options = {**OBSERVED, "fgattn.mask": "pooled"}
    return compile_whole(copy.deepcopy(model), options)(x, text)
