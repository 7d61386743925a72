"""The build and its binaries: what they name, need and export, and what the build says when something is missing."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from deadlines import seconds
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(importlib.util.find_spec("kfo_ext").submodule_search_locations[0])
CPU, CUDA = PACKAGE / "_kfo_cpu.so", PACKAGE / "_kfo_cuda.so"

needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf (binutils)")
libraries = pytest.mark.parametrize("library", [CPU, CUDA], ids=lambda path: path.stem)


def load_module(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup():
    """The module setup.py, whose toolchain is `setup.toolchain`."""
    path = list(sys.path)
    yield load_module("kfo_setup", ROOT / "setup.py")
    sys.path[:] = path


@pytest.fixture
def toolchain(setup, monkeypatch, tmp_path):
    """The toolchain module, with an empty PATH and no variables of the build set."""
    for name in ("KFO_CUDA", "KFO_TORCH_ROOT", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(setup.toolchain, "TERMINAL", tmp_path / "terminal")
    return setup.toolchain


def built(library: Path) -> Path:
    if not library.exists():
        pytest.skip(f"{library.name} is not built")
    return library


def dynamic_section(library: Path) -> str:
    return subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout


def dynamic_symbols(library: Path) -> list[tuple[str, str, str]]:
    """(binding, section, name) of each dynamic symbol; the section is UND where it is taken from elsewhere."""
    table = subprocess.run(["readelf", "--dyn-syms", "-W", library], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines()]
    return [
        (row[4], row[6], row[7].partition("@")[0]) for row in rows if len(row) >= 8 and row[0].rstrip(":").isdigit()
    ]


def fake_program(folder: Path, name: str, output: str) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\ncat <<'EOF'\n{output}\nEOF\n".replace("cat", shutil.which("cat", path=os.defpath)))
    program.chmod(0o755)


@needs_readelf
def test_cpu_library_needs_torch_cpu_alone():
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic_section(built(CPU))))
    assert "libtorch_cpu.so" in needed
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert needed <= {"libtorch_cpu.so", "libc10.so"} | system


@needs_readelf
def test_cuda_library_names_libtorch_and_nothing_of_cuda():
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic_section(built(CUDA))))
    assert "libtorch.so" in needed
    assert not {name for name in needed if re.search("cuda|nvrtc|cublas", name)}


@needs_readelf
@libraries
def test_no_search_path(library):
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic_section(built(library)))


@needs_readelf
@libraries
def test_only_the_stable_interface_is_used(library):
    taken = {name for _, section, name in dynamic_symbols(built(library)) if section == "UND"}
    assert not {name for name in taken if re.match(r"_?Py", name)}
    assert not {name for name in taken if re.match(r"_ZNK?(2at|3c10|5torch)", name)}


@needs_readelf
@libraries
def test_only_our_own_names_are_exported(library):
    exported = {
        name for binding, section, name in dynamic_symbols(built(library)) if binding == "GLOBAL" and section != "UND"
    }
    expected = {
        "_kfo_cpu": {"kfo_cpu_build_id", "kfo_cpu_fma", "kfo_cpu_isa"},
        "_kfo_cuda": {"kfo_cuda_build_id", "kfo_cuda_versions"},
    }[library.stem]
    assert exported - {"_edata", "_end", "__bss_start"} == expected


@libraries
def test_no_path_of_the_build_machine(library):
    content = built(library).read_bytes()
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content


@needs_readelf
@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_code_for_a_newer_processor_is_shared_with_nothing(isa):
    """A weak symbol in such an object could replace the baseline's, and end in an illegal instruction there."""
    objects = list(ROOT.glob(f"build/temp.*/cpu_*_kernels.cpp_{isa}.o"))
    if not objects:
        pytest.skip("no build folder")
    for item in objects:
        symbols = subprocess.run(["readelf", "-sW", item], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r" (?:WEAK|UNIQUE) .*", symbols)


def test_the_binaries_are_of_one_build():
    plan = pytest.importorskip("kfo_ext._plan", reason="the extension is not built")
    function = ctypes.CDLL(str(built(CPU))).kfo_cpu_build_id
    function.restype = ctypes.c_char_p
    assert function().decode() == plan.build_id()


def test_build_id_depends_on_names_contents_and_version(toolchain, tmp_path):
    source = tmp_path / "a.cpp"
    source.write_text("1")
    ids = [toolchain.build_id(tmp_path, "1.0"), toolchain.build_id(tmp_path, "1.1")]
    source.write_text("2")
    ids.append(toolchain.build_id(tmp_path, "1.0"))
    source.rename(tmp_path / "b.cpp")
    ids.append(toolchain.build_id(tmp_path, "1.0"))
    assert len(set(ids)) == 4
    assert ids[3] == toolchain.build_id(tmp_path, "1.0")


