"""Settings by site: which entries apply, what reaches the operators, what is refused, and names that match nothing."""

import json
import logging

import pytest
import torch

import fg_inductor
from fg_inductor.inner import HOOK, with_joint_pass
from fg_inductor.settings import Settings
from fg_inductor.testing_passes import run_pass
from fg_inductor.toy_models import SHORT, Stack, tiny_wan, tokens, wan_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {**SHORT, "fgattn.inner": "eager"}


def parse(sites, **options):
    return Settings.parse({"fgattn.sites": sites} | {f"fgattn.{name}": x for name, x in options.items()})


# (entries, other options, path, what differs from the other options there)
APPLIED = {
    "exact": ({"blocks.1.attn": {"density": 0.3}}, {}, "blocks.1.attn", {"density": 0.3}),
    "another": ({"blocks.1.attn": {"density": 0.3}}, {}, "blocks.11.attn", {}),
    "star": ({"blocks.*.attn": {"top_p": 0.5}}, {}, "blocks.11.attn", {"top_p": 0.5}),
    "by head": ({"*": {"density": [0.1, 1]}}, {}, "x", {"density": (0.1, 1.0)}),
    "prefixed": ({"*": {"fgattn.slice": "64x1"}}, {}, "x", {"slice": "64x1"}),
    "joined": ({"*": {"tail": "pooled"}, "x*": {"pool": 8}}, {}, "x", {"tail": "pooled", "pool": 8}),
    "later": ({"x": {"density": 0.1}, "*": {"density": 0.2}}, {}, "x", {"density": 0.2}),
    "top-p in place of density": ({"x": {"top_p": 0.5}}, {"density": 0.3}, "x", {"top_p": 0.5, "density": None}),
    "density in place of alpha": ({"x": {"density": 0.5}}, {"alpha": 2}, "x", {"density": 0.5, "alpha": None}),
    "a later rule": ({"*": {"alpha": 2}, "x": {"top_p": 0.7}}, {}, "x", {"top_p": 0.7}),
    "density after top-p": ({"*": {"top_p": 0.7}, "x": {"density": 0.5}}, {}, "x", {"density": 0.5}),
    "not a rule": ({"x": {"max_density": 0.5}}, {"alpha": 2}, "x", {"max_density": 0.5}),
    "dense": ({"x": {"dense": True}}, {}, "x", {"mask": "dense"}),
    "dense taken back": ({"*": {"dense": True}, "x": {"dense": False}}, {}, "x", {}),
    "dense and static": (
        {"x": {"dense": True}},
        {"mask": "static", "static": {"radius": 3}},
        "x",
        {"mask": "dense", "static": None},
    ),
}


@pytest.mark.parametrize(("entries", "others", "path", "expected"), APPLIED.values(), ids=APPLIED)
def test_entries_apply(entries, others, path, expected):
    settings, plain = parse(entries, **others), parse(None, **others)
    assert isinstance(hash(settings), int)
    site = settings.for_site(path)
    assert {name: x for name, x in vars(site).items() if x != getattr(plain, name)} == expected


REFUSED = {
    "no mapping": (3, "must be a mapping of site paths to options, the path of a JSON file with one, or None; got 3"),
    "no entry": ({"x": 0.3}, "must have a mapping of options for 'x'"),
    "empty": ({"x": {}}, "must have a mapping of options for 'x'"),
    "no name": ({"": {"density": 0.3}}, "must have site paths as keys"),
    "near": ({"x": {"dentisy": 0.3}}, "must not have 'dentisy' for 'x': did you mean 'density'?"),
    "of graphs": ({"x": {"token_grid": None}}, "must not have 'token_grid' for 'x': a site takes"),
    "value": ({"x": {"density": 2}}, "a valid 'density' for 'x', which must be a number in (0, 1]"),
    "heads": ({"x": {"density": []}}, "a valid 'density' for 'x', which must be a number in (0, 1], a list"),
    "head": ({"x": {"density": [0.3, 0]}}, "a valid 'density' for 'x', which must be a number in (0, 1]"),
    "flag": ({"x": {"dense": 1}}, "a valid 'dense' for 'x', which must be True or False"),
    "rules": ({"x": {"density": 0.3, "alpha": 1}}, "one of 'density' and 'alpha' for 'x'"),
    "rules too": ({"x": {"top_p": 0.3, "density": 1}}, "one of 'density' and 'top_p' for 'x'"),
    "no file": ("/nowhere/settings.json", "must name a file that can be read (No such file"),
}


