"""The rooms of the package: which may import which, checked on the imports as written."""

from __future__ import annotations

import ast
import pkgutil
import re
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
    "invoked": set(),
    "machine": {"version"},
    "ops": set(),
    "packing": {"ops"},
    "problems": {"ops", "packing"},
    "functional": {"ops"},
    "tasks": {"lazy"},
    "networks": {"functional", "choices"},
    "updates": {"functional", "problems", "packing", "ops", "machine"},
    "adapt": {"updates", "packing", "ops", "tasks"},
    "layers": {"adapt", "ops"},
    "runs": {"lazy", "machine"},
    "testing": {"ops", "problems", "networks"},
    "trainer": {"choices", "invoked", "lazy", "machine", "runs", "adapt", "updates", "tasks", "networks"},
    "interop": {"functional", "packing", "problems", "updates"},
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
    "cli": {"choices", "invoked", "streams", "version", "machine", "runs", "trainer", "doctor", "demo", "bench"},
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
    "layers": {"torch"},
}
# The one file that may import triton, and that no other imports at module level.
KERNELS = PACKAGE / "ops" / "transform" / "triton" / "kernels.py"
SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh", ".sh")
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


def modules_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_imports_itself_through_others():
    """At module level, as written: what is imported inside a function or for types alone makes no cycle."""
    needs: dict[str, set[str]] = {}
    paths = sorted(PACKAGE.rglob("*.py"))
    known = {modules_of(path) for path in paths}
    for path in paths:
        module = modules_of(path)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        needs[module] = set()
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                source = ".".join(filter(None, [package if node.level else "", node.module or ""]))
                names = [f"{source}.{alias.name}" for alias in node.names]
                names = [name if name in known else source for name in names]
            needs[module] |= {name for name in names if name in known and name != module}
    while leaves := [module for module, others in needs.items() if not others & set(needs)]:
        for module in leaves:
            del needs[module]
    assert not needs, "these import each other in a circle, or what does"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one, as a user would write it."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


DOTTED = re.compile(r"\bkfo_ext(?:\.[A-Za-z_]\w*)+(?!\w*\*)")
# Attributes that exist once something is built, measured or installed, and names of files.
NOT_NAMES = re.compile(r"\.(py|so|egg|json|md)\b|^kfo_ext\._plan")


def test_every_dotted_name_of_the_package_is_one():
    """In code, messages, docstrings, comments and documents."""
    folders = ("kfo_ext", "bench", "experiments", "docs", "csrc", "build_backend")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.*")] + list(ROOT.glob("*.md"))
    texts = [path for path in paths if path.suffix in (*SOURCES, ".md") and "results" not in path.parts]
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        for name in sorted(set(DOTTED.findall(path.read_text())))
        if not NOT_NAMES.search(name) and not resolves(name)
    ]
    assert not wrong


def test_cpu_and_cuda_sources_never_include_each_other():
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        for path in (ROOT / "csrc" / here).iterdir():
            includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
            assert not any(f"{there}/" in line for line in includes), path


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_files_stay_readable():
    """400 lines at most, 600 for tests."""
    tests = [(path, 600) for path in (ROOT / "python_tests").rglob("*.*") if path.suffix in SOURCES]
    sources = [(path, 400) for folder in ("kfo_ext", "csrc", "bench") for path in (ROOT / folder).rglob("*.*")]
    long = [path for path, most in [*tests, *sources] if path.suffix in SOURCES and lines(path) > most]
    assert not long, long
