"""The entry point: registration, options, what reaches the inner compiler, and what happens when something fails."""

import importlib.metadata
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import fg_inductor
from fg_inductor import backend, inner
from fg_inductor.passes import sdpa
from fg_inductor.passes.site import Site
from fg_inductor.settings import Settings
from fg_inductor.testing import assert_as_accurate
from fg_inductor.toy_models import SHORT, SelfAttention, Stack, tokens

EAGER = {**SHORT, "fgattn.inner": "eager", "fgattn.density": 1.0}


def run_python(script):
    """A fresh interpreter, away from the repository; returns its stdout."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def rewrites(monkeypatch):
    """The graphs that the pass has seen."""
    seen, original = [], sdpa.rewrite
    monkeypatch.setattr(sdpa, "rewrite", lambda gm, *rest: seen.append(gm) or original(gm, *rest))
    return seen


@pytest.fixture
def patches(monkeypatch):
    """What compile_fx is given as config_patches; it compiles nothing."""
    seen = []

    def compile_fx(gm, example_inputs, config_patches=None):
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return seen


# Registration


def test_entry_point_needs_no_import():
    script = """
import sys, torch
assert "fgattn" in torch._dynamo.list_backends()
assert "fg_inductor" not in sys.modules
f = torch.compile(lambda x: x + 1, backend="fgattn", options={"fgattn.inner": "eager", "fgattn.quiet": True})
import fg_inductor
fg_inductor.register()
print(f(torch.zeros(1)).item())
"""
    assert run_python(script) == "1.0\n"


def test_register_without_an_entry_point():
    script = """
