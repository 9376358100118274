"""What an attention site is expected to take, dense and sparse: ``fgattn.when`` asks before a site is rewritten.

The time of one forward call, on one device, in terms of its sizes (B batch, H query heads, Sq and Sk tokens, D head
dim, M queries a slice, N keys a group, ``density`` kept, ``tail`` 1 or 0) and of constants that are measured:

    dense   = max(host,  work / rate + row * rows)                                      work = 4 B H Sq Sk D,
              rate: one for lengths that are multiples of 128, one for others
    sparse  = max(host', (density + tail / 128) * work / rate' + slice * slices         attention
                         + list * groups                                                column lists
                         + score * groups + mean * (tokens of q and k))                 selection

with rows = B H Sq, slices = rows / M, groups = slices * Sk / N, the bits of the mask. ``host`` is what launching a call
takes in Python: the device waits for it where there is little to do. Constants belong to one card, head dim, dtype, M,
N and tail. What the model leaves out: a key mask (which slows dense attention), backward, and text that is kept dense.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import sympy
import torch

from fg_inductor.passes.site import Forecast
from fg_inductor.settings import Settings

MIN_GAIN = 0.03  # a smaller one is within what a measurement of two kernels differs by
# What top_p keeps is known when the model runs. The quickstart's trained model keeps 0.31 at 0.9.
KEPT_BY_TOP_P = 0.3
TAIL_KEYS = 128  # dropped keys for each summary key of the pooled tail
TILE = 128  # cuDNN takes 9% to 12% longer (H100, head dims 128 and 64) where a length is not a multiple of it

B, H, SQ, SK, D, M, N = sympy.symbols("B H Sq Sk D M N", positive=True)
DENSITY, TAIL, RAGGED = sympy.symbols("density tail ragged", nonnegative=True)

SIZES = (B, H, SQ, SK, D, M, N, DENSITY, TAIL, RAGGED)


@dataclass(frozen=True)
class Constants:
    """Milliseconds for one unit each; rates in floating-point operations a millisecond."""

    dense_rate: float
    ragged_rate: float
    dense_row: float
    dense_host: float
    kept_rate: float
    slice: float
    list: float
    score: float
    mean: float
    sparse_host: float


_C = {name: sympy.Symbol(name, nonnegative=True) for name in Constants.__dataclass_fields__}
WORK = 4 * B * H * SQ * SK * D
ROWS = B * H * SQ
SLICES = ROWS / M
GROUPS = SLICES * SK / N
# Terms by the constant that they are multiplied with: ``device_constants`` fits the constants to them.
DENSE_TERMS = {"1/dense_rate": (1 - RAGGED) * WORK, "1/ragged_rate": RAGGED * WORK, "dense_row": ROWS}
ATTENTION_TERMS = {"1/kept_rate": (DENSITY + TAIL / TAIL_KEYS) * WORK, "slice": SLICES, "list": GROUPS}
SELECTION_TERMS = {"score": GROUPS, "mean": B * H * (SQ + SK)}


def _sum(terms: dict[str, sympy.Expr]) -> sympy.Expr:
    return sum(term / _C[name[2:]] if name.startswith("1/") else term * _C[name] for name, term in terms.items())


DENSE = sympy.Max(_C["dense_host"], _sum(DENSE_TERMS))
SPARSE = sympy.Max(_C["sparse_host"], _sum(ATTENTION_TERMS) + _sum(SELECTION_TERMS))


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, by their names in the expressions."""

    B: int
    H: int
    Sq: int
    Sk: int
    D: int
    M: int
    N: int
    density: float
    tail: int

    @property
    def ragged(self) -> int:
        """1 where a length is no multiple of dense attention's tiles."""
        return int(self.Sq % TILE > 0 or self.Sk % TILE > 0)

    def values(self) -> dict[sympy.Symbol, float]:
        return {symbol: getattr(self, symbol.name) for symbol in SIZES}


@functools.cache
def _compiled(expression: sympy.Expr) -> Callable[..., float]:
    return sympy.lambdify([*SIZES, *_C.values()], expression, "math")


def expected_ms(shape: Shape, constants: Constants) -> tuple[float, float]:
    """Milliseconds of a call, dense and sparse."""
    numbers = (*shape.values().values(), *asdict(constants).values())
    return _compiled(DENSE)(*numbers), _compiled(SPARSE)(*numbers)


def expected_density(settings: Settings) -> float:
    """The share of pairs that a selector is expected to keep."""
    if isinstance(settings.share, tuple):  # by head
        return sum(settings.share) / len(settings.share)
    if settings.share is not None:
        return settings.share
    return min(KEPT_BY_TOP_P, settings.max_density)


def forecast(shape: Shape, constants: Constants, assumed: bool = False) -> Forecast:
    """Whether a rewrite is expected to gain 3% or more. ``assumed``: the density is not an option's, but a guess."""
    dense, sparse = expected_ms(shape, constants)
    guess = " (assumed)" if assumed else ""
    text = f"{dense / sparse:.2f}x at density {shape.density:g}{guess}: {sparse:.3g} ms for {dense:.3g} ms dense"
    return Forecast(dense >= (1 + MIN_GAIN) * sparse, text)


def forecaster(host_counts: bool = True) -> Callable[..., Forecast | None]:
    """What the pass asks about a site: ``ask(settings, batch, heads, queries, keys, dim, dtype, device)``.

    ``host_counts``: whether Python launches the kernels; CUDA graphs replay them. ``settings`` are those of the site.
    ``ask`` returns None where all is to be rewritten ("always") or nothing is known: for selectors other than "pooled"
    (and "observed", which takes no longer over a run), and where ``device_constants`` has none. "auto" doesn't ask on
    CPU, whose cores other work may share: a measurement there can be ten times off, and a test machine would get
    another result than its neighbour.
    """

    def ask(
        settings: Settings, batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> Forecast | None:  # fmt: skip
        from fg_inductor import device_constants

        if settings.when == "always" or (settings.when == "auto" and device.type == "cpu"):
            return None
        if settings.mask not in ("pooled", "observed"):
            return None
        settings = settings.with_order(True)  # whether an order is found is not known yet, and changes little
        constants = device_constants.constants(settings, dim, dtype, device)
        if constants is None:
            return None
        if not host_counts:
            constants = Constants(**asdict(constants) | {"dense_host": 0.0, "sparse_host": 0.0})
        sizes = (batch, heads, queries, keys, dim, settings.m, settings.n)
        shape = Shape(*sizes, expected_density(settings), int(settings.tail_kind == "pooled"))
        return forecast(shape, constants, assumed=settings.share is None)

    return ask