@pytest.mark.parametrize(("value", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(value, message):
    with pytest.raises(ValueError) as error:
        parse(value)
    assert str(error.value).startswith("fgattn: option 'fgattn.sites' must")
    assert message in str(error.value)


def test_refuses_what_contradicts_the_other_options(tmp_path):
    with pytest.raises(ValueError, match=r"alpha=2.0 is a rule for estimates.*\(in fgattn.sites, 'x'\)"):
        parse({"x": {"alpha": 2}}, mask="observed")
    with pytest.raises(ValueError, match=r"a density for each head with mask='static', which has none.*'x'\)"):
        parse({"x": {"density": [0.1, 0.2]}}, mask="static", static={"radius": 3})
    file = tmp_path / "bad.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="must name a JSON file"):
        parse(file)
    file.write_text(json.dumps({"x": {"density": [0.1, 0.2]}}))
    assert parse(str(file)) == parse({"x": {"density": [0.1, 0.2]}})


def test_settings_of_sites_are_in_the_caches_key():
    plain, other = parse({"x": {"density": 0.3}}), parse({"x": {"density": [0.3, 0.4]}})
    keys = {with_joint_pass({}, settings)[HOOK].uuid() for settings in (plain, other, parse(None))}
    assert len(keys) == 3


@pytest.mark.parametrize("mask", ["pooled", "dfs"])
def test_densities_reach_the_selector(mask):
    sites = parse({"blocks.0": {"density": [0.1, 0.9]}, "*.1": {"density": 0.5}, "blocks.2": {"dense": True}}).sites
    grid = {"token_grid": (2, 8, 8)}
    done = run_pass(Stack(3), (tokens(),), mask=mask, sites=sites, **grid)
    assert [x.decision for x in done.sites] == ["rewritten", "rewritten", "dense"]
    assert done.sites[2].reason == "dense in fgattn.sites"
    assert [(x["density"], x["head_density"]) for x in done.attention()] == [(None, [0.1, 0.9]), (0.5, None)]


def test_slice_of_a_site_has_its_own_order():
    sites = parse({"blocks.1": {"slice": "32x16", "tail": "pooled"}}).sites
    done = run_pass(Stack(2), (tokens(),), sites=sites, token_grid=(2, 8, 8))
    assert [(x["m"], x["n"], x["tail"], x["order"].args[5]) for x in done.attention()] == [
        (16, 8, "none", 16),
        (32, 16, "pooled", 32),
    ]


def test_time_step_of_a_site_has_its_own_order():
    sites = parse({"blocks.1": {"time_step": 2}}).sites
    done = run_pass(Stack(3), (tokens(),), sites=sites, token_grid=(2, 8, 8))
    first, second, third = (x["order"] for x in done.attention())
    assert first is third is not second and second.args[-1] == 2.0 and len(first.args) == 7


def test_densities_of_another_model_are_refused():
    done = run_pass(Stack(1), (tokens(),), sites=parse({"*": {"density": [0.1, 0.2, 0.3]}}).sites)
    (site,) = done.sites
    assert (site.decision, site.reason, site.video) == ("dense", "densities for another number of heads", True)
    assert site.detail == "3 in fgattn.sites for 2 heads"


def compiled(model, **options):
    return torch.compile(model, backend="fgattn", options={**OPTIONS, **{f"fgattn.{k}": v for k, v in options.items()}})


@torch.no_grad()
def test_report_shows_what_each_site_has():
    entries = {"blocks.0": {"density": [0.25, 0.75]}, "blocks.1": {"top_p": 0.5, "tail": "pooled"}}
    compiled(Stack(3), sites=entries, stats=True, density=0.125)(tokens())
    rows = {row.site.path: row for row in fg_inductor.report()}
    assert [rows[f"blocks.{i}"].density for i in (0, 2)] == [0.5, 0.125]
    assert rows["blocks.1"].to_dict()["settings"]["tail"] == "pooled"
    text = str(fg_inductor.report())
    assert (
        "0.25 to 0.75 by head, 0.5 on average" in text and "top_p 0.5, pooled tail" in text and "density 0.125" in text
    )


@torch.no_grad()
def test_densities_by_head_of_observed_masks():
    model, x = Stack(2), tokens()
    run = compiled(model, mask="observed", stats=True, sites={"blocks.1": {"density": [0.25, 0.75]}}, density=0.125)
    with fg_inductor.denoising(run, steps=2) as steps, steps.branch("only"):
        for _ in range(2):
            run(x)
            steps.step()
    assert torch._dynamo.utils.counters["fgattn"]["masks reused"] == 2
    assert [row.density for row in fg_inductor.report()] == [0.125, 0.5]


@torch.no_grad()
def test_says_which_entries_name_no_site(caplog):
    entries = {"blocks.0.attn1": {"density": 0.3}, "blocks.0.atn1": {"density": 0.5}}
    with caplog.at_level(logging.WARNING, "fg_inductor"):
        compiled(tiny_wan(), sites=entries)(**wan_inputs())
    (warning,) = [x.getMessage() for x in caplog.records if "entries of fgattn.sites" in x.getMessage()]
    assert "'blocks.0.atn1' (near: blocks.0.attn1" in warning and "'blocks.0.attn1' (near" not in warning
    assert str(fg_inductor.report()).splitlines()[-1].startswith("fgattn.sites: no site is named 'blocks.0.atn1'")
    report = fg_inductor.explain(tiny_wan(), **wan_inputs(), options={**OPTIONS, "fgattn.sites": entries})
    assert report.notes == fg_inductor.report().notes


@torch.no_grad()
def test_settings_of_layers_need_the_whole_model():
    model, inputs = tiny_wan(), wan_inputs()
    model.compile_repeated_blocks(
        backend="fgattn", options={**OPTIONS, "fgattn.sites": {"blocks.1.attn1": {"density": 0.3}}}
    )
    with pytest.raises(Exception, match=r"has 'blocks.1.attn1', but this graph is of one block .* name 'attn1'"):
        model(**inputs)
    torch._dynamo.reset()
    model = tiny_wan()
    model.compile_repeated_blocks(backend="fgattn", options={**OPTIONS, "fgattn.sites": {"attn1": {"density": 0.5}}})
    model(**inputs)
    assert [row.settings.density for row in fg_inductor.report() if row.site.rewritten] == [0.5]


def test_reset_forgets_names():
    with torch.no_grad():
        compiled(Stack(1), sites={"nowhere": {"dense": True}})(tokens())
    assert fg_inductor.report().notes
    fg_inductor.reset()
    assert not fg_inductor.report().notes
