"""The CPU library under AddressSanitizer and UBSan: builds it with them and runs `cases.py` for each instruction set.

    python -m python_tests.cpu_sanitizers.run [SEED]        from the repository root

A copy of the package with this build goes to a temporary folder; the installed one is left alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import setup

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"


def build(package: Path, work: Path) -> list[str]:
    """Compiles the package's own graph, for the CPU, with the sanitizers and less optimization, which takes long.

    out: the instruction sets
    """
    os.environ["CXX"] = f"{os.environ.get('CXX') or 'g++'} {SANITIZERS}"
    setup.HOST = setup.HOST.replace("-O3", "-O1")
    folder, version = setup.toolchain.find_torch()
    setup.make_links(work, package, folder)
    (work / "build.ninja").write_text(setup.build_graph("sanitized", version, None))
    subprocess.run([setup.toolchain.find_ninja(), "--quiet", "-C", str(work)], check=True)
    return list(setup.ISAS)


def start(folder: Path, isa: str, seed: str) -> subprocess.Popen:
    """`cases.py` in a process that starts with the sanitizers' libraries."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")  # the last for exceptions, which the first one watches
    compiler = os.environ["CXX"].split()[0]
    found = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    env = {
        **os.environ,
        "KFO_CPU_ISA": isa,
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": ":".join(found),
        # Python and torch keep memory to the end of a process.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.Popen([sys.executable, str(HERE / "cases.py"), seed], env=env, cwd=folder)


def main() -> None:
    seed = sys.argv[1] if len(sys.argv) > 1 else "0"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package, work = folder / "kfo_ext", folder / "build"
        work.mkdir()
        shutil.copytree(ROOT / "kfo_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        processes = {isa: start(folder, isa, seed) for isa in build(package, work)}
        failed = [isa for isa, process in processes.items() if process.wait()]
    if failed:
        sys.exit(f"sanitizers: failed with {', '.join(failed)}")
    print("sanitizers: no error")


if __name__ == "__main__":
    main()
