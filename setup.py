"""Compiles the package with ninja: two libraries of kernels on torch's stable ABI, and the pybind11 module _plan.

KFO_CUDA=auto|0|1   build the CUDA library if there is an nvcc (the default), never, or fail without one
KFO_CUDA_ARCHITECTURES="80 90"   compute capabilities to compile for, instead of all that a wheel has
KFO_TORCH_ROOT=DIR  directory of the torch package to compile against, where it is not the installed one
CXX, CUDA_HOME      the C++ compiler; the CUDA toolkit, where nvcc is not on PATH
"""

from __future__ import annotations

import os
import shlex
import shutil
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

# Machine code for each, which later ones of the same generation run, and PTX of the first, which serves all others.
ARCHITECTURES = [int(number) for number in (os.environ.get("KFO_CUDA_ARCHITECTURES") or "80 90 100 120").split()]
PYTHON = sys.implementation.cache_tag  # names the folder of what is compiled for this Python alone
HOST = "-O3 -g0 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off"  # of the C++ that runs on the CPU
ISAS = {
    "avx512": "-mavx512f -mavx2 -mfma",
    "avx2": "-mavx2 -mfma",
    "baseline": "",
}


def define(name: str, text: str) -> str:
    return shlex.quote(f'-D{name}="{text}"').replace("$", "$$")


