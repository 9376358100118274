"""Options: what is accepted, in which type, and what a refusal says."""

import dataclasses
import math

import numpy as np
import pytest

from fg_inductor.option_values import Schedule, StaticMask
from fg_inductor.settings import Settings, options_table

ACCEPTED = [
    ("density", 1, 1.0),
    ("density", None, None),
    ("density", np.float32(0.25), 0.25),
    ("top_p", 0.5, 0.5),
    ("pool", np.int64(32), 32),
    ("min_seq", 0, 0),
    ("min_seq", np.int32(128), 128),
    ("slice", "64x1", "64x1"),
    ("token_grid", [2, np.int64(3), 4], (2, 3, 4)),
    ("token_grid", None, None),
    ("time_step", 2, 2.0),
    ("time_step", "auto", "auto"),
    ("dense_first", 0, 0.0),
    ("dense_first", 1, 1.0),
    ("refresh", "every 16", "every 16"),
    ("refresh", [9, np.int64(3), 3], (3, 9)),
    ("refresh", (), ()),
    ("refresh", "drift .050", "drift 0.05"),
    ("density", {0.5: 0.2, 0: 0.3}, Schedule(((0.0, 0.3), (0.5, 0.2)))),
    ("state_bytes", np.int64(10**9), 10**9),
    ("state_memory", "host", "host"),
    ("heads_per_mask", np.int64(2), 2),
    ("mask", "observed", "observed"),
    ("tail", "pooled", "pooled"),
    ("kernel", "hopper", "hopper"),
    ("strict", True, True),
    ("reduce", "max", "max"),
    ("gamma", 0.6, 0.6),
    ("gamma", None, None),
    ("alpha", 1, 1.0),
]


@pytest.mark.parametrize(("name", "value", "stored"), ACCEPTED, ids=[f"{n}={v}" for n, v, _ in ACCEPTED])
def test_accepts(name, value, stored):
    settings = Settings.parse({f"fgattn.{name}": value})
    assert getattr(settings, name) == stored
    assert type(getattr(settings, name)) is type(stored)
    assert hash(settings) == hash(dataclasses.replace(Settings(), **{name: stored}))


