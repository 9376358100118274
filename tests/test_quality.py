"""The quality example at a small size: with everything kept nothing changes, with less something does."""

import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = ["--device", "cpu", "--frames", "3", "--side", "64", "--steps", "3", "--seeds", "0", "1"]

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def quality(import_example, monkeypatch, tmp_path):
    """Runs it; returns its module and what it wrote."""
    module = import_example("quality")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["quality.py", *SMALL, *arguments, "--out", str(tmp_path / "q")])
        module.main()
        assert (tmp_path / "q.png").stat().st_size > 10_000
        return json.loads((tmp_path / "q.json").read_text())

    return module, run


def test_everything_kept_and_half(quality):
    _, run = quality
    found = run("--methods", "means", "observed", "--density", "1.0", "0.5")
    table = {(row["method"], row["density"]): row for row in found["summary"]}
    for method in ("means", "observed"):
        whole, half = table[method, 1.0], table[method, 0.5]
        assert whole["kept"] == 1 and whole["psnr_db"] > 80 and whole["motion_error"] < 1e-3  # equal to rounding
        assert 0.49 < half["kept"] < 0.55 and half["psnr_db"] < 60 and half["videos"] == 2
        assert half["psnr_db_min"] < half["psnr_db"] < half["psnr_db_max"]  # seeds differ
    layers = {(row["layer"], row["density"]): row["error"] for row in found["layers"]}
    assert len(layers) == 4 * 2 == len(found["layers"])  # of the stateless method alone
    assert all((error < 1e-3) == (density == 1.0) for (_, density), error in layers.items())


def test_weights_of_a_file_tell_their_sizes(quality):
    module, _ = quality
    shipped, loaded = (module.load_model(path, "cpu") for path in (None, str(EXAMPLES / "assets/tiny_dit.safetensors")))
    assert {name: getattr(loaded.config, name) for name in ("num_layers", "ffn_dim", "text_dim", "patch_size")} == {
        name: getattr(shipped.config, name) for name in ("num_layers", "ffn_dim", "text_dim", "patch_size")
    }
    for name, weight in shipped.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


def test_refuses_sizes_that_are_no_patches(quality):
    _, run = quality
    with pytest.raises(SystemExit, match="don't divide into patches"):
        run("--side", "63")


def test_runs_are_put_together(quality, tmp_path):
    module, run = quality
    paths = []
    for method in ("means", "dfs"):
        run("--methods", method, "--density", "0.5")
        paths.append((tmp_path / "q.json").rename(tmp_path / f"{method}.json"))
    both = run("--plot", *map(str, paths))
    assert [row["method"] for row in both["summary"]] == ["means", "dfs"]
    assert len(both["videos"]) == 4 and len(both["layers"]) == 8
    other = json.loads(paths[1].read_text())
    other["what"]["steps"] += 1
    paths[1].write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="differ in steps"):
        module.together(paths)
