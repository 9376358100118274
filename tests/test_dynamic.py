"""What does not compile again: steps, prompts, branches of guidance, resolutions."""

import pytest
import torch
from torch._dynamo.utils import counters

import fg_inductor
from fg_inductor.passes import sdpa
from fg_inductor.toy_models import SHORT, SelfAttention, tiny_wan, tokens, wan_inputs

OPTIONS = {**SHORT, "fgattn.inner": "aot_eager"}


@pytest.fixture
def compiles(monkeypatch):
    """The compile ids of the graphs that the pass has seen."""
    seen, original = [], sdpa.rewrite

    def rewrite(*arguments):
        seen.append(str(torch._guards.CompileContext.current_compile_id()))
        return original(*arguments)

    monkeypatch.setattr(sdpa, "rewrite", rewrite)
    return seen


def assert_one_graph(compiles, rewritten):
    assert compiles == ["0/0"]
    assert fg_inductor.report().rewritten == counters["fgattn"]["rewritten"] == rewritten
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_steps_prompts_and_branches_of_guidance(compiles):
    model = tiny_wan(1).eval()
    run = torch.compile(model, backend="fgattn", options={**OPTIONS, "fgattn.density": 1.0}, fullgraph=True)
    prompt, empty = torch.randn(1, 8, 16), torch.zeros(1, 8, 16)
    for step in range(3):
        inputs = wan_inputs() | {"timestep": torch.tensor([1000.0 - 300 * step])}
        for text in (prompt, empty, torch.randn(1, 8, 16)):
            inputs["encoder_hidden_states"] = text
            torch.testing.assert_close(run(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-4)
    assert_one_graph(compiles, rewritten=1)


@torch.no_grad()
def test_one_compile_for_four_resolutions(compiles):
    model = tiny_wan(1).eval()
    run = torch.compile(model, backend="fgattn", options={**OPTIONS, "fgattn.density": 1.0}, fullgraph=True)
    # No two sides equal, in tokens either: equal sizes share a symbol, and then a guard.
    for frames, height, width in ((3, 8, 12), (5, 12, 20), (2, 16, 10), (7, 10, 18)):
        inputs = wan_inputs(frames, height, width)
        for dim in (2, 3, 4):
            torch._dynamo.mark_dynamic(inputs["hidden_states"], dim)
        torch.testing.assert_close(run(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-4)
    assert_one_graph(compiles, rewritten=1)
    assert "s" in fg_inductor.report()[0].site.query


def test_dynamic_true_compiles_once_for_lengths(compiles):
    model = SelfAttention()
    run = torch.compile(
        model, backend="fgattn", options={**OPTIONS, "fgattn.density": 1.0}, dynamic=True, fullgraph=True
    )
    for length in (96, 130, 200):
        x = tokens(length, requires_grad=True)
        out = run(x)
        torch.testing.assert_close(out, model(x))
        out.sum().backward()
        assert x.grad.isfinite().all()
    assert_one_graph(compiles, rewritten=1)


def test_symbolic_length_below_min_seq_is_dense(compiles):
    """One graph for both sides of min_seq: which one runs is decided at each call."""
    model = SelfAttention()
    options = {**OPTIONS, "fgattn.min_seq": 100, "fgattn.density": 0.1}
    run = torch.compile(model, backend="fgattn", options=options, fullgraph=True)
    equal = []
    for length in (96, 130):
        x = tokens(length)
        torch._dynamo.mark_dynamic(x, 1)
        equal.append(torch.allclose(run(x), model(x), rtol=1e-4, atol=1e-5))
    assert equal == [True, False]
    assert_one_graph(compiles, rewritten=1)
    assert fg_inductor.report()[0].site.reason == "dense below 100 tokens"


@torch.no_grad()
def test_regional_compilation_has_one_graph_for_all_layers(compiles):
    model, inputs = tiny_wan(2).eval(), wan_inputs()
    expected = model(**inputs)[0]
    model.compile_repeated_blocks(backend="fgattn", options={**OPTIONS, "fgattn.density": 1.0}, fullgraph=True)
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-4)
    assert_one_graph(compiles, rewritten=1)
