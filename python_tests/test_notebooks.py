"""The notebooks of experiments/examples: without outputs, of the code of their scripts, and they run as they stand."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from deadlines import seconds

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("experiments/**/*.ipynb")) + sorted(ROOT.glob("docs/**/*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="experiments/ is not beside the tests")


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_there_are_two():
    assert {path.stem for path in NOTEBOOKS} >= {"adapt_and_save", "hand_written_loop"}


@each
def test_it_has_no_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@each
def test_its_code_is_that_of_the_script(path):
    script = ast.parse(path.with_suffix(".py").read_text()).body
    cells = ast.parse("\n".join(code_of(path))).body
    # All but the docstring, sys and the start from the command line, instead of which main is called.
    kept = [ast.dump(node) for node in script[1:-1] if ast.unparse(node) != "import sys"]
    assert [ast.dump(node) for node in cells[:-1]] == kept
    assert re.fullmatch(r"main\(\d+\)", ast.unparse(cells[-1]))


@each
def test_it_is_what_the_generator_writes(path):
    notebooks = pytest.importorskip("experiments.notebooks")
    assert path.read_text() == notebooks.notebook(path.stem), "python -m experiments.notebooks writes it anew"


@each
def test_it_runs(path, tmp_path, monkeypatch):
    """In a kernel of its own, every cell as it stands; a warning in it is an error."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import warnings; warnings.simplefilter('error')"))
    work = tmp_path / "work"
    work.mkdir()
    nbclient.NotebookClient(notebook, timeout=seconds(240), resources={"metadata": {"path": str(work)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.get("name") for output in outputs} == {"stdout"}, outputs
    numbers = re.findall(r"\d+\.\d+|nan|inf", "".join(output.text for output in outputs))
    assert numbers and all(float(number) < 1e3 for number in numbers), outputs
    assert not list(work.iterdir())


def test_what_is_no_script_of_an_example_is_refused():
    notebooks = pytest.importorskip("experiments.notebooks")
    with pytest.raises(ValueError, match=r"source: expected a script with a docstring, 'import sys' and at its end"):
        notebooks.cells("x = 1\n")
