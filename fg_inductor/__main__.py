"""The command line: ``python -m fg_inductor {options,env,bench}``."""

import argparse
import importlib
import importlib.metadata
import json
import pkgutil
import platform

from fg_inductor import bench, settings


def main(argv: list[str] | None = None) -> None:
    names = benchmarks()
    parser = argparse.ArgumentParser(
        prog="python -m fg_inductor", description="Sparse attention for video transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("options", help="print the options of the backend as a Markdown table")
    commands.add_parser("env", help="print versions and card, for a bug report")
    # The benchmark parses its own arguments, -h included.
    run = commands.add_parser("bench", help="run a benchmark; 'bench NAME -h' explains it", add_help=False)
    run.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    args, rest = parser.parse_known_args(argv)
    if args.command == "bench":
        importlib.import_module(f"fg_inductor.bench.{args.name}").main(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif args.command == "options":
        print(settings.options_table())
    else:
        print(json.dumps(environment(), indent=1))


def benchmarks() -> list[str]:
    """The modules of ``fg_inductor.bench`` that are benchmarks: all but what they share."""
    return sorted({module.name for module in pkgutil.iter_modules(bench.__path__)} - {"common", "masks"})


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
