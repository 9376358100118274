"""The report, explain, the counters, the log and the density that ``fgattn.stats`` measures."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import fg_inductor
from fg_inductor.option_values import StaticMask
from fg_inductor.passes import sdpa
from fg_inductor.report import COLUMNS, Meter, Report, summary
from fg_inductor.settings import Settings
from fg_inductor.toy_models import SHORT, SelfAttention, Stack, tokens

EAGER = {**SHORT, "fgattn.inner": "eager", "fgattn.density": 0.5}


class Mixture(torch.nn.Module):
    """One site to rewrite, one to leave."""

    def __init__(self):
        super().__init__()
        self.sparse, self.causal = SelfAttention(), SelfAttention(is_causal=True)

    def forward(self, x):
        return self.causal(self.sparse(x))


def compiled(model, **options):
    return torch.compile(model, backend="fgattn", options={**EAGER, **options}, fullgraph=True)


@pytest.mark.parametrize(
    "settings, text",
    [
        ({}, "pooled 128x8, density 0.3"),
        ({"top_p": 0.9}, "pooled 128x8, top_p 0.9"),
        ({"density": 0.25, "tail": "pooled"}, "pooled 128x8, density 0.25, pooled tail"),
        ({"alpha": 0.5}, "pooled 128x8, alpha 0.5"),
        ({"mask": "dfs"}, "dfs 128x8, density 0.3"),
        ({"mask": "static", "static": StaticMask(radius=9.0)}, "static 128x8"),  # no number says how much it keeps
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_summary_of_settings(settings, text):
    assert summary(Settings(**settings), "128x8") == text


def test_rows_as_data():
    compiled(Mixture())(tokens())
    report = fg_inductor.report()
    assert (len(report), report.rewritten) == (2, 1)
    sparse, causal = report
    assert (sparse.site.path, sparse.site.query, sparse.site.key) == ("sparse", "1x2x128x64", "1x2x128x64")
    assert (sparse.site.dtype, sparse.site.decision, sparse.kernel) == ("float32", "rewritten", "reference")
    assert (causal.site.path, causal.site.decision, causal.site.reason) == ("causal", "dense", "causal")
    assert causal.kernel is None
    assert sparse.density is causal.density is None
    data = json.loads(report.to_json())
    assert data["rewritten"] == 1
    assert [site["path"] for site in data["sites"]] == ["sparse", "causal"]
    assert data["sites"][0]["settings"] == {
        "slice": "16x8", "density": 0.5, "min_seq": 1, "when": "always", "quiet": True, "inner": "eager",
    }  # fmt: skip


def test_table():
    compiled(Mixture(), **{"fgattn.tail": "pooled"})(tokens())
    head, columns, _, sparse, causal = str(fg_inductor.report()).splitlines()
    assert head == "fgattn: 1 of 2 attention sites rewritten"
    assert tuple(columns.split()) == COLUMNS
    assert "pooled 16x8, density 0.5, pooled tail" in sparse
    assert causal.endswith("causal")


def test_empty():
    assert str(fg_inductor.report()) == "fgattn: no attention site has been compiled."
    assert fg_inductor.report().to_dict() == {"rewritten": 0, "sites": []}


def test_counters():
    compiled(Mixture())(tokens())
    assert counters["fgattn"] == {"rewritten": 1, "skipped: causal": 1}


def test_counts_once_where_a_frame_is_compiled_twice(monkeypatch):
    """A symbolic float that AOTAutograd can't keep makes Dynamo restart, and call the backend again for the frame."""
    calls, original = [], sdpa.rewrite
    monkeypatch.setattr(sdpa, "rewrite", lambda gm, *rest: calls.append(gm) or original(gm, *rest))
    model = Mixture()

    @torch.compile(backend="fgattn", options={**EAGER, "fgattn.inner": "aot_eager"}, dynamic=True)
    def run(x, bound):
        return model(x).clamp(-bound, bound)

    with torch.no_grad():
        run(tokens(), 0.5)
    assert len(calls) == 2
    assert counters["fgattn"] == {"rewritten": 1, "skipped: causal": 1}
    assert len(fg_inductor.report()) == 2


