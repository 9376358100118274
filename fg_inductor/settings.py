"""Every option of the backend: ``torch.compile(model, backend="fgattn", options={"fgattn.<name>": value})``."""

import dataclasses
import difflib
import math
import reprlib
from dataclasses import dataclass
from typing import Any

from fg_inductor import site_settings
from fg_inductor.kernels.checks import KERNELS, REDUCES, TAILS
from fg_inductor.kernels.mask import GROUPS
from fg_inductor.option_values import (
    Schedule,
    StaticMask,
    between,
    fraction,
    one_of,
    read_by_head,
    read_bytes,
    read_count,
    read_density,
    read_flag,
    read_grid,
    read_length,
    read_mask,
    read_pool,
    read_refresh,
    read_share,
    read_slice,
    read_static,
    read_step,
)
from fg_inductor.selectors import registered_selector
from fg_inductor.site_settings import RULES, Sites

PREFIX = "fgattn."
INNERS = ("inductor", "aot_eager", "eager")
WHENS = ("auto", "faster", "always")
BY_MASS = ("pooled", "observed")  # masks of the groups with most attention mass, estimated or exact
LITTLE = 0.25  # kept density below which summaries of what was dropped kept videos closer to dense (docs/selectors.md)
BY_HEAD = ("pooled", "observed", "dfs", "dense")  # masks that a density for each head goes with


def _sites(value):
    readers = {f.name: f.metadata["read"] for f in dataclasses.fields(Settings) if f.name in site_settings.NAMES}
    return site_settings.read(value, readers | {"density": read_by_head})


def _option(default, read, text):
    return dataclasses.field(default=default, metadata={"read": read, "text": text})


