"""Compiles the package: two libraries of kernels on torch's stable ABI, and the pybind11 module _plan, all through ninja.

KFO_CUDA=auto|0|1   build the CUDA library if there is an nvcc (the default), never, or fail without one
KFO_TORCH_ROOT=DIR  directory of the torch package to compile against, where it is not the installed one
CXX, CUDA_HOME      the C++ compiler, and the CUDA toolkit where nvcc is not on PATH
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from kfo_build import HEADER, torch_root  # noqa: E402  it lies in the in-tree backend's own directory

OLDEST_TORCH = (2, 10)
OLDEST_NVCC = (12, 8)  # the first to know sm_120
ARCHITECTURES = (80, 90, 100, 120)
ISAS = {
    "avx512": ("kAvx512", "-mavx512f -mavx2 -mfma"),
    "avx2": ("kAvx2", "-mavx2 -mfma"),
    "baseline": ("kBaseline", ""),
}
HOST = "-O3 -g0 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra"
STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def check_platform() -> None:
    """Raises SetupError where the package has no binaries: it is for Linux on x86-64 and CPython with its GIL."""
    found = f"{platform.python_implementation()} on {sys.platform} {platform.machine()}"
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64" or sys.implementation.name != "cpython":
        raise SetupError(f"kfo_ext needs CPython on Linux x86-64, this is {found}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise SetupError("kfo_ext needs a CPython with its GIL, this one is free-threaded")


def find_torch() -> tuple[Path, str]:
    """The torch package to compile against and its version. Raises SetupError when there is none, or one too old."""
    root = torch_root()
    if root is None or not (root / HEADER).exists():
        raise SetupError(f"kfo_ext compiles against torch>=2.10: no {HEADER} under {root or 'any site-packages'}; set KFO_TORCH_ROOT")
    version = re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text())[1]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise SetupError(f"kfo_ext compiles against torch>=2.10, but {root} is {version}")
    return root, version


def find_nvcc() -> tuple[str, str] | None:
    """The nvcc to use and its version, or None to build without CUDA. Raises SetupError as KFO_CUDA asks."""
    mode = os.environ.get("KFO_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        raise SetupError(f"KFO_CUDA: expected auto, 0 or 1, got {mode!r}")
    if mode == "0" or not any((ROOT / "csrc/cuda").glob("*.cu")):
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if nvcc is None:
        missing = "no nvcc in CUDA_HOME or on PATH"
    else:
        version = re.search(r"release (\S+), ", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout)[1]
        if tuple(int(part) for part in version.split(".")) >= OLDEST_NVCC:
            return nvcc, version
        missing = f"{nvcc} is {version}, needs 12.8 or later"
    if mode == "1":
        raise SetupError(f"KFO_CUDA=1: {missing}")
    print(f"kfo_ext: building without CUDA: {missing}")
    return None


def build_id(version: str) -> str:
    """Hash of everything compiled, the same in every binary of one build."""
    digest = hashlib.sha256(version.encode())
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Ninja:
    """A build.ninja under construction; paths of sources are relative to the root of the repository."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, flags: str, variant: str = "") -> str:
        name = f"{source.relative_to(ROOT / 'csrc')}".replace("/", "_") + (f"_{variant}" if variant else "")
        self.lines += [f"build {name}.o: {rule} {escape(source)}", f"  flags = {flags}"]
        return f"{name}.o"

    def link(self, rule: str, target: Path, objects: list[str], flags: str) -> None:
        self.lines += [f"build {escape(target)}: {rule} {' '.join(objects)}", f"  flags = {flags}"]


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def define(name: str, text: str) -> str:
    return shlex.quote(f'-D{name}="{text}"').replace("$", "$$")


