"""Inductor's and AOTAutograd's caches: hit in a second process, missed when the package or the settings change."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from fg_inductor.passes.cache_key import JointPass, source_hash

SCRIPT = """
import json, torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
import fg_inductor
from fg_inductor.passes import cache_key
from fg_inductor.toy_models import SHORT, Stack, tokens

def context_fn():
    return create_selective_checkpoint_contexts([torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default])

context_fn.cache_hash = "save sdpa"
checkpointed = lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=context_fn)

def train(call=None, **options):
    counters.clear()
    torch._dynamo.reset()
    model = torch.compile(Stack(1, call=call), backend="fgattn", options={**SHORT, **options}, fullgraph=True)
    model(tokens()).sum().backward()
    events = ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")
    found = {name: counters["aot_autograd"][name] for name in events}
    found |= {name: counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_cache_miss")}
    return found | {"reported": fg_inductor.report().rewritten, "counted": counters["fgattn"]["rewritten"]}

runs = {
    "plain": lambda: train(),
    "stats": lambda: train(**{"fgattn.stats": True}),
    "checkpoint": lambda: train(call=checkpointed),
}
results = {name: run() for name, run in runs.items()}
if second:
    # Settings that are not in the text of the graph, and a change of the package's source.
    results["settings"] = train(**{"fgattn.strict": True})
    cache_key.source_hash = lambda *folders: "other source"
    results["source"] = train()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What the counters say in two processes that share one cache directory."""
    # VEC_ISA_OK spares each new cache directory a compilation for each instruction set of the CPU.
    caches = str(tmp_path_factory.mktemp("inductor"))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches, "TORCHINDUCTOR_VEC_ISA_OK": "1"}
    results = []
    for second in (False, True):
        command = [sys.executable, "-c", f"second = {second}\n{SCRIPT}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, env=env, check=False)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


MISS = {"autograd_cache_hit": 0, "autograd_cache_miss": 1, "fxgraph_cache_hit": 0, "fxgraph_cache_miss": 2}
HIT = {"autograd_cache_hit": 1, "autograd_cache_miss": 0, "fxgraph_cache_hit": 2, "fxgraph_cache_miss": 0}
REST = {"autograd_cache_bypass": 0, "reported": 1, "counted": 1}


@pytest.mark.parametrize("run", ["plain", "stats", "checkpoint"])
def test_second_process_hits_and_reports(processes, run):
    first, second = processes
    assert first[run] == MISS | REST
    assert second[run] == HIT | REST


@pytest.mark.parametrize("changed", ["settings", "source"])
def test_a_change_misses(processes, changed):
    assert processes[1][changed] == MISS | REST


class Hook(CustomGraphPass):
    def __init__(self, identity):
        self.identity = identity

    def __call__(self, graph):
        graph.identity = self.identity

    def uuid(self):
        return self.identity


UUIDS = {
    "alone": ((), ("salt",)),
    "hook": ((Hook("a"),), ("salt", "a")),
    "two-hooks": ((Hook("a"), Hook(b"b")), ("salt", "a", b"b")),
    "hook-without": ((Hook(None),), None),
    "function": ((Hook("a"), lambda graph: None), None),
}


@pytest.mark.parametrize(("hooks", "uuid"), UUIDS.values(), ids=UUIDS)
def test_uuid_holds_the_users(hooks, uuid):
    assert JointPass("salt", hooks).uuid() == uuid


def test_joint_pass_calls_hooks_and_pickles():
    joint = pickle.loads(pickle.dumps(JointPass("salt", (Hook("a"),))))
    assert joint.uuid() == ("salt", "a")
    graph = torch.fx.Graph()
    joint(graph)
    assert graph.identity == "a"


def test_source_hash_reads_names_and_contents(tmp_path):
    hashes = set()
    contents = (
        {"a.py": "1"},
        {"a.py": "2"},
        {"b.py": "1"},
        {"a.py": "1", "sub/b.py": ""},
        {"a.py": "1", "note.txt": ""},
    )
    for i, files in enumerate(contents):
        for name, text in files.items():
            file = tmp_path / str(i) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        hashes.add(source_hash(tmp_path / str(i)))
    assert len(hashes) == 4  # a text file doesn't count