import importlib.metadata, torch
importlib.metadata.entry_points = lambda **kwargs: importlib.metadata.EntryPoints()
assert "fgattn" not in torch._dynamo.list_backends()
import fg_inductor
fg_inductor.register()
fg_inductor.register()
f = torch.compile(lambda x: x + 1, backend="fgattn", options={"fgattn.inner": "eager", "fgattn.quiet": True})
print(f(torch.zeros(1)).item())
"""
    assert run_python(script) == "1.0\n"


def test_one_entry_point():
    points = importlib.metadata.entry_points(group="torch_dynamo_backends", name="fgattn")
    assert {point.load() for point in points} == {backend.fgattn}


# Options

MODES = {
    "none": ({}, {}),
    "default": ({"mode": "default"}, {}),
    "max-autotune": ({"mode": "max-autotune"}, {"max_autotune": True, "triton.cudagraphs": True}),
    "reduce-overhead": ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
    "mode-among-options": (
        {"options": {"mode": "max-autotune-no-cudagraphs", "fgattn.density": 0.2}},
        {"max_autotune": True},
    ),
    "inductor-options": (
        {"options": {"epilogue_fusion": False, "triton.cudagraphs": False}},
        {"epilogue_fusion": False, "triton.cudagraphs": False},
    ),
    "option-overrides-mode": (
        {"options": {"mode": "max-autotune", "triton.cudagraphs": False}},
        {"max_autotune": True, "triton.cudagraphs": False},
    ),
    "dashes": ({"options": {"max-autotune": True}}, {"max_autotune": True}),
    "dynamic": ({"dynamic": True, "mode": "max-autotune"}, {"max_autotune": True}),
    "gradients": ({}, {"triton.mix_order_reduction": False} if torch.__version__ < (2, 15) else {}),
    "user-wins": ({"options": {"triton.mix_order_reduction": True}}, {"triton.mix_order_reduction": True}),
}


@pytest.mark.parametrize(("arguments", "expected"), MODES.values(), ids=MODES)
def test_what_reaches_inductor(patches, arguments, expected):
    options = {**SHORT, **arguments["options"]} if "options" in arguments else None
    given = dict(options) if options else None
    model = torch.compile(SelfAttention(), backend="fgattn", fullgraph=True, **{**arguments, "options": options})
    model(tokens())
    assert patches
    for received in patches:
        assert expected.items() <= received.items()
        assert not any(key.startswith("fgattn") or key == "mode" for key in received)
        assert (inner.HOOK in received) == (options is not None)
    assert options == given
    assert (fg_inductor.report().rewritten > 0) == (options is not None)


def test_backward_sees_the_options():
    graphs = []
    options = {**SHORT, "post_grad_custom_pre_pass": graphs.append, "fgattn.density": 0.5}
    x = tokens(requires_grad=True)
    torch.compile(SelfAttention(), backend="fgattn", options=options, fullgraph=True)(x).sum().backward()
    ops = [[str(node.target) for node in graph.nodes] for graph in graphs]
    assert ["fgattn.attention.default" in names for names in ops] == [True, False]
    assert ["fgattn.attention_backward.default" in names for names in ops] == [False, True]


REFUSED = {
    "ours": ({"fgattn.dentisy": 0.2}, ValueError, "unknown option 'fgattn.dentisy'; did you mean 'fgattn.density'?"),
    "ours-value": ({"fgattn.slice": "9x9"}, ValueError, "option 'fgattn.slice' must be 'auto', or 'MxN'"),
    "no-prefix": ({"density": 0.2}, ValueError, "unknown option 'density', neither 'fgattn.<name>' nor one of"),
    "no-prefix-hint": ({"inner": "eager"}, ValueError, "did you mean 'fgattn.inner'?"),
    "prefix-typo": ({"fgatn.density": 0.2}, ValueError, "did you mean 'fgattn.density'?"),
    "inductor": ({"max_autotone": True}, ValueError, "did you mean 'max_autotune'?"),
    "nothing-near": ({"qqqqqq": 1}, ValueError, "fg_inductor.settings and torch._inductor.list_options() name them."),
    "inductor-type": ({"max_autotune": "yes"}, TypeError, "option 'max_autotune' takes a bool; got 'yes'"),
    "mode": ({"mode": "max-autotone"}, ValueError, "unknown mode 'max-autotone'; did you mean 'max-autotune'?"),
    "mode-type": ({"mode": 3}, ValueError, "unknown mode 3; choose one of default, "),
    "not-a-string": ({1: 2}, TypeError, "the names of options are strings; got 1."),
}


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(options, kind, message):
    with pytest.raises(kind) as error:
        backend.read_options(None, options)
    assert str(error.value).startswith("fgattn: ")
    assert message in str(error.value)


def test_refuses_two_modes():
    with pytest.raises(ValueError, match="are both given; give one"):
        backend.read_options("max-autotune", {"mode": "default"})


def test_refusal_is_what_the_user_reads():
    """The first call fails, and the text ends with our sentence."""
    model = torch.compile(SelfAttention(), backend="fgattn", options={"fgattn.dentisy": 0.2})
    with pytest.raises(BackendCompilerFailed) as error:
        model(tokens())
    message = "ValueError: fgattn: unknown option 'fgattn.dentisy'; did you mean 'fgattn.density'?"
    assert str(error.value).split("\n\n")[0] == f"backend='fgattn' raised:\n{message}"


def test_refusal_is_logged_where_errors_are_suppressed():
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("torch._dynamo")
    logger.addHandler(handler)
    try:
        with torch._dynamo.config.patch(suppress_errors=True):
            torch.compile(SelfAttention(), backend="fgattn", options={"fgattn.dentisy": 0.2})(tokens())
    finally:
        logger.removeHandler(handler)
    texts = [record.getMessage() + logging.Formatter().format(record) for record in records]
    assert any("did you mean 'fgattn.density'?" in text for text in texts)


# Hooks on the joint graph


@pytest.mark.parametrize("where", ["options", "config"])
def test_calls_the_users_joint_hook(where):
    graphs = []
    hook = graphs.append
    options = dict(SHORT)
    with torch._inductor.config.patch({} if where == "options" else {inner.HOOK: hook}):
        options |= {inner.HOOK: hook} if where == "options" else {}
        torch.compile(SelfAttention(), backend="fgattn", options=options)(tokens())
    assert len(graphs) == 1
    assert fg_inductor.report().rewritten == 1


# What runs


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda f: f.__name__)
def test_density_1_equals_dense(inner, grad):
    model, x = Stack(), tokens()
    options = {**SHORT, "fgattn.inner": inner, "fgattn.density": 1.0}
    with grad():
        actual = torch.compile(model, backend="fgattn", options=options, fullgraph=True)(x)
        assert fg_inductor.report().rewritten == 2
        torch.testing.assert_close(actual, model(x))


def test_sparse_differs_from_dense():
    model, x = Stack(), tokens()
    actual = torch.compile(model, backend="fgattn", options={**EAGER, "fgattn.density": 0.1}, fullgraph=True)(x)
    assert not torch.allclose(actual, model(x))


def test_one_backend_call_for_equal_options(rewrites):
    model, x = Stack(), tokens()
    for _ in range(2):
        torch.compile(model, backend="fgattn", options=dict(EAGER))(x)
    assert len(rewrites) == 1
    torch.compile(model, backend="fgattn", options={**EAGER, "fgattn.density": 0.5})(x)
    assert len(rewrites) == 2


def test_two_models():
    for model in (Stack(1), Stack(3)):
        torch.compile(model, backend="fgattn", options=EAGER)(tokens())
    report = fg_inductor.report()
    assert report.rewritten == 4
    assert len({row.graph for row in report}) == 2


def test_nothing_to_rewrite_runs_as_before(patches):
    model = torch.compile(SelfAttention(is_causal=True), backend="fgattn", options=SHORT)
    model(tokens())
    assert patches == [inner.PATCHES]
    assert [row.site.reason for row in fg_inductor.report()] == ["causal"]


def test_the_users_own_call_of_an_operator():
    """It is no site, and runs as it is written, beside one that is."""

    def run(x):
        q = model(x).unflatten(-1, (2, 64)).transpose(1, 2)
        mask = torch.ops.fgattn.select_pooled(q, q, None, None, 0.1, 16, 8, 16, 0.9, 0.5, 1.0, [], [], 0)
        return torch.ops.fgattn.attention.default(q, q, q, mask, None, None, 0.1, 16, 8, "none", 0)[0]

    model, x = SelfAttention(), tokens()
    options = {**EAGER, "fgattn.stats": True}
    torch.testing.assert_close(torch.compile(run, backend="fgattn", options=options, fullgraph=True)(x), run(x))
    assert [(row.site.decision, row.density) for row in fg_inductor.report()] == [("rewritten", 1.0)]


def test_reset_clears_however_often():
    model, x = torch.compile(Stack(), backend="fgattn", options=EAGER), tokens()
    for _ in range(3):
        model(x)
        assert len(fg_inductor.report()) == 2
        torch._dynamo.reset()
        assert len(fg_inductor.report()) == 0
    assert counters["fgattn"] == {"rewritten": 6}


# Failure


def fail(gm, settings, ask):
    raise KeyError("a defect")


def test_error_of_the_pass_leaves_the_model_as_it_was(monkeypatch, caplog):
    monkeypatch.setattr(sdpa, "rewrite", fail)
    model, x = Stack(), tokens()
    compiled = torch.compile(model, backend="fgattn", options=EAGER, fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(x), model(x))
    (row,) = fg_inductor.report()
    assert (row.site.decision, row.site.reason) == ("dense", "error in the pass")
    assert row.site.detail == "KeyError: 'a defect'"
    assert counters["fgattn"] == {"skipped: error in the pass": 1}
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "please report this" in record.message
    assert record.exc_info[0] is KeyError


def test_error_of_the_pass_under_strict(monkeypatch):
    monkeypatch.setattr(sdpa, "rewrite", fail)
    with pytest.raises(BackendCompilerFailed, match="KeyError: 'a defect'"):
        torch.compile(Stack(), backend="fgattn", options={**EAGER, "fgattn.strict": True})(tokens())


@pytest.mark.parametrize("video", [True, False])
def test_strict_raises_for_video_sites_only(monkeypatch, video):
    site = Site("blocks.0", 0, "self", "1x2x128x64", "1x2x128x64", "float32", "dense", "dropout", video=video)
    monkeypatch.setattr(sdpa, "rewrite", lambda gm, settings, ask: [site])
    model = torch.compile(Stack(), backend="fgattn", options={**EAGER, "fgattn.strict": True})
    if not video:
        model(tokens())
        return
    with pytest.raises(
        BackendCompilerFailed, match=r"(?s)RuntimeError: fgattn: 1 video attention sites.*blocks\.0.*dropout"
    ):
        model(tokens())


def test_settings_reach_the_pass(monkeypatch):
    seen = []
    monkeypatch.setattr(sdpa, "rewrite", lambda gm, settings, ask: seen.append(settings) or [])
    torch.compile(
        Stack(), backend="fgattn", options={"fgattn.pool": 32, "fgattn.quiet": True, "fgattn.inner": "eager"}
    )(tokens())
    assert seen == [Settings(pool=32, quiet=True, inner="eager")]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes_on_cuda(mode):
    """CUDA graphs capture and replay the operators, and the densities that leave the graph."""
    model, x = Stack().to("cuda", torch.bfloat16), tokens(300).to("cuda", torch.bfloat16)
    options = {**SHORT, "mode": mode, "fgattn.density": 1.0, "fgattn.stats": True}
    run = torch.compile(model, backend="fgattn", options=options, fullgraph=True)
    with torch.no_grad():
        for scale in (1, 2, -1, 3):
            torch.compiler.cudagraph_mark_step_begin()
            actual, plain = run(scale * x).clone(), model(scale * x)
            exact = model.double()((scale * x).double())
            model.bfloat16()
            assert_as_accurate(actual, plain, exact)
    assert [row.density for row in fg_inductor.report()] == [1.0] * 2
    assert all(row.kernel in ("portable", "hopper") for row in fg_inductor.report())
    assert counters["inductor"]["cudagraph_skips"] == 0
