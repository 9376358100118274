"""Attention that is not written as SDPA: each form has a file that finds it, and one stand-in serves them all."""

from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fg_inductor.passes import attention_calls, eager_softmax, multi_head
from fg_inductor.passes.graph import name, value
from fg_inductor.passes.stand_in import Insertion, StandIn, Unknown

FORMS = (eager_softmax, attention_calls, multi_head)
CALLS = frozenset().union(*(form.CALLS for form in FORMS))


def insert(gm: GraphModule) -> tuple[list[StandIn], list[Unknown]]:
    """Put SDPA beside each attention of ``gm`` and its child graphs that is written otherwise, where it can be."""
    inserted: list[StandIn] = []
    unknown: list[Unknown] = []
    try:
        for graph in [module.graph for module in gm.modules() if isinstance(module, GraphModule)]:
            calls = [node for node in graph.nodes if name(node) in CALLS]
            for matcher in FORMS:
                for found in matcher.find([node for node in calls if name(node) in matcher.CALLS]):
                    if isinstance(found, Insertion) and (kind := _subclass(found)):
                        found = Unknown(found.original, "tensor subclass", kind)
                    if isinstance(found, Unknown):
                        unknown.append(found)
                    else:
                        inserted.append(found.insert())
    except Exception:
        for stand_in in inserted:
            stand_in.take_out()
        raise
    return inserted, unknown


def _subclass(found: Insertion) -> str:
    """The name of the tensor subclass (DTensor, nested tensors) that the attention computes with; "" for plain tensors.

    Nothing is inserted then: calling other functions on its values may fail, or take long.
    """
    tensors = [x for node in (found.original, *found.original.all_input_nodes) if isinstance(x := value(node), Tensor)]
    return next((type(x).__name__ for x in tensors if is_traceable_wrapper_subclass(x) or x.is_nested), "")
