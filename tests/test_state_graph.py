"""State in the graph, as the inner compiler and the caches see it."""

import json
import os
import subprocess
import sys

import torch
from denoising_loops import OBSERVED, Guided, compile_whole

import fg_inductor
from fg_inductor import backend
from fg_inductor.toy_models import tokens


def test_state_has_static_addresses(monkeypatch):
    """As AOTAutograd tells CUDA graphs: inputs that are updated in place where they lie."""
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def spy(gm, inputs):
        context = torch._guards.TracingContext.get()
        seen.append([gm.graph.find_nodes(op="placeholder")[i].name for i in context.fw_metadata.static_input_indices])
        return gm

    compiler = aot_autograd(fw_compiler=spy)
    monkeypatch.setattr(backend, "compile_graph", lambda gm, inputs, inner, patches: compiler(gm, inputs))
    model = compile_whole(Guided(), OBSERVED)
    with torch.no_grad(), fg_inductor.denoising(model):
        model(tokens(), tokens(1))
    (names,) = seen
    assert len(names) >= 3 and len(names) == len(set(names))
    placeholders = 8 + 2 + 3  # weights; x and text; two masks and the flag
    assert names[-3:] == [f"arg{placeholders - 3 + i}_1" for i in range(3)]


SCRIPT = """
import json, torch
from torch._dynamo.utils import counters
import fg_inductor
from fg_inductor.toy_models import SHORT, Stack, tokens

torch.manual_seed(0)
options = {**SHORT, "fgattn.mask": "observed", "fgattn.density": 0.25, "fgattn.dense_first": 0.3}
model, results = torch.compile(Stack(1), backend="fgattn", options=options, fullgraph=True), []
with torch.no_grad(), fg_inductor.denoising(model, steps=4) as run:
    for _ in range(4):
        with run.branch(0):
            results.append(model(tokens()).sum().item())
        run.step()
names = ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")
print(json.dumps([{name: counters["aot_autograd"][name] for name in names}, results]))
"""


def test_caches_hold_both_forms(tmp_path):
    """A second process takes the dense and the stateful form from AOTAutograd's cache, and does the same."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_VEC_ISA_OK": "1"}
    runs = []
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, env=env, check=False)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    (first, results), (second, again) = runs
    assert first == {"autograd_cache_hit": 0, "autograd_cache_miss": 2, "autograd_cache_bypass": 0}
    assert second == {"autograd_cache_hit": 2, "autograd_cache_miss": 0, "autograd_cache_bypass": 0}
    assert again == results