class BuildExt(build_ext):
    """Writes build.ninja and runs ninja; a target lands where setuptools would put an extension module."""

    def run(self) -> None:
        check_platform()
        root, torch = find_torch()
        cuda = find_nvcc()
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "kfo_ext"
        package.mkdir(parents=True, exist_ok=True)
        if cuda is None:
            (package / "_kfo_cuda.so").unlink(missing_ok=True)
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text("\n".join(self.ninja_lines(package, root, torch, cuda)) + "\n")
        subprocess.run([ninja_program(), "-C", str(work), *(["-v"] if self.verbose and self.verbose > 1 else [])], check=True)

    def ninja_lines(self, package: Path, root: Path, torch: str, cuda: tuple[str, str] | None) -> list[str]:
        import pybind11

        version = self.distribution.get_version()
        compiler = os.environ.get("CXX") or "g++"
        identity = define("KFO_BUILD_ID", build_id(version))
        map_paths = f"-ffile-prefix-map={shlex.quote(str(ROOT))}=."
        stable = f"{STABLE} -isystem {shlex.quote(str(root / 'include'))}"
        libraries = f"-L{shlex.quote(str(root / 'lib'))}"
        n = Ninja()
        n.rule("cxx", f"{compiler} -MMD -MF $out.d {HOST} {map_paths} $flags -c $in -o $out", depfile=True)
        n.rule("link", f"{compiler} -shared -Wl,--as-needed -Wl,-z,defs,-z,relro,-z,now $in $flags -o $out")

        cpu = [n.compile("cxx", ROOT / "csrc/library.cpp", stable)]
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            if source.name == "kernels.cpp":
                for isa, (table, flags) in ISAS.items():
                    cpu.append(n.compile("cxx", source, f"{flags} -DKFO_ISA={isa} -DKFO_ISA_TABLE={table}", isa))
            else:
                cpu.append(n.compile("cxx", source, identity if source.stem == "build_id" else stable))
        n.link("link", package / "_kfo_cpu.so", cpu, f"{libraries} -ltorch_cpu")

        info = {
            "KFO_VERSION": version,
            "KFO_COMPILER": subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0],
            "KFO_NVCC": cuda[1] if cuda else "",
            "KFO_ARCHITECTURES": " ".join(f"sm_{arch}" for arch in ARCHITECTURES) + f" compute_{ARCHITECTURES[-1]}" if cuda else "",
            "KFO_INSTRUCTION_SETS": " ".join(ISAS),
            "KFO_TORCH": torch,
        }
        python = f"-isystem {shlex.quote(sysconfig.get_path('include'))} -isystem {shlex.quote(pybind11.get_include())}"
        plan = [
            n.compile("cxx", ROOT / "csrc/plan_module.cpp", python),
            n.compile("cxx", ROOT / "csrc/build_info.cpp", " ".join([identity, *(define(*item) for item in info.items())])),
        ]
        # A module finds the interpreter's symbols in the process that imports it.
        n.rule("link_module", f"{compiler} -shared -Wl,--as-needed -Wl,-z,relro,-z,now $in $flags -o $out")
        n.link("link_module", package / f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}", plan, "")

        if cuda:
            nvcc = shlex.quote(cuda[0])
            code = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES)
            code += f" -gencode arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]} --compress-mode=size"
            host = f"-Xcompiler -fPIC,-fvisibility=hidden,-g0,-ffp-contract=off,{map_paths}"
            n.rule("nvcc", f"{nvcc} -MMD -MF $out.d -ccbin {shlex.quote(compiler)} -O3 -std=c++17 {code} {host} $flags -c $in -o $out", depfile=True)
            # Symbols of libtorch_cuda resolve only for a library that names libtorch, which brings it in under a CUDA torch.
            n.rule("link_cuda", f"{nvcc} -shared -ccbin {shlex.quote(compiler)} $in -Xlinker --no-as-needed $flags -o $out")
            objects = [
                n.compile("nvcc", source, identity if source.stem == "build_id" else stable)
                for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))
            ]
            n.link("link_cuda", package / "_kfo_cuda.so", objects, f"{libraries} -ltorch -ltorch_cpu")
        return n.lines

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "kfo_ext"
        return [str(path) for path in sorted(package.glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def ninja_program() -> str:
    """The ninja of this environment, else the one on PATH. Raises SetupError when there is neither."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR)
    if found is None:
        raise SetupError("kfo_ext is built by ninja: pip install ninja")
    return found


if __name__ == "__main__":
    setup(ext_modules=[Extension("kfo_ext._plan", ["csrc/plan_module.cpp"])], cmdclass={"build_ext": BuildExt})
