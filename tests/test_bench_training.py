"""The training benchmark: its arguments, and its rows, computed on CPU."""

import importlib.util
import json

import pytest
import torch

from fg_inductor import settings
from fg_inductor.bench import training
from fg_inductor.bench.common import PRESETS, Timing
from fg_inductor.kernels import ops

# Arguments


def test_defaults():
    args = training.parse([])
    assert (args.preset, args.parts, args.layers) == ("wan2.1-1.3b-480p", ["attention", "step"], 4)
    assert (args.slice, args.density, args.lists, args.tail) == ([(128, 8)], [0.3], ["random"], ["none"])
    assert (args.schedule, args.batch, args.checkpointing) == (["auto"], 1, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--preset wan", "invalid choice: 'wan'"),
        (
            "--preset ltx-2b",
            "--preset ltx-2b has no model for the step; give --parts attention, or one of wan2.1-1.3b-",
        ),
        ("--parts backward", "invalid choice: 'backward'"),
        ("--layers 0", "'0' is not a whole number above 0"),
        ("--density 0", "'0' is not a number in (0, 1]"),
        ("--slice 128x2", "'128x2' is not MxN"),
        ("--schedule atomics", "invalid choice: 'atomics'"),
    ],
)
def test_refuses(text, message, capsys):
    with pytest.raises(SystemExit):
        training.parse(text.split())
    assert message in capsys.readouterr().err


def test_attention_alone_of_any_preset():
    for preset in PRESETS:
        assert training.parse(["--preset", preset, "--parts", "attention"]).preset == preset


def test_says_that_it_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        training.main([])


# Rows


@pytest.fixture
def calls(monkeypatch):
    """A tiny preset; ``measure`` runs each call once and takes 1 ms, one more each time; nothing is lowered."""
    seen = []

    def measure(calls):
        seen.append(len(calls))
        for call in calls:
            call()
        return Timing(float(len(seen)), 0.5, 99.5)

    compile_model = torch.compile

    def compile_eagerly(model, options=None, **how):
        options = options and {**options, "fgattn.inner": "eager"}
        return compile_model(model, **{"backend": "eager", "options": options, **how})

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr(training, "measure", measure)
    monkeypatch.setattr(training, "environment", lambda: {"card": "a card", "commit": "abc"})
    monkeypatch.setitem(PRESETS, "tiny-1p", {"heads": 2, "tokens": 240, "dim": 64, "grid": (3, 8, 10)})
    monkeypatch.setitem(training.WAN, "tiny", {"ffn_dim": 64, "num_layers": 7})
    monkeypatch.setattr(training, "TEXT", (8, 16))
    return seen


def rows(text):
    return list(training.rows(training.parse(["--preset", "tiny-1p", "--slice", "16x8", *text.split()]), "cpu"))


def test_rows_of_attention(calls):
    found = rows("--parts attention --density 0.5 --tail pooled --lists skewed")
    # 1 to 3 are dense; then forward, backward, both; then, with selection, the same, of which both is shown.
    assert [(r["work"], r["baseline_ms"], r["median_ms"], r["lists"]) for r in found] == [
        ("forward", 1.0, 4.0, "skewed"),
        ("backward", 2.0, 5.0, "skewed"),
        ("forward and backward", 3.0, 6.0, "skewed"),
        ("selection, forward and backward", 3.0, 9.0, "selected"),
    ]
    for row in found:
        assert (row["bench"], row["preset"], row["shape"], row["tail"]) == (
            "training",
            "tiny-1p",
            [1, 2, 240, 64],
            "pooled",
        )
        assert (row["baseline"], row["variant"], row["slice"]) == ("cuDNN dense", "reference", "16x8")
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["median_ms"])
        assert row["kept"] == pytest.approx(0.5, abs=0.02) and (row["p20_ms"], row["p80_ms"]) == (0.5, 99.5)
        assert "peak_gb" not in row  # no device memory here
        json.dumps(row)
    assert 0 < found[1]["error"] < 0.01 and all("error" not in row for row in (found[0], *found[2:]))


