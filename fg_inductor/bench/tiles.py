"""What slices that share a tile of attention cost, and what it brings to match them by their masks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fg_inductor.bench.common import measure_graph
from fg_inductor.kernels.mask import group_count, unpack

CALLS = 4  # of each set of inputs, in a graph


def slices_of_a_tile(dim: int, m: int, kernel: str) -> int:
    """Slices that share a list in a kernel."""
    if kernel != "hopper":
        return 1
    from fg_inductor.kernels import attention_forward_hopper

    return attention_forward_hopper.slices_of_a_tile(attention_forward_hopper.configuration(dim, m), m)


def union_of(mask: Tensor, keys: int, n: int, slices: int, alike: Tensor | None = None) -> float:
    """Pairs in the unions of ``slices`` slices in a row over the pairs that the slices keep.

    ``alike`` [B, H, T]: which slices follow each other (``kernels.alike_slices``).
    """
    sizes = torch.full((group_count(mask.shape[2], slices),), slices, device=mask.device)
    sizes[-1] -= -mask.shape[2] % slices
    union = kept = torch.zeros((), dtype=torch.int64, device=mask.device)
    order = [None] * mask[..., 0, 0].numel() if alike is None else alike.long().flatten(0, 1)
    for words, places in zip(mask.flatten(0, 1), order, strict=True):  # unpacked, all heads would take gigabytes
        keep = unpack(words if places is None else words[places], group_count(keys, n))
        tiles = F.pad(keep, (0, 0, 0, -mask.shape[2] % slices)).unflatten(0, (-1, slices))
        union = union + (tiles.any(1).sum(-1) * sizes).sum()
        kept = kept + keep.sum()
    return (union / kept).item()


def matched(inputs: list[tuple], call: tuple, slices: int) -> dict[str, float]:
    """Unions and times of ``call`` of Hopper's kernel with slices matched by their masks, and as they are.

    "union" is that of the call itself. Times are of CUDA graphs: "alike_ms" is what the matching takes, a part of
    "matched_ms".
    """
    from fg_inductor.kernels import alike_slices, attention_forward_hopper

    mask, order, n, keys = call[0], call[2], call[5], inputs[0][1].shape[2]
    found = {"union_as_is": union_of(mask, keys, n, slices)}
    found["union_matched"] = union_of(mask, keys, n, slices, alike_slices.launch(mask, slices))
    found["union"] = found["union_matched" if order is None else "union_as_is"]

    def timed(run: Callable[..., object]) -> float:
        return measure_graph([lambda qkv=qkv: run(*qkv) for qkv in inputs], CALLS).median

    for name, alike in (("as_is_ms", False), ("matched_ms", True)):
        found[name] = timed(lambda *qkv, alike=alike: attention_forward_hopper.launch(*qkv, *call[:-1], ALIKE=alike))
    found["alike_ms"] = timed(lambda *_: alike_slices.launch(mask, slices))
    return found
