"""Every notebook runs from its first cell to its last, in its quick form."""

import json
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook():
  assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, capsys):
  pyplot = pytest.importorskip("matplotlib.pyplot")
  pyplot.switch_backend("agg")
  monkeypatch.setenv("JAXADV_QUICK", "1")
  names = {"__name__": "__main__"}
  cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
  for number, cell in enumerate(cells):
    source = compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec")
    exec(source, names)
  assert pyplot.get_fignums(), "a notebook shows pictures"
  pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_with_what_it_showed(path):
  """Someone who only looks at it sees numbers and pictures, and no error."""
  cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
  outputs = [output for cell in cells for output in cell["outputs"]]
  kinds = {output["output_type"] for output in outputs}
  assert "error" not in kinds
  assert any("image/png" in output.get("data", {}) for output in outputs)
