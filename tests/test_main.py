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
