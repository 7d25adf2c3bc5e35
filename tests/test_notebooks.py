"""Every notebook runs from its first cell to its last, in its quick form."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def code_cells(path):
  cells = json.loads(path.read_text())["cells"]
  return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_is_a_notebook():
  assert NOTEBOOKS


RUN = """
import json, pathlib, sys
from matplotlib import pyplot

path = pathlib.Path(sys.argv[1])
cells = json.loads(path.read_text())["cells"]
cells = [cell for cell in cells if cell["cell_type"] == "code"]
names = {"__name__": "__main__"}
for number, cell in enumerate(cells):
  source = compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec")
  exec(source, names)
assert pyplot.get_fignums(), "a notebook shows pictures"
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
  """In a process of its own, as it may have something to say before jax starts."""
  pytest.importorskip("matplotlib.pyplot")
  quick = {"JAXADV_QUICK": "1", "MPLBACKEND": "agg"}
  done = subprocess.run(
    [sys.executable, "-W", "ignore:FigureCanvasAgg", "-c", RUN, str(path)],
    env=os.environ | quick,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_with_what_it_showed(path):
  """Someone who only looks at it sees numbers and pictures, and no error."""
  outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
  kinds = {output["output_type"] for output in outputs}
  assert "error" not in kinds
  assert any("image/png" in output.get("data", {}) for output in outputs)
