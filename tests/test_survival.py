"""Killed, stopped, on a full disk: a run ends with the bits of an undisturbed one."""

import csv
import functools
import glob
import json
import os
import signal
import subprocess
import sys
import time

import helpers
import jax
import numpy as np
import pytest

from jaxadv import checkpoints, cli, preemption, victim_job, victims

STUDY = """
import optax
from jaxadv import attacks, augment, training
from jaxadv.experiments import Recipe, UniversalStudy
from jaxadv.models import ConvNet

def get_config(*, quick=False):
  return UniversalStudy(
    victims={"small": Recipe(
      model=ConvNet(num_classes=3, width=4, depth=2), optimizer=optax.adam(1e-2),
      data=("PACK",), holdout=0.25, loss=training.cross_entropy, train_steps=TRAIN,
      batch_size=6, checkpoint_every=EVERY, augment=augment.affine(),
    )},
    perturbations={"universal": attacks.universal}, norm="l2", shares=(0.1, 0.5),
    craft_steps=CRAFT, craft_batch=12, checkpoint_every=EVERY,
  )
"""
ATTACK = """
import optax
from jaxadv import attacks
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet

def get_config(*, quick=False):
  return Experiment(
    model=UNet(num_classes=2, width=4, depth=1), optimizer=optax.adam(1e-2),
    data=("PACK",), train_steps=24, batch_size=4, checkpoint_every=2,
    attacks={"asma": attacks.asma_calibrated(num_steps=200, scale=3e-3)},
    baseline="asma", num_pairs=10, attack_batch=1, gallery=2, max_initial_iou=0.9,
  )
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
  path = tmp_path_factory.mktemp("pack") / "colors.npz"
  return helpers.color_pack(path, train=36, test=12)


def study(folder, pack, *, train=40, craft=30, every=5):
  text = STUDY.replace("PACK", str(pack)).replace("TRAIN", str(train))
  path = folder / "study.py"
  path.write_text(text.replace("CRAFT", str(craft)).replace("EVERY", str(every)))
  return path


def start(command, config, folder):
  words = [command, str(config), "--out", str(folder), "--no-progress"]
  return subprocess.Popen(
    [sys.executable, "-m", "jaxadv", *words],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(command, config, folder):
  process = start(command, config, folder)
  _, error = process.communicate(timeout=300)
  assert process.returncode == 0, error


def until(process, moment):
  """Waits for a moment of the run; False when it ended before."""
  deadline = time.monotonic() + 300
  while not moment():
    if process.poll() is not None:
      return False
    assert time.monotonic() < deadline
    time.sleep(0.0005)
  return True


def kept(folder):
  """Everything a run leaves, but times: path -> bytes, rows, weights."""
  found = {}
  for path in sorted(folder.rglob("*")):
    name = str(path.relative_to(folder))
    if path.suffix in (".npy", ".png"):
      found[name] = path.read_bytes()
    elif path.name == "rows.csv":
      with path.open() as file:
        found[name] = [timeless(row) for row in csv.DictReader(file)]
    elif path.suffix == ".json" and "checkpoints" not in path.parts:
      found[name] = timeless(json.loads(path.read_text()))
  return found


def timeless(value):
  if isinstance(value, dict):
    return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
  return [timeless(v) for v in value] if isinstance(value, list) else value


def weights(config, folder):
  """The last state of training and the selected one."""
  (task,) = victim_job.prepare(config, out=folder).tasks.values()
  recipe, selects = task.recipe, task.parts.validation is not None
  begin = functools.partial(victims._start, recipe, selects)
  shapes = jax.eval_shape(begin, victims._shapes(recipe, task.parts.train))
  state = checkpoints.restore(task.folder / "checkpoints", shapes)
  assert int(state.train.step) == recipe.train_steps
  key = jax.random.key_data(state.train.key)
  return state._replace(train=state.train._replace(key=key))


def assert_same(command, config, disturbed, whole):
  finish(command, config, disturbed)
  finish(command, config, whole)
  one, other = kept(disturbed), kept(whole)
  assert one.keys() == other.keys()
  for name, value in one.items():
    assert value == other[name], name
  helpers.assert_trees_equal(weights(config, disturbed), weights(config, whole))
  assert not list(disturbed.rglob("unfinished"))
  assert not list(disturbed.rglob("*.tmp"))


def steps_in(place):
  return sorted(int(path.name[5:]) for path in place.glob("step_*"))


def test_sigterm_saves_the_present_step_and_the_end_is_the_same(pack, tmp_path):
  """Between two checkpoints, in training and in crafting; nothing is judged there."""
  config = study(tmp_path, pack, train=300, craft=400, every=100)
  stopped, whole = tmp_path / "stopped", tmp_path / "whole"
  cell = stopped / "perturbations" / "small" / "0.1" / "universal"
  for place in (stopped / "victims" / "small", cell):
    places, process = place / "checkpoints", start("uap", config, stopped)
    assert until(process, lambda at=places: any(at.glob("step_*")))
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    first, last = error.splitlines()
    assert first == "jaxadv: SIGTERM: stops after this step, again: at once"
    assert last == "jaxadv: stopped by SIGTERM; the same command goes on from here"
    assert steps_in(places)[-1] % 100, "not between two checkpoints"
    assert not list(stopped.rglob("unfinished"))
  assert_same("uap", config, stopped, whole)


def test_sigterm_stops_an_attack_after_the_batch_in_hand(discs, tmp_path):
  config = tmp_path / "attack.py"
  config.write_text(ATTACK.replace("PACK", str(discs)))
  process = start("attack", config, tmp_path / "run")
  rows = tmp_path / "run" / "rows.csv"
  assert until(process, rows.exists)
  process.terminate()
  process.communicate(timeout=60)
  assert process.returncode == 143
  done = len(kept(tmp_path / "run")["rows.csv"])
  assert 0 < done < 10
  images = list((tmp_path / "run" / "images" / "asma").iterdir())
  assert len(images) == done


@pytest.fixture
def interrupts():
  """Python's own answer to SIGINT, which shells take from what runs behind them."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_second_signal_stops_at_once():
  with preemption.watch():
    assert not preemption.requested()
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.requested()
    with pytest.raises(preemption.Preempted, match="stopped by SIGINT") as stop:
      preemption.check()
    assert stop.value.status == 130
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  with preemption.watch():
    assert not preemption.requested()


