"""The text of a graph, for snapshot tests: it does not change with the version of PyTorch, only with the graph.

Values are renumbered, targets have their plain names, keyword arguments are sorted, metadata is left out. Child graphs
(bodies of checkpointed regions) follow under ``graph 1``, ``graph 2``, ... in the order of their first use.
"""

import torch
from torch.fx import GraphModule, Node


def target_name(node: Node) -> str:
    """``linear``, ``.transpose`` (a method), ``fgattn.attention.default`` (an operator)."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if node.op == "call_method":
        return f".{target}"
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def graph_text(gm: GraphModule) -> str:
    """One line a node; see the module's docstring."""
    graphs, blocks = [gm], []
    for number, module in enumerate(graphs):  # grows while child graphs are found
        lines = [f"graph {number}:"] if number else []
        names: dict[Node, str] = {}

        def show(x, module=module, names=names):
            if isinstance(x, Node):
                return names[x]
            if isinstance(x, (tuple, list)):
                return "(" + ", ".join(map(show, x)) + ")"
            if isinstance(x, dict):
                return "{" + ", ".join(f"{k}: {show(v)}" for k, v in x.items()) + "}"
            if isinstance(x, slice):
                return ":".join("" if part is None else show(part) for part in (x.start, x.stop, x.step))
            return repr(x)

        inputs = values = 0
        for node in module.graph.nodes:
            if node.op == "output":
                lines.append(f"return {show(node.args[0])}")
            elif node.op == "placeholder":
                names[node] = f"in{inputs}"
                inputs += 1
            elif node.op == "get_attr" and isinstance(child := getattr(module, node.target, None), GraphModule):
                if child not in graphs:
                    graphs.append(child)
                names[node] = f"graph {graphs.index(child)}"
            elif node.target is getattr:  # x.mT, which is a call of its own since torch 2.14
                lines.append(f"%{values} = {node.args[1]}({show(node.args[0])})")
                names[node], values = f"%{values}", values + 1
            else:
                args = [*map(show, node.args), *(f"{k}={show(v)}" for k, v in sorted(node.kwargs.items()))]
                names[node], values = f"%{values}", values + 1
                lines.append(f"{names[node]} = {target_name(node)}({', '.join(args)})")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