@dataclass(frozen=True)
class Settings:
    """The options, validated. ``Settings.parse`` makes one from the user's dict."""

    mask: str = _option(
        "pooled",
        read_mask,
        "selector that makes the mask: 'pooled' (at run time), 'observed' (exact, kept over steps), 'dfs' (DFSAttn's "
        "blocks), 'static' (by place alone), 'dense', or one of your own (`docs/selectors.md`)",
    )
    slice: str = _option(
        "auto",
        read_slice,
        "M queries by N keys that are kept or dropped together; 'auto': 128x16 where the token grid is known, else "
        "128x8",
    )
    density: "float | Schedule | tuple[float, ...] | None" = _option(  # noqa: RUF009 (by head from ``sites`` alone)
        None,
        read_density,
        "share of its key groups that a slice keeps; 0.3 where nothing else is given. A dict gives one by steps: "
        "`{0: 0.3, 0.5: 0.2}` is 0.2 from half of them on; needs `fg_inductor.denoising`",
    )
    top_p: float | None = _option(
        None, fraction(optional=True), "instead of density: share of the estimated attention mass to keep, in (0, 1]"
    )
    max_density: float = _option(1.0, fraction(), "bound on the share of key groups that top_p keeps")
    pool: int | str = _option(
        "auto", read_pool, "queries in one mean of the pooled score; 'auto': 16, and the whole slice where N is 1"
    )
    reduce: str = _option(
        "sum", one_of(*REDUCES), "how the means of a slice are joined: 'sum' of their estimates, or the 'max'"
    )
    gamma: float | None = _option(
        None, between(1), "self-similarity (mean cosine with the mean) below which slices and groups are kept whole"
    )
    alpha: float | None = _option(
        None, between(math.inf), "instead of density: keep groups above alpha times the uniform probability"
    )
    static: StaticMask | None = _option(  # noqa: RUF009
        None,
        read_static,
        "what the mask 'static' keeps: a dict of 'tile', 'window', 'radius' and 'ranges' (`docs/selectors.md`)",
    )
    tail: str = _option(
        "auto",
        one_of("auto", *TAILS),
        "dropped keys: 'none', or 'pooled' (one summary key for each 128 keys); 'auto': pooled where `fgattn.density` "
        "is below 0.25",
    )
    token_grid: tuple[int, int, int] | str | None = _option(
        "auto", read_grid, "(T, H, W) of the video tokens, 'auto' (read off the graph), or None"
    )
    time_step: float | str = _option(
        "auto",
        read_step,
        "steps in height or width that a step in time counts as, where tokens that are near each other share a slice: "
        "less for videos with little motion; 'auto': 0.125, 0.5 or 2 by the queries of each call, and 0.5 for masks "
        "that are not 'pooled'",
    )
    min_seq: int = _option(4096, read_length, "tokens; sites with fewer queries or keys stay dense")
    dense_first: float = _option(
        0.0, read_share, "share of the denoising steps, the first ones, attended densely; needs `fg_inductor.denoising`"
    )
    refresh: str | tuple[int, ...] = _option(
        "every 8",
        read_refresh,
        "when observed masks are made anew: 'every N' steps; a list of steps, from 0; or 'drift X', where the mass "
        "that they keep has fallen by X",
    )
    state_bytes: int | None = _option(
        None,
        read_bytes,
        "bound on the bytes of observed masks; they are kept by larger key groups where they exceed it, and at last "
        "shared by heads",
    )
    heads_per_mask: int = _option(
        1,
        read_count,
        "heads for each observed mask: of 12 heads, those that agree most share 6 masks with 2, 3 with 4; decided at "
        "each refresh",
    )
    state_memory: str = _option(
        "device",
        one_of("device", "host"),
        "where observed masks lie: 'device', or 'host': pinned host memory, from which they are copied one layer ahead "
        "(`docs/denoising.md`); `fgattn.state_bytes` does not count them there",
    )
    when: str = _option(
        "auto",
        one_of(*WHENS),
        "'faster': sites where less than 3% is expected to be gained stay dense, by a measurement of the device (once, "
        "seconds); 'always': all are rewritten; 'auto': 'faster' on a GPU, 'always' on CPU",
    )
    sites: Sites | None = _option(  # noqa: RUF009
        None,
        _sites,
        "settings by site: a mapping of site paths to options, or the file that calibration wrote "
        "(`docs/calibration.md`)",
    )
    kernel: str = _option(
        "auto",
        one_of(*KERNELS),
        "'hopper', 'portable', or 'auto' (hopper where card and call allow); a forced one that can't run raises",
    )
    strict: bool = _option(
        False, read_flag, "raise where a video site cannot be rewritten, instead of leaving it dense"
    )
    stats: bool = _option(False, read_flag, "measure the kept density of each site (costs a pass over the mask)")
    quiet: bool = _option(False, read_flag, "do not print the line at the first compile")
    inner: str = _option("inductor", one_of(*INNERS), "what compiles the rewritten graph")

    @classmethod
    def parse(cls, options: dict[str, Any]) -> "Settings":
        """Settings from ``{"fgattn.<name>": value}``.

        Raises ValueError for an unknown name or a value out of range; the message names the nearest valid name.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values = {}
        for key, value in options.items():
            name = key.removeprefix(PREFIX)
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1)
                hint = f"did you mean {PREFIX + near[0]!r}?" if near else f"the options are {', '.join(fields)}."
                raise ValueError(f"fgattn: unknown option {key!r}; {hint}")
            try:
                values[name] = fields[name].metadata["read"](value)
            except ValueError as error:
                shown = reprlib.repr(value) if isinstance(value, dict) else repr(value)
                raise ValueError(f"fgattn: option {key!r} {error}; got {shown}.") from None
        settings = cls(**values)
        settings._check()
        for pattern, entry in () if settings.sites is None else settings.sites.entries:
            try:
                settings._with(site_settings.alone(dict(entry)))._check()
            except ValueError as error:
                raise ValueError(f"{error} (in fgattn.sites, {pattern!r})") from None
        settings._check_calibration()
        return settings

    def _check(self) -> None:
        """Raises ValueError for options that contradict each other."""
        given = [f"{name}={getattr(self, name)}" for name in RULES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"fgattn: {' and '.join(given)} both say how much to keep; give one (max_density bounds top_p)."
            )
        if self.alpha is not None and self.mask == "observed":
            raise ValueError(
                f"fgattn: alpha={self.alpha} is a rule for estimates; with mask='observed' give top_p or density."
            )
        if (self.mask == "static") != (self.static is not None):
            raise ValueError(
                f"fgattn: mask={self.mask!r} with static={self.static!r}; the mask 'static' is what the option "
                "'fgattn.static' describes: give both, or neither."
            )
        if isinstance(self.density, tuple) and self.mask not in BY_HEAD:
            raise ValueError(
                f"fgattn: a density for each head with mask={self.mask!r}, which has none; give a mask of "
                f"{', '.join(map(repr, BY_HEAD))}."
            )

    def _check_calibration(self) -> None:
        for name, value in () if self.sites is None else self.sites.made_with:
            own = getattr(self, name, None)
            if name == "tail" and own == "auto":
                own = "none"  # of heads with densities of their own: ``tail_kind``
            if own != value:
                raise ValueError(
                    f"fgattn: the settings in fgattn.sites were measured with fgattn.{name}={value!r}, and this is "
                    f"compiled with {own!r}; give the same, or calibrate again."
                )

    def for_site(self, path: str) -> "Settings":
        """The settings of the site with this path: these with what ``sites`` says of it."""
        if self.sites is None:
            return self
        return self._with(self.sites.options(path))

    def _with(self, options: dict[str, Any]) -> "Settings":
        changes = {name: value for name, value in options.items() if name != "dense"}
        if options.get("dense"):
            changes |= {"mask": "dense", "static": None}
        return dataclasses.replace(self, sites=None, **changes)

    def with_order(self, known: bool) -> "Settings":
        """These with the slice "auto" decided; ``known``: queries and keys are put in query order."""
        return dataclasses.replace(self, slice="128x16" if known else "128x8") if self.slice == "auto" else self

    @property
    def tail_kind(self) -> str:
        """``tail`` with "auto" decided: summaries pay where little is kept, of masks that keep what matters most.

        Not where heads have densities of their own: calibration measured those without summaries.
        """
        if self.tail != "auto":
            return self.tail
        little = self.mask in BY_MASS and isinstance(self.density, float) and self.density < LITTLE
        return "pooled" if little else "none"

    @property
    def m(self) -> int:
        """Queries in a slice."""
        return 128 if self.slice == "auto" else int(self.slice.partition("x")[0])

    @property
    def n(self) -> int:
        """Keys in a group."""
        return 8 if self.slice == "auto" else int(self.slice.partition("x")[2])

    @property
    def stages(self) -> tuple[tuple[float, "Settings"], ...]:
        """(share of the steps, the settings from there on), in order; one stage where ``density`` is one number."""
        if not isinstance(self.density, Schedule):
            return ((0.0, self),)
        return tuple((start, dataclasses.replace(self, density=density)) for start, density in self.density.steps)

    @property
    def levels(self) -> tuple["Settings", ...]:
        """As observed masks may be kept: these settings alone; with ``state_bytes`` in larger and larger key groups
        too, where those are the largest with a mask for two heads, and for four, and at last in host memory.
        """
        if self.mask != "observed":
            return ()
        largest = 16 if self.slice == "auto" else self.n
        if not self.state_bytes or self.state_memory == "host":
            return (self,)
        levels = [self, *(dataclasses.replace(self, slice=f"{self.m}x{n}") for n in GROUPS if n > largest)]
        shared = [heads for heads in (2, 4) if heads > self.heads_per_mask]
        levels += [dataclasses.replace(levels[-1], heads_per_mask=heads) for heads in shared]
        return (*levels, dataclasses.replace(self, state_memory="host"))

    @property
    def drift(self) -> float | None:
        """The bound on drift that ``refresh`` sets; None where it is a schedule."""
        drift = isinstance(self.refresh, str) and self.refresh.startswith("drift")
        return float(self.refresh.split()[1]) if drift else None

    @property
    def selector(self):
        """The operator of a selector of the user's own; None for the built-in ones."""
        return registered_selector(self.mask)

    @property
    def share(self) -> float | tuple[float, ...] | None:
        """Share of the groups that a slice keeps; None where ``top_p`` or ``alpha`` decides."""
        return 0.3 if all(getattr(self, name) is None for name in RULES) else self.density

    @property
    def mass(self) -> float:
        """Share of the mass that a slice keeps, where ``share`` is None."""
        return 1.0 if self.top_p is None else self.top_p

    @property
    def queries_per_mean(self) -> int:
        """``pool`` in numbers. Scoring costs 1 / (pool * N) of dense attention's products: 6% at pool 16 and N = 1."""
        if self.pool == "auto":
            return min(self.m, 16) if self.n > 1 else self.m
        return self.pool

    def changed(self) -> dict[str, Any]:
        """The options that are not at their defaults, as they may be given."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {name: dict(x.steps) if isinstance(x, Schedule) else x for name, x in values.items()}


def options_table() -> str:
    """The options as a Markdown table: name, default, meaning."""
    rows = [f"| `fgattn.{f.name}` | `{f.default!r}` | {f.metadata['text']} |" for f in dataclasses.fields(Settings)]
    return "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows])
