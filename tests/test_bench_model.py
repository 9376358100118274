"""The benchmark of whole models: its arguments, its arithmetic, and its rows, computed on CPU."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from fg_inductor import state
from fg_inductor.bench import architectures, model
from fg_inductor.bench.architectures import ARCHITECTURES
from fg_inductor.bench.common import PRESETS, Timing

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="needs diffusers")
TINY = {"heads": 2, "tokens": 60, "dim": 32, "grid": (3, 4, 5)}


def test_defaults():
    args = model.parse([])
    assert (args.preset, args.layers, args.compile, args.mask) == ("wan2.1-1.3b-480p", [1, 3], "blocks", ["pooled"])
    assert (args.slice, args.density, args.tail, args.steps, args.dense) == (
        [model.DEFAULT_SLICE],
        [0.3],
        ["none"],
        50,
        10,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--preset ltx-2b", "invalid choice: 'ltx-2b'"),  # attention alone has it
        ("--layers 3", "give two numbers up to 30"),
        ("--layers 1 31", "give two numbers up to 30"),
        ("--layers 1 2 3", "give two numbers up to 30"),
        ("--steps 5 --dense 6", "--dense 6: the dense steps are some of the 5"),
        ("--steps 5 --dense -1", "--dense -1: the dense steps are some of the 5"),
    ],
)
def test_refuses(text, message, capsys):
    with pytest.raises(SystemExit):
        model.parse(text.split())
    assert message in capsys.readouterr().err


def test_the_full_number_of_layers_alone_is_not_scaled():
    assert model.parse(["--layers", "30"]).layers == [30]
    assert model.scaled({30: 7.0}, 30) == 7.0 == model.scaled({1: 2.0, 30: 7.0}, 30)


def test_scaled():
    assert model.scaled({1: 15.0, 3: 25.0}, 40) == 10 + 40 * 5  # 10 ms that no layer takes, 5 ms a layer
    with pytest.raises(ValueError, match=r"3 layers took 24\.0 ms and 1 took 25\.0 ms"):
        model.scaled({1: 25.0, 3: 24.0}, 40)


def test_run_time():
    total, words = model.run_time(50, 10, 100.0, 50.0)
    assert total == 10 * 100 + 40 * 50
    assert words == "10 dense x 100 ms + 40 sparse x 50 ms = 3 s, 1.67x of 50 x 100 ms dense"
    total, words = model.run_time(50, 10, 100.0, 40.0, 160.0, every=15)
    assert total == 10 * 100 + 37 * 40 + 3 * 160  # steps 10, 25 and 40 refresh
    assert "37 sparse x 40 ms + 3 refresh x 160 ms" in words


# Rows


@pytest.fixture
def calls(monkeypatch):
    """Tiny presets; a layer takes 5 ms and the rest 10, attention alone 2; nothing is lowered."""
    seen = {"layers": None, "refreshed": 0, "reused": 0}
    shorten = architectures.Architecture.shorten

    def shortened(architecture, built, layers):
        shorten(architecture, built, layers)
        seen["layers"] = layers

    def measure(calls):
        for call in calls:
            call()
        return Timing(2.0 if seen["layers"] is None else 10.0 + 5 * seen["layers"], 0.5, 99.5)

    def count(what, number):
        seen[what] = seen.get(what, 0) + number

    monkeypatch.setattr(architectures.Architecture, "shorten", shortened)
    monkeypatch.setattr(state, "_count", count)
    monkeypatch.setattr(model, "measure", measure)
    monkeypatch.setattr(model, "environment", lambda: {"card": "a card", "commit": "abc"})
    monkeypatch.setattr(architectures, "TEXT_WIDTH", 16)
    monkeypatch.setattr(architectures, "CHANNELS", 4)
    compile_module = torch.nn.Module.compile

    def compile_eagerly(module, options=None, **how):
        options = options and {**options, "fgattn.inner": "eager"}
        compile_module(module, **{"backend": "eager", "options": options, **how})

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    common = {"in_channels": 4, "out_channels": 4}
    tiny = {
        "wan2.1-1.3b-480p": {**common, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32},
        "hunyuanvideo-720p": {
            **common, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 768,
            "rope_axes_dim": (8, 12, 12),
        },
        "cogvideox-5b": {
            **common, "text_embed_dim": 16, "time_embed_dim": 16, "sample_width": 10, "sample_height": 8,
            "sample_frames": 9, "max_text_seq_length": 7, "use_rotary_positional_embeddings": True,
        },
    }  # fmt: skip
    for name, config in tiny.items():
        monkeypatch.setitem(ARCHITECTURES, name, dataclasses.replace(ARCHITECTURES[name], config=config, text=7))
        monkeypatch.setitem(PRESETS, name, TINY | {"tokens": 60 if "wan" in name else 67})
    yield seen
    torch._dynamo.reset()


def rows(text):
    return list(model.rows(model.parse(["--slice", "16x8", "--density", "0.5", *text.split()]), "cpu"))


@pytest.mark.parametrize("how", ["blocks", "whole"])
@pytest.mark.parametrize("preset", ["wan2.1-1.3b-480p", "hunyuanvideo-720p", "cogvideox-5b"])
def test_rows(preset, how, calls, capsys):
    dense, sparse = rows(f"--preset {preset} --tail pooled --layers 1 2 --compile {how}")
    units = ARCHITECTURES[preset].units
    assert dense["median_ms"] == sparse["median_ms"] == sparse["baseline_ms"] == 10 + 5 * units
    attention = 2 * sum(ARCHITECTURES[preset].layers.values()) / (10 + 5 * units)
    assert dense["attention"] == pytest.approx(attention)
    assert dense["ceiling"] == (pytest.approx(1 / (1 - attention)) if attention < 1 else None)
    assert dense["variant"] == dense["baseline"] == sparse["baseline"]
    assert sparse["variant"] == "fgattn, pooled" and sparse["kept"] == pytest.approx(0.5, abs=0.1)  # 9 groups
    assert sparse["shape"] == {"layers": units, "heads": 2, "tokens": PRESETS[preset]["tokens"]}
    assert sparse["scaled"] == "from 1 and 2 layers"
    assert "of 50 x" in capsys.readouterr().out
    assert sparse["layers_1"]["median_ms"] == 15 and (dense["run_s"], sparse["run_s"]) == (dense["run_s"],) * 2
    json.dumps([dense, sparse])


def test_best_baseline_alone(calls, monkeypatch):
    monkeypatch.setattr(model, "_dense_ways", lambda *_: {"best": {}, "SDPA's choice": {}})
    assert [r["variant"] for r in rows("--preset hunyuanvideo-720p --layers 1 2")] == [
        "best", "SDPA's choice", "fgattn, pooled",
    ]  # fmt: skip
    best, sparse = rows("--preset hunyuanvideo-720p --layers 1 2 --baselines best")
    assert best["variant"] == sparse["baseline"] == "best"


def test_observed_masks_are_made_anew_in_a_refresh_and_only_there(calls):
    """Two numbers of layers: masks are made in the first call of each, and once more where the refresh is timed."""
    _, row = rows("--preset wan2.1-1.3b-480p --mask observed --layers 1 2 --refresh 15")
    assert row["variant"] == "fgattn, observed" and row["refresh_ms"] == row["median_ms"] and row["refresh_every"] == 15
    # Two layers: made, then timed as refresh, then kept. Then one of them: kept, refreshed, kept.
    assert (calls["refreshed"], calls["reused"]) == (2 + 2 + 1, 2 + 1 + 1)


def test_says_so_where_a_site_stays_dense(calls, monkeypatch):
    monkeypatch.setattr(ARCHITECTURES["wan2.1-1.3b-480p"].__class__, "attention_calls", lambda *_: 7)
    with pytest.raises(RuntimeError, match="of 7 sites are sparse"):
        rows("--preset wan2.1-1.3b-480p --layers 1 2 --compile whole")


def test_a_mask_that_says_nothing_is_left_out():
    def attend(q, mask):
        return torch.nn.functional.scaled_dot_product_attention(query=q, key=q, value=q, attn_mask=mask)

    q = torch.randn(1, 2, 8, 16)
    wrong = torch.zeros(1, 1, 1, 8, dtype=torch.bool).index_fill(-1, torch.tensor(3), True)
    out = torch.compile(attend, backend=model.without_mask_then("eager"))(q, wrong)
    torch.testing.assert_close(out, attend(q, None))


def test_what_diffusers_keeps_in_float32_stays_so(calls):
    built, inputs = architectures.make("wan2.1-1.3b-480p", 1, 1, "cpu")
    dtypes = {name: p.dtype for name, p in built.named_parameters()}
    assert (
        dtypes["blocks.0.scale_shift_table"] == torch.float32 and dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    )
    assert built.rope.freqs_cos.dtype != torch.bfloat16  # tables of angles are made in float32 or finer
    assert inputs["hidden_states"].shape == (1, 4, 3, 8, 10)
