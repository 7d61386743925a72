"""What the machine has, and the compiled libraries on it: the carried ones if they load, else built here for its GPU.

The last line says which; exits with 1 if there is none for the device.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / "build" / "gpu_carry" / "kfo_ext"
PACKAGE = ROOT / "kfo_ext"
FACTS = (
    ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv,noheader"),
    ("nvcc", "--version"),
    (os.environ.get("CXX") or "g++", "--version"),
    ("compute-sanitizer", "--version"),
    ("ncu", "--version"),
    (sys.executable, "-c", "from kfo_ext.bench.result import environment; print(environment())"),
)
LOADED = """
import sys
import torch
from kfo_ext.ops import library
loads, reason = library.status()[sys.argv[1]]
if loads and sys.argv[1] == "cuda":
    reason = f"{reason}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no CUDA device"
    loads = torch.cuda.is_available()
print(reason)
sys.exit(not loads)
"""
CAPABILITY = "import torch; print(*torch.cuda.get_device_capability(), sep='')"


def source_version() -> str:
    """The package's, as its build knows it."""
    found = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None, "pyproject.toml names the version"
    return found[1]


def source_id() -> str:
    """The build id of the sources in this tree, which is that of every binary built from them."""
    sys.path.insert(0, str(ROOT / "build_backend"))
    import kfo_toolchain

    return kfo_toolchain.build_id(ROOT / "csrc", source_version())


def said(command: Sequence[str]) -> tuple[bool, str]:
    """Whether a command ended well, and its last line."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=45
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"{type(error).__name__}: {error}"
    return done.returncode == 0, (done.stdout.strip().splitlines() or [""])[-1]


def put_carried() -> str:
    """Copies the carried binaries into the package; says why not, where they are not of these sources."""
    files = sorted(CARRIED.glob("*.so")) if CARRIED.is_dir() else []
    if not files:
        return "nothing is carried"
    build = source_id()
    for file in files:
        if build.encode() not in file.read_bytes():
            return f"{file.name} is not of build {build}, as these sources are: run gpu_carry.sh again"
    for file in files:
        shutil.copy(file, PACKAGE)
    return f"{len(files)} binaries of build {build}"


def build(device: str) -> None:
    """Builds in place; on CUDA for the architecture of the GPU alone."""
    known, capability = said([sys.executable, "-c", CAPABILITY])
    settings = {"KFO_CUDA_ARCHITECTURES": capability} if device == "cuda" and known else {}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env={**os.environ, **settings})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    for command in FACTS:
        print(f"{Path(command[0]).name}: {said(command)[1]}", flush=True)
    check = [sys.executable, "-c", LOADED, options.device]
    print(f"carried: {put_carried()}", flush=True)
    loads, reason = said(check)
    where = "carried"
    if not loads:
        print(f"built here, since: {reason}", flush=True)
        build(options.device)
        loads, reason = said(check)
        where = "built here"
    print(f"{where}: {reason}" if loads else f"error: no library: {reason}")
    return int(not loads)


if __name__ == "__main__":
    raise SystemExit(main())