# Log


def first_line(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("fg_inductor") and r.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("model", "start"),
    [
        (
            Mixture,
            "1 of 2 attention sites of graph 0/0 now run sparse, which is approximate: pooled 16x8, density 0.5.",
        ),
        (
            lambda: Stack(is_causal=True),
            "0 of 2 attention sites of graph 0/0 run sparse; the most common reason (2): causal.",
        ),
        (lambda: torch.nn.Linear(128, 128), "0 of 0 attention sites of graph 0/0 run sparse: it calls no "),
    ],
    ids=["some", "none", "no-attention"],
)
def test_first_line_is_said_once(caplog, model, start):
    for width in (128, 192):
        compiled(model(), **{"fgattn.quiet": False})(tokens(width))
    assert counters["stats"]["unique_graphs"] == 2
    (line,) = first_line(caplog)
    assert line.startswith(f"fgattn: {start}")
    assert "fg_inductor.report()" in line


def test_first_line_again_for_other_settings(caplog):
    compiled(Stack(), **{"fgattn.quiet": False})(tokens())
    compiled(Stack(), **{"fgattn.quiet": False, "fgattn.density": 0.25})(tokens())
    assert len(first_line(caplog)) == 2


def test_quiet(caplog):
    compiled(Stack())(tokens())
    assert first_line(caplog) == []


def test_torch_logs_and_trace(tmp_path):
    script = """
import torch
from fg_inductor.toy_models import SHORT, Stack, tokens
model = torch.compile(Stack(1), backend="fgattn", options={**SHORT, "fgattn.inner": "eager"})
model(tokens())
"""
    env = {**os.environ, "TORCH_LOGS": "+fg_inductor", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=os.sep, env=env, check=True
    )
    assert "graph 0/0, site blocks.0: " in done.stderr
    before, _, after = done.stderr.partition("after:")
    assert "scaled_dot_product_attention" in before
    assert "torch.ops.fgattn.attention.default" not in before
    assert "torch.ops.fgattn.attention.default" in after
    (trace,) = tmp_path.iterdir()
    assert '"name": "fgattn_report"' in trace.read_text()


# Explain


def test_explain(capsys):
    model, x = Mixture(), tokens()
    explained = fg_inductor.explain(model, x, options=SHORT)
    printed = capsys.readouterr().out
    assert "1 of 2 attention sites rewritten" in printed and "sparse" in printed and "causal" in printed
    assert [row.site.decision for row in explained] == ["rewritten", "dense"]
    assert [row.site.path for row in explained] == ["sparse", "causal"]
    assert len(fg_inductor.report()) == 0
    assert counters["fgattn"] == {}
    # The same as compiling it.
    compiled(model)(x)
    assert [row.site for row in fg_inductor.report()] == [row.site for row in explained]


@pytest.mark.parametrize("rich", [True, False])
def test_table_with_and_without_rich(rich, capsys, monkeypatch):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    compiled(Mixture())(tokens())
    fg_inductor.report().print()
    printed = capsys.readouterr().out
    assert printed.startswith("fgattn: 1 of 2 attention sites rewritten") and "rewritten" in printed
    assert ("kernel" in printed) == (not rich)  # the plain table has all columns
    fg_inductor.reset()
    fg_inductor.report().print()
    assert capsys.readouterr().out.strip() == "fgattn: no attention site has been compiled."


def test_explain_leaves_compiled_code_alone(monkeypatch):
    calls, original = [], sdpa.rewrite
    model, x = Mixture(), tokens()
    run = compiled(model)
    expected = run(x)
    monkeypatch.setattr(sdpa, "rewrite", lambda gm, *rest: calls.append(gm) or original(gm, *rest))
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        assert fg_inductor.explain(run, x, options=SHORT).rewritten == 1
    calls.clear()
    assert torch.equal(run(x), expected)
    assert calls == []
    assert len(fg_inductor.report()) == 2


