"""A driver or a GPU that is too old for the compiled CUDA library: `auto` goes on without it, and says so once."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from deadlines import seconds

from kfo_ext import doctor
from kfo_ext.ops import cuda_support, dispatch, library, triton_support
from kfo_ext.ops.batch_norm.op import OPERATOR as BATCH_NORM
from kfo_ext.ops.conv2d.op import OPERATOR as CONV
from kfo_ext.ops.transform.op import OPERATOR as TRANSFORM

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "driver.cu"
GPU, DRIVER_ALONE = torch.device("cuda", 0), torch.device("cuda")

# driver, compiled with, compute capability of cuda:0 -> why the library does not run there
CASES = {
    "same": (13000, 13000, (9, 0), ""),
    "later": (13020, 13000, (9, 0), ""),
    "same_generation_of_cuda": (13000, 13020, (9, 0), ""),
    "later_of_the_generation": (13000, 13000, (8, 9), ""),
    "compiled_by_the_driver": (13000, 13000, (11, 0), ""),
    "old_driver": (12080, 13000, (9, 0), r"needs a driver for CUDA 13\.0 or later, that of this machine is for 12\.8"),
    "no_driver": (0, 13000, (9, 0), "there is no CUDA driver"),
    "old_gpu": (13000, 13000, (7, 5), r"compute capability 8\.0 or later, cuda:0 is of 7\.5"),
    "driver_too_old_to_compile": (
        13000,
        13020,
        (11, 0),
        r"CUDA 13\.2 or later to compile for cuda:0, .* 11\.0, .* 13\.0",
    ),
}


@pytest.fixture
def machine(monkeypatch):
    """Sets what the driver, the library and the GPU say of themselves; the library counts as loaded."""
    monkeypatch.setitem(library._status, "cuda", (True, "loaded, in the test"))
    monkeypatch.setattr(triton_support, "_INSTALLED", True)
    monkeypatch.setattr(cuda_support, "generations", lambda: {8, 9, 10, 12})

    def of(driver: int, runtime: int, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(library, "_problems", {})
        monkeypatch.setattr(dispatch, "_said", set())
        monkeypatch.setattr(cuda_support, "versions", lambda library: (driver, runtime))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    return of


@pytest.mark.parametrize("case", CASES)
def test_what_is_needed_and_what_is_there(case, machine):
    *found, why = CASES[case]
    machine(*found)
    assert library.available(GPU, "cuda") == (not why)
    if not why:
        assert library.why_not(GPU) == "loaded, in the test"
        assert TRANSFORM.resolve("auto", GPU) == BATCH_NORM.resolve("auto", GPU) == "native"
        return
    with pytest.raises(RuntimeError, match=f"backend 'native' does not run on cuda: .*{why}"):
        TRANSFORM.resolve("native", GPU)
    with pytest.warns(RuntimeWarning, match=f"do not run on cuda:0: .*{why}"):
        assert TRANSFORM.resolve("auto", GPU) == "triton"
    # It has been said: warnings are errors here.
    assert TRANSFORM.resolve("auto", GPU) == "triton"
    assert BATCH_NORM.resolve("auto", GPU) == "reference"
    assert CONV.resolve("auto", GPU) == "grouped"


def test_without_a_device_the_driver_alone_is_asked(machine):
    machine(13000, 13020, (7, 5))
    assert library.available(DRIVER_ALONE, "cuda")
    machine(12080, 13000, (9, 0))
    assert not library.available(DRIVER_ALONE, "cuda")


def test_without_triton_the_warning_names_both(machine, monkeypatch):
    machine(*CASES["old_driver"][:3])
    monkeypatch.setattr(triton_support, "_INSTALLED", False)
    with pytest.warns(
        RuntimeWarning, match=r"plain torch on cuda: native: .* CUDA 13\.0 .*; triton: triton is not inst"
    ):
        assert TRANSFORM.resolve("auto", GPU) == "reference"


def test_the_driver_is_asked_once(machine, monkeypatch):
    machine(*CASES["same"][:3])
    asked = []
    monkeypatch.setattr(cuda_support, "versions", lambda library: asked.append(library) or (13000, 13000))
    for _ in range(3):
        assert library.available(GPU, "cuda")
    assert asked == [library.CUDA_LIBRARY]


@pytest.mark.parametrize("case", ["same", "old_driver"])
def test_a_compiled_graph_asks_too(case, machine):
    machine(*CASES[case][:3])
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + library.available(GPU, "cuda"), fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(torch.zeros(())) == (case == "same")


def test_doctor_says_which_driver_is_needed(machine):
    machine(*CASES["old_driver"][:3])
    lines: list[str] = []
    assert doctor.examine(lines.append)
    place = lines.index("cuda: loads (loaded, in the test)")
    assert lines[place + 1].startswith("  does not run here: it needs a driver for CUDA 13.0 or later")
    assert not torch.cuda.is_initialized()


def test_code_for_every_generation_and_ptx_for_the_others():
    architectures = importlib.import_module("kfo_ext._plan").build_info()["architectures"]
    if not architectures:
        pytest.skip("the CUDA library is not built: no nvcc")
    assert architectures == ["sm_80", "sm_90", "sm_100", "sm_120", "compute_80"]
    assert cuda_support.generations() == {8, 9, 10, 12}


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
def test_the_library_tells_its_version_and_the_drivers(tmp_path):
    # The one source by itself: the library as a whole loads under a CUDA build of torch alone.
    built = tmp_path / "driver.so"
    command = ["nvcc", "-shared", "-Xcompiler", "-fPIC", str(SOURCE), "-o", str(built)]
    subprocess.run(command, check=True, timeout=seconds(120))
    driver, runtime = cuda_support.versions(built)
    assert driver == 0 or driver > 8000
    assert runtime >= 12080
