"""`jaxadv defend` and `analyse`: rows, checks, resuming after a kill, refusals."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import (
  analysis_job,
  cli,
  config_files,
  defence_job,
  defence_report,
  experiments,
  robustness,
  trust,
  victim_job,
)

CONFIG = """
import optax
from jaxadv import attacks, defences
from jaxadv.experiments import DefenceStudy, Recipe
from jaxadv.models import ConvNet
from jaxadv.robustness import Effort

def get_config(*, quick=False):
  return DefenceStudy(
    recipe=Recipe(
      model=ConvNet(num_classes=CLASSES, width=4, depth=2, norm="batch"),
      optimizer=optax.adam(3e-2), data=("PACK",), holdout=0.25, train_steps=20,
      batch_size=8, checkpoint_every=5, monitor=attacks.pgd(0.1, num_steps=3),
    ),
    defences={"NAME": defences.adversarial_training(0.1, num_steps=2)},
    seeds=(0, 1), eps=0.1, radii=(0.05, 0.1), num_images=9,
    effort=Effort(4, 2, 10, 0.6, 8, 40),
  )
"""
MODELS = ["standard 0", "standard 1", "at 0", "at 1"]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
  path = tmp_path_factory.mktemp("pack") / "colors.npz"
  return helpers.color_pack(path, train=48, test=12)


def write_config(folder, pack, *, name="at", classes=3):
  path = folder / "colors.py"
  text = CONFIG.replace("PACK", str(pack)).replace("NAME", name)
  path.write_text(text.replace("CLASSES", str(classes)))
  return path


@pytest.fixture(scope="module")
def finished(pack, tmp_path_factory):
  folder = tmp_path_factory.mktemp("finished")
  run = defence_job.prepare(write_config(folder, pack), out=folder / "run")
  return run, defence_job.defend(run)


def test_every_model_and_radius_has_a_row_and_every_model_its_checks(finished):
  run, results = finished
  cells = [(row["model"], row["eps"]) for row in results["rows"]]
  assert cells == [(model, eps) for model in MODELS for eps in (0.05, 0.1)]
  assert json.loads((run.folder / "results.json").read_text()) == results
  assert results["gradients"] == {"at": 2}
  assert results["images"] == 9
  std = run.victims.tasks["at 0"].parts.train.images.std((0, 1, 2)) / 255
  listed = ", ".join(f"{25.5 / value:.2f}" for value in std)
  assert results["budget"] == f"25.5/255 in pixels ({listed} /255 normalized)"
  for row in results["rows"]:
    assert row["accuracy worst"] <= row["accuracy apgd"] <= row["accuracy clean"]
    for view in ("pgd", "square"):
      assert (f"accuracy {view}" in row) == (row["eps"] == 0.1)
  for model in MODELS:
    assert [check["name"] for check in results["checks"][model]][2:4] == [
      "fgsm",
      "steps",
    ]


def test_rates_and_checks_are_those_of_the_stored_logits(finished):
  run, results = finished
  with np.load(run.folder / "attacked" / "at 1" / "25.5.npz") as stored:
    found = dict(stored)
  assert set(found) == set(robustness.VIEWS)
  row = next(r for r in results["rows"] if r["model"] == "at 1" and r["eps"] == 0.1)
  right = (found["pgd"].argmax(1) == run.test.labels).mean()
  assert row["accuracy pgd"] == pytest.approx(right)
  checks = trust.judge(found, run.test).checks
  assert results["checks"]["at 1"] == [check._asdict() for check in checks]


def test_the_table_has_means_over_the_seeds_with_their_margin(finished):
  _, results = finished
  heads, lines = defence_report.table(results)
  assert [line[0] for line in lines] == ["standard", "at"]
  assert [line[1] for line in lines] == ["0", "2"]
  at = [r for r in results["rows"] if r["kind"] == "at" and r["eps"] == 0.05]
  a, b = (r["accuracy apgd"] for r in at)
  half = 12.7062 * abs(a - b) / 2  # Student's t of one degree of freedom
  wanted = f"{50 * (a + b):.0f} ± {100 * half:.0f}"
  assert lines[1][heads.index("APGD 12.75")] == wanted


def test_a_failed_check_is_told(finished):
  _, results = finished
  found = results["checks"]["at 0"]
  checks = [{**check, "passed": check["name"] != "radius"} for check in found]
  doubtful = results | {"checks": results["checks"] | {"at 0": checks}}
  told = defence_report.verdicts(doubtful)
  assert ("at 0", "radius") in [line[:2] for line in told]
  page = defence_report.page(doubtful)
  assert "Unreliable" in page
  assert told[0][2] in page


def test_training_alone_says_that_its_scores_are_clean(
  finished, pack, tmp_path, capsys
):
  run, _ = finished
  config = write_config(tmp_path, pack)
  words = ["train", config, "--out", run.folder, "--no-progress"]
  assert cli.main([str(word) for word in words]) == 0
  assert "of clean images: no defence was put to the test" in capsys.readouterr().out


def test_a_killed_run_ends_with_the_same_bits(finished, pack, tmp_path):
  run, results = finished
  config, out = write_config(tmp_path, pack), tmp_path / "run"
  words = ["defend", str(config), "--out", str(out), "--no-progress"]
  command = [sys.executable, "-m", "jaxadv", *words]
  for waits_for in ("victims/at 0/checkpoints/step_*", "attacked/at 0/*.npz"):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob(waits_for)):
      assert process.poll() is None, "the run ended before it could be killed"
      assert time.monotonic() < deadline
      time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert str(out / "report.html") in done.stdout
  for one in run.folder.glob("attacked/*/*.npz"):
    other = out / one.relative_to(run.folder)
    with np.load(one) as a, np.load(other) as b:
      assert set(a) == set(b) != set()
      for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=f"{other} {name}")
  again = json.loads((out / "results.json").read_text())
  assert again["rows"] == results["rows"]


def test_another_study_is_refused_and_one_seed_can_be_asked_for(
  finished, pack, tmp_path, capsys
):
  run, _ = finished
  copy = tmp_path / "copy"
  shutil.copytree(run.folder, copy)
  other = write_config(tmp_path, pack, name="other")
  assert cli.main(["defend", str(other), "--out", str(copy), "--no-progress"]) == 2
  assert "config" in capsys.readouterr().err
  seeded = defence_job.prepare(other, out=tmp_path / "s", overrides={"seed": 5})
  assert list(seeded.victims.tasks) == ["standard 5", "other 5"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "standard"}, "`defences` has 'standard', which is the plain model"),
    ({"classes": 2}, "gives logits (1, 2), labels of 3 classes need (1, 3)"),
  ],
)
def test_bad_studies_are_refused_in_one_line(changes, message, pack, tmp_path, capsys):
  config = write_config(tmp_path, pack, **changes)
  assert cli.main(["defend", str(config), "--out", str(tmp_path / "run")]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"seeds": ()}, r"`seeds` is \(\)"),
    ({"seeds": (1, 1)}, r"write different ones"),
    ({"eps": 0.3}, r"`eps` too"),
    ({"radii": (0.0, 0.1)}, r"write different radii above 0"),
    ({"radii": (0.1, 0.1)}, r"write different radii above 0"),
    ({"num_images": 0}, r"`num_images` is 0"),
    ({"defences": {}}, r"`defences` is empty"),
  ],
)
def test_numbers_that_cannot_work_are_refused(fields, message, pack, tmp_path):
  study = config_files.load_config(write_config(tmp_path, pack)).experiment
  known = {"recipe": study.recipe, "defences": study.defences, "eps": 0.1}
  known |= {"radii": (0.1,)}
  with pytest.raises(experiments.ConfigError, match=message):
    experiments.DefenceStudy(**known | fields)


def test_masks_are_refused(discs, tmp_path):
  config = write_config(tmp_path, discs)
  text = config.read_text().replace(
    'ConvNet(num_classes=3, width=4, depth=2, norm="batch")', "M"
  )
  text = text.replace("import ConvNet", "import UNet\nM = UNet(num_classes=2, width=4)")
  config.write_text(text)
  with pytest.raises(defence_job.JobError, match=r"labels are masks"):
    defence_job.prepare(config, out=tmp_path / "run")


def test_gains_are_differences_of_models_of_one_seed(finished):
  _, results = finished
  heads, ((name, *cells),) = defence_report.gains(results)
  rows = {row["model"]: row for row in results["rows"] if row["eps"] == 0.1}
  won = [
    rows[f"at {seed}"]["accuracy pgd"] - rows[f"standard {seed}"]["accuracy pgd"]
    for seed in (0, 1)
  ]
  assert name == "at"
  assert cells[heads.index("PGD") - 1].split(" ± ")[0] == f"{100 * sum(won) / 2:.0f}"


def test_the_docs_page_is_made_of_finished_runs(finished, capsys):
  run, results = finished
  helpers.benchmark("defences").main([str(run.folder)])
  page = capsys.readouterr().out
  for line in defence_report.table(results)[1]:
    assert " | ".join(line) in page
  assert "Won and lost at 25.5/255" in page


def test_an_analysis_looks_into_a_model_of_each_kind(finished):
  run, results = finished
  found = analysis_job.analyse(run)
  folder = run.folder / "analysis"
  assert json.loads((folder / "results.json").read_text()) == found
  assert found["rows"] == results["rows"]
  pictures = [path.relative_to(folder) for path in folder.rglob("*.png")]
  each, shared = {"heat_maps", "embedding", "landscape"}, {"accuracy", "layers"}
  wanted = {f"{kind}/{name}" for kind in ("standard", "at") for name in each}
  assert {str(path.with_suffix("")) for path in pictures} == wanted | shared
  page = (folder / "report.html").read_text()
  assert page.count("data:image/png") == len(pictures)
  numbers = found["analysis"]["at"]
  assert 0 <= numbers["iou"] <= 1
  assert list(numbers["distances"]) == ["stage1", "stage2", "pooled"]
  assert all(0 < distance < 2 for distance in numbers["distances"].values())
  assert numbers["probe_attacked"] <= numbers["probe_clean"]
  heads, lines = analysis_job.table(found)
  assert [line[0] for line in lines] == ["standard", "at"]
  assert len(heads) == len(lines[0]) == 6


SMALLEST = {
  "train_steps=20": "train_steps=2",
  "seeds=(0, 1)": "seeds=(0,)",
  "radii=(0.05, 0.1)": "radii=(0.1,)",
  "Effort(4, 2, 10, 0.6, 8, 40)": "Effort(2, 1, 2, 0.6, 2, 5)",
}


def write_smallest(folder, pack, changes):
  path = write_config(folder, pack)
  text = path.read_text()
  for before, after in (SMALLEST | changes).items():
    assert before in text
    text = text.replace(before, after)
  path.write_text(text)
  return path


def test_label_sets_are_defended_and_analysed(pack, tmp_path):
  with np.load(pack) as arrays:
    arrays = dict(arrays)
  # half of the images have no finding; the last finding is on none
  labels = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]], np.int32)
  np.savez(tmp_path / "sets.npz", **arrays | {"labels": labels[np.arange(60) % 4]})
  changes = {"num_images=9": "num_images=None"}
  config = write_smallest(tmp_path, tmp_path / "sets.npz", changes)
  run = defence_job.prepare(config, out=tmp_path / "run")
  found = analysis_job.analyse(run)
  assert found["labels"] == "set"
  assert found == json.loads((run.folder / "analysis" / "results.json").read_text())

  heads, lines = defence_report.table(found)
  with np.load(run.folder / "attacked" / "at 0" / "25.5.npz") as stored:
    apgd = stored["apgd"]
  wanted = 50 * sum(_auroc(apgd[:, k], run.test.labels[:, k]) for k in (0, 1))
  assert lines[1][heads.index("APGD 25.5")] == f"{wanted:.0f}"
  score = "auroc apgd"
  plain, at = (row[score] for row in found["rows"])
  heads, ((_, *cells),) = defence_report.gains(found)
  assert cells[heads.index("APGD") - 1] == f"{round(100 * (at - plain))}"
  assert "AUROC, mean over the findings" in (run.folder / "report.html").read_text()

  heads, lines = analysis_job.table(found)
  assert heads[-3:] == ["correlations, distance", "mean |r|, clean", "attacked"]
  numbers = found["analysis"]["at"]
  assert numbers["correlation_distance"] > 0
  assert lines[1][-3] == f"{numbers['correlation_distance']:.2f}"
  assert 0 <= numbers["probe_clean"] <= 1  # of any finding and none
  assert (run.folder / "analysis" / "at" / "correlations.png").exists()


def _auroc(scores, labels):
  """The share of pairs in the right order."""
  order = np.sign(scores[labels == 1][:, None] - scores[labels == 0][None])
  return (1 + order).mean() / 2


def test_a_score_that_is_nowhere_defined_leaves_a_gap_in_the_curves(finished):
  _, results = finished
  rows = [{**row, "accuracy worst": None} for row in results["rows"]]
  clean, *rest = defence_report.curves(results | {"rows": rows})["at"]
  assert 0 <= clean <= 1
  assert all(map(math.isnan, rest))
  page = defence_report.page(results | {"rows": rows})
  assert "at other radii of APGD and the clean image" in page


NOT_FINITE = """class Stored(ConvNet):
  def __call__(self, image, train=False):
    logits, features = super().__call__(image, train)
    grey = 255 * image
    stored = (abs(grey - grey.round()) < 1e-3).all((1, 2, 3))
    return jnp.where(stored[:, None], logits, jnp.nan), features

def get_config"""


def test_logits_that_break_under_attack_are_one_line(pack, tmp_path, capsys):
  changes = {
    "import optax": "import flax.linen as nn, jax.numpy as jnp, optax",
    "ConvNet(num": "Stored(num",
    "def get_config": NOT_FINITE,
  }
  config = write_smallest(tmp_path, pack, changes)
  words = ["defend", str(config), "--out", str(tmp_path / "run"), "--no-progress"]
  assert cli.main(words) == 2
  error = capsys.readouterr().err
  assert "standard 0: on 9 of 9 images the logits are not finite (program" in error
  assert error.count("\n") == 1


def test_features_that_cannot_be_explained_are_one_line(finished, monkeypatch):
  run, _ = finished
  train = victim_job.train

  def copies(task, **options):
    victim = train(task, **options)

    def predict(variables, images):
      logits, features = victim.predict(variables, images)
      return logits, {name: jnp.copy(value) for name, value in features.items()}

    return victim._replace(predict=predict)

  monkeypatch.setattr(victim_job, "train", copies)
  with pytest.raises(defence_job.JobError, match=r"standard: the logits do not depend"):
    analysis_job.analyse(run)