def test_without_nvcc_the_build_says_so_in_one_line(toolchain, capsys):
    assert toolchain.find_nvcc(ROOT) is None
    assert capsys.readouterr().out == "kfo_ext: building without CUDA: no nvcc in CUDA_HOME or on PATH\n"


@pytest.mark.parametrize("nvcc", [("nvcc", "13.0"), None], ids=["cuda", "cpu"])
def test_the_build_says_what_it_compiles_and_how_long_it_takes(toolchain, capsys, tmp_path, nvcc):
    toolchain.announce(nvcc)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "half a minute" in line
    assert (nvcc is not None) == ("with nvcc 13.0, for CUDA: about two minutes" in line)
    assert (nvcc is not None) == ("KFO_CUDA=0" in line)
    assert (tmp_path / "terminal").read_text() == f"\n{line}", "pip keeps the output of a build to itself"


def test_cuda_can_be_left_out_and_insisted_on(toolchain, monkeypatch, capsys):
    monkeypatch.setenv("KFO_CUDA", "0")
    assert toolchain.find_nvcc(ROOT) is None
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("KFO_CUDA", "1")
    with pytest.raises(SetupError, match="KFO_CUDA=1: no nvcc"):
        toolchain.find_nvcc(ROOT)
    monkeypatch.setenv("KFO_CUDA", "yes")
    with pytest.raises(SetupError, match="KFO_CUDA: expected auto, 0 or 1, got 'yes'"):
        toolchain.find_nvcc(ROOT)


@pytest.mark.parametrize(("release", "accepted"), [("11.8", False), ("12.6", False), ("12.8", True), ("13.0", True)])
def test_nvcc_must_know_the_newest_architecture(toolchain, tmp_path, capsys, release, accepted):
    fake_program(tmp_path, "nvcc", f"Cuda compilation tools, release {release}, V{release}.1")
    found = toolchain.find_nvcc(ROOT)
    if accepted:
        assert found == (str(tmp_path / "nvcc"), release)
    else:
        assert found is None
        assert f"is {release}, older than 12.8" in capsys.readouterr().out


def test_paths_that_nvcc_hands_to_a_shell_are_refused(toolchain, tmp_path, monkeypatch):
    for name, broken in (("a`b", "'`'"), ("a$(b)", r"'\$\('"), ("a${b", r"'\$\{'")):
        fake_program(tmp_path, "nvcc", "Cuda compilation tools, release 13.0, V13.0.1")
        with pytest.raises(
            SetupError, match=f"the path of the sources: nvcc breaks at {broken}, got .*: move them, or"
        ):
            toolchain.find_nvcc(tmp_path / name)
    for name in ("a$b", "a`b", 'a"b'):
        (tmp_path / name / "bin").mkdir(parents=True)
        fake_program(tmp_path / name / "bin", "nvcc", "Cuda compilation tools, release 13.0, V13.0.1")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / name))
        with pytest.raises(SetupError, match=r"the path of nvcc: nvcc breaks at .*: set CUDA_HOME to a link"):
            toolchain.find_nvcc(ROOT)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (
            lambda m: m.setattr("platform.machine", lambda: "aarch64"),
            "needs CPython on Linux x86-64, this is .* aarch64",
        ),
        (lambda m: m.setattr("sys.platform", "darwin"), "this is .* on darwin"),
        (lambda m: m.setattr("sysconfig.get_config_var", lambda name: 1), "free-threaded"),
    ],
    ids=["machine", "system", "free-threaded"],
)
def test_other_platforms_are_refused(toolchain, monkeypatch, patch, message):
    toolchain.check_platform()
    patch(monkeypatch)
    with pytest.raises(SetupError, match=message):
        toolchain.check_platform()


def test_another_python_is_refused_before_torch_is_looked_for(toolchain, monkeypatch):
    monkeypatch.setattr("sys.version_info", (3, 9, 18, "final", 0))
    with pytest.raises(SetupError, match=r"needs Python 3.10 or later, .* as in python3.12 -m pip install"):
        toolchain.check_platform()
    for hook in hooks(monkeypatch):
        with pytest.raises(SystemExit, match=r"^error: kfo_ext needs Python 3.10 or later"):
            hook("metadata")


def hooks(monkeypatch) -> list:
    """The backend's, of which each comes first under some frontend and options; none may look for a torch."""
    backend = sys.modules["kfo_build"]
    monkeypatch.setattr(backend, "_torch", lambda: pytest.fail("looks for a torch"))
    stages = ("get_requires_for_build", "prepare_metadata_for_build")
    return [getattr(backend, f"{stage}_{kind}") for stage in stages for kind in ("wheel", "editable")]


