"""What compiles a graph behind the rewrite: Inductor, with what it must know of ours."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fg_inductor import kernels, passes
from fg_inductor.kernels import ops, ops_observed
from fg_inductor.passes import cache_key
from fg_inductor.settings import Settings

HOOK = "joint_custom_pre_pass"
# From 2.10 on, Inductor loses gradients of scales and shifts that are chunks of one tensor, as blocks of diffusion
# transformers have them, with dense attention too: the memory of some is never written (pytorch/pytorch#193061). The
# fix, #193103, came after 2.14.
PATCHES = {"triton.mix_order_reduction": False} if torch.__version__ < (2, 15) else {}


def replays(patches: dict[str, Any]) -> bool:
    """Whether Inductor will replay CUDA graphs, so that Python launches nothing."""
    from torch._inductor import config

    return bool(patches.get("triton.cudagraphs", config.triton.cudagraphs))


def with_joint_pass(patches: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Inductor's patches with our pass on the joint graph, behind the user's own hooks."""
    from torch._inductor import config

    theirs = patches.get(HOOK, config.joint_custom_pre_pass)
    theirs = () if theirs is None else tuple(theirs) if isinstance(theirs, (list, tuple)) else (theirs,)
    folders = (Path(module.__file__).parent for module in (kernels, passes))
    salt = f"{cache_key.source_hash(Path(__file__).parent, *folders)} {settings}"
    return {**patches, HOOK: cache_key.JointPass(salt, theirs)}


def compile_graph(gm: GraphModule, example_inputs: Sequence[Any], inner: str, patches: dict[str, Any]) -> Callable:
    """Compile by ``inner``, an option of ours; ``patches`` are Inductor's."""
    if inner != "inductor":
        return torch._dynamo.lookup_backend(inner)(gm, example_inputs)
    # Imported here as torch's own backend does: importing Inductor is slow, and its worker pool should start early.
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    # Into Inductor's own table: with a table of ours, its caches would be off.
    with config.patch(patches):
        select_decomp_table().setdefault(ops.reorder, ops.reorder_decomposition)
        select_decomp_table().setdefault(ops.expand_heads, ops_observed.expand_heads_decomposition)
    # As patches and not in a ``with``: backward is compiled later, and must see them too.
    return compile_fx(gm, example_inputs, config_patches=PATCHES | patches)
