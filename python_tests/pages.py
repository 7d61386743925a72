"""Pages of documentation as tests see them: their Python examples, and the scripts that write some of them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def examples(page: Path) -> list[str]:
    """The source of each Python example, in order."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def run_example(page: Path, number: int) -> None:
    """Runs an example as it stands, as a script of its own."""
    source = examples(page)[number]
    exec(compile(source, f"{page.name}, example {number + 1}", "exec"), {"__name__": "__main__"})


def run_page(page: Path) -> None:
    """Runs the examples of a page in order, as one script."""
    names = {"__name__": "__main__"}
    for number, source in enumerate(examples(page)):
        exec(compile(source, f"{page.name}, example {number + 1}", "exec"), names)


def script(name: str) -> ModuleType:
    """A script of docs/, by its name without the ending."""
    # Its folder is where a script finds the modules beside it.
    if str(DOCS) not in sys.path:
        sys.path.append(str(DOCS))
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
