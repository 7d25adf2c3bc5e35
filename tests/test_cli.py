"""The command line: bad input is one line and exit code 2, before any work."""

import pathlib
import subprocess
import sys

import pytest

from jaxadv import cli

GOOD = """
import optax
from jaxadv import combine
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet

def get_config(*, quick=False):
  return Experiment(model=UNet(width=4, depth=1), optimizer=optax.adam(1e-2),
                    data=("PACK",), train_steps=2, batch_size=2, num_pairs=1,
                    attacks={"none": combine.identity}, max_initial_iou=1.0)
"""


@pytest.fixture
def config(tmp_path, discs):
  path = tmp_path / "small.py"
  path.write_text(GOOD.replace("PACK", str(discs)))
  return str(path)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["attack", "missing.py"], "cannot read config missing.py: FileNotFoundError"),
    (["attack", "CONFIG", "--data", "missing.npz"], "missing.npz"),
    (["attack", "CONFIG", "--data", "TORN"], "torn.npz"),
    (["attack", "CONFIG", "--pairs", "0"], "`num_pairs` is 0; write 1 or more"),
    (["attack", "CONFIG", "--out", "FILE"], "cannot write to"),
    (["train", "CONFIG", "--out", "FILE"], "cannot write to"),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
  words, message, config, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and then nothing")
  (tmp_path / "file").write_text("in the way")
  names = {
    "CONFIG": config,
    "TORN": str(tmp_path / "torn.npz"),
    "FILE": str(tmp_path / "file" / "run"),
  }
  before = sorted(tmp_path.rglob("*"))
  assert cli.main([names.get(word, word) for word in words] + ["--no-progress"]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
  "words",
  [
    [],
    ["atack", "x.py"],
    ["attack"],
    ["attack", "x.py", "--epsilon", "3"],
    ["attack", "x.py", "--pairs", "many"],
    ["attack", "x.py", "--pair", "3"],
  ],
)
def test_unknown_words_are_one_line(words, capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main(words)
  assert caught.value.code == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert "--help" in error


def test_a_missing_extra_names_the_install_line(config, capsys, monkeypatch):
  monkeypatch.setattr(cli, "_NEEDED", ("no_such_package",))
  assert cli.main(["attack", config]) == 2
  assert "pip install 'jaxadv[report]'" in capsys.readouterr().err


def test_training_shows_its_evaluation_and_progress(config, tmp_path, capsys):
  out = tmp_path / "out"
  assert cli.main(["train", config, "--out", str(out), "--steps", "3"]) == 0
  shown, progress = capsys.readouterr()
  assert "training" in progress
  assert "3/3" in progress
  assert "3/3" not in shown  # a table sent to a file has nothing else in it
  assert "pixel accuracy" in shown
  assert str(out / "victim" / "results.json") in shown
  assert (out / "victim" / "checkpoints" / "step_00000003").is_dir()
  assert not (out / "rows.csv").exists()


def test_no_progress_is_silent(config, tmp_path, capsys):
  words = ["train", config, "--out", str(tmp_path / "out"), "--no-progress"]
  assert cli.main(words) == 0
  assert capsys.readouterr().err == ""


def test_the_module_runs_from_another_folder(tmp_path):
  words = [sys.executable, "-m", "jaxadv", "attack", "missing.py"]
  root = str(pathlib.Path(__file__).parent.parent)
  done = subprocess.run(
    words, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": root}
  )
  assert done.returncode == 2
  assert done.stderr.startswith("jaxadv: cannot read config missing.py")
