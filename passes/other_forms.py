"""Attention that is not written as SDPA: each form has a file that finds it, and one stand-in serves them all."""

from torch.fx import GraphModule

from fg_inductor.passes import attention_calls, eager_softmax, multi_head
from fg_inductor.passes.stand_in import StandIn, Unknown

FORMS = (eager_softmax, attention_calls, multi_head)


def insert(gm: GraphModule) -> tuple[list[StandIn], list[Unknown]]:
    """Put SDPA beside each attention of ``gm`` and its child graphs that is written otherwise, where it can be."""
    inserted: list[StandIn] = []
    unknown: list[Unknown] = []
    try:
        for graph in [module.graph for module in gm.modules() if isinstance(module, GraphModule)]:
            for matcher in FORMS:
                for found in matcher.find(graph):
                    if isinstance(found, Unknown):
                        unknown.append(found)
                    else:
                        inserted.append(found.insert())
    except Exception:
        for stand_in in inserted:
            stand_in.take_out()
        raise
    return inserted, unknown
