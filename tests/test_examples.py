"""The notebooks run from the first cell to the last, each in a folder of its own, and are stored without outputs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(each.get("text", "") for cell in notebook.cells for each in cell.get("outputs", []))


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()  # raises what a cell raises
    shown = [
        each.data.get("text/html", "") for cell in notebook.cells for each in cell.get("outputs", []) if "data" in each
    ]
    assert any("<progress" in each and "training" in each for each in shown), "training shows a bar without widgets"
    assert not any("ipywidgets" in each for each in (*shown, printed(notebook)))
    share = re.search(r"([\d.]+) ?% of", printed(notebook))
    assert share and float(share[1]) > 85, "the generated network that it loads works"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_or_places(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text())


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["demo", "own_checkpoints"]
