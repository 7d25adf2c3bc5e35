"""The main job: rows, resuming after a kill, refusals, results."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from jaxadv import cli, experiments, job, records, summaries

# A small victim on discs, one attack of ours and one written by hand.
CONFIG = """
import jax, jax.numpy as jnp, optax
from jaxadv import attacks, combine
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet

def noise(key, predict, x, y):
  result = combine.identity(key, predict, x, y)
  draw = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], minval=-0.1, maxval=0.1))
  image = jnp.clip(x + draw(key), 0, 1)
  return result._replace(image=image, delta=image - x)

def get_config(*, quick=False):
  return Experiment(
    model=UNet(num_classes=2, width=4, depth=1), optimizer=optax.adam(1e-2),
    data=("PACK",), train_steps=24, batch_size=4, checkpoint_every=8,
    attacks={"asma": attacks.asma_calibrated(num_steps=STEPS, scale=3e-3),
             "noise": noise},
    baseline="asma", num_pairs=5, attack_batch=2, gallery=2, max_initial_iou=0.9,
  )
"""
TIMES = ("seconds",)


@pytest.fixture(scope="module")
def config(tmp_path_factory, discs):
  return write_config(tmp_path_factory.mktemp("config"), discs, num_steps=20)


def write_config(folder, pack, *, num_steps):
  path = folder / "small.py"
  path.write_text(CONFIG.replace("PACK", str(pack)).replace("STEPS", str(num_steps)))
  return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  """A run that was never interrupted."""
  folder = tmp_path_factory.mktemp("finished")
  results = job.attack(job.prepare(config, out=folder))
  return folder, results


def values(folder):
  """The rows without the clock, by attack and pair."""
  with (folder / "rows.csv").open() as file:
    rows = list(csv.DictReader(file))
  keys = [(row["attack"], int(row["pair"])) for row in rows]
  assert len(set(keys)) == len(keys)
  kept = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
  return dict(zip(keys, kept, strict=True))


def test_every_file_is_there_and_the_numbers_agree(finished):
  folder, results = finished
  rows = values(folder)
  assert len(rows) == 10
  assert json.loads((folder / "results.json").read_text()) == results
  stored = sorted(p.name for p in (folder / "images" / "asma").iterdir())
  assert stored == [f"{n:04d}.png" for n in range(5)]
  assert (folder / "gallery.png").stat().st_size > 10_000
  l2 = [float(rows["asma", n]["l2_8bit"]) for n in range(5)]
  assert results["attacks"]["asma"]["all"]["l2_8bit"]["mean"] == pytest.approx(
    np.mean(l2)
  )
  assert results["attacks"]["asma"]["all"]["backwards"]["mean"] == 20
  assert results["versions"]["jax"] == jax.__version__
  assert results["seed"] == 0
  assert results["victim"]["iou"] > 0.3


def test_rows_describe_the_stored_images(config, finished):
  folder, _ = finished
  run = job.prepare(config, out=folder)
  images = dict(zip(run.test_set.ids, run.test_set.images, strict=True))
  for (attack, number), row in values(folder).items():
    with Image.open(folder / "images" / attack / f"{number:04d}.png") as file:
      stored = np.asarray(file, np.float64).reshape(run.test_set.images.shape[1:])
    clean = images[int(row["source"])]
    clean = clean / 255 if clean.dtype == np.uint8 else clean
    delta = stored / 255 - clean
    assert float(row["l2_8bit"]) == pytest.approx(np.linalg.norm(delta), rel=1e-4)
    assert float(row["linf_8bit"]) == pytest.approx(np.abs(delta).max(), rel=1e-4)


def test_the_attack_moves_masks_and_noise_does_not(finished):
  rows = values(finished[0]).values()

  def gain(name):
    mine = [row for row in rows if row["attack"] == name]
    return np.mean([float(r["iou_8bit"]) - float(r["initial_iou"]) for r in mine])

  assert gain("asma") > 0.2
  assert abs(gain("noise")) < 0.1


def test_a_finished_run_is_not_run_again(config, finished, monkeypatch):
  folder, _ = finished
  before = values(folder)
  monkeypatch.setattr(job.trials, "compile_attack", None)
  monkeypatch.setattr(job.victim_job.victims.loops, "fit", None)
  job.attack(job.prepare(config, out=folder))
  assert values(folder) == before


def test_rows_do_not_depend_on_the_batch_or_the_order(config, finished, tmp_path):
  run = job.prepare(config, out=tmp_path, overrides={"attack_batch": 3})
  job.attack(run)
  for key, row in values(finished[0]).items():
    for name, value in values(tmp_path)[key].items():
      if name != "attack":
        assert float(value) == pytest.approx(float(row[name]), rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("loss", ["torn line", "image", "both files of results"])
def test_what_was_lost_is_made_again(config, finished, tmp_path, loss):
  folder = copy(finished[0], tmp_path)
  want = values(folder)
  rows = folder / "rows.csv"
  if loss == "torn line":
    rows.write_bytes(rows.read_bytes()[:-40])
  elif loss == "image":
    (folder / "images" / "noise" / "0003.png").unlink()
  else:
    (folder / "results.json").unlink()
    (folder / "report.html").unlink()
  job.attack(job.prepare(config, out=folder))
  assert values(folder) == want
  assert (folder / "images" / "noise" / "0003.png").exists()
  assert (folder / "report.html").exists()


def copy(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  subprocess.run(["cp", "-r", f"{source}/.", str(target)], check=True)
  return target


def test_a_killed_run_ends_with_the_same_rows(tmp_path, discs):
  config = write_config(tmp_path, discs, num_steps=200)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  checkpoints = killed / "victim" / "checkpoints"
  moments = [
    lambda: any(checkpoints.glob("step_*")),
    lambda: count_rows(killed) >= 2,
    lambda: count_rows(killed) >= 5,
  ]
  for moment in moments:
    kill_at(moment, config, killed)
  assert 0 < count_rows(killed) < 10
  assert not (killed / "results.json").exists()
  for folder in (killed, whole):
    subprocess.run(command(config, folder), check=True, capture_output=True)
  assert values(killed) == values(whole)
  assert not list(killed.rglob("*.tmp"))


def command(config, folder):
  words = ["attack", str(config), "--out", str(folder), "--no-progress"]
  return [sys.executable, "-m", "jaxadv", *words]


def count_rows(folder):
  path = folder / "rows.csv"
  return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def kill_at(moment, config, folder):
  """SIGKILL as soon as `moment` is true; the run must not have ended by itself."""
  process = subprocess.Popen(command(config, folder), stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 120
  while not moment():
    assert process.poll() is None, "the run ended before it could be killed"
    assert time.monotonic() < deadline
    time.sleep(0.002)
  os.kill(process.pid, signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL


def test_another_run_in_the_folder_is_refused(finished, discs, tmp_path):
  folder = copy(finished[0], tmp_path / "copy")
  other = write_config(tmp_path, discs, num_steps=21)
  with pytest.raises(records.RecordError, match=r"num_steps=20.* \| .*num_steps=21"):
    job.attack(job.prepare(other, out=folder))
  write_config(tmp_path, discs, num_steps=20)
  with pytest.raises(records.RecordError, match="seed was 0, is 1"):
    job.attack(job.prepare(other, out=folder, overrides={"seed": 1}))
  with pytest.raises(records.RecordError, match="train_steps was 24, is 5"):
    job.attack(job.prepare(other, out=folder, overrides={"train_steps": 5}))


def test_a_changed_optimizer_is_another_victim(config):
  text = config.read_text()
  settings = job.prepare(config).task.settings
  config.write_text(text.replace("adam(1e-2)", "adam(2e-2)"))
  changed = job.prepare(config).task.settings
  config.write_text(text)
  assert {k for k in settings if settings[k] != changed[k]} == {"optimizer"}
  assert job.prepare(config).task.settings == settings


def test_two_runs_cannot_share_a_folder(config, tmp_path):
  run = job.prepare(config, out=tmp_path)
  with records.lock(tmp_path), pytest.raises(records.RecordError, match="another run"):
    job.attack(run)


def test_rows_of_other_pairs_are_refused(config, finished, tmp_path):
  folder = copy(finished[0], tmp_path)
  lines = (folder / "rows.csv").read_text().splitlines(keepends=True)
  cells = lines[3].split(",")
  cells[2] = str(int(cells[2]) + 1)
  lines[3] = ",".join(cells)
  (folder / "rows.csv").write_text("".join(lines))
  with pytest.raises(job.JobError, match="rows of other pairs"):
    job.attack(job.prepare(config, out=folder))


def test_rows_of_an_attack_that_is_not_run_are_refused(config, finished, tmp_path):
  folder = copy(finished[0], tmp_path)
  lines = (folder / "rows.csv").read_text().splitlines(keepends=True)
  (folder / "rows.csv").write_text("".join(lines).replace("noise", "louder"))
  with pytest.raises(job.JobError, match=r"rows of \['louder'\], no attacks here"):
    job.attack(job.prepare(config, out=folder))


def test_damaged_rows_are_refused_by_line(tmp_path):
  path = tmp_path / "rows.csv"
  path.write_text("a,b\n1,2\n3\n4,5\n")
  with pytest.raises(records.RecordError, match="line 3 is damaged"):
    records.read_rows(path)
  path.write_text("a,b\n1,2\n3")
  assert records.read_rows(path) == [{"a": "1", "b": "2"}]
  assert path.read_text() == "a,b\n1,2\n"
  with pytest.raises(records.RecordError, match="other columns"):
    records.append_rows(path, [{"a": 1, "c": 2}])


def test_a_pack_for_another_task_is_refused(config, tmp_path):
  pack = tmp_path / "classes.npz"
  np.savez(
    pack,
    images=np.zeros((4, 8, 8, 1), np.uint8),
    labels=np.zeros(4, np.int32),
    split=np.array(["train", "train", "test", "test"]),
    class_names=np.array(["a", "b"]),
  )
  with pytest.raises(job.JobError, match="mask"):
    job.prepare(config, source=str(pack))


def test_bootstrap_intervals_cover_and_ratios_are_paired():
  rng = np.random.default_rng(0)
  hits = 0
  for seed in range(200):
    got = summaries.interval(rng.normal(3, 1, 30), resamples=400, seed=seed)
    hits += got["low"] <= 3 <= got["high"]
  assert 0.88 <= hits / 200 <= 0.99
  assert summaries.interval([1.0, float("inf"), 3.0])["n"] == 2


def test_the_real_pack_end_to_end(tmp_path):
  name = "fundus_idrid_optic_disc_128.npz"
  config = write_config(tmp_path, name, num_steps=30)
  try:
    run = job.prepare(config, out=tmp_path / "run", overrides={"train_steps": 60})
  except job.JobError as error:
    pytest.skip(f"no real pack: {error}")
  results = job.attack(run)
  assert results["source"] == name
  assert results["victim"]["iou"] > 0.5
  means = results["attacks"]["asma"]["all"]
  assert means["iou_8bit"]["mean"] > means["initial_iou"]["mean"] + 0.3


def test_the_command_and_the_function_are_the_same(config, finished, capsys):
  folder, _ = finished
  assert cli.main(["attack", str(config), "--out", str(folder), "--no-progress"]) == 0
  assert str(folder / "report.html") in capsys.readouterr().out


def test_overrides_replace_fields(config):
  run = job.prepare(config, overrides={"num_pairs": 2, "seed": 7})
  assert (run.experiment.num_pairs, run.experiment.seed) == (2, 7)
  with pytest.raises(experiments.ConfigError, match="`num_pairs` is 0"):
    job.prepare(config, overrides={"num_pairs": 0})
