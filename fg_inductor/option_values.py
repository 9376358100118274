"""What the options' values may be: a reader for each kind, and the values that are types of their own.

A reader returns the value in its own type, or raises ValueError that begins with "must be".
"""

import dataclasses
import difflib
import math
import numbers
import re
from dataclasses import dataclass

from fg_inductor.kernels.checks import POOLS
from fg_inductor.kernels.mask import GROUPS, SLICES
from fg_inductor.selectors import selector_names


@dataclass(frozen=True)
class StaticMask:
    """What ``fgattn.static`` describes; ``kernels/select_static.py`` says what each means. The window is in tiles."""

    tile: tuple[int, int, int] = (2, 8, 8)
    window: tuple[int, ...] = ()
    radius: float = 0.0
    ranges: tuple[int, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """A density by steps: (share of the steps, density from there on), from 0 on in order."""

    steps: tuple[tuple[float, float], ...]


def whole(value) -> int | None:
    """The value as an int, numpy's included; None for anything else, bool too."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def one_of(*allowed):
    """The reader of one of these, by value and by type: True is not 1."""

    def read(value):
        if isinstance(allowed[0], int):
            value = value if whole(value) is None else whole(value)
        if not any(type(value) is type(a) and value == a for a in allowed):
            near = difflib.get_close_matches(str(value), map(str, allowed), 1)
            hint = f"; did you mean {near[0]!r}?" if near and isinstance(value, str) else ""
            raise ValueError(f"must be one of {', '.join(map(repr, allowed))}{hint}")
        return value

    return read


def read_mask(value):
    """The name of a selector, one of the user's own included."""
    return one_of(*selector_names())(value)


def read_static(value):
    if value is None or isinstance(value, StaticMask):
        return value
    names = [f.name for f in dataclasses.fields(StaticMask)]
    if not isinstance(value, dict) or not set(value) <= set(names) or not set(value) - {"tile"}:
        raise ValueError(f"must be a dict with some of {', '.join(map(repr, names))}, a rule besides the tile, or None")
    read = dict(value)
    for name in ("tile", "window", "ranges"):
        if name in read:
            numbers_ = tuple(map(whole, read[name])) if isinstance(read[name], (tuple, list)) else (None,)
            smallest = 0 if name == "ranges" else 1
            if any(x is None or x < smallest for x in numbers_):
                raise ValueError(f"must have whole numbers, {smallest} or more, in {name!r}")
            read[name] = numbers_
    if len(read.get("tile", (1, 1, 1))) != 3:
        raise ValueError("must have a 'tile' of three sizes: time, height, width")
    if "window" in read and (len(read["window"]) != 3 or any(x % 2 == 0 for x in read["window"])):
        raise ValueError("must have a 'window' of three odd numbers of tiles: time, height, width")
    if len(read.get("ranges", ())) % 2:
        raise ValueError("must have 'ranges' of [start, end) pairs: an even number of tokens")
    radius = read.get("radius", 0.0)
    if isinstance(radius, bool) or not isinstance(radius, numbers.Real) or not 0 <= radius < math.inf:
        raise ValueError("must have a 'radius' of 0 tokens or more")
    return StaticMask(**read | {"radius": float(radius)})


def read_pool(value):
    if isinstance(value, str) and value == "auto":
        return value
    if whole(value) not in POOLS:
        raise ValueError(f"must be 'auto' or one of {', '.join(map(str, POOLS))}")
    return whole(value)


def read_slice(value):
    if isinstance(value, str) and value == "auto":
        return value
    m, _, n = value.partition("x") if isinstance(value, str) else ("", "", "")
    if not (m.isdecimal() and n.isdecimal() and int(m) in SLICES and int(n) in GROUPS):
        raise ValueError(f"must be 'auto', or 'MxN', M queries in {SLICES} by N keys in {GROUPS}, such as '128x8'")
    return f"{int(m)}x{int(n)}"


def fraction(optional=False):
    """The reader of a number in (0, 1]; ``optional``: or None."""

    def read(value):
        if optional and value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value <= 1:
            raise ValueError("must be a number in (0, 1]" + (" or None" if optional else ""))
        return float(value)

    return read


def between(high):
    """The reader of a number in (0, high), or None."""

    def read(value):
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < high:
            raise ValueError("must be a positive number" + (f" below {high}" if high < math.inf else "") + " or None")
        return float(value)

    return read


def read_step(value):
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ValueError("must be a positive number or 'auto'")
    return float(value)


def read_share(value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError("must be a number in [0, 1]")
    return float(value)


def read_flag(value):
    if not isinstance(value, bool):
        raise ValueError("must be True or False")
    return value


def read_length(value):
    tokens = whole(value)
    if tokens is None or tokens < 0:
        raise ValueError("must be a number of tokens, 0 or more")
    return tokens


def read_grid(value):
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    sides = tuple(map(whole, value)) if isinstance(value, (tuple, list)) else ()
    if len(sides) != 3 or any(x is None or x < 1 for x in sides):
        raise ValueError("must be (T, H, W), the tokens of the video in time, height and width; 'auto'; or None")
    return sides


def read_density(value):
    """A share of the groups, None, or a dict {share of the steps: density from there on}."""
    if not isinstance(value, dict):
        return fraction(optional=True)(value)
    pairs = sorted((read_share(start), fraction()(density)) for start, density in value.items())
    if not pairs or pairs[0][0] != 0 or pairs[-1][0] == 1:
        raise ValueError("must begin at 0 and end before 1, as {0: 0.3, 0.5: 0.2}: from half of the steps on 0.2")
    return Schedule(tuple(pairs))


def read_bytes(value):
    if value is not None and (whole(value) is None or whole(value) < 1):
        raise ValueError("must be a number of bytes, 1 or more, or None")
    return value if value is None else whole(value)


def read_count(value):
    if whole(value) is None or whole(value) < 1:
        raise ValueError("must be a whole number, 1 or more")
    return whole(value)


def read_refresh(value):
    word, _, number = value.partition(" ") if isinstance(value, str) else ("", "", "")
    if word == "every" and number.isdecimal() and int(number) > 0:
        return f"every {int(number)}"
    if word == "drift" and re.fullmatch(r"0?\.\d+", number) and float(number) > 0:
        return f"drift {float(number):g}"
    steps = tuple(map(whole, value)) if isinstance(value, (tuple, list)) else (None,)
    if any(x is None or x < 0 for x in steps):
        raise ValueError(
            "must be 'every N', N a number of steps; 'drift X', X a fall of the kept mass between 0 and 1; or a list "
            "of steps, the first of which is 0"
        )
    return tuple(sorted(set(steps)))


def read_by_head(value):
    """A share of the groups for all heads, or a list of one for each."""
    if not isinstance(value, (list, tuple)):
        return fraction(optional=True)(value)
    if not value:
        raise ValueError("must be a number in (0, 1], a list of one for each head, or None")
    return tuple(map(fraction(), value))