REFUSED = [
    ("fgattn.dentisy", 0.2, "unknown option 'fgattn.dentisy'; did you mean 'fgattn.density'?"),
    ("fgattn.zzz", 1, "unknown option 'fgattn.zzz'; the options are mask, slice"),
    ("fgattn.density", 0, "'fgattn.density' must be a number in (0, 1] or None; got 0."),
    ("fgattn.density", float("nan"), "must be a number in (0, 1] or None; got nan"),
    ("fgattn.density", True, "must be a number in (0, 1] or None; got True"),
    ("fgattn.density", "0.2", "must be a number in (0, 1] or None; got '0.2'"),
    ("fgattn.max_density", None, "must be a number in (0, 1]; got None"),
    ("fgattn.top_p", 1.5, "must be a number in (0, 1] or None; got 1.5"),
    ("fgattn.slice", "128x7", "such as '128x8'; got '128x7'"),
    ("fgattn.slice", "²x8", "such as '128x8'; got '²x8'"),
    ("fgattn.slice", (128, 8), "such as '128x8'; got (128, 8)"),
    ("fgattn.pool", 12, "must be 'auto' or one of 8, 16, 32, 64, 128; got 12."),
    ("fgattn.pool", 16.0, "must be 'auto' or one of 8, 16, 32, 64, 128; got 16.0."),
    ("fgattn.pool", True, "must be 'auto' or one of 8, 16, 32, 64, 128; got True."),
    ("fgattn.tail", "poled", "did you mean 'pooled'?; got 'poled'"),
    ("fgattn.inner", None, "must be one of 'inductor', 'aot_eager', 'eager'; got None"),
    ("fgattn.min_seq", True, "must be a number of tokens, 0 or more; got True"),
    ("fgattn.min_seq", -1, "must be a number of tokens, 0 or more; got -1"),
    ("fgattn.token_grid", (1, 2), "must be (T, H, W)"),
    ("fgattn.time_step", 0, "must be a positive number or 'auto'"),
    ("fgattn.time_step", "fast", "must be a positive number or 'auto'; got 'fast'"),
    ("fgattn.time_step", math.inf, "must be a positive number"),
    ("fgattn.time_step", True, "must be a positive number"),
    ("fgattn.token_grid", (True, 2, 3), "must be (T, H, W)"),
    ("fgattn.token_grid", "atuo", "must be (T, H, W)"),
    ("fgattn.reduce", "mean", "must be one of 'sum', 'max'; got 'mean'"),
    ("fgattn.gamma", 1.0, "must be a positive number below 1 or None; got 1.0"),
    ("fgattn.gamma", -0.5, "must be a positive number below 1 or None; got -0.5"),
    ("fgattn.alpha", 0, "must be a positive number or None; got 0"),
    ("fgattn.alpha", float("nan"), "must be a positive number or None; got nan"),
    ("fgattn.alpha", True, "must be a positive number or None; got True"),
    ("fgattn.strict", 1, "must be True or False; got 1"),
    ("fgattn.dense_first", -0.1, "'fgattn.dense_first' must be a number in [0, 1]; got -0.1"),
    ("fgattn.refresh", "every", "must be 'every N', N a number of steps; 'drift X'"),
    ("fgattn.refresh", "every 0", "must be 'every N', N a number of steps; 'drift X'"),
    ("fgattn.refresh", "drift 0", "'drift X', X a fall of the kept mass between 0 and 1; or a list"),
    ("fgattn.refresh", "drift 5", "got 'drift 5'"),
    ("fgattn.density", {0.5: 0.2}, "must begin at 0 and end before 1, as {0: 0.3, 0.5: 0.2}"),
    ("fgattn.density", {0: 0.3, 1: 0.2}, "must begin at 0 and end before 1"),
    ("fgattn.density", {0: 3}, "must be a number in (0, 1]"),
    ("fgattn.state_bytes", 0, "must be a number of bytes, 1 or more, or None; got 0"),
    ("fgattn.state_memory", "hosts", "must be one of 'device', 'host'; did you mean 'host'?; got 'hosts'"),
    ("fgattn.state_memory", None, "must be one of 'device', 'host'; got None"),
    ("fgattn.heads_per_mask", 0, "must be a whole number, 1 or more; got 0"),
    ("fgattn.heads_per_mask", 2.0, "must be a whole number, 1 or more; got 2.0"),
    ("fgattn.refresh", [1, -1], "a list of steps, the first of which is 0; got [1, -1]"),
    ("fgattn.refresh", 8, "got 8"),
    ("fgattn.dense_first", True, "'fgattn.dense_first' must be a number in [0, 1]; got True"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED, ids=[f"{k}={v}" for k, v, _ in REFUSED])
def test_refuses(key, value, message):
    with pytest.raises(ValueError) as error:
        Settings.parse({key: value})
    assert str(error.value).startswith("fgattn: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"tile": (1, 2, 2)},
            "must be a dict with some of 'tile', 'window', 'radius', 'ranges', a rule besides the tile",
        ),
        ({"windows": (1, 3, 3)}, "must be a dict with some of"),
        ("window", "must be a dict with some of"),
        ({"window": (1, 2, 3)}, "must have a 'window' of three odd numbers of tiles"),
        ({"window": (3, 3)}, "must have a 'window' of three odd numbers of tiles"),
        ({"window": 3}, "must have whole numbers, 1 or more, in 'window'"),
        ({"tile": (2, 8), "radius": 3}, "must have a 'tile' of three sizes"),
        ({"ranges": [0, 4, 9]}, "must have 'ranges' of [start, end) pairs"),
        ({"ranges": [-1, 4]}, "must have whole numbers, 0 or more, in 'ranges'"),
        ({"radius": -1}, "must have a 'radius' of 0 tokens or more"),
    ],
    ids=str,
)
def test_refuses_static(value, message):
    with pytest.raises(ValueError) as error:
        Settings.parse({"fgattn.mask": "static", "fgattn.static": value})
    assert str(error.value).startswith(f"fgattn: option 'fgattn.static' {message}")