class Graph:
    """The lines of build.ninja. Names of objects come from those of their sources; depfiles track the headers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def rule(self, name: str, command: str) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if "-MF" in command:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, flags: str, variant: str = "") -> str:
        name = source.relative_to(CSRC)
        target = "_".join([*name.parts, variant]).strip("_") + ".o"
        return self.build(rule, target, [f"csrc/{name}"], flags)

    def build(self, rule: str, target: str, inputs: list[str], flags: str = "") -> str:
        self.lines += [f"build {target}: {rule} {' '.join(inputs)}", f"  flags = {flags}"]
        return target


def make_links(work: Path, package: Path, torch: Path) -> None:
    """Gives every folder outside of `work` a plain name inside, the only name that the graph uses.

    nvcc and its host compiler break other names at commas, spaces, quotes and dollars, and no path of the build machine
    gets into a binary. What was built with other inputs is deleted: ninja would keep it. Only `_plan` is of one Python:
    the next Python compiles that alone.
    """
    import pybind11

    _link(work, {"csrc": CSRC, "torch": torch})
    _link(work / PYTHON, {"pybind11": pybind11.get_include(), "python": sysconfig.get_path("include")})
    (work / "package").unlink(missing_ok=True)
    (work / "package").symlink_to(package)


def _link(folder: Path, inputs: dict[str, str | Path]) -> None:
    """Makes `folder` hold links of these names to these inputs, and nothing that was built with others."""
    if any((folder / name).resolve() != Path(source).resolve() for name, source in inputs.items()):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in inputs.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(source)


def build_graph(version: str, torch: str, nvcc: tuple[str, str] | None) -> str:
    """Make the text of build.ninja, whose folders are those of `make_links`.

    Args:
        version: the package's version.
        torch: version of the torch to compile against.
        nvcc: path and version of nvcc, or None to omit the CUDA library.

    Returns:
        The text.
    """
    cxx, compiler = toolchain.compiler()
    identity = define("KFO_BUILD_ID", toolchain.build_id(CSRC, version))
    stable = "-DTORCH_TARGET_VERSION=0x020a000000000000 -isystem torch/include"
    flags_of = {"build_id": identity}

    graph = Graph()
    words = shlex.split(cxx)
    program = shlex.join(words).replace("$", "$$")
    graph.rule("cxx", f"{program} -MMD -MF $out.d {HOST} -Wall -Wextra $flags -c $in -o $out")
    graph.rule("link", f"{program} -shared -Wl,--as-needed,-z,relro,-z,now $in $flags -o $out")

    kernels = set(CSRC.glob("cpu/*_kernels.cpp"))  # compiled once for each instruction set
    sources = sorted({CSRC / "library.cpp", *CSRC.glob("cpu/*.cpp")} - kernels)
    objects = [graph.compile("cxx", source, flags_of.get(source.stem, stable)) for source in sources]
    for source in sorted(kernels):
        objects += [graph.compile("cxx", source, f"-DKFO_ISA={isa} {flags}", isa) for isa, flags in ISAS.items()]
    graph.build("link", "package/_kfo_cpu.so", objects, "-Wl,-z,defs -Ltorch/lib -ltorch_cpu")

    codes = [f"sm_{arch}" for arch in ARCHITECTURES] + [f"compute_{ARCHITECTURES[0]}"]
    info = {
        "KFO_VERSION": version,
        "KFO_COMPILER": compiler,
        "KFO_NVCC": nvcc[1] if nvcc else "",
        "KFO_ARCHITECTURES": " ".join(codes) if nvcc else "",
        "KFO_INSTRUCTION_SETS": " ".join(ISAS),
        "KFO_TORCH": torch,
    }
    told = " ".join([identity, *(define(name, text) for name, text in info.items())])
    plan, headers = f"{PYTHON}/plan_module.cpp.o", f"-isystem {PYTHON}/python -isystem {PYTHON}/pybind11"
    objects = [
        graph.build("cxx", plan, ["csrc/plan_module.cpp"], headers),
        graph.compile("cxx", CSRC / "build_info.cpp", told),
    ]
    graph.build("link", f"package/_plan{sysconfig.get_config_var('EXT_SUFFIX')}", objects)

    if nvcc:
        # Its temporary files lie in the working directory: the user's TMPDIR may have a name that nvcc breaks.
        program = f"TMPDIR=. {shlex.quote(nvcc[0])} -ccbin {shlex.quote(' '.join(words))}".replace("$", "$$")
        code = " ".join(f"-gencode arch=compute_{name.rpartition('_')[2]},code={name}" for name in codes)
        host = "-fPIC,-fvisibility=hidden,-g0,-ffp-contract=off"
        # torch's stable headers declare their CUDA functions under USE_CUDA.
        device = f"-O3 -std=c++17 -DUSE_CUDA {code} --compress-mode=size -Xcompiler {host}"
        graph.rule("nvcc", f"{program} -MMD -MF $out.d {device} $flags -c $in -o $out")
        # libtorch by name, although nothing is taken from it: under a CUDA torch it is what brings libtorch_cuda in.
        graph.rule(
            "nvlink",
            f"{program} -shared -nodlink $in -Xlinker --exclude-libs=ALL -Xlinker --no-as-needed $flags -o $out",
        )
        sources = sorted(CSRC.glob("cuda/*.cu"))
        objects = [graph.compile("nvcc", source, flags_of.get(source.stem, stable)) for source in sources]
        graph.build("nvlink", "package/_kfo_cuda.so", objects, "-Ltorch/lib -ltorch -ltorch_cpu")
    return "\n".join(graph.lines) + "\n"


class BuildExt(build_ext):
    """Runs ninja; the binaries land where setuptools would put an extension module."""

    def finalize_options(self) -> None:
        if self.build_temp is None:
            # One folder for all Pythons, kept after the build: what is compiled for none of them is compiled once.
            base = self.get_finalized_command("build").build_base
            self.build_temp = str(Path(base, f"temp.{sysconfig.get_platform()}"))
        super().finalize_options()

    def run(self) -> None:
        toolchain.check_platform()
        toolchain.check_pybind11()
        (torch, torch_version), nvcc = toolchain.find_torch(), toolchain.find_nvcc(CSRC)
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "kfo_ext"
        package.mkdir(parents=True, exist_ok=True)
        if not nvcc:
            (package / "_kfo_cuda.so").unlink(missing_ok=True)  # of an earlier build
        work = Path(self.build_temp).resolve()
        make_links(work, package, torch)
        (work / "build.ninja").write_text(build_graph(self.distribution.get_version(), torch_version, nvcc))
        ninja = toolchain.find_ninja()
        toolchain.announce(nvcc)
        subprocess.run([ninja, "-C", str(work)], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(Path(self.build_lib, "kfo_ext").glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


if __name__ == "__main__":
    setup(ext_modules=[Extension("kfo_ext._plan", ["csrc/plan_module.cpp"])], cmdclass={"build_ext": BuildExt})