def test_explain_runs_dense_and_checkpointed():
    seen = []
    model, x = Stack(call=lambda block, x: checkpoint(block, x, use_reentrant=False)), tokens()
    report = fg_inductor.explain(lambda x: seen.append(model(x)), x, options={**SHORT, "fgattn.density": 0.1})
    assert report.rewritten == 2
    torch.testing.assert_close(seen[0], model(x))


def test_explain_refuses_options():
    with pytest.raises(ValueError, match=r"did you mean 'fgattn\.density'"):
        fg_inductor.explain(Mixture(), tokens(), options={"fgattn.dentisy": 1})


# Density


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("grad", [torch.enable_grad, torch.inference_mode], ids=lambda f: f.__name__)
def test_measures_density(inner, grad):
    model, x = Mixture(), tokens(requires_grad=grad is torch.enable_grad)
    options = {"fgattn.inner": inner, "fgattn.density": 0.25}
    plain, measured = (compiled(model, **options, **{"fgattn.stats": stats}) for stats in (False, True))
    with grad():
        out = measured(x)
        assert torch.equal(out, plain(x))
    if out.requires_grad:
        (expected,) = torch.autograd.grad(plain(x).sum(), x)
        (actual,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(actual, expected)
    densities = {(row.site.path, row.settings.stats): row.density for row in fg_inductor.report()}
    assert densities == {
        ("sparse", False): None, ("causal", False): None, ("sparse", True): 0.25, ("causal", True): None,
    }  # fmt: skip


def test_density_is_the_mean_over_calls():
    run = compiled(SelfAttention(), **{"fgattn.stats": True, "fgattn.density": None, "fgattn.top_p": 0.5})
    flat, peaked = tokens(), 30 * tokens()

    def density(*inputs):
        torch._dynamo.reset()
        for x, grad in inputs:
            with grad():
                run(x)
        return fg_inductor.report()[0].density

    first, second = density((flat, torch.no_grad)), density((peaked, torch.no_grad))
    assert first > second > 0
    mean = density((flat, torch.inference_mode), (peaked, torch.inference_mode), (peaked, torch.inference_mode))
    assert mean == pytest.approx((first + 2 * second) / 3)


def test_meter_keeps_its_outputs_to_itself():
    meter = Meter([3, 5])
    run = meter.wrap(lambda x: (x, x + 1, torch.tensor(0.25), torch.tensor(1.0)))
    assert run(1) == (1, 2)
    assert run(2) == (2, 3)
    assert meter.means() == {3: 0.25, 5: 1.0}


def test_density_with_symbolic_length():
    run = compiled(SelfAttention(), **{"fgattn.stats": True, "fgattn.inner": "aot_eager", "fgattn.density": 1.0})
    for length in (96, 130):
        x = tokens(length)
        torch._dynamo.mark_dynamic(x, 1)
        run(x)
    (row,) = fg_inductor.report()
    assert row.density == 1.0


def test_density_of_a_graph_that_ddp_splits():
    """Several graphs of one compile id; DDP's splitter also calls them with fake tensors."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(Stack(8), bucket_cap_mb=1)
        options = {**EAGER, "fgattn.inner": "aot_eager", "fgattn.stats": True}
        run = torch.compile(model, backend="fgattn", options=options)
        for _ in range(2):
            run(tokens()).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    report = fg_inductor.report()
    assert [row.site.path.split("blocks.")[1] for row in report] == [str(i) for i in range(8)]
    assert len({row.site.index for row in report}) < 8
    assert [row.density for row in report] == [0.5] * 8
    assert counters["fgattn"] == {"rewritten": 8}


def test_density_in_a_checkpoint_is_not_measured():
    model = Stack(call=lambda block, x: checkpoint(block, x, use_reentrant=False))
    compiled(model, **{"fgattn.stats": True})(tokens())
    assert [row.density for row in fg_inductor.report()] == [None, None]
    assert str(fg_inductor.report()).count("density not measured inside a checkpointed region") == 2


def test_slices_of_a_report():
    compiled(Stack(3))(tokens())
    report = fg_inductor.report()
    assert [row.site.path for row in report[1:]] == ["blocks.1", "blocks.2"]
    assert str(Report(report[1:])).startswith("fgattn: 2 of 2")
