"""Measuring the constants of the cost model: the fit, the files, and a measurement on CPU."""

import dataclasses
import json

import pytest
import torch

from fg_inductor import cost, device_constants
from fg_inductor.cost import Constants, Shape
from fg_inductor.settings import Settings

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONSTANTS = Constants(1e9, 9e8, 1e-3, 0.0, 5e8, 0.5, 1e-4, 1e-4, 1e-5, 0.1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FGATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FGATTN_DEVICE_CONSTANTS", "on")
    device_constants.forget()
    yield tmp_path / "cache"
    device_constants.forget()


@pytest.fixture
def measured(monkeypatch):
    """``measure`` returns CONSTANTS; how often it did."""
    calls = []
    monkeypatch.setattr(device_constants, "measure", lambda *what: calls.append(what) or CONSTANTS)
    return calls


def get(**options):
    return device_constants.constants(Settings(**options), 64, torch.float32, CPU)


def test_measured_once_and_read_after_that(measured, folder, caplog):
    assert get() == get() == CONSTANTS and len(measured) == 1
    assert caplog.text.count("measured dense and sparse attention on CPU") == 1 and str(folder) in caplog.text
    device_constants.forget()  # another process
    assert get() == CONSTANTS and len(measured) == 1
    record = json.loads(next(folder.glob("CPU_*.json")).read_text())
    assert record["about"]["torch"] == torch.__version__ and record["about"]["slice"] == "128x16"


@pytest.mark.parametrize("change", [{"slice": "64x8"}, {"tail": "pooled"}, {"pool": 32}, {"reduce": "max"}], ids=str)
def test_what_constants_depend_on_is_measured_apart(change, measured):
    get()
    get(**change)
    assert len(measured) == 2
    get(slice="128x16", density=0.6, top_p=0.5, quiet=True)  # they don't depend on these
    assert len(measured) == 2


def test_quiet(measured, caplog):
    get(quiet=True)
    assert not caplog.text


def test_off(measured, monkeypatch):
    monkeypatch.setenv("FGATTN_DEVICE_CONSTANTS", "off")
    assert get() is None and not measured


def test_a_broken_file_is_measured_anew(measured, folder, caplog):
    get()
    path = next(folder.glob("*.json"))
    path.write_text('{"constants": {"dense_rate": 1}}')
    device_constants.forget()
    assert get() == CONSTANTS and len(measured) == 2
    assert "can't be read" in caplog.text and json.loads(path.read_text())["constants"]["slice"] == 0.5


def test_a_folder_that_cant_be_written(measured, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FGATTN_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert get() == get() == CONSTANTS and len(measured) == 1
    assert "can't be written" in caplog.text


def test_no_memory_left(monkeypatch, caplog):
    def measure(*what):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(device_constants, "measure", measure)
    assert get() is None and "no memory left" in caplog.text


def test_a_failure_is_told_and_stops_nothing(monkeypatch, caplog):
    def measure(*what):
        raise RuntimeError("a kernel that can't run")

    monkeypatch.setattr(device_constants, "measure", measure)
    assert get() is None and "failed" in caplog.text and "a kernel that can't run" in caplog.text
    device_constants.forget()
    with pytest.raises(RuntimeError, match="a kernel that can't run"):
        get(strict=True)


def test_a_graph_for_another_machine(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_constants.constants(Settings(), 64, torch.float32, GPU) is None and not measured


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FGATTN_CACHE_DIR": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/fg_inductor"),
        ({"HOME": "/c"}, "/c/.cache/fg_inductor"),
    ],
    ids=str,
)
def test_cache_folder(variables, expected, monkeypatch):
    for name in ("FGATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert device_constants.cache_folder().as_posix() == expected


# The fit


def times(terms, constants, noise=()):
    """Pairs of (shape, time) at the shapes that are timed on CUDA."""
    found = []
    for heads, grid in device_constants.SHAPES["cuda"]:
        tokens = grid[0] * grid[1] * grid[2]
        for density, cut in zip(device_constants.DENSITIES, (0, device_constants.CUT), strict=True):
            shape = Shape(1, heads, tokens - cut, tokens - cut, 128, 128, 8, density, 0)
            total = 0.0
            for name, term in terms.items():
                unit = 1 / constants[name[2:]] if name.startswith("1/") else constants[name]
                total += float(term.subs(shape.values())) * unit
            found.append((shape, total * (noise[len(found)] if noise else 1)))
    return found


H100 = {
    "dense_rate": 6e11, "ragged_rate": 5.4e11, "dense_row": 1e-7, "kept_rate": 5.4e11, "slice": 2e-5, "list": 2e-9,
    "score": 1e-8, "mean": 1e-8,
}  # fmt: skip


@pytest.mark.parametrize("terms", [cost.DENSE_TERMS, cost.ATTENTION_TERMS, cost.SELECTION_TERMS], ids=["d", "a", "s"])
def test_fit_finds_what_made_the_times(terms):
    found = device_constants._fit(terms, times(terms, H100))
    assert found == {name.removeprefix("1/"): pytest.approx(H100[name.removeprefix("1/")]) for name in terms}


def test_fit_never_pays_for_work():
    """Noise would make a constant negative: it is left out, and the others fit what is left."""
    truth = H100 | {"dense_row": 0.0}
    found = device_constants._fit(cost.DENSE_TERMS, times(cost.DENSE_TERMS, truth, noise=(0.99, 0.99, 1.01, 1.01)))
    assert found["dense_row"] == 0 and found["dense_rate"] == pytest.approx(6e11, rel=0.02)


def test_measures_on_cpu(monkeypatch):
    """All terms, small: every constant is a number that is not negative, and the user's random numbers stay his."""
    monkeypatch.setitem(device_constants.SHAPES, "cpu", ((2, (2, 4, 8)), (1, (4, 4, 8))))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    found = device_constants.measure(Settings(slice="16x8", tail="pooled"), 16, torch.float32, CPU)
    assert torch.equal(torch.rand(3), expected)
    assert all(value >= 0 for value in dataclasses.astuple(found)) and found.dense_rate > 0 < found.kept_rate


@pytest.mark.gpu
def test_measures_on_a_gpu_in_time(caplog):
    found = device_constants.constants(Settings(), 128, torch.bfloat16, GPU)
    assert found.sparse_host > 0 < found.dense_host and found.dense_rate > found.kept_rate / 2
