"""Settings by site, ``fgattn.sites``: patterns of site paths with the options that hold there, or a file of them.

    {"blocks.0.*": {"dense": True}, "blocks.7.attn1": {"density": [0.08, 0.8]}, "*.attn1": {"tail": "pooled"}}

A pattern is a site's path as the report shows it, with ``*`` and ``?`` as in file names. Every entry whose pattern
matches applies, in the order of the mapping, later ones over earlier ones. A file is JSON: such a mapping, or what
``fg_inductor.calibrate`` writes, {"sites": mapping, "options": what it was measured with}.
"""

import difflib
import fnmatch
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What an entry may hold beside "dense". The rest is decided for a whole graph.
NAMES = ("density", "top_p", "max_density", "alpha", "slice", "pool", "reduce", "gamma", "tail", "time_step")
RULES = ("density", "top_p", "alpha")  # each says how much to keep: one that an entry gives replaces the others
HEADER = ("sites", "options", "error", "inputs")


@dataclass(frozen=True)
class Sites:
    """What ``fgattn.sites`` says, validated and hashable.

    entries    (pattern, ((option, value), ...)) in the order of the mapping
    made_with  ((option, value), ...): the options that a calibration was made with
    """

    entries: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    made_with: tuple[tuple[str, Any], ...] = ()

    def options(self, path: str) -> dict[str, Any]:
        """What the entries say of the site with this path; a rule for how much to keep stands alone."""
        found: dict[str, Any] = {}
        for pattern, options in self.entries:
            if fnmatch.fnmatchcase(path, pattern):
                found |= alone(dict(options))
        return found

    def unmatched(self, paths: Iterable[str]) -> list[str]:
        """The patterns that match none of the paths."""
        paths = list(paths)
        return [p for p, _ in self.entries if not any(fnmatch.fnmatchcase(path, p) for path in paths)]

    def of_layers(self, path: str) -> list[str]:
        """The patterns that mean a site of this path in single layers, where a graph knows no layers.

        Models compiled block by block have one graph for all blocks: the site is ``attn1`` there, not
        ``blocks.7.attn1``.
        """
        if not path or any(fnmatch.fnmatchcase(path, p) for p, _ in self.entries):
            return []
        return [p for p, _ in self.entries if p.endswith("." + path)]


def alone(options: dict[str, Any]) -> dict[str, Any]:
    """An entry that also takes back what others say about how much to keep, where it says so itself."""
    return dict.fromkeys(RULES) | options if any(name in options for name in RULES) else options


def near(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a pattern which matches none of them may have meant, at most three."""
    paths = list(dict.fromkeys(filter(None, paths)))
    return difflib.get_close_matches(pattern, paths, 3, 0.5) or paths[:3]


def unmatched_text(sites: Sites, paths: Iterable[str]) -> str:
    """Which patterns match none of the paths, and what they may have meant; empty where all match."""
    paths, shown = list(paths), []
    patterns = sites.unmatched(paths)
    for pattern in patterns[:3]:
        names = ", ".join(near(pattern, paths)) or "no site has a path"
        shown.append(f"{pattern!r} (near: {names})")
    more = f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
    return ", ".join(shown) + more


def read(value: Any, readers: dict[str, Callable[[Any], Any]]) -> Sites | None:
    """``fgattn.sites`` as given by the user; ``readers`` validate the options. Raises ValueError, "must ..."."""
    if value is None or isinstance(value, Sites):
        return value
    if isinstance(value, (str, Path)):
        value = _load(Path(value))
    if not isinstance(value, dict):
        raise ValueError("must be a mapping of site paths to options, the path of a JSON file with one, or None")
    made_with: dict[str, Any] = {}
    if "sites" in value and set(value) <= set(HEADER):
        value, made_with = value["sites"], value.get("options", {})
    if not (isinstance(value, dict) and isinstance(made_with, dict)):
        raise ValueError("must be a mapping of site paths to options, as fg_inductor.calibrate writes it")
    entries = tuple((_pattern(p), _entry(p, options, readers)) for p, options in value.items())
    return Sites(entries, tuple((name.removeprefix("fgattn."), x) for name, x in made_with.items()))


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"must name a file that can be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"must name a JSON file ({error})") from None


def _pattern(pattern: Any) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"must have site paths as keys, such as 'blocks.0.attn1'; {pattern!r} is none")
    return pattern


def _entry(pattern: str, options: Any, readers: dict[str, Callable[[Any], Any]]) -> tuple[tuple[str, Any], ...]:
    allowed = {**readers, "dense": _flag}
    if not isinstance(options, dict) or not options:
        raise ValueError(f"must have a mapping of options for {pattern!r}, such as {{'density': 0.3}}")
    found = []
    for key, value in options.items():
        name = str(key).removeprefix("fgattn.")
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"a site takes {', '.join(allowed)}"
            raise ValueError(f"must not have {key!r} for {pattern!r}: {hint}")
        try:
            found.append((name, allowed[name](value)))
        except ValueError as error:
            raise ValueError(f"must have a valid {name!r} for {pattern!r}, which {error}") from None
    given = [name for name in RULES if options.get(name, options.get(f"fgattn.{name}")) is not None]
    if len(given) > 1:
        names = " and ".join(map(repr, given))
        raise ValueError(f"must have one of {names} for {pattern!r}: both say how much to keep")
    return tuple(found)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be True or False")
    return value
