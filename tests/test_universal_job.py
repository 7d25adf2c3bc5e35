"""`jaxadv uap`: rows, controls, resuming after a kill, refusals, a real pack."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import helpers
import numpy as np
import pytest
from PIL import Image

from jaxadv import cli, crafting, experiments, subjects, universal_job

CONFIG = """
import optax
from jaxadv import attacks, training
from jaxadv.experiments import Recipe, UniversalStudy
from jaxadv.models import ConvNet

def get_config(*, quick=False):
  return UniversalStudy(
    victims={"small": Recipe(
      model=ConvNet(num_classes=3, width=4, depth=2), optimizer=optax.adam(1e-2),
      data=("PACK",), loss=training.cross_entropy, train_steps=20, batch_size=6,
    )},
    perturbations={"universal": attacks.universal},
    targeted=attacks.targeted_universal,
    targets=(TARGET,), norm="l2", shares=(0.1, 0.5), craft_steps=STEPS,
    craft_batch=BATCH, checkpoint_every=3,
  )
"""
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NAMES = ["universal", "to red", "random ball", "random sign"]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
  path = tmp_path_factory.mktemp("pack") / "colors.npz"
  return helpers.color_pack(path, train=36, test=12)


def write_config(folder, pack, *, steps=6, batch=12, target=0):
  path = folder / "colors.py"
  text = CONFIG.replace("PACK", str(pack)).replace("STEPS", str(steps))
  path.write_text(text.replace("BATCH", str(batch)).replace("TARGET", str(target)))
  return path


@pytest.fixture(scope="module")
def finished(pack, tmp_path_factory):
  folder = tmp_path_factory.mktemp("finished")
  config = write_config(folder, pack)
  run = universal_job.prepare(config, out=folder / "run")
  return run, universal_job.craft(run)


def rows(folder):
  return json.loads((folder / "results.json").read_text())["rows"]


def perturbations(folder):
  """Path -> array; the bits of everything that was crafted."""
  found = folder.glob("perturbations/*/*/*/uap.npy")
  return {str(path.relative_to(folder)): np.load(path) for path in found}


def test_every_cell_has_a_row_a_pattern_and_both_controls(finished):
  run, results = finished
  cells = [(row["perturbation"], row["share"]) for row in rows(run.folder)]
  assert cells == [(name, share) for share in (0.1, 0.5) for name in NAMES]
  assert len(perturbations(run.folder)) == 8
  with Image.open(run.folder / "perturbations/small/0.5/universal/uap.png") as image:
    assert image.size == (8, 8)
  assert json.loads((run.folder / "results.json").read_text()) == results
  assert (run.folder / "report.html").read_text().count("<figure>") == 6


def test_the_radius_is_the_share_of_the_mean_norm_and_is_kept(finished):
  run, results = finished
  images = run.parts.train.images / 255
  norm = np.linalg.norm(images.reshape(len(images), -1), axis=1).mean()
  for row in results["rows"]:
    assert row["eps"] == pytest.approx(row["share"] * norm, rel=1e-5)
    assert row["l2"] <= row["eps"] * (1 + 1e-5)
    if row["perturbation"] == "random sign":
      assert row["l2"] == pytest.approx(row["eps"], rel=1e-5)


def test_crafted_perturbations_beat_the_controls_and_reach_their_target(finished):
  _, results = finished
  found = {(r["perturbation"], r["share"]): r for r in results["rows"]}
  best = found["universal", 0.5]["fooling_test_stored"]
  assert best > found["random sign", 0.5]["fooling_test_stored"] + 0.3
  # an image may have a perturbation of its own; it is not worse off for that
  assert found["universal", 0.5]["fooling_per_image"] >= best
  smaller = found["universal", 0.1]["fooling_per_image"]
  assert smaller <= found["universal", 0.5]["fooling_per_image"]
  assert found["to red", 0.5]["targeted_test_stored"] > 0.9
  assert found["universal", 0.5]["targeted_test_stored"] is None


def test_the_counts_are_those_of_the_stored_perturbation(finished):
  """A second way to the same number: the model on images made by hand."""
  run, results = finished
  task = run.victims.tasks["small"]
  from jaxadv import victim_job

  victim = victim_job.train(task)
  delta = np.load(run.folder / "perturbations/small/0.5/universal/uap.npy")
  clean = run.parts.test.images.astype(np.float32) / 255
  stored = np.rint(np.clip(clean + delta, 0, 1) * 255).astype(np.float32) / 255
  decide = lambda x: np.argmax(victim.predict(victim.variables, x)[0], -1)
  (row,) = (
    r for r in results["rows"] if (r["perturbation"], r["share"]) == ("universal", 0.5)
  )
  fooled = np.mean(decide(stored) != decide(clean))
  assert row["fooling_test_stored"] == pytest.approx(fooled)


def test_as_many_training_as_test_images_are_judged_of_every_class(finished):
  run, _ = finished
  file = run.folder / "perturbations/small/0.5/universal/outcome.json"
  counts = json.loads(file.read_text())["counts"]
  for split, each in (("train", 4), ("test", 4)):
    for view in subjects.VIEWS:
      table = np.asarray(counts[split][view])
      assert table.sum((1, 2)).tolist() == [each] * 3, (split, view)


def test_a_finished_run_is_not_computed_again(finished):
  run, results = finished
  times = {path: path.stat().st_mtime_ns for path in run.folder.glob("p*/**/uap.npy")}
  assert universal_job.craft(run)["rows"] == results["rows"]
  assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_new_radius_or_target_compiles_nothing(finished):
  run, _ = finished
  attacked = universal_job.subject(run, "small")
  planned, traces = run.plans["to red"], []

  def predict(variables, x):
    traces.append("victim")
    return attacked.predict(variables, x)

  def make(*arguments, **options):  # traced at the start, and in every step
    traces.append("rule")
    return planned.make(*arguments, **options)

  watched, plan = attacked._replace(predict=predict), planned._replace(make=make)
  crafting.craft(plan, watched, 0.1)
  before = len(traces)
  assert before
  for eps, target in ((0.2, 0), (0.3, 1), (0.4, 2)):
    crafting.craft(plan._replace(target=target), watched, eps)
  assert len(traces) == before
  # another number of steps is another program, is seen, and compiles for all its steps
  crafting.craft(plan._replace(steps=2), watched, 0.1)
  assert len(traces) == 2 * before


def table(text):
  """Cells of the Markdown rows below the heads."""
  lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
  return [[cell.strip("| `") for cell in line] for line in lines[1:]]


def test_the_benchmark_of_speed(finished, capsys):
  run, _ = finished
  config = run.folder.parent / "colors.py"
  words = [str(config), "--out", str(run.folder), "--share", "0.5", "--level", "0.2"]
  helpers.benchmark("uap").main(words)
  found = table(capsys.readouterr().out)
  assert [line[1] for line in found] == NAMES[:2]
  for line in found:
    assert float(line[2].split()[0]) > 0
    assert 0.2 <= float(line[5]) <= 1  # the six steps of the study get that far
    assert 12 <= int(line[6]) <= 72


def test_the_tables_of_the_docs(finished, capsys):
  """The spread over the victims, then one line per victim and share."""
  run, results = finished
  script = helpers.benchmark("universal")
  script.main([str(run.folder)])
  text = capsys.readouterr().out
  found = table(text)
  reached = [r for r in results["rows"] if (r["target"], r["share"]) == (0, 0.5)]
  reached = f"{100 * reached[0]['targeted_test_stored']:.0f}"
  name = results["name"]
  assert [line[:2] for line in found[:2]] == [[name, "10.0%"], [name, "50.0%"]]
  assert found[1][-2] == f"{reached} to {reached} % (1/1)"
  assert "Of 2 lines" in text
  accuracy = f"{100 * results['victims']['small']['accuracy']:.1f} %"
  lines = [["small", accuracy, "10.0%"], ["small", accuracy, "50.0%"]]
  assert [line[:3] for line in found[3:5]] == lines
  crafted = [r for r in results["rows"] if r["share"] == 0.5 and r["steps"]]
  kinds = ["fooling" if r["target"] is None else "targeted" for r in crafted]
  pairs = zip(kinds, crafted, strict=True)
  mean = np.mean([r[f"{kind}_test_clipped"] for kind, r in pairs])
  assert found[-1] == ["50.0%", *found[-1][1:3], f"{mean:.1%}", found[-1][4]]


def test_the_spread_over_victims_and_the_best_target():
  script = helpers.benchmark("universal")
  heads = ["victim", "accuracy", "share", "universal", "best target fools"]
  lines = [["a", 1.0, 0.02, None, 0.1], ["b", 1.0, 0.02, 0.9, 0.855]]
  spread = [["one", "2.0%", "90 to 90 % (1/1)", "10 to 86 % (1/2)"]]
  assert script.over_victims({"one": (heads, lines)}) == (["run", *heads[2:]], spread)
  lines = [["a", 1, 0.1, 0.5, other] for other in (0.55, 0.45, 0.44, 0.53)]
  assert "in 1, more in 1 and less in 2." in script.best_target({"one": (heads, lines)})


def test_the_benchmark_of_retraining_resumes(finished, capsys):
  run, _ = finished
  config = run.folder.parent / "colors.py"
  words = [str(config), "--out", str(run.folder), "--share", "0.2", "--rounds", "1"]
  words += ["--epochs", "1", "--pool", "2", "--rates", "1e-3"]
  helpers.benchmark("retraining").main(words)
  found = table(capsys.readouterr().out)
  assert [line[3] for line in found] == ["0", "1"] * 2
  assert len({line[1] for line in found}) == 2
  helpers.benchmark("retraining").main(words)
  assert table(capsys.readouterr().out) == found


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_bits(pack, tmp_path):
  config = write_config(tmp_path, pack, steps=40)
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  delay = np.random.default_rng(0).uniform(3, 8)  # somewhere in the victim's training
  kill_after(delay, config, killed)
  moments = (
    "perturbations/small/0.1/universal/checkpoints/step_*",
    "perturbations/small/0.1/to red/checkpoints/step_*",
    "perturbations/small/0.5/universal/checkpoints/step_*",
    "perturbations/small/0.5/to red/checkpoints/step_00000040",  # while it is judged
  )
  for moment in moments:
    kill_at(moment, config, killed)
  assert not (killed / "results.json").exists()
  for folder in (killed, whole):
    subprocess.run(command(config, folder), check=True, capture_output=True)
  one, other = perturbations(killed), perturbations(whole)
  assert one.keys() == other.keys()
  for name, delta in one.items():
    np.testing.assert_array_equal(delta, other[name], err_msg=name)
  drop = lambda row: {k: v for k, v in row.items() if k != "seconds"}
  assert list(map(drop, rows(killed))) == list(map(drop, rows(whole)))


def command(config, folder):
  words = ["uap", str(config), "--out", str(folder), "--no-progress"]
  return [sys.executable, "-m", "jaxadv", *words]


def kill_after(seconds, config, folder):
  process = subprocess.Popen(command(config, folder), stdout=subprocess.DEVNULL)
  time.sleep(seconds)
  assert process.poll() is None, "the run ended before it could be killed"
  process.kill()
  assert process.wait() == -signal.SIGKILL


def kill_at(pattern, config, folder):
  """SIGKILL as soon as a file is there; the run must not have ended by itself."""
  process = subprocess.Popen(command(config, folder), stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 120
  while not any(folder.glob(pattern)):
    assert process.poll() is None, "the run ended before it could be killed"
    assert time.monotonic() < deadline
    time.sleep(0.002)
  os.kill(process.pid, signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch": 37}, "36 training images are fewer than a batch of 37"),
    ({"target": 3}, r"`targets` has 3; the classes are 0..2"),
  ],
)
def test_what_data_and_study_together_forbid(pack, tmp_path, changes, message):
  config = write_config(tmp_path, pack, **changes)
  with pytest.raises(universal_job.JobError, match=message):
    universal_job.prepare(config, out=tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_perturbation_that_cannot_be_built_is_refused(pack, tmp_path):
  config = write_config(tmp_path, pack)
  text = config.read_text()
  config.write_text(text.replace("attacks.universal}", "lambda eps: None}"))
  with pytest.raises(universal_job.JobError, match="perturbation 'universal': TypeErr"):
    universal_job.prepare(config, out=tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_perturbation_may_follow_what_the_victim_alone_returns(pack, tmp_path):
  """The first hidden layer, which a stand-in with logits only has not."""
  config = write_config(tmp_path, pack)
  feature = "lambda s: (s.features['stage1'] ** 2).mean()"
  rule = f"lambda eps, **rest: attacks.universal(eps, loss={feature}, **rest)}}"
  config.write_text(config.read_text().replace("attacks.universal}", rule))
  run = universal_job.prepare(config, out=tmp_path / "run")
  assert run.settings["perturbations"]["universal"].startswith("6 steps of ")
  config.write_text(config.read_text().replace("stage1", "stage9"))
  with pytest.raises(universal_job.JobError, match="KeyError: 'stage9'"):
    universal_job.prepare(config, out=tmp_path / "run")


def test_a_victim_that_diverged_is_one_line(pack, tmp_path, capsys):
  config = write_config(tmp_path, pack)
  config.write_text(config.read_text().replace("optax.adam(1e-2)", "optax.sgd(1e38)"))
  words = ["uap", str(config), "--out", str(tmp_path / "run"), "--no-progress"]
  assert cli.main(words) == 2
  error = capsys.readouterr().err
  assert "logits are not finite" in error
  assert error.count("\n") == 1


def test_torn_checkpoints_are_told_of_in_one_line(finished, tmp_path):
  """The newest whole one is used; without any the run is refused."""
  run, results = finished
  folder = tmp_path / "run"
  shutil.copytree(run.folder, folder)
  cell = folder / "perturbations" / "small" / "0.1" / "universal"
  older, newest = sorted((cell / "checkpoints").iterdir())
  words = ["uap", str(run.folder.parent / "colors.py"), "--out", str(folder)]

  def again():
    (cell / "outcome.json").unlink()
    done = subprocess.run(
      [sys.executable, "-m", "jaxadv", *words, "--no-progress"],
      capture_output=True,
      text=True,
    )
    return done.returncode, done.stderr

  (newest / "about.json").unlink()
  status, error = again()
  assert status == 0
  assert f"{newest} is torn (about.json: No such file or directory)" in error
  assert "step 3 is used" in error
  assert error.count("\n") == 1
  drop = lambda row: {k: v for k, v in row.items() if k != "seconds"}
  assert list(map(drop, rows(folder))) == list(map(drop, results["rows"]))
  for torn in (older, newest):
    (torn / "about.json").unlink()
  status, error = again()
  assert status == 2
  assert f"{newest} is torn" in error
  assert error.count("\n") == 1


def test_checkpoints_of_another_run_are_refused(finished, tmp_path, capsys):
  """A folder of checkpoints that was copied to where others belong."""
  run, _ = finished
  folder = tmp_path / "run"
  shutil.copytree(run.folder, folder)
  cells = folder / "perturbations" / "small"
  (cells / "0.1" / "universal" / "outcome.json").unlink()
  shutil.rmtree(cells / "0.1" / "universal" / "checkpoints")
  shutil.copytree(
    cells / "0.5" / "universal" / "checkpoints",
    cells / "0.1" / "universal" / "checkpoints",
  )
  words = ["uap", str(run.folder.parent / "colors.py"), "--out", str(folder)]
  assert cli.main([*words, "--no-progress"]) == 2
  error = capsys.readouterr().err
  assert "is of another run: eps: checkpoint has 3.46" in error
  assert error.count("\n") == 1


def test_numbers_of_a_study_are_checked():
  fine = {"victims": {"a": None}, "perturbations": {"p": None}}
  for changes, message in (
    ({"shares": (0.0,)}, "shares above 0"),
    ({"shares": ()}, "shares above 0"),
    ({"craft_steps": 0}, "write 1 or more"),
    ({"targets": (0,)}, r"`targets` is \(0,\) without `targeted`"),
    ({"perturbations": {}}, "name at least one"),
    ({"perturbations": {"a/b": None}}, "has 'a/b'"),
    ({"victims": {}}, "name at least one"),
  ):
    with pytest.raises(experiments.ConfigError, match=message):
      experiments.UniversalStudy(**fine | changes)


def test_another_kind_of_config_is_refused(capsys, tmp_path):
  config = str(CONFIGS / "demo.py")
  assert cli.main(["uap", config, "--out", str(tmp_path / "run")]) == 2
  assert "this needs a UniversalStudy" in capsys.readouterr().err


def test_a_real_pack_end_to_end(tmp_path):
  try:
    run = universal_job.prepare(
      "configs/uap_blood.py", quick=True, out=tmp_path / "run"
    )
  except universal_job.JobError as error:
    pytest.skip(f"no real pack: {error}")
  results = universal_job.craft(run)
  assert results["classes"] == ["RBC", "WBC", "Platelets"]
  found = {row["perturbation"]: row for row in results["rows"]}
  assert list(found) == ["universal", "to RBC", "random ball", "random sign"]
  for row in found.values():
    assert row["l2"] <= row["eps"] * (1 + 1e-5)
  assert found["random ball"]["fooling_test_stored"] < 0.2
  place = run.folder / "perturbations/vgg16/0.04/universal/outcome.json"
  counts = json.loads(place.read_text())["counts"]["test"]["stored"]
  assert np.sum(counts) == 90
