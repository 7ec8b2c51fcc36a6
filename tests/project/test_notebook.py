"""examples/quickstart.ipynb runs from top to bottom, and shows what it shows."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

PATH = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def text_of(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", ()))


def kinds_of(cell: Any) -> set[str]:
    """What a cell shows. In how many pieces it prints is a matter of time."""
    return {output["output_type"] for output in cell.get("outputs", ())}


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    stored = nbformat.read(PATH, as_version=4)
    run = copy.deepcopy(stored)
    for cell in run.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell["outputs"], cell["execution_count"] = [], None
    with warnings.catch_warnings():  # of the client and of the kernel
        warnings.simplefilter("ignore")
        nbclient.NotebookClient(
            run, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
    said = "".join(map(text_of, run.cells))
    assert "epoch 4: accuracy 100%, 100% of requests from memory" in said
    assert "epoch 2: 50% from memory" in said
    assert "Warning" not in said and "Traceback" not in said
    outputs = [output for cell in run.cells for output in cell.get("outputs", ())]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds == {"image/png", "text/html", "text/plain"}
    for cell, was in zip(run.cells, stored.cells, strict=True):
        assert kinds_of(cell) == kinds_of(was), cell.source


def test_what_is_stored_can_be_read_anywhere() -> None:
    """With outputs, small, and without paths of the machine that it ran on."""
    content = PATH.read_text()
    assert len(content) < 100_000
    assert "/tmp" not in content and "Error" not in content
    cells = json.loads(content)["cells"]
    assert all(cell["outputs"] or not cell["source"][-1].strip() or _assigns(cell) for cell in cells
               if cell["cell_type"] == "code")  # fmt: skip


def _assigns(cell: Any) -> bool:
    """Whether a cell ends with a statement that shows nothing."""
    last = "".join(cell["source"]).rstrip().splitlines()[-1]
    return last.startswith(" ") or " = " in last or last.endswith("()")
