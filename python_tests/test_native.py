"""Loading the compiled libraries: what is refused, what is said, and that nothing falls back in silence."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deadlines import seconds

from kfo_ext.ops import library
from kfo_ext.ops.conv2d.op import OPERATOR as CONVOLUTION

PACKAGE = Path(importlib.util.find_spec("kfo_ext").submodule_search_locations[0])

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the package in a folder of its own."""
    shutil.copytree(PACKAGE, tmp_path / "kfo_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "kfo_ext"


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs code in a new process that finds kfo_ext in `folder` first."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds(120), cwd=folder)


def test_status_names_every_backend():
    status = library.status()
    assert set(status) == {"reference", "cpu", "cuda"}
    assert status["cpu"][0]
    assert "build" in status["cpu"][1]
    assert all(reason for _, reason in status.values())


def test_the_cuda_library_loads_under_a_cuda_torch_and_is_refused_under_another():
    loaded, reason = library.status()["cuda"]
    if not library.CUDA_LIBRARY.exists():
        pytest.skip("the CUDA library is not built: no nvcc")
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in (
        "transform",
        "transform_backward",
        "transform_double_backward",
        "conv2d",
        "conv2d_input",
        "conv2d_weight",
    ):
        assert registered(f"kfo_ext::{op}", "CUDA") == (torch.version.cuda is not None)
    if torch.version.cuda is None:
        assert (loaded, reason) == (False, f"torch {torch.__version__} is a CPU build")
    else:
        assert loaded, reason


def test_auto_leaves_kernels_that_run_by_name_only(monkeypatch):
    monkeypatch.setattr(library, "available", lambda device, kind: True)
    cuda = torch.device("cuda")
    assert CONVOLUTION.resolve("native", cuda) == "native"
    assert CONVOLUTION.resolve("auto", cuda) != "native"
    assert CONVOLUTION.resolve("auto", torch.device("cpu")) == "native"


def test_a_second_copy_is_refused_with_both_paths(copy):
    first = PACKAGE / "_kfo_cpu.so"
    done = run(f"import torch; torch.ops.load_library({str(first)!r}); import kfo_ext.functional", copy.parent)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: kfo_ext: a second copy of the package")
    assert str(first) in message
    assert str(copy / "_kfo_cpu.so") in message


def test_binaries_of_different_builds_are_refused(copy):
    library = copy / "_kfo_cpu.so"
    found = importlib.import_module("kfo_ext._plan").build_id().encode()
    binary = library.read_bytes()
    assert binary.count(found) == 1
    library.write_bytes(binary.replace(found, b"0" * len(found)))
    done = run("import kfo_ext.functional", copy.parent)
    assert done.returncode == 1
    assert f"{library} is not of build {found.decode()}, as _plan is" in done.stderr


def test_a_library_that_does_not_load_names_both_versions(copy):
    library = copy / "_kfo_cpu.so"
    build, built = (getattr(importlib.import_module("kfo_ext._plan"), name)() for name in ("build_id", "build_info"))
    library.write_bytes(b"no library, but of this build: " + build.encode())
    done = run("import kfo_ext; from kfo_ext.ops import library; print(library.status()['cpu'])", copy.parent)
    assert done.returncode == 0, done.stderr
    message = f"_kfo_cpu.so, built with torch {built['torch']}, does not load under torch {torch.__version__}: "
    assert f"RuntimeWarning: kfo_ext: no compiled CPU library ({message}" in done.stderr
    assert done.stdout.startswith("(False, ")
    assert message in done.stdout


def test_without_the_library_auto_warns_and_native_raises(copy):
    (copy / "_kfo_cpu.so").unlink()
    code = """
import torch
from kfo_ext import Problems, transform
X = [torch.full((1, 1), 2.0)] * 3
print(transform(*X, Problems([(1, 1, 1)])).item())
transform(*X, Problems([(1, 1, 1)]), backend="native")
"""
    done = run(code, copy.parent)
    assert done.stdout == "8.0\n"
    assert (
        "RuntimeWarning: kfo_ext: no compiled CPU library (not built: _kfo_cpu.so is not in the package: "
        "install kfo_ext anew with this Python and this torch); backend='auto' runs plain torch" in done.stderr
    )
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: backend 'native' does not run on cpu: not built")


def test_what_to_do_about_a_library_that_is_not_there(tmp_path, monkeypatch):
    tree, site = tmp_path / "a tree", tmp_path / "site"
    (tree / "kfo_ext").mkdir(parents=True)
    monkeypatch.setattr(library, "_PACKAGE", tree / "kfo_ext")
    monkeypatch.setattr("sys.path", ["", str(tree), str(site)])
    monkeypatch.chdir(tree)
    assert library._way_out() == "install kfo_ext anew with this Python and this torch"
    (tree / "setup.py").touch()
    build = f"build it: {sys.executable} -m pip install -e '{tree}'"
    assert library._way_out() == f"{tree} is a source tree; {build}"
    (site / "kfo_ext").mkdir(parents=True)
    (site / "kfo_ext" / "_kfo_cpu.so").touch()
    hidden = f"this source tree hides the kfo_ext installed in {site}; start Python in another folder, or {build}"
    assert library._way_out() == hidden
    assert library._why_no_plan() == "not built: _plan is not in the package"
    (tree / "kfo_ext" / "_plan.cpython-39-x86_64-linux-gnu.so").touch()
    assert library._why_no_plan() == "built for another Python: _plan.cpython-39-x86_64-linux-gnu.so"


def test_names_of_the_package():
    import kfo_ext

    assert kfo_ext.transform is importlib.import_module("kfo_ext.functional").transform
    assert set(kfo_ext.__all__) <= set(dir(kfo_ext))
    assert pickle.loads(pickle.dumps(kfo_ext.transform)) is kfo_ext.transform
    assert pickle.loads(pickle.dumps(kfo_ext.KFO)) is kfo_ext.KFO
    with pytest.raises(AttributeError, match="module 'kfo_ext' has no attribute 'nothing'"):
        kfo_ext.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from kfo_ext.trainer import nothing  # noqa: F401


def test_the_function_is_there_after_an_import_of_its_room():
    code = """
import kfo_ext
assert "torch" not in sys.modules
from kfo_ext.ops import library
from kfo_ext.ops.conv2d.op import OPERATOR as CONVOLUTION
import kfo_ext.updates
import torch
problems = kfo_ext.Problems([(1, 1, 1)])
double = torch.compile(lambda R, G, L: kfo_ext.transform(R, G, L, problems), backend="eager", fullgraph=True)
assert double(*[torch.full((1, 1), 2.0)] * 3).item() == 8
"""
    done = run(code, PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_import_touches_no_device(copy):
    code = "import torch, kfo_ext.adapt; assert not torch.cuda.is_initialized(); assert 'triton' not in sys.modules"
    assert run(code, copy.parent).returncode == 0


def test_too_little_memory_is_an_error_that_says_so(tmp_path):
    code = """
import resource, torch
from kfo_ext.problems import Problems
from kfo_ext.functional import transform
from kfo_ext.ops import one_task
problems = Problems([(1000, 10, 10)])
R, L = torch.eye(10).view(1, -1), torch.eye(10).view(1, -1)
G = torch.zeros(1, 100000).expand(100000, -1)
transform(R, G[:4], L, problems, backend="native")
# Above what is taken: some libraries reserve many more addresses than they use.
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + (4 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for grad in (False, True):
    try:
        transform(R.clone().requires_grad_(grad), G, L, problems, backend="native")
    except torch.OutOfMemoryError as error:
        print(error)
try:
    one_task.conv2d(torch.zeros(1, 1, 2, 20000), torch.zeros(40000, 1, 1, 1), None, 1, 0)
except torch.OutOfMemoryError as error:
    print(error)
"""
    done = run(code, PACKAGE.parent)
    lines = [
        f"kfo_ext::{name}: no memory left on cpu for its outputs or its scratch memory"
        for name in ("transform", "transform", "conv2d")
    ]
    assert done.stdout.splitlines() == lines, done.stderr
