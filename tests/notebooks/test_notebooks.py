"""Every notebook runs from top to bottom, and is committed without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST = 180
"""Seconds a cell may take; a whole notebook takes less on a quiet machine."""


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_without_outputs(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path):
    """A cell that raises fails the test, with its traceback."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    environment |= {"PYTHONPATH": str(ROOT), "MAIRA2": "", "MAIRA2_SAE": "", "STUDIES": ""}
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=LONGEST, kernel_name="python3").execute(
        cwd=str(tmp_path), env=environment
    )
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
