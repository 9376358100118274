"""The training example at a small size, without Inductor."""

import json
import re
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = (
    "--frames",
    "3",
    "--side",
    "64",
    "--layers",
    "1",
    "--heads",
    "1",
    "--workers",
    "0",
    "--device",
    "cpu",
)  # 48 tokens
OPTIONS = {"fgattn.min_seq": 1, "fgattn.slice": "16x8", "fgattn.inner": "eager", "fgattn.quiet": True}


@pytest.fixture
def example(import_example):
    return import_example("train_video_dit")


@pytest.fixture
def run(example, monkeypatch, tmp_path, capsys, one_thread):
    """Runs it in a folder; returns its log, the weights and state that it left, and what it printed."""

    def run(name, *arguments, density=None):
        how = ["--backend", "eager"]
        if density is not None:
            how = ["--backend", "fgattn", "--options", json.dumps({**OPTIONS, "fgattn.density": density})]
        monkeypatch.setattr(
            sys, "argv", ["train_video_dit.py", *SMALL, *how, "--out", str(tmp_path / name), *arguments]
        )
        example.main()
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        (last,) = (tmp_path / name).glob("step-*")
        files = ("diffusion_pytorch_model", "optimizer")
        state = [load_file(last / f"{file}.safetensors") for file in files]
        return [r["loss"] for r in log], state[0] | state[1], capsys.readouterr().out

    return run


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("density", [None, 0.3], ids=["dense", "sparse"])
def test_resumes_bit_for_bit(run, tmp_path, density):
    """Also where the run was cut off after its last checkpoint, whose later steps are then done once more."""
    losses, state, _ = run("whole", "--steps", "5", "--save-every", "3", density=density)
    run("parts", "--steps", "3", density=density)
    with (tmp_path / "parts/log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 0.0, "grad_norm": 0.0, "seconds": 0.0}\n')
    (tmp_path / "parts/step-00000005.partial").mkdir()  # and while it wrote another
    torch.manual_seed(5)
    again, resumed, _ = run("parts", "--steps", "5", "--resume", density=density)
    assert again == losses and len(set(losses)) == 5
    assert_same(resumed, state)


def test_dense_and_sparse_learn_from_the_same(run):
    """At density 1.0 the losses are dense training's, to rounding; at 0.3 they are others, of the same samples."""
    dense, _, _ = run("dense", "--steps", "3")
    full, _, printed = run("full", "--steps", "3", density=1.0)
    sparse, _, _ = run("sparse", "--steps", "3", density=0.3)
    assert "1 of 2 attention sites rewritten" in printed
    # One float32 rounding of each of a few thousand errors that are averaged.
    assert full == pytest.approx(dense, rel=4000**0.5 * torch.finfo(torch.float32).eps)
    assert sparse != dense and sparse == pytest.approx(dense, rel=0.01)


def test_checkpointing_and_batches(run):
    """Blocks that are recomputed give the same losses."""
    plain, _, _ = run("plain", "--steps", "2", "--batch", "2")
    recomputed, _, _ = run("recomputed", "--steps", "2", "--batch", "2", "--checkpointing")
    assert recomputed == plain


def test_samples(example):
    """The same from the same seed; another start, place, level and noise with every number and every seed."""
    one, same, other = (example.Clips(EXAMPLES / "assets", 3, 64, seed) for seed in (0, 0, 1))
    for i in (0, 7):
        for a, b in zip(one[i], same[i], strict=True):
            assert torch.equal(a, b)
    clip, text, level, noise = one[0]
    assert (clip.shape, text.shape, level.shape, noise.shape) == ((3, 3, 64, 64), (8, 64), (), (3, 3, 64, 64))
    assert clip.min() >= -1 and clip.max() <= 1 and clip.std() > 0.05
    for sample in (one[1], other[0]):
        assert all(not torch.equal(a, b) for a, b in ((clip, sample[0]), (level, sample[2]), (noise, sample[3])))
        assert torch.equal(text, sample[1])  # of the same file


def test_levels_lean_towards_noise(example, monkeypatch):
    monkeypatch.setattr(example, "_read", lambda *where: torch.zeros(3, 1, 8, 8))
    clips = example.Clips(EXAMPLES / "assets", 1, 8)
    levels = torch.tensor([clips[i][2] for i in range(200)])
    assert levels.min() > 0 and levels.max() < 1
    assert 0.6 < levels.median() < 0.9  # 0.75 for a uniform u, and 0.5 without the shift


def test_plot(run, example, tmp_path, monkeypatch, capsys):
    run("one", "--steps", "3")
    run("other", "--steps", "3", "--seed", "1")
    logs, out = [str(tmp_path / name / "log.jsonl") for name in ("one", "other")], tmp_path / "losses.png"
    monkeypatch.setattr(sys, "argv", ["train_video_dit.py", "--plot", *logs, "--out", str(out)])
    example.main()
    assert matplotlib.image.imread(out).std() > 0.1
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--side", "100"), "100 is not a multiple of 8"),
        (("--frames", "90"), "of 1 mp4 files in .* none has 90 frames, the longest has 74"),
        (("--data", "/nowhere"), "of 0 mp4 files"),
        (("--plot", "/nowhere/log.jsonl"), "there is no such log"),
    ],
    ids=["side", "frames", "data", "plot"],
)
def test_refuses(run, arguments, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as refused:
        run("refused", *arguments)
    printed = f"{refused.value} {capsys.readouterr().err}"
    assert re.search(message, printed), printed


def test_refuses_to_go_on_with_another_run(run):
    run("one", "--steps", "1")
    with pytest.raises(SystemExit, match="--batch was 1, is 2, --seed was 0, is 1"):
        run("one", "--steps", "2", "--resume", "--seed", "1", "--batch", "2")


def test_stops_where_the_loss_is_not_finite(run, monkeypatch, example):
    monkeypatch.setattr(example.F, "mse_loss", lambda a, b: (a - b).square().mean() * float("nan"))
    with pytest.raises(FloatingPointError, match=r"the loss of step 0 is nan; try a lower --lr than 0\.1"):
        run("diverged", "--steps", "1", "--lr", "0.1")
