"""Pages of documentation as tests see them: their Python examples, and the scripts that write some of them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# What makes a run as small as can be, by the option that it replaces or adds.
SMALL = {
    "--layers": 1,
    "--hidden": 4,
    "--steps": 1,
    "--meta-batch": 2,
    "--iterations": 1,
    "--validation-tasks": 2,
    "--shots": 1,
    "--queries": 1,
}


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


def small(line: str) -> list[str]:
    """The arguments of a command line of a page, for a run that takes no time."""
    command, *given = line.split()
    if command == "eval":
        return [command, *given, "--tasks", "2"]
    if command != "train":
        return [command, *given]
    options = {"--iterations": 2} if "--resume" in given else dict(SMALL)
    if "sinusoid" in given:
        # Its network has no blocks.
        del options["--layers"]
    after = zip(given, ["", *given])
    words = [word for word, before in after if word not in options and before not in options]
    return [command, *words, *(str(word) for option in options.items() for word in option)]
