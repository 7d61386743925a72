"""learn2learn's own unit tests with our GBML, MAML and KroneckerLinear in the places of its classes.

    python -m python_tests.learn2learn_tests        from the repository root; downloads learn2learn's sdist

The tests are read from the sdist into a temporary folder, which is removed. They import learn2learn, installed or not:
what they test is ours.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import unittest
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kfo_ext.interop import learn2learn as ours

NAME = "learn2learn-0.2.0"
SHA256 = "69f1d7cb0d0a6be7a2c6ad8e83e2ebbe70fb05e51d61e45e63078b40c75ea419"
# Test file -> the class it is about, and where learn2learn keeps that.
TESTS = {
    "tests/unit/algorithms/gbml_test.py": ("learn2learn.algorithms", "GBML"),
    "tests/unit/algorithms/maml_test.py": ("learn2learn.algorithms", "MAML"),
    "tests/unit/nn/kroneckers_test.py": ("learn2learn.nn", "KroneckerLinear"),
}


def download(folder: Path) -> Path:
    """The sdist, whose metadata pip prepares without building anything.

    Raises:
        CalledProcessError: pip failed.
        ValueError: another file than the one that was published.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-binary", "learn2learn", "--dest", str(folder), "learn2learn==0.2.0"]
    subprocess.run(command, check=True)
    archive = folder / f"{NAME}.tar.gz"
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{archive.name}: expected SHA-256 {SHA256}, got {found}")
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Writes the package's Python files and the tests, and nothing else."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(f"{NAME}/")
            if not member.isfile() or not (name in TESTS or (name.startswith("learn2learn/") and name.endswith(".py"))):
                continue
            source = tar.extractfile(member)
            assert source is not None
            place = folder / name
            if not place.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{archive.name}: {member.name} lies outside")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(source.read())


@contextmanager
def substituted() -> Iterator[Counter[str]]:
    """Ours under learn2learn's names; how many of each were made."""
    made: Counter[str] = Counter()
    kept = []

    def counting(name: str):
        def make(*args, **kwargs):
            made[name] += 1
            return getattr(ours, name)(*args, **kwargs)

        return make

    for module, name in TESTS.values():
        place = importlib.import_module(module)
        kept.append((place, name, getattr(place, name)))
        setattr(place, name, counting(name))
    try:
        yield made
    finally:
        for place, name, own in kept:
            setattr(place, name, own)


def run(folder: Path) -> int:
    """Runs the test files of a folder; 0 where each ran, passed, and made objects of our class."""
    ours.light_import()
    failed = 0
    for path, (_, name) in TESTS.items():
        with substituted() as made, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec = importlib.util.spec_from_file_location(Path(path).stem, folder / path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            suite = unittest.defaultTestLoader.loadTestsFromModule(module)
            result = unittest.TextTestRunner(sys.stdout, verbosity=2).run(suite)
        wrong = len(result.failures) + len(result.errors)
        right = not wrong and not result.skipped and made[name] > 0
        failed += not right
        sys.stdout.write(
            f"{path}: {result.testsRun} ran, {wrong} failed, {len(result.skipped)} skipped; "
            f"{made[name]} objects of kfo_ext.interop.learn2learn.{name}: {'passed' if right else 'FAILED'}\n"
        )
    return failed


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        unpack(download(folder), folder)
        if importlib.util.find_spec("learn2learn") is None:
            sys.path.append(temporary)
        return run(folder)


if __name__ == "__main__":
    sys.exit(main())
