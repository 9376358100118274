"""(T, H, W) of the video tokens, so that a query slice can be a cube of them: given by the user, or read off the graph.

A graph shows it where a tensor has T, H and W as three dimensions in a row: the output of the convolution that makes
patches, the reshape that undoes them, position embeddings. Graphs of single blocks (regional compilation) have none.
"""

import functools

import torch
from torch import Tensor
from torch.fx import Node

from fg_inductor.passes.graph import Extent, names, product, same, value
from fg_inductor.passes.program import Program

PATCHES = names("conv3d")
SHAPED = names("reshape view unflatten stack")


class TokenGrid:
    """The shapes of one program that may show a token grid; ``find`` picks the one that fits."""

    def __init__(self, program: Program):
        self._program = program
        self._patches = _tensors(program, PATCHES)
        shapes = (tuple(value(n).shape) for n in _tensors(program, SHAPED))
        self._shapes = {shape for shape in shapes if all(isinstance(size, int) for size in shape)}

    @functools.cached_property
    def _places(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self._program.nodes)}

    def find(self, tokens: int | torch.SymInt, site: Node) -> tuple[Extent, Extent, Extent] | None:
        """The grid of that many video tokens; None where the graph shows none, or more than one.

        Patches decide; where there are none, the other shapes must agree. A symbolic number needs patches made before
        the site, where their sizes can be read.
        """
        usable = [n for n in self._patches if isinstance(tokens, int) or self._places[n] < self._places[site]]
        patches = [[Extent(value(n).shape[dim], n, dim) for dim in (-3, -2, -1)] for n in usable]
        patches = [grid for grid in patches if same(product(x.size for x in grid), tokens)]
        if patches:
            agree = all(same(a.size, b.size) for grid in patches for a, b in zip(grid, patches[0], strict=True))
            return tuple(patches[0]) if agree else None
        grids = set(filter(None, (_first_grid(shape, tokens) for shape in self._shapes)))
        # (1, T, H*W) is no grid but has its product: one frame only where nothing says more.
        grids = {grid for grid in grids if grid[0] > 1} or grids
        return tuple(map(Extent, grids.pop())) if len(grids) == 1 else None


def _tensors(program: Program, called: frozenset[str]) -> list[Node]:
    found = [node for method in called for node in program.named[method]]
    return [node for node in found if isinstance(value(node), Tensor) and value(node).dim() >= 4]


def _first_grid(shape: tuple[int, ...], tokens) -> tuple[int, ...] | None:
    """The first three sizes in a row, height and width above 1, whose product is ``tokens``."""
    triples = (shape[i : i + 3] for i in range(len(shape) - 2))
    return next((t for t in triples if t[1] > 1 and t[2] > 1 and same(product(t), tokens)), None)