def test_an_old_setuptools_is_refused_before_it_reads_the_metadata(toolchain, monkeypatch):
    monkeypatch.setattr("setuptools.__version__", "65.5.0")
    for hook in hooks(monkeypatch):
        with pytest.raises(SystemExit, match=r'"setuptools>=77" ninja pybind11, or leave out .*; this is 65\.5\.0$'):
            hook("metadata")


def test_without_setuptools_the_build_says_what_to_install():
    code = "import sys; sys.modules['setuptools'] = None; import kfo_build"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "build_backend")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith('error: kfo_ext is built by setuptools 77 or later: pip install "setuptools>=77"')


def test_without_a_compiler_the_build_says_what_to_install(toolchain, monkeypatch, tmp_path):
    with pytest.raises(SetupError, match=r"there is no g\+\+ on PATH: install GCC 12 or later \(apt-get install g\+\+"):
        toolchain.compiler()
    monkeypatch.setenv("CXX", "g++-14 -m64")
    with pytest.raises(SetupError, match=r"CXX is 'g\+\+-14 -m64', which is not there: install GCC"):
        toolchain.compiler()
    fake_program(tmp_path, "g++", "11.4.0")
    monkeypatch.delenv("CXX")
    with pytest.raises(SetupError, match=r"cannot be compiled with g\+\+, which is 11\.4\.0: install GCC 12"):
        toolchain.compiler()
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(SetupError, match="CXX: expected a command"):
        toolchain.compiler()
    folder = tmp_path / "a compiler"
    folder.mkdir()
    fake_program(folder, "g++", "14.1.0")
    monkeypatch.setenv("CXX", f"'{folder}/g++'")
    assert toolchain.compiler() == (f"'{folder}/g++'", "14.1.0")


def test_without_pybind11_or_ninja_the_build_says_what_to_install(toolchain, monkeypatch):
    toolchain.check_pybind11()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install pybind11, or leave out --no-build-isolation"):
        toolchain.check_pybind11()
    monkeypatch.setattr("sysconfig.get_path", lambda name: "nowhere")
    with pytest.raises(SetupError, match="pip install ninja, or leave out --no-build-isolation"):
        toolchain.find_ninja()


def test_torch_is_found_without_importing_it(toolchain):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'build_backend')!r})\n"
        "import kfo_build; assert kfo_build.torch_root(); assert 'torch' not in sys.modules\n"
        "assert not any('torch' in name for name in kfo_build.get_requires_for_build_wheel())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_without_torch_the_build_asks_for_it(toolchain, monkeypatch):
    backend = sys.modules["kfo_build"]
    monkeypatch.setattr(backend, "_torch_places", lambda: iter(()))
    assert backend._torch() == ["torch>=2.10"]
    with pytest.raises(SetupError, match="install it first, or set KFO_TORCH_ROOT"):
        toolchain.find_torch()


def test_torch_must_be_new_enough(toolchain, monkeypatch, tmp_path):
    monkeypatch.setenv("KFO_TORCH_ROOT", str(tmp_path))
    with pytest.raises(SetupError, match="KFO_TORCH_ROOT: expected the directory of a torch package"):
        toolchain.find_torch()
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    with pytest.raises(SetupError, match=r"torch>=2.10 with its headers, but .* is 2\.9\.1\+cpu"):
        toolchain.find_torch()


def test_graph_of_a_cuda_build(setup):
    plain = setup.build_graph("1.0", "2.13", None)
    assert "nvcc" not in plain
    assert "_kfo_cuda" not in plain
    cuda = setup.build_graph("1.0", "2.13", ("nvcc", "13.0"))
    for code in ("sm_80", "sm_90", "sm_100", "sm_120", "compute_80"):
        assert f"code={code} " in cuda
    assert re.search(r"--no-as-needed", cuda)
    assert "-ltorch " in cuda


