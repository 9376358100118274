"""Fixtures of every test, and two guards: the repository root stays off sys.path, and no test leaves global state."""

import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: the portable kernels run on CPU tensors

from fg_inductor import testing

# Whether a site is rewritten must not depend on what a busy machine measures; tests of the measurement say "on".
os.environ["FGATTN_DEVICE_CONSTANTS"] = "off"

ROOT = Path(__file__).resolve().parent.parent
TRITON = importlib.util.find_spec("triton") is not None
KERNEL_TESTS = [
    f"test_{name}.py"
    for name in (
        "alike_slices", "attention_backward", "attention_forward", "kept_density", "order_spread", "resources",
        "select_cut", "select_pooled",
    )
]  # fmt: skip
collect_ignore = [] if TRITON else KERNEL_TESTS


def pytest_sessionstart(session):
    for name in ("kernels", "passes"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
        if any(Path(place).resolve().is_relative_to(ROOT) for place in places if place):
            raise pytest.UsageError(
                f"`import {name}` finds {ROOT / name}: the repository root is on sys.path, where it hides packages of "
                "that name. Run plain `pytest` or `python -P -m pytest`; unset PYTHONPATH if it names the root."
            )
    if TRITON and not torch.cuda.is_available():
        _check_interpreter(metadata.version("triton"), metadata.version("numpy"))


def pytest_report_header(config):
    return [] if TRITON else f"no Triton on this platform, so these are not run: {', '.join(collect_ignore)}"


def _check_interpreter(triton: str, numpy: str) -> None:
    if _minor(triton) <= (3, 6) and _minor(numpy) >= (2, 4):
        raise pytest.UsageError(
            f"Triton {triton} interprets kernels with NumPy below 2.4 only, and NumPy is {numpy}. "
            'Run: pip install "numpy<2.4"'
        )


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def device() -> str:
    """ "cuda" where there is one, for tests marked gpu; else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison():
    """Uninitialised memory is NaN or garbage during the test, so that an output left unwritten shows."""
    with testing.poison():
        yield


@pytest.fixture
def one_thread():
    """For many tiny operations, where threads mostly wait for each other: 18 s instead of 120 s on two busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def import_example(monkeypatch):
    """Imports a module of examples/ as ``python examples/NAME.py`` does; behind the test none of them stays."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield importlib.import_module
    for path in (ROOT / "examples").glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def script(request, tmp_path, monkeypatch):
    """The path of a file with the SCRIPT of the test's module; ``sys.path`` will be what it was."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "script.py"
    path.write_text(request.module.SCRIPT)
    return path


def _global_state() -> dict:
    return {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_default_device()": torch.get_default_device(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.is_autocast_enabled('cpu')": torch.is_autocast_enabled("cpu"),
        "torch.is_autocast_enabled('cuda')": torch.is_autocast_enabled("cuda"),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.empty": torch.empty,
        "torch.nn.functional.scaled_dot_product_attention": torch.nn.functional.scaled_dot_product_attention,
    }


@pytest.fixture(autouse=True)
def _isolated():
    """Each test starts from seed 0 and without compiled code, and must leave torch's global switches as they were."""
    torch.manual_seed(0)
    before = _global_state()
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    changed = [f"{name}: {before[name]} -> {value}" for name, value in _global_state().items() if value != before[name]]
    assert not changed, "the test left global state behind: " + "; ".join(changed)
