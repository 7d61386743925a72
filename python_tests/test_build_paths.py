"""Builds in folders whose names compilers and shells take apart: one file by each compiler, through the real graph."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# Every one of them in each of the folders: of the sources, of torch, of the build and of the temporary files.
HOSTILE = "a b,c'd\"e$f;g#h&i%j(k)é"
# Small files that include torch, pybind11 or CUDA; ninja's names of their objects.
OBJECTS = {
    "g++": ["library.cpp.o", "build_info.cpp.o", f"package/_plan{EXT_SUFFIX}"],
    "nvcc": ["cuda_build_id.cu.o", "cuda_header.cu.o"],
}


@pytest.fixture
def graph(tmp_path, monkeypatch):
    """Sets a build up in hostile folders: the module setup.py of a copied tree, and its working directory."""
    for name in ("KFO_CUDA", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / HOSTILE
    for name in ("csrc", "build_backend"):
        shutil.copytree(ROOT / name, place / name)
    shutil.copy(ROOT / "setup.py", place)
    # A header of torch, and its path in the binary.
    (place / "csrc" / "cuda" / "header.cu").write_text(
        '#include <torch/headeronly/macros/Macros.h>\nextern "C" const char* header() { return __FILE__; }\n'
    )
    for name in ("kfo_toolchain", "kfo_build"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("sys.path", list(sys.path))
    spec = importlib.util.spec_from_file_location("kfo_setup_hostile", place / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    (place / "package").mkdir()
    (place / "torch").symlink_to(setup.toolchain.find_torch()[0])
    return setup, place


@pytest.mark.parametrize("compiler", OBJECTS)
def test_hostile_folders(compiler, graph):
    setup, place = graph
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    work = place / "work"
    setup.ARCHITECTURES[:] = [80]
    nvcc = setup.toolchain.find_nvcc(setup.CSRC) if compiler == "nvcc" else None
    setup.make_links(work, place / "package", place / "torch")
    (work / "build.ninja").write_text(setup.build_graph("1.0", "2.13", nvcc))
    targets = OBJECTS[compiler]
    command = [setup.toolchain.find_ninja(), "-C", str(work), *targets]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(place)})
    assert done.returncode == 0, done.stdout + done.stderr
    # Headers are tracked by names that exist: nothing is built again.
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no work to do" in done.stdout
    for name in targets:
        content = (work / name).read_bytes()
        assert b"a b,c" not in content
        assert b"site-packages" not in content


def test_other_inputs_build_anew_and_another_package_folder_does_not(graph):
    setup, place = graph
    work, first = place / "work", place / "torch"
    setup.make_links(work, place / "package", first)
    (work / "a.o").touch()
    (place / "elsewhere").mkdir()
    setup.make_links(work, place / "elsewhere", first)
    assert (work / "a.o").exists()
    assert (work / "package").resolve() == place / "elsewhere"
    setup.make_links(work, place / "elsewhere", place / "package")
    assert not (work / "a.o").exists()
    assert (work / "torch").resolve() == place / "package"


def test_the_next_python_compiles_its_own_module_alone(graph, monkeypatch):
    setup, place = graph
    work, first = place / "work", setup.PYTHON
    setup.make_links(work, place / "package", place / "torch")
    kept = [work / "a.o", work / first / "plan.o"]
    for path in kept:
        path.touch()
    monkeypatch.setattr(setup, "PYTHON", "cpython-399")
    setup.make_links(work, place / "package", place / "torch")
    assert all(path.exists() for path in kept)
    of_one_python = [line for line in setup.build_graph("1.0", "2.13", None).splitlines() if "cpython-399" in line]
    assert [line.split()[:2] for line in of_one_python] == [
        ["build", "cpython-399/plan_module.cpp.o:"],
        ["flags", "="],
        ["build", f"package/_plan{EXT_SUFFIX}:"],
    ]
    # Another pybind11, as in every isolated build.
    monkeypatch.setattr("pybind11.get_include", lambda: str(place / "package"))
    monkeypatch.setattr(setup, "PYTHON", first)
    setup.make_links(work, place / "package", place / "torch")
    assert [path.exists() for path in kept] == [True, False]
