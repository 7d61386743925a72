"""Compiles the package with ninja: two libraries of kernels on torch's stable ABI, and the pybind11 module _plan.

KFO_CUDA=auto|0|1   build the CUDA library if there is an nvcc (the default), never, or fail without one
KFO_TORCH_ROOT=DIR  directory of the torch package to compile against, where it is not the installed one
CXX, CUDA_HOME      the C++ compiler; the CUDA toolkit, where nvcc is not on PATH
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "build_backend"))
import kfo_toolchain as toolchain  # noqa: E402  it lies in the directory of the in-tree backend

ARCHITECTURES = [80, 90, 100, 120]
HOST = "-O3 -g0 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off"  # of the C++ that runs on the CPU
ISAS = {
    "avx512": "-mavx512f -mavx2 -mfma",
    "avx2": "-mavx2 -mfma",
    "baseline": "",
}


def define(name: str, text: str) -> str:
    return shlex.quote(f'-D{name}="{text}"').replace("$", "$$")


def include(folder: Path | str) -> str:
    return f"-isystem {shlex.quote(str(folder))}"


class Graph:
    """The lines of build.ninja. Names of objects come from those of their sources; depfiles track the headers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def rule(self, name: str, command: str) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if "-MF" in command:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, flags: str, variant: str = "") -> str:
        target = "_".join([*source.relative_to(CSRC).parts, variant]).strip("_") + ".o"
        return self.build(rule, target, [str(source)], flags)

    def build(self, rule: str, target: str, inputs: list[str], flags: str = "") -> str:
        escape = str.maketrans({"$": "$$", " ": "$ ", ":": "$:"})
        names = [name.translate(escape) for name in [target, *inputs]]
        self.lines += [f"build {names[0]}: {rule} {' '.join(names[1:])}", f"  flags = {flags}"]
        return target


def build_graph(package: Path, version: str, torch: tuple[Path, str], nvcc: tuple[str, str] | None) -> str:
    """The text of build.ninja.

    package: where the three binaries go
    version: the package's
    torch: directory and version of the torch to compile against
    nvcc: its path and version, or None to leave the CUDA library out
    """
    import pybind11

    cxx, compiler = toolchain.compiler()
    folders = {ROOT: ".", torch[0] / "include": "torch", pybind11.get_include(): "pybind11"}
    portable = [f"-ffile-prefix-map={shlex.quote(str(folder))}={name}" for folder, name in folders.items()]
    identity = define("KFO_BUILD_ID", toolchain.build_id(CSRC, version))
    stable = f"-DTORCH_TARGET_VERSION=0x020a000000000000 {include(torch[0] / 'include')}"
    libraries = f"-L{shlex.quote(str(torch[0] / 'lib'))}"
    flags_of = {"build_id": identity}

    graph = Graph()
    host = f"{HOST} -Wall -Wextra {' '.join(portable)}"
    graph.rule("cxx", f"{cxx} -MMD -MF $out.d {host} $flags -c $in -o $out")
    graph.rule("link", f"{cxx} -shared -Wl,--as-needed,-z,relro,-z,now $in $flags -o $out")

    kernels = set(CSRC.glob("cpu/*_kernels.cpp"))  # compiled once for each instruction set
    sources = sorted({CSRC / "library.cpp", *CSRC.glob("cpu/*.cpp")} - kernels)
    objects = [graph.compile("cxx", source, flags_of.get(source.stem, stable)) for source in sources]
    for source in sorted(kernels):
        objects += [graph.compile("cxx", source, f"-DKFO_ISA={isa} {flags}", isa) for isa, flags in ISAS.items()]
    graph.build("link", str(package / "_kfo_cpu.so"), objects, f"-Wl,-z,defs {libraries} -ltorch_cpu")

    codes = [f"sm_{arch}" for arch in ARCHITECTURES] + [f"compute_{ARCHITECTURES[-1]}"]
    info = {
        "KFO_VERSION": version,
        "KFO_COMPILER": compiler,
        "KFO_NVCC": nvcc[1] if nvcc else "",
        "KFO_ARCHITECTURES": " ".join(codes) if nvcc else "",
        "KFO_INSTRUCTION_SETS": " ".join(ISAS),
        "KFO_TORCH": torch[1],
    }
    told = " ".join([identity, *(define(name, text) for name, text in info.items())])
    python = f"{include(sysconfig.get_path('include'))} {include(pybind11.get_include())}"
    objects = [
        graph.compile("cxx", CSRC / "plan_module.cpp", python),
        graph.compile("cxx", CSRC / "build_info.cpp", told),
    ]
    graph.build("link", str(package / f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}"), objects)

    if nvcc:
        program = f"{shlex.quote(nvcc[0])} -ccbin {shlex.quote(cxx)}"
        code = " ".join(f"-gencode arch=compute_{name.rpartition('_')[2]},code={name}" for name in codes)
        host = ",".join(["-fPIC,-fvisibility=hidden,-g0,-ffp-contract=off", *portable])
        device = f"-O3 -std=c++17 {code} --compress-mode=size -Xcompiler {host}"
        graph.rule("nvcc", f"{program} -MMD -MF $out.d {device} $flags -c $in -o $out")
        # libtorch by name, although nothing is taken from it: under a CUDA torch it is what brings libtorch_cuda in.
        graph.rule(
            "nvlink",
            f"{program} -shared -nodlink $in -Xlinker --exclude-libs=ALL -Xlinker --no-as-needed $flags -o $out",
        )
        sources = sorted(CSRC.glob("cuda/*.cu"))
        objects = [graph.compile("nvcc", source, flags_of.get(source.stem, stable)) for source in sources]
        flags = f"{libraries} -ltorch -ltorch_cpu"
        graph.build("nvlink", str(package / "_kfo_cuda.so"), objects, flags)
    return "\n".join(graph.lines) + "\n"


class BuildExt(build_ext):
    """Runs ninja; the binaries land where setuptools would put an extension module."""

    def run(self) -> None:
        toolchain.check_platform()
        torch, nvcc = toolchain.find_torch(), toolchain.find_nvcc()
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "kfo_ext"
        package.mkdir(parents=True, exist_ok=True)
        if not nvcc:
            (package / "_kfo_cuda.so").unlink(missing_ok=True)  # of an earlier build
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(build_graph(package, self.distribution.get_version(), torch, nvcc))
        subprocess.run([toolchain.find_ninja(), "-C", str(work)], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(Path(self.build_lib, "kfo_ext").glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


if __name__ == "__main__":
    setup(ext_modules=[Extension("kfo_ext._plan", ["csrc/plan_module.cpp"])], cmdclass={"build_ext": BuildExt})
