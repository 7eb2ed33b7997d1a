"""The notebook, run from its first cell to its last in a small form, and saved without what it printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_look.ipynb"


def test_the_notebook_runs_from_start_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason='pip install -c constraints.txt -e ".[dev]"')
    nbclient = pytest.importorskip("nbclient", reason='pip install -c constraints.txt -e ".[dev]"')
    pytest.importorskip("ipykernel", reason='pip install -c constraints.txt -e ".[dev]"')
    monkeypatch.setenv("PROXIMO_QUICK", "1")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    assert re.search(r"[\d,]+ steps in [\d.]+ s; mean return of the last episodes: \d+", said)
    assert "Diagnosis:" in said
    assert float(re.findall(r"right on (\d+)%", said)[0]) > 70
    after_sft, after_ppo = said.partition("after sft:")[2].split("after ppo:")
    assert len(re.findall(r"(?m)^    i\b", after_sft)) == len(re.findall(r"(?m)^    i\b", after_ppo)) == 4
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) == 2


def test_the_notebook_is_saved_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat", reason='pip install -c constraints.txt -e ".[dev]"')
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []
    assert NOTEBOOK.stat().st_size < 20_000