def test_a_path_with_a_space_and_a_comma_is_compiled_by_nvcc(setup, monkeypatch, tmp_path):
    nvcc = setup.toolchain.find_nvcc(ROOT)
    ninja = shutil.which("ninja", path=os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)]))
    if nvcc is None or ninja is None:
        pytest.skip("no nvcc, or no ninja")
    folder = tmp_path / "a space, a comma"
    source, torch, work = folder / "csrc", folder / "torch", folder / "work"
    for name in ("library.cpp", "build_info.cpp", "plan_module.cpp", "cuda/a.cu"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text('#include "in_torch.h"\n__global__ void kernel(int *x) { *x = ONE; }\n')
    (torch / "include").mkdir(parents=True)
    (torch / "include" / "in_torch.h").write_text("#define ONE 1\n")
    monkeypatch.setattr(setup, "CSRC", source)
    monkeypatch.setattr(setup, "ARCHITECTURES", [80])
    setup.make_links(work, folder, torch)
    (work / "build.ninja").write_text(setup.build_graph("1.0", "2.13", nvcc))
    subprocess.run([ninja, "-C", work, "cuda_a.cu.o"], check=True, timeout=seconds(100), stdout=subprocess.DEVNULL)
    assert str(tmp_path).encode() not in (work / "cuda_a.cu.o").read_bytes()


def test_headers_are_tracked():
    folders = [folder for folder in ROOT.glob("build/temp.*") if (folder / ".ninja_deps").exists()]
    ninja = shutil.which("ninja", path=os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)]))
    if not folders or ninja is None:
        pytest.skip("no build folder, or no ninja")
    for folder in folders:
        command = [ninja, "-C", folder, "-t", "deps", "cpu_transform.cpp.o"]
        assert "check.h" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the sources, without anything built."""
    built = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "shared")

    def ignored(folder: str, names: list[str]) -> set[str]:
        # The runs of this checkout, not the package of that name.
        return {*built(folder, names), *(["runs"] if Path(folder) == ROOT else [])}

    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored))


def versioned() -> list[Path]:
    """Every file of this checkout but those for the repository alone, whose names or folders begin with a dot."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in done.stdout.split("\0") if name and not name.startswith(".")]


def test_no_file_names_a_path_of_one_machine():
    """Temporary folders and homes: results, documents and sources are read on other machines."""
    path = re.compile(rb"(?<![\w.*}>])/(?:tmp|work|root|home|Users)/")
    # Tests have such paths as inputs.
    found = [
        name for name in versioned() if name.parts[0] != "python_tests" and path.search((ROOT / name).read_bytes())
    ]
    assert not found


@pytest.fixture
def unpacked(tree, tmp_path) -> Path:
    """The source distribution of this checkout, unpacked in a folder whose name compilers and shells break."""
    (tree / "kfo_ext" / "_stale.so").touch()
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path], cwd=tree, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(tmp_path / "a space, a comma", filter="data")
    (folder,) = (tmp_path / "a space, a comma").iterdir()
    return folder


def test_sdist_holds_everything_a_build_needs(unpacked):
    for name in versioned():
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes(), name
    assert not [path for path in unpacked.rglob("*") if path.suffix in (".so", ".pyc")]


def test_an_installed_wheel_works_from_another_directory(unpacked, setup, tmp_path):
    """That of the source distribution, which is the tree's; without CUDA, and without a torch from the network."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    # Not optimised: that takes most of the time, and every other test runs optimised code.
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
    environment = {**os.environ, "KFO_CUDA": "0", "CXX": str(compiler), "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "pip", "install", *options, "--target", site, unpacked]
    subprocess.run(command, check=True, env={**environment, "PYTHONPATH": ""}, timeout=seconds(400))

    package = {path.relative_to(site) for path in site.glob("kfo_ext/**/*") if path.is_file() and path.suffix != ".pyc"}
    binaries = {path for path in package if path.suffix == ".so"}
    assert {path.name.partition(".")[0] for path in binaries} == {"_kfo_cpu", "_plan"}
    assert package - binaries == {path for path in versioned() if path.parts[0] == "kfo_ext"}
    for path in package - binaries:
        assert (site / path).read_bytes() == (ROOT / path).read_bytes(), path
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    build = setup.toolchain.build_id(ROOT / "csrc", version).encode()
    assert all(build in (site / path).read_bytes() for path in binaries), "compiled from other sources"

    where = "import kfo_ext; print(kfo_ext.__file__, kfo_ext.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(site / "kfo_ext" / "__init__.py"), version]
    command = [sys.executable, site / "bin" / "kfo", "--version"]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"kfo {version}\n"
    tests = [str(unpacked / "python_tests" / "test_transform.py"), "-k", "every_order"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_citation_is_of_this_version():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_workflows_cover_what_the_metadata_promises():
    workflows = ROOT / ".github" / "workflows"
    if not workflows.exists():
        pytest.skip("not a git checkout")
    project, ci, wheels = [
        path.read_text() for path in (ROOT / "pyproject.toml", workflows / "ci.yml", workflows / "wheels.yml")
    ]
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert pythons[0] == re.search(r'^requires-python = ">=(.+)"', project, re.MULTILINE)[1]
    builds = " ".join("cp" + python.replace(".", "") + "-*" for python in pythons)
    assert f'build = "{builds}"' in project
    assert re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.+)\]", wheels)[1]) == pythons
    oldest = re.search(r"torch>=([\d.]+)", project)[1]
    assert f'torch: "{oldest}.0" }} # the oldest' in ci
