"""The package as users get it, as a wheel and editable, in new environments that borrow this one's torch."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = ("fg_inductor", "kernels", "passes")

# What runs in the new environment, from a folder that holds none of our files. argv: where the package must come from.
PROBE = """
import pathlib, sys
import torch
import fg_inductor, fg_inductor.kernels.ops, fg_inductor.kernels.reference, fg_inductor.passes.sdpa, fg_inductor.bench

home = pathlib.Path(sys.argv[1]).resolve()
for module in (fg_inductor, fg_inductor.kernels, fg_inductor.passes, fg_inductor.bench):
    assert pathlib.Path(module.__file__).resolve().is_relative_to(home), module.__file__
assert (pathlib.Path(fg_inductor.__file__).parent / "py.typed").exists()

import kernels
assert kernels.get_kernel and not pathlib.Path(kernels.__file__).resolve().is_relative_to(home), kernels.__file__
try:
    import passes
except ModuleNotFoundError:
    pass
else:
    raise AssertionError(passes.__file__)

assert "fgattn" in torch._dynamo.list_backends()
compiled = torch.compile(lambda x: x + 1, backend="fgattn", options={"fgattn.inner": "eager", "fgattn.quiet": True})
assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
"""


def run(*command, cwd=None):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=_clean_environment(), check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _clean_environment():
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_USER")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packaged, so that building leaves nothing in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def environment(tmp_path):
    """A new virtual environment that sees this one's packages behind its own: its Python, its site-packages."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Hugging Face's `kernels`, or behind it, for where this environment lacks it, a stand-in.
    stand_in = tmp_path / "hugging_face" / "kernels"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("def get_kernel(repository):\n    raise NotImplementedError\n")
    (site / "borrowed.pth").write_text("\n".join([*borrowed, str(stand_in.parent)]) + "\n")
    return python, site


def install(python, *arguments):
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", "--no-build-isolation", *arguments)


def test_package_list_matches_the_tree():
    """A subpackage missing from the list works when editable and is absent from the wheel."""
    setuptools = PYPROJECT["tool"]["setuptools"]
    listed = {name: setuptools["package-dir"][name] for name in setuptools["packages"]}
    found = {}
    for top in SOURCES:
        for init in (ROOT / top).rglob("__init__.py"):
            folder = init.parent.relative_to(ROOT)
            parts = folder.parts if top == "fg_inductor" else ("fg_inductor", *folder.parts)
            found[".".join(parts)] = folder.as_posix()
    assert listed == found


def test_every_folder_with_modules_is_a_package():
    """setuptools' editable finder doesn't find a nested folder that has no __init__.py."""
    folders = {path.parent for top in SOURCES for path in (ROOT / top).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_wheel(source, environment, tmp_path):
    python, site = environment
    build = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation")
    run(*build, "--no-index", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("fg_inductor-*.whl")
    install(python, wheel)
    run(python, "-c", PROBE, site, cwd=tmp_path)
    packed = {path.relative_to(site / "fg_inductor").as_posix() for path in (site / "fg_inductor").rglob("*.py")}
    expected = set()
    for top in SOURCES:
        prefix = "" if top == "fg_inductor" else f"{top}/"
        expected |= {prefix + path.relative_to(source / top).as_posix() for path in (source / top).rglob("*.py")}
    assert packed == expected
    assert not (site / "kernels").exists() and not (site / "passes").exists()


def test_editable_install(source, environment, tmp_path):
    python, _ = environment
    install(python, "--editable", source)
    run(python, "-c", PROBE, source, cwd=tmp_path)
    # A module written after the installation is found.
    later = source / "kernels" / "written_later.py"
    later.write_text("print('found')\n")
    try:
        assert run(python, "-c", "import fg_inductor.kernels.written_later", cwd=tmp_path) == "found\n"
    finally:
        later.unlink()