def test_an_unwritable_folder_is_one_line_before_the_data_is_used(
  pack, tmp_path, capsys
):
  (tmp_path / "file").write_text("")
  words = ["uap", str(study(tmp_path, pack)), "--out", str(tmp_path / "file" / "run")]
  assert cli.main([*words, "--no-progress"]) == 2
  error = capsys.readouterr().err
  assert f"cannot write to {tmp_path}/file/run: Not a directory" in error
  assert error.count("\n") == 1


@pytest.fixture
def small_disk(tmp_path):
  """`make(kilobytes)` mounts a file system of that size; only root may."""
  place = tmp_path / "disk"
  place.mkdir()

  def make(kilobytes):
    options = ["-o", f"size={kilobytes}k"]
    mount = ["mount", "-t", "tmpfs", *options, "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
      pytest.skip("mounting a small disk needs root")
    return place

  yield make
  subprocess.run(["umount", str(place)], capture_output=True)


def test_a_disk_that_is_too_small_is_told_before_the_first_step(pack, small_disk):
  place = small_disk(64)
  config = study(place.parent, pack)
  process = start("uap", config, place / "run")
  _, error = process.communicate(timeout=120)
  assert process.returncode == 2
  assert "MB free; checkpoints need" in error
  assert error.count("\n") == 1
  assert not list(place.rglob("step_*"))


def test_a_disk_that_fills_up_costs_no_finished_checkpoint(pack, small_disk):
  """The same run ends with the same bits once there is room."""
  place = small_disk(4096)
  config, whole = study(place.parent, pack, train=100), place.parent / "whole"
  places = place / "run" / "victims" / "small" / "checkpoints"
  process = start("uap", config, place / "run")
  assert until(process, lambda: any(places.glob("step_*")))
  subprocess.run(["dd", "if=/dev/zero", f"of={place}/ballast"], capture_output=True)
  _, error = process.communicate(timeout=120)
  assert process.returncode == 2, error
  (line,) = (each for each in error.splitlines() if each.startswith("jaxadv: "))
  assert line.startswith("jaxadv: cannot save step")
  assert str(place / "run") in line
  assert "No space left on device; step" in line
  (place / "ballast").unlink()
  assert steps_in(places)
  assert not list(places.glob("unfinished"))
  assert_same("uap", config, place / "run", whole)


# While a checkpoint is being written, and any other file.
SAVES = (
  "**/unfinished",
  "**/unfinished/state*tmp*",
  "**/unfinished/state",
  "**/unfinished/about.json",
  "**/.*.tmp",
)


def found(folder, pattern):
  """Paths by a pattern; `pathlib` fails where folders go while it looks."""
  return set(glob.glob(f"{folder}/{pattern}", recursive=True, include_hidden=True))


def kill_anywhere(command, config, folder, *, patterns):
  """SIGKILL at twenty random moments; half of them while something is being written.

  Returns:
    What each was aimed at, and the checkpoints it fell into; fewer if the run ended.
  """
  rng, doing = np.random.default_rng(0), []
  while len(doing) < 20:
    process = start(command, config, folder)
    if len(doing) % 2:
      pattern = patterns[rng.integers(len(patterns))]
      moment = lambda p=pattern: found(folder, p)
      until(process, lambda p=pattern: not found(folder, p))  # left by the last kill
    else:
      pattern = "any time"
      at = time.monotonic() + rng.uniform(2, 8)
      moment = lambda at=at: time.monotonic() > at
    if not until(process, moment):
      process.communicate()
      assert process.returncode == 0
      return doing
    time.sleep(rng.uniform(0, 0.01))
    process.kill()
    process.communicate()
    doing.append((pattern, found(folder, "**/unfinished")))
  return doing


@pytest.mark.long
def test_uap_killed_at_twenty_moments_ends_with_the_same_bits(pack, tmp_path):
  config = study(tmp_path, pack, train=1500, craft=1500, every=15)
  killed = tmp_path / "killed"
  doing = kill_anywhere("uap", config, killed, patterns=SAVES)
  assert len(doing) == 20, "the run is too short for twenty kills"
  assert any(aside for _, aside in doing), "no kill fell into a save"
  assert_same("uap", config, killed, tmp_path / "whole")


@pytest.mark.long
def test_attack_killed_at_twenty_moments_ends_with_the_same_bits(discs, tmp_path):
  config = tmp_path / "attack.py"
  text = ATTACK.replace("PACK", str(discs)).replace("train_steps=24", "train_steps=300")
  config.write_text(
    text.replace("num_pairs=10", "num_pairs=50").replace("=200,", "=600,")
  )
  killed = tmp_path / "killed"
  doing = kill_anywhere("attack", config, killed, patterns=("**/.*.tmp",))
  assert len(doing) == 20, "the run is too short for twenty kills"
  assert_same("attack", config, killed, tmp_path / "whole")
