"""The command line: ``python -m fg_inductor {options,env,selftest,explain,calibrate,bench}``."""

import argparse
import ast
import importlib
import importlib.metadata
import json
import pkgutil
import platform
import runpy
import sys
from pathlib import Path

import torch

from fg_inductor import bench, settings


def main(argv: list[str] | None = None) -> None:
    names = benchmarks()
    parser = argparse.ArgumentParser(
        prog="python -m fg_inductor", description="Sparse attention for video transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("options", help="print the options of the backend as a Markdown table")
    commands.add_parser("env", help="print versions and card, for a bug report")
    selftest = commands.add_parser("selftest", help="check kernels and speed on this machine, in under two minutes")
    selftest.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    explain = commands.add_parser(
        "explain",
        help="say what becomes of each attention site of a model",
        description="Say what becomes of each attention site of a model, without compiling it.",
    )
    explain.add_argument(
        "target", metavar="SCRIPT.py:FUNCTION", help="FUNCTION() returns (model, inputs): a tuple, or a dict by keyword"
    )
    explain.add_argument("--html", metavar="FILE", help="run sparse, and write a page with each block mask")
    explain.add_argument("--json", metavar="FILE", help="write the table as JSON")
    explain.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="such as fgattn.top_p=0.8; several times"
    )
    calibrate = commands.add_parser(
        "calibrate",
        help="find the density that each head of a model needs",
        description="Run a model on a few inputs, and find for each attention site and head the density that keeps it "
        "near dense attention. fgattn.sites reads the file.",
    )
    calibrate.add_argument(
        "target",
        metavar="SCRIPT.py:FUNCTION",
        help="FUNCTION() returns (model, inputs): a list of calls, each a tuple, a dict by keyword, or (tuple, dict)",
    )
    calibrate.add_argument("--error", type=float, default=0.05, help="bound on the relative error of a head's output")
    calibrate.add_argument("--out", metavar="FILE", required=True, help="the JSON file to write")
    calibrate.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="such as fgattn.tail=pooled; several times"
    )
    # The benchmark parses its own arguments, -h included.
    run = commands.add_parser("bench", help="run a benchmark; 'bench NAME -h' explains it", add_help=False)
    run.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    args, rest = parser.parse_known_args(argv)
    if args.command == "bench":
        importlib.import_module(f"fg_inductor.bench.{args.name}").main(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif args.command == "explain":
        _explain(parser, args)
    elif args.command == "calibrate":
        _calibrate(parser, args)
    elif args.command == "selftest":
        from fg_inductor.selftest import main as check

        raise SystemExit(check(args.device))
    elif args.command == "options":
        print(settings.options_table())
    else:
        print(json.dumps(environment(), indent=1))


def _made(parser: argparse.ArgumentParser, target: str, kinds: tuple[type, ...], wanted: str) -> tuple:
    """(model, inputs) of SCRIPT.py:FUNCTION, inputs of one of ``kinds``; a usage error that says what is ``wanted``."""
    script, _, function = target.rpartition(":")
    if not script or not Path(script).is_file():
        parser.error(f"{target!r} is not SCRIPT.py:FUNCTION, or there is no such script")
    sys.path.insert(0, str(Path(script).resolve().parent))
    make = runpy.run_path(script).get(function)
    if not callable(make):
        parser.error(f"{script} has no function {function!r}")
    made = make()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], kinds)):
        parser.error(f"{function}() must return (model, inputs), inputs {wanted}; got {type(made).__name__}")
    return made


def _explain(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    import fg_inductor

    model, inputs = _made(parser, args.target, (tuple, dict), "a tuple or a dict")
    positional, named = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
    options = dict(map(_option, args.option))
    try:
        with torch.no_grad():
            report = fg_inductor.explain(model, *positional, options=options, page=args.html, **named)
    except (ValueError, TypeError) as error:
        parser.error(str(error)) if str(error).startswith("fgattn") else _raise(error)
    if args.json:
        Path(args.json).write_text(report.to_json())


def _calibrate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    import fg_inductor

    model, inputs = _made(parser, args.target, (list, tuple, dict), "a list of calls, a tuple or a dict")
    inputs = inputs if isinstance(inputs, list) else [inputs]
    options = dict(map(_option, args.option))
    try:
        found = fg_inductor.calibrate(model, inputs, args.error, options=options, out=args.out)
    except (ValueError, TypeError) as error:
        parser.error(str(error)) if str(error).startswith(("fgattn", "fg_inductor")) else _raise(error)
    print(found)


def _raise(error: Exception) -> None:
    raise error


def _option(text: str) -> tuple[str, object]:
    """``fgattn.top_p=0.8`` -> ("fgattn.top_p", 0.8); a value that is no Python literal is a string."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def benchmarks() -> list[str]:
    """The modules of ``fg_inductor.bench`` that are benchmarks: all but what they share."""
    return sorted(
        {module.name for module in pkgutil.iter_modules(bench.__path__)}
        - {"architectures", "common", "masks", "peer_kernels", "tiles"}
    )


def environment() -> dict[str, str]:
    """What a bug report needs."""
    from fg_inductor.bench.common import environment as measured_on

    versions = {name: _version(name) for name in ("fg-inductor", "diffusers", "transformers")}
    return {**measured_on(), **versions, "python": platform.python_version(), "system": platform.platform()}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
