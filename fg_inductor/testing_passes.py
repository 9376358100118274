"""Test utility: run the pass on the graphs of a model, and check what must hold after every rewrite.

done = run_pass(model, (x,), min_seq=16)
assert [site.decision for site in done.sites] == ["rewritten"]
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fg_inductor.kernels import ops
from fg_inductor.passes import sdpa
from fg_inductor.passes.graph import name, value
from fg_inductor.passes.printer import graph_text
from fg_inductor.passes.site import Site
from fg_inductor.settings import Settings

# What makes the pass rewrite short sequences, with several slices and groups in each.
SMALL = {"min_seq": 1, "slice": "16x8", "when": "always", "quiet": True}


OPERATORS = ("scaled_dot_product_attention", "select_pooled", "attention", "query_order")


@dataclasses.dataclass
class PassBackend:
    """A backend that runs the pass and executes what it made, eagerly.

    ask            the forecast that the pass is given, if any
    sites          of all graphs so far, in order
    before, after  the text of each graph
    graphs         each graph, rewritten
    result         what the model returned to ``run_pass``
    """

    settings: Settings
    ask: Callable | None = None
    sites: list[Site] = dataclasses.field(default_factory=list)
    before: list[str] = dataclasses.field(default_factory=list)
    after: list[str] = dataclasses.field(default_factory=list)
    graphs: list[GraphModule] = dataclasses.field(default_factory=list)
    result: Any = None

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable:
        before, guards, old = graph_text(gm), _guards(gm), {node for graph in _graphs(gm) for node in graph.nodes}
        sites = sdpa.rewrite(gm, self.settings, self.ask)
        after = graph_text(gm)
        assert _guards(gm) == guards, "the pass added guards"
        for graph in _graphs(gm):
            graph.lint()
            missing = [node for node in graph.nodes if node not in old and value(node) is None]
            assert not missing, f"new nodes without a value: {missing}"
        again = sdpa.rewrite(gm, self.settings, self.ask)
        assert graph_text(gm) == after and not any(x.rewritten for x in again), "a second run changed the graph"
        for record, item in zip((self.before, self.after, self.graphs), (before, after, gm), strict=True):
            record.append(item)
        self.sites += sites
        return gm.forward

    def calls(self, target: Any) -> list[Node]:
        """The calls of ``target`` in all graphs."""
        graphs = [graph for gm in self.graphs for graph in _graphs(gm)]
        return [node for graph in graphs for node in graph.find_nodes(op="call_function", target=target)]

    def attention(self) -> list[dict[str, Any]]:
        """The arguments of each rewritten site by name: of its selector, and v, mask and tail of its attention."""
        merged = []
        for node in self.calls(ops.attention):
            arguments = _by_name(node) | _by_name(_by_name(node)["mask"])
            merged.append(arguments)
        return merged

    def counts(self) -> tuple[int, ...]:
        """How often the graphs call each of OPERATORS."""
        found = Counter(name(node) for gm in self.graphs for graph in _graphs(gm) for node in graph.nodes)
        return tuple(found[operator] for operator in OPERATORS)


def run_pass(
    model: Callable, inputs: tuple | dict[str, Any], *, fullgraph=True, dynamic=None, ask=None, **settings
) -> PassBackend:
    """Compile ``model`` with a PassBackend and call it once; ``settings`` replace those of SMALL."""
    backend = PassBackend(Settings(**{**SMALL, **settings}), ask)
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic)
    backend.result = compiled(**inputs) if isinstance(inputs, dict) else compiled(*inputs)
    return backend


def _graphs(gm: GraphModule) -> list[torch.fx.Graph]:
    return [module.graph for module in gm.modules() if isinstance(module, GraphModule)]


def _by_name(node: Node) -> dict[str, Any]:
    return dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=True))


def _guards(gm: GraphModule) -> tuple[int, ...] | None:
    """How much the shapes of a graph are constrained."""
    fakes = (value(node) for node in gm.graph.nodes)
    mode = next((x.fake_mode for x in fakes if isinstance(x, Tensor) and hasattr(x, "fake_mode")), None)
    env = mode and mode.shape_env
    return env and (len(env.guards), len(env.replacements), len(env.deferred_runtime_asserts))
