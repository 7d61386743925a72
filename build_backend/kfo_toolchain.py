"""What the build needs: platform, torch, compilers, pybind11, ninja; each found, or refused with the way out."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from kfo_build import HEADER, torch_root
from setuptools.errors import SetupError

OLDEST_TORCH = (2, 10)
OLDEST_NVCC = (12, 8)  # the first to know sm_120
OLDEST_GCC = 12  # the first with __builtin_shufflevector
OLDEST_PYTHON = (3, 10)
CPU_TIME, CUDA_TIME = "half a minute", "about two minutes"
TERMINAL = Path("/dev/tty")
_COMPILER = (
    f"install GCC {OLDEST_GCC} or later (apt-get install g++, dnf install gcc-c++) or clang, or set CXX to a command"
)


def check_platform() -> None:
    """Raises SetupError where the package has no binaries: it is for Linux on x86-64 and CPython with its GIL."""
    found = f"{platform.python_implementation()} on {sys.platform} {platform.machine()}"
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64" or sys.implementation.name != "cpython":
        raise SetupError(f"kfo_ext needs CPython on Linux x86-64, this is {found}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise SetupError("kfo_ext needs a CPython with its GIL, this one is free-threaded")
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise SetupError(
            f"kfo_ext needs Python 3.10 or later, {sys.executable} is {platform.python_version()}: use a later one, "
            "as in python3.12 -m pip install ., or make PYTHON=python3.12"
        )


def find_torch() -> tuple[Path, str]:
    """The torch package to compile against and its version. Raises SetupError when there is none, or one too old."""
    root = torch_root()
    if root is None:
        raise SetupError("kfo_ext compiles against torch>=2.10: install it first, or set KFO_TORCH_ROOT")
    if not (root / "version.py").exists():
        raise SetupError(f"KFO_TORCH_ROOT: expected the directory of a torch package, got {root}")
    version = re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text())[1]
    if _numbers(version) < OLDEST_TORCH or not (root / HEADER).exists():
        raise SetupError(f"kfo_ext compiles against torch>=2.10 with its headers, but {root} is {version}")
    return root, version


def find_nvcc(sources: Path) -> tuple[str, str] | None:
    """Find the nvcc to use.

    Args:
        sources: directory of the sources to compile.

    Returns:
        Its path and version, or None to build without CUDA.

    Raises:
        SetupError: KFO_CUDA requires CUDA and there is none, KFO_CUDA has another value, or a shell would split a path.
    """
    mode = os.environ.get("KFO_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        raise SetupError(f"KFO_CUDA: expected auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if nvcc is None:
        missing = "no nvcc in CUDA_HOME or on PATH"
    else:
        version = re.search(r"release (\S+),", _output_of(nvcc, "--version"))[1]
        if _numbers(version) >= OLDEST_NVCC:
            # nvcc hands its own path, and the real path of a source, to a shell within double quotes.
            _check_shell("nvcc", nvcc, r'[`$"]', "set CUDA_HOME to a link to it with another name")
            _check_shell("the sources", str(sources.resolve()), r"`|\$[({]", "move them")
            return nvcc, version
        missing = f"{nvcc} is {version}, older than 12.8"
    if mode == "1":
        raise SetupError(f"KFO_CUDA=1: {missing}")
    _say(f"kfo_ext: building without CUDA: {missing}")
    return None


def announce(nvcc: tuple[str, str] | None) -> None:
    """Say what is compiled and how long it takes.

    nvcc: what `find_nvcc` returned
    """
    if nvcc:
        _say(
            f"kfo_ext: compiling for the CPU and, with nvcc {nvcc[1]}, for CUDA: {CUDA_TIME} on two cores; "
            f"KFO_CUDA=0 leaves CUDA out: {CPU_TIME}"
        )
    else:
        _say(f"kfo_ext: compiling for the CPU: {CPU_TIME} on two cores")


def _say(line: str) -> None:
    print(line, flush=True)
    if not sys.stdout.isatty():
        # pip shows what a build prints after an error alone; a person at a terminal would wait without a word.
        with contextlib.suppress(OSError), TERMINAL.open("w") as terminal:
            terminal.write(f"\n{line}\n")


def _check_shell(what: str, path: str, broken: str, remedy: str) -> None:
    if found := re.search(broken, path):
        raise SetupError(f"the path of {what}: nvcc breaks at {found[0]!r}, got {path}: {remedy}, or set KFO_CUDA=0")


def check_pybind11() -> None:
    """Raises SetupError if pybind11 is missing, as it may be under --no-build-isolation."""
    if importlib.util.find_spec("pybind11") is None:
        raise SetupError("kfo_ext is compiled with pybind11: pip install pybind11, or leave out --no-build-isolation")


def find_ninja() -> str:
    """The ninja on PATH, else the one installed beside this Python. Raises SetupError when there is neither."""
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if found is None:
        raise SetupError("kfo_ext is built by ninja: pip install ninja, or leave out --no-build-isolation")
    return found


def compiler() -> tuple[str, str]:
    """Find the C++ compiler.

    Returns:
        Its command and the first line of its version.

    Raises:
        SetupError: there is no compiler, or it is a GCC before 12.
    """
    command = os.environ.get("CXX") or "g++"
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SetupError(f"CXX: expected a command, got {command!r} ({error})") from None
    if not words or shutil.which(words[0]) is None:
        where = f"CXX is {command!r}, which is not there" if os.environ.get("CXX") else "there is no g++ on PATH"
        raise SetupError(f"kfo_ext needs a C++ compiler, but {where}: {_COMPILER}")
    name = (_output_of(*words, "--version").splitlines() or [""])[0]
    major = _output_of(*words, "-dumpversion").strip().split(".")[0]
    if "clang" not in name and not (major.isdigit() and int(major) >= OLDEST_GCC):
        raise SetupError(f"kfo_ext cannot be compiled with {command}, which is {name or 'nameless'}: {_COMPILER}")
    return command, name


def build_id(sources: Path, version: str) -> str:
    """Hash everything that is compiled; every binary of one build has the same hash.

    Args:
        sources: directory of the files whose names and contents are hashed.
        version: the package's version.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(version.encode())
    for path in sorted(path for path in sources.rglob("*") if path.is_file()):
        digest.update(f"\0{path.relative_to(sources)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"kfo_ext: {' '.join(command)} does not run: {error}") from None
