"""Loads the compiled libraries next to this package and says what loaded, and why not what did not."""

from __future__ import annotations

import ctypes
import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from kfo_ext.ops import cuda_support

_PACKAGE = Path(__file__).resolve().parent.parent
CPU_LIBRARY = _PACKAGE / "_kfo_cpu.so"
CUDA_LIBRARY = _PACKAGE / "_kfo_cuda.so"

# backend -> (loaded, reason); filled once at import by `load`.
_status: dict[str, tuple[bool, str]] = {}
# Index of a CUDA device, None for the driver alone -> why the loaded library does not run there, or "".
_problems: dict[int | None, str] = {}
T = TypeVar("T")


def _kept() -> dict[str, Any]:
    """What outlives the modules of this package, as the operators do that it belongs to."""
    return vars(torch.ops.kfo_ext).setdefault("_kept", {})


def once(part: str, register: Callable[[torch.library.Library], T]) -> T:
    """Register a part of the operators at the first import of a process.

    The dispatcher takes each registration once, and keeps it when the package is imported again.

    Args:
        part: name of the part.
        register: registers the part in the library that it is given.

    Returns:
        The result of `register`, from the first import.
    """
    kept = _kept()
    if part not in kept:
        library = torch.library.Library("kfo_ext", "FRAGMENT")
        kept[part] = (library, register(library))
    return kept[part][1]


def _registered() -> bool:
    return bool(torch._C._jit_get_schemas_for_operator("kfo_ext::transform"))


def _load(library: Path, build: str) -> tuple[bool, str]:
    if not library.exists():
        return False, f"not built: {library.name} is not in the package"
    # Read from the file: once loaded, a library of another build could not be taken back.
    if build.encode() not in library.read_bytes():
        raise ImportError(f"kfo_ext: {library} is not of build {build}, as _plan is: reinstall the package")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        built = importlib.import_module("kfo_ext._plan").build_info()["torch"]
        versions = f"built with torch {built}, does not load under torch {torch.__version__}"
        return False, f"{library.name}, {versions}: {error}"
    return True, f"{library.name}, build {build}"


def _why_no_plan() -> str:
    others = sorted(path.name for path in _PACKAGE.glob("_plan*.so"))
    return f"built for another Python: {others[0]}" if others else "not built: _plan is not in the package"


def _way_out() -> str:
    tree = _PACKAGE.parent
    if not (tree / "setup.py").exists():
        return "install kfo_ext anew with this Python and this torch"
    build = f"build it: {sys.executable} -m pip install -e {shlex.quote(str(tree))}"
    for folder in map(Path, sys.path):
        if folder.resolve() != tree and (folder / _PACKAGE.name / CPU_LIBRARY.name).exists():
            return (
                f"this source tree hides the kfo_ext installed in {folder}; start Python in another folder, or {build}"
            )
    return f"{tree} is a source tree; {build}"


def load() -> None:
    """Load both libraries, or find them loaded by an earlier import.

    Raises:
        ImportError: another copy of the package is loaded in this process, or the binaries are of different builds.
    """
    kept = _kept()
    if _registered():
        if kept.get("library") != CPU_LIBRARY:
            others = sorted(path for path in torch.ops.loaded_libraries if "_kfo_cpu" in path) or ["an unknown file"]
            raise ImportError(
                f"kfo_ext: a second copy of the package: its operators were loaded from {others[0]}, "
                f"now {CPU_LIBRARY} registers them again; uninstall one of the two"
            )
        if not CPU_LIBRARY.exists() or kept["build"].encode() not in CPU_LIBRARY.read_bytes():
            raise ImportError(
                f"kfo_ext: build {kept['build']} is loaded, but {CPU_LIBRARY} is of another build: restart Python"
            )
        _status.update(kept["status"])
        return
    try:
        build = importlib.import_module("kfo_ext._plan").build_id()
    except ModuleNotFoundError:
        build = ""
    _status["cpu"] = _load(CPU_LIBRARY, build) if build else (False, _why_no_plan())
    if not _status["cpu"][0]:
        reason = f"{_status['cpu'][1]}: {_way_out()}"
        _status["cpu"] = False, reason
        warnings.warn(
            f"kfo_ext: no compiled CPU library ({reason}); backend='auto' runs plain torch",
            RuntimeWarning,
            stacklevel=2,
        )
        _status["cuda"] = (False, "needs the CPU library, which holds the schemas")
    elif torch.version.cuda is None:
        _status["cuda"] = (False, f"torch {torch.__version__} is a CPU build")
    else:
        _status["cuda"] = _load(CUDA_LIBRARY, build)
    kept.update(library=CPU_LIBRARY, build=build, status=dict(_status))


load()


def _problem(index: int | None) -> str:
    if index not in _problems:
        _problems[index] = cuda_support.problem(CUDA_LIBRARY, index)
    return _problems[index]


# As torch.compiler.assume_constant_result does, which would import the compiler: it cannot trace a call of the driver.
vars(_problem)["_dynamo_marked_constant"] = True


def loaded(device_type: str) -> bool:
    """Whether the library for "cpu" or "cuda" tensors is loaded; its kernels may still not run on this machine."""
    return _status.get(device_type, (False, ""))[0]


def available(device: torch.device, kind: str) -> bool:
    """Whether compiled kernels run on tensors of `device`; the first call for a CUDA device calls the driver.

    Args:
        device: the device.
        kind: its type, which torch makes anew at each access.

    Returns:
        Whether they do.
    """
    return loaded(kind) and (kind != "cuda" or not _problem(device.index))


def why_not(device: torch.device) -> str:
    """Why no compiled kernel runs on tensors of `device`; what is loaded, where one does."""
    if device.type == "cuda" and loaded("cuda") and _problem(device.index):
        return _problem(device.index)
    return _status.get(device.type, (False, f"there are no kernels for {device.type} tensors"))[1]


def cpu_isa() -> str:
    """The instruction set of the CPU kernels in use.

    Returns:
        "avx512", "avx2" or "baseline".

    Raises:
        ValueError: KFO_CPU_ISA names one that is unknown or that this machine lacks.
    """
    function = ctypes.CDLL(str(CPU_LIBRARY)).kfo_cpu_isa
    function.restype = ctypes.c_char_p
    name = function()
    if name is None:
        wanted = os.environ.get("KFO_CPU_ISA")
        raise ValueError(f"KFO_CPU_ISA: expected one of {', '.join(supported_isas())}, got {wanted!r}")
    return name.decode()


def cpu_multiply_adds(steps: int) -> float:
    """Run float32 multiply-adds on this thread, without memory accesses; for benchmarks. Releases the GIL.

    Args:
        steps: number of steps; each is a fixed number of multiply-adds, which depends on the instruction set.

    Returns:
        Floating-point operations done, 2 for each multiply-add.
    """
    function = ctypes.CDLL(str(CPU_LIBRARY)).kfo_cpu_fma
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64]
    return function(steps)


def supported_isas() -> list[str]:
    """The instruction sets this machine can run, best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    return ["avx512", "avx2", "baseline"][{"AVX512": 0, "AVX2": 1}.get(capability, 2) :]


def status() -> dict[str, tuple[bool, str]]:
    """Per backend, whether it is loaded, and a detail or the reason why not; does not call the CUDA driver."""
    return {"reference": (True, f"torch {torch.__version__}"), **_status}
