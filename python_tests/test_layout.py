"""The rooms of the package: which may import which, checked on the imports as written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kfo_ext"

# Room -> the rooms of kfo_ext that its files may import, besides itself.
ALLOWED = {
    "choices": set(),
    "lazy": set(),
    "streams": set(),
    "version": set(),
    "machine": {"version"},
    "ops": set(),
    "packing": {"ops"},
    "problems": {"ops", "packing"},
    "functional": {"ops"},
    "tasks": set(),
    "networks": {"functional", "choices"},
    "updates": {"functional", "problems", "packing", "ops", "machine"},
    "adapt": {"updates", "packing", "ops", "tasks"},
    "runs": {"lazy", "machine"},
    "testing": {"ops", "problems", "networks"},
    "trainer": {"choices", "lazy", "machine", "runs", "adapt", "updates", "tasks", "networks"},
    "interop": {"updates"},
    "doctor": {"machine", "ops", "testing", "version"},
    "demo": {"trainer", "runs", "choices"},
    "bench": {
        "machine",
        "ops",
        "functional",
        "packing",
        "problems",
        "runs",
        "updates",
        "networks",
        "testing",
        "interop",
    },
    "cli": {"choices", "streams", "version", "machine", "runs", "trainer", "doctor", "demo", "bench"},
    "__main__": {"cli"},
}
# Outside packages that importing a room may need at module level.
LIGHT = {
    "tasks": {"torch"},
    "functional": {"torch"},
    "networks": {"torch"},
    "ops": {"torch"},
    "packing": {"torch"},
    "problems": {"torch"},
    "updates": {"torch"},
    "adapt": {"torch"},
}
# The one file that may import triton, and that no other imports at module level.
KERNELS = PACKAGE / "ops" / "transform" / "triton" / "kernels.py"
STANDARD = __import__("sys").stdlib_module_names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # One dot stays in its own room; two would leave it unseen.
            assert node.level <= 1, "imports of other rooms are absolute"
            if node.level:
                continue
            names.add(node.module)
            if node.module == "kfo_ext":
                names |= {f"kfo_ext.{alias.name}" for alias in node.names}
    return names


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_rooms(path):
    room = room_of(path)
    assert room in ALLOWED, f"a new room: give it a line in ALLOWED ({room})"
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if (
            parts[0] == "kfo_ext"
            and len(parts) > 1
            and (PACKAGE / parts[1]).with_suffix(".py").exists() | (PACKAGE / parts[1]).is_dir()
        ):
            assert parts[1] == room or parts[1] in ALLOWED[room], f"{room} imports {name}"
        assert parts[0] not in ("learn2learn", "bench", "experiments", "python_tests") or room == "interop", name


@pytest.mark.parametrize(
    "path", [path for path in FILES if room_of(path) in LIGHT], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_light_rooms_import_torch_alone(path):
    top = ast.Module(
        [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))], []
    )
    for name in imported(top):
        package = name.split(".")[0]
        allowed = LIGHT[room_of(path)] | ({"triton"} if path == KERNELS else set())
        assert package in STANDARD or package in allowed or package == "kfo_ext", name
        assert name != "kfo_ext.ops.transform.triton.kernels"


def test_cpu_and_cuda_sources_never_include_each_other():
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        for path in (ROOT / "csrc" / here).iterdir():
            includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
            assert not any(f"{there}/" in line for line in includes), path


def test_files_stay_readable():
    """About 400 lines is the point to split; tests and the table of cases may be longer."""
    long = [path for path in [*FILES, *(ROOT / "csrc").rglob("*.*")] if len(path.read_text().splitlines()) > 420]
    assert not long, long