@pytest.mark.parametrize("tail", ["none", "pooled"])
@pytest.mark.parametrize("which", range(3), ids=["dq", "dk", "dv"])
def test_error_is_seen(which, tail):
    """A backward that is wrong for the last query, or key, has a large error."""
    q, k, v, _ = training._inputs((1, 250, 2, 64), "cpu")[0]
    arguments = (q, k, v, training.select(q, k, None, 16, 8, 0.5), None, None, 0.125, 16, 8, tail, 0)

    def right(dout):
        return torch.autograd.grad(ops.attention(*arguments)[0], (q, k, v), dout)

    def wrong(dout):
        grads = right(dout)
        grads[which][:, -1, -1] += 1
        return grads

    assert training.error(right, *arguments) < 0.01
    assert training.error(wrong, *arguments) > 0.1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_rows_of_schedules(calls, monkeypatch):
    """Called as the operator would call the kernels; a wrong one is seen."""
    from fg_inductor.kernels import attention_backward

    def launch(dout, q, k, v, out, lse, *rest, split):
        with torch.enable_grad():
            attended, expected = ops.attention(q, k, v, *rest, 0)
            assert torch.equal(out, attended) and torch.equal(lse, expected)
            dq, dk, dv = torch.autograd.grad(attended, (q, k, v), dout)
        return dq, dk * (1 + split), dv

    monkeypatch.setattr(attention_backward, "launch", launch)
    slices, keys = rows("--parts attention --tail pooled --schedule slices keys")
    assert [(r["work"], r["variant"], r["baseline_ms"], r["median_ms"]) for r in (slices, keys)] == [
        ("backward", "backward by slices", 2.0, 4.0), ("backward", "backward by keys", 2.0, 5.0),
    ]  # fmt: skip
    assert slices["error"] < 0.01 and keys["error"] > 0.1


def test_rows_of_a_step(calls):
    found = rows("--parts step --density 0.5 0.2 --layers 2 --tail pooled")
    assert [(r["density"], r["tail"], r["median_ms"]) for r in found] == [(0.5, "pooled", 5.0), (0.2, "pooled", 6.0)]
    for row in found:
        assert (row["work"], row["variant"], row["baseline"]) == ("training step", "fgattn", "the same step, Inductor")
        assert (row["baseline_ms"], row["attention"]) == (4.0, 2 * 3.0 / 4.0)
        assert row["shape"] == {"layers": "2 of 7", "heads": 2, "tokens": 240}
        assert row["kept"] == pytest.approx(row["density"], abs=0.02)
        json.dumps(row)


def test_a_step_with_checkpointing(calls):
    """Attention runs forward twice, and its share of the step says so."""
    (row,) = rows("--parts step --layers 1 --checkpointing")
    assert row["checkpointing"] and row["attention"] == (3.0 + 1.0) / 4.0


def test_a_step_that_stays_dense_is_an_error(calls, monkeypatch):
    dense = settings.Settings(mask="dense", inner="eager", quiet=True)
    monkeypatch.setattr(settings.Settings, "parse", lambda options: dense)
    with pytest.raises(RuntimeError, match="0 of 1 sites are sparse"):
        rows("--parts step --layers 1")


@pytest.mark.gpu
def test_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny-1p", {"heads": 2, "tokens": 1200, "dim": 64, "grid": (3, 20, 20)})
    monkeypatch.setitem(training.WAN, "tiny", {"ffn_dim": 64, "num_layers": 7})
    file = tmp_path / "rows.json"
    text = "--preset tiny-1p --schedule auto slices keys --tail none pooled --layers 1"
    training.main([*text.split(), "--json", str(file)])
    found = json.loads(file.read_text())
    assert len(found) == 2 * (4 + 2) + 2
    assert all(row["ratio"] > 0 and row["peak_gb"] > 0 and row["baseline_peak_gb"] > 0 for row in found)
    assert all(row["error"] < 0.01 for row in found if "error" in row)
    assert "cuDNN" in capsys.readouterr().out
