"""Writes the notebooks of experiments/examples, each from the script of its name, so that there is one text of both.

python -m experiments.notebooks

A notebook has no outputs: its first cell is the script's docstring, each function a cell, and the last one a short run.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent / "examples"
NAMES = ("adapt_and_save", "hand_written_loop")
# Of meta-iterations: enough to see an effect within seconds.
CALL = "main(20)"
# What only a script needs.
IMPORT, START = "import sys", 'if __name__ == "__main__":\n    main(*map(int, sys.argv[1:]))'


def cells(source: str) -> tuple[str, list[str]]:
    """Split a script into the cells of its notebook.

    Args:
        source: the text of the script.

    Returns:
        Its docstring without the command line, and its code: one cell per block, then a short run.

    Raises:
        ValueError: the script has no docstring, no `import sys`, or does not end in the lines that run it.
    """
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree)
    if docstring is None or f"\n{IMPORT}\n" not in source or not source.endswith(f"\n{START}\n"):
        raise ValueError(f"source: expected a script with a docstring, {IMPORT!r} and at its end {START!r}")
    text = "\n\n".join(part for part in docstring.split("\n\n") if "python experiments/" not in part)
    code = "".join(_lines(source)[tree.body[0].end_lineno :]).removesuffix(f"{START}\n")
    # With the line below it where it is a block of its own.
    code = code.replace(f"\n\n{IMPORT}\n\n", "\n\n", 1).replace(f"\n{IMPORT}\n", "\n", 1)
    return text, [*(part.strip("\n") for part in code.split("\n\n\n") if part.strip()), CALL]


def notebook(name: str) -> str:
    """The text of the notebook of a script."""
    text, code = cells((EXAMPLES / f"{name}.py").read_text())
    note = f"Written by `python -m experiments.notebooks` from `{name}.py`, which is the place to change it."

    def numbered() -> Iterator[dict[str, Any]]:
        yield {"cell_type": "markdown", "id": "0", "metadata": {}, "source": _lines(f"{text}\n\n{note}")}
        for i, part in enumerate(code, start=1):
            kept: dict[str, Any] = {"execution_count": None, "id": str(i), "metadata": {}, "outputs": []}
            yield {"cell_type": "code", **kept, "source": _lines(part)}

    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    whole = {"cells": list(numbered()), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1) + "\n"


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    for each in NAMES:
        (EXAMPLES / f"{each}.ipynb").write_text(notebook(each))
