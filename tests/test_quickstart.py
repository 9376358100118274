"""The quickstart at a small size, without Inductor; the real one is run by .ci/run."""

import json
import sys

import matplotlib.image
import pytest
import torch

SMALL = ("--frames", "4", "--side", "64", "--steps", "3")  # 256 tokens
OPTIONS = {"fgattn.min_seq": 1, "fgattn.slice": "32x8", "fgattn.inner": "eager", "fgattn.quiet": True}


@pytest.fixture
def modules(import_example):
    return import_example("quickstart"), import_example("tiny_dit")


@pytest.fixture
def quickstart(modules, monkeypatch, tmp_path, capsys):
    """Runs it; returns what it printed, its measurements and its picture."""
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile_model(model, **{"backend": "eager", **how}))

    def run(**options):
        picture, record = tmp_path / "picture.png", tmp_path / "record.json"
        options = json.dumps({**OPTIONS, **{f"fgattn.{name}": value for name, value in options.items()}})
        arguments = (*SMALL, "--options", options, "--out", str(picture), "--json", str(record))
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments])
        modules[0].main()
        return capsys.readouterr().out, json.loads(record.read_text())[0], matplotlib.image.imread(picture)

    return run


def test_reports_measures_and_draws(quickstart):
    printed, record, picture = quickstart(density=0.25)
    assert "4 of 8 attention sites rewritten" in printed
    assert printed.count("cross attention") == 4
    assert record["kept"] == pytest.approx(0.25, abs=0.01)
    assert record["shape"]["tokens"] == 256
    assert f"{record['psnr_db']} dB PSNR against the dense" in printed
    assert 10 < record["psnr_db"] < 60
    assert picture.std() > 0.1


def test_density_1_draws_the_same_video(quickstart):
    """Equal to rounding: far above what a mask that drops anything reaches."""
    _, record, _ = quickstart(density=1.0)
    assert record["kept"] == 1
    assert record["psnr_db"] > 90


def test_the_model_denoises(modules):
    """By 11 dB: weights are dequantised, noise levels and timesteps mean what they did in training."""
    _, tiny_dit = modules
    model = tiny_dit.load_model()
    clip = tiny_dit.load_clip(5, 96)
    noisy = tiny_dit.add_noise(clip, 0.5)
    denoised, seconds = tiny_dit.denoise(model, noisy, [0.5, 0.25, 0.0])
    assert tiny_dit.psnr(denoised, clip) > tiny_dit.psnr(noisy, clip) + 8
    assert len(seconds) == 2


def test_clip_that_is_too_short(modules):
    with pytest.raises(ValueError, match="has 74 frames, not 90; ask for fewer"):
        modules[1].load_clip(80, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--side", "100"), "100 is not a multiple of 8"), (("--steps", "2"), "the first 2 are not timed")],
    ids=["side", "steps"],
)
def test_refuses(modules, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit):
        modules[0].parse_args()
    assert message in capsys.readouterr().err
