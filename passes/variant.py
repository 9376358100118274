"""A copy of Dynamo's graph, so that one frame can have several compiled forms.

Dynamo reads the metadata of its own placeholders after the backend returns, and an inner compiler may change the graph
that it is given: so each form gets a graph of its own, child graphs (checkpointed regions) included.
"""

from typing import Any

import torch
from torch import Tensor
from torch._guards import CompileContext, TracingContext, compile_context, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _make_graph_module


def copy_graph(gm: GraphModule) -> GraphModule:
    """A GraphModule with new nodes, and with the weights, the fake values and the metadata of ``gm``."""
    graph, copied = Graph(), {}
    graph.output(graph.graph_copy(gm.graph, copied))
    old_output, new_output = (next(n for n in reversed(g.nodes) if n.op == "output") for g in (gm.graph, graph))
    new_output.meta = dict(old_output.meta)
    for old, new in copied.items():
        new.meta.pop("grapharg", None)  # Dynamo's own, which it empties
        if hasattr(old, "_dynamo_source"):  # AOTAutograd asks every placeholder for it
            new._dynamo_source = old._dynamo_source
    result = _make_graph_module(gm, graph, gm.__class__.__name__)  # lazy in Dynamo: no code before it is run, if ever
    result.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        result._param_name_to_source = gm._param_name_to_source
    for name, child in result.named_children():
        if isinstance(child, GraphModule):
            setattr(result, name, copy_graph(child))
    return result


class Lazy:
    """A compiled form of a graph that is compiled when it first runs, as Inductor compiles backward graphs.

    compile   makes the callable; called once, under the tracing context of the frame that it belongs to
    """

    def __init__(self, compile):
        self._compile = compile
        self._compiled = None
        self._contexts = TracingContext.try_get(), CompileContext.try_get()

    def compile(self) -> None:
        """Compile it now, if it is not."""
        if self._compiled is None:
            of_tracing, of_compiling = self._contexts
            with tracing(of_tracing), compile_context(of_compiling):
                self._compiled = self._compile()
            self._compile = self._contexts = None  # lets the graph go

    def __call__(self, *args):
        self.compile()
        return self._compiled(*args)


def fake_inputs(example_inputs) -> list[Any]:
    """Example inputs without data, with the sizes that Dynamo made symbolic, and no others.

    A form that is compiled later would otherwise hold the tensors of the first call until then, and find sizes of which
    Dynamo no longer says that they are constants.
    """
    context = TracingContext.try_get()
    if context is None:  # the backend was called by hand
        return list(example_inputs)

    def fake(x):
        if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
            return x
        sizes = context.tensor_to_context.get(x)
        if sizes is None:
            return context.fake_mode.from_tensor(x, static_shapes=True)
        return context.fake_mode.from_tensor(x, symbolic_context=sizes, source=sizes.tensor_source, trace=False)

    return [fake(x) for x in example_inputs]


def is_symbolic(inputs: list[Any]) -> bool:
    """Whether a graph has symbolic sizes. Its forms are then compiled while Dynamo still collects guards."""
    sizes = (size for x in inputs for size in (x.shape if isinstance(x, Tensor) else (x,)))
    return any(isinstance(size, torch.SymInt) for size in sizes)