def test_accepts_static():
    rule = {"tile": [1, 4, 4], "window": (1, 3, 3), "radius": 20, "ranges": [0, np.int64(30)]}
    settings = Settings.parse({"fgattn.mask": "static", "fgattn.static": rule})
    assert settings.static == StaticMask((1, 4, 4), (1, 3, 3), 20.0, (0, 30))
    assert isinstance(hash(settings), int)
    for options in ({"fgattn.mask": "static"}, {"fgattn.static": {"radius": 3}}):
        with pytest.raises(ValueError, match=r"with static=.*; the mask 'static' is what .* give both, or neither"):
            Settings.parse(options)


def test_refuses_two_rules_for_how_much_to_keep():
    with pytest.raises(ValueError, match=r"fgattn: density=0.3 and alpha=0.5 both say how much to keep; give one"):
        Settings.parse({"fgattn.alpha": 0.5, "fgattn.density": 0.3})
    with pytest.raises(ValueError, match=r"fgattn: density=0.3 and top_p=0.9 both .* \(max_density bounds top_p\)"):
        Settings.parse({"fgattn.top_p": 0.9, "fgattn.density": 0.3})
    with pytest.raises(ValueError, match=r"fgattn: alpha=0.5 is a rule for estimates; with mask='observed' give top_p"):
        Settings.parse({"fgattn.alpha": 0.5, "fgattn.mask": "observed"})


def test_defaults_pass_their_own_checks():
    defaults = {f"fgattn.{f.name}": f.default for f in dataclasses.fields(Settings)}
    assert Settings.parse(defaults) == Settings()


def test_changed_holds_only_what_differs():
    settings = Settings.parse({"fgattn.slice": "64x16", "fgattn.density": 0.5, "fgattn.pool": "auto"})
    assert settings.changed() == {"slice": "64x16", "density": 0.5}
    assert (settings.m, settings.n) == (64, 16)


@pytest.mark.parametrize(
    ("slice_", "pool", "queries"),
    [("128x8", "auto", 16), ("128x1", "auto", 128), ("64x1", 32, 32), ("16x16", "auto", 16)],
)
def test_queries_per_mean(slice_, pool, queries):
    assert Settings.parse({"fgattn.slice": slice_, "fgattn.pool": pool}).queries_per_mean == queries


def test_every_option_is_in_the_table():
    table = options_table()
    assert all(f"| `fgattn.{f.name}` | `{f.default!r}` | " in table for f in dataclasses.fields(Settings))


@pytest.mark.parametrize(
    "options, share, mass",
    [({}, 0.3, 1.0), ({"density": 0.5}, 0.5, 1.0), ({"top_p": 0.8}, None, 0.8), ({"alpha": 0.5}, None, 1.0)],
    ids=["default", "density", "top_p", "alpha"],
)
def test_one_rule_says_how_much_to_keep(options, share, mass):
    settings = Settings(**options)
    assert (settings.share, settings.mass) == (share, mass)


def test_automatic_slice_follows_the_order():
    assert [Settings().with_order(known).slice for known in (True, False)] == ["128x16", "128x8"]
    given = Settings(slice="64x1")
    assert given.with_order(True) is given and (given.m, given.n) == (64, 1)


@pytest.mark.parametrize(
    ("options", "tail"),
    [
        ({}, "none"),
        ({"density": 0.3}, "none"),
        ({"density": 0.25}, "none"),
        ({"density": 0.2}, "pooled"),
        ({"density": 0.2, "tail": "none"}, "none"),
        ({"tail": "pooled"}, "pooled"),
        ({"density": 0.2, "mask": "observed"}, "pooled"),
        ({"density": 0.2, "mask": "dfs"}, "none"),  # a rule of others, as they have it
        ({"top_p": 0.5}, "none"),  # what that keeps is known when the model runs
    ],
    ids=str,
)
def test_tail_by_density(options, tail):
    settings = Settings.parse({f"fgattn.{name}": value for name, value in options.items()})
    assert settings.tail_kind == tail


def test_tail_by_density_of_a_stage_and_not_of_heads():
    settings = Settings.parse({"fgattn.density": {0: 0.3, 0.5: 0.1}})
    assert [stage.tail_kind for _, stage in settings.stages] == ["none", "pooled"]
    by_head = Settings.parse({"fgattn.sites": {"a": {"density": [0.1, 0.2]}}})
    assert by_head.for_site("a").tail_kind == "none"
