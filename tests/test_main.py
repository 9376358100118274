"""The command line."""

import json

import pytest

from fg_inductor.__main__ import benchmarks, main
from fg_inductor.settings import options_table


def test_options(capsys):
    main(["options"])
    assert capsys.readouterr().out.strip() == options_table()


def test_env_is_json_with_versions(capsys):
    main(["env"])
    assert {"card", "torch", "triton", "python", "fg-inductor", "diffusers"} <= json.loads(
        capsys.readouterr().out
    ).keys()


@pytest.mark.parametrize("name", benchmarks())
def test_each_benchmark_explains_itself(name, capsys):
    """Every module but the shared one has a ``main(argv)``; it, not the outer parser, sees -h."""
    with pytest.raises(SystemExit) as exit:
        main(["bench", name, "-h"])
    assert exit.value.code == 0
    assert f"python -m fg_inductor bench {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "atention"], "invalid choice: 'atention'"),
        (["options", "--csv"], "unrecognized arguments: --csv"),
        ([], "required: command"),
    ],
    ids=["benchmark", "argument", "nothing"],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


SCRIPT = """
import torch
from fg_inductor.toy_models import Stack, tokens

def positional():
    return Stack(2), (tokens(),)

def by_name():
    return Stack(1), {"x": tokens()}

def nothing():
    return Stack(1)
"""
SHORT = ["--option", "fgattn.min_seq=1", "--option", "fgattn.slice=16x8", "--option", "fgattn.density=0.5"]


@pytest.mark.parametrize(("function", "sites"), [("positional", 2), ("by_name", 1)])
def test_explain(function, sites, script, tmp_path, capsys):
    page, data = tmp_path / "page.html", tmp_path / "report.json"
    main(["explain", f"{script}:{function}", "--html", str(page), "--json", str(data), *SHORT])
    assert f"{sites} of {sites} attention sites rewritten" in capsys.readouterr().out
    report = json.loads(data.read_text())
    assert [site["density"] for site in report["sites"]] == [0.5] * sites
    assert page.read_text().count("<article") == sites


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("nowhere.py:f", [], "is not SCRIPT.py:FUNCTION"),
        ("{}", [], "is not SCRIPT.py:FUNCTION"),
        ("{}:f", [], "has no function 'f'"),
        ("{}:nothing", [], "must return (model, inputs)"),
        ("{}:by_name", ["--option", "fgattn.dentisy=1"], "did you mean 'fgattn.density'"),
    ],
    ids=["no script", "no function given", "no such function", "no inputs", "option"],
)
def test_explain_refuses(target, arguments, message, script, capsys):
    with pytest.raises(SystemExit):
        main(["explain", target.format(script), *arguments])
    assert message in capsys.readouterr().err
