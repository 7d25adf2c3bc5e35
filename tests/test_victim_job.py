"""Training classifiers: selection, resuming after a kill, refusals, real packs."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time

import helpers
import jax
import numpy as np
import optax
import pytest

from jaxadv import (
  assessment,
  attacks,
  checkpoints,
  cli,
  combine,
  data,
  defences,
  experiments,
  training,
  victim_job,
  victims,
)
from jaxadv.models import ConvNet, UNet

CONFIG = """
import optax
from jaxadv import augment, training
from jaxadv.experiments import Recipe, UniversalStudy
from jaxadv.models import ConvNet

def get_config(*, quick=False):
  recipe = Recipe(
    model=ConvNet(num_classes=CLASSES, width=4, depth=2), optimizer=optax.adam(3e-2),
    data=("PACK",), holdout=0.25, train_steps=STEPS, batch_size=6, checkpoint_every=4,
    augment=augment.chain(training.flips, augment.affine()), EXTRA
  )
  return RETURNS
"""
STUDY = "UniversalStudy(victims={'a': recipe, 'b': recipe}, perturbations={'p': None})"


def stripes(kind="class", n=48, **changes):
  """Stripes along rows, columns or both under noise; rows and columns are rare."""
  rng = np.random.default_rng(0)
  classes = np.minimum(np.arange(n) % 6, 2)
  findings = np.stack([classes != 1, classes != 0], 1)
  wave = 45 * np.sign(np.sin(np.arange(8) * np.pi / 2 + 0.5))
  rows, columns = wave[None, :, None], wave[None, None, :]
  level = 120 + findings[:, :1, None] * rows + findings[:, 1:, None] * columns
  images = (level + rng.normal(0, 25, (n, 8, 8))).clip(0, 255).astype(np.uint8)
  names = ["rows", "columns", "both"] if kind == "class" else ["rows", "columns"]
  arrays = {
    "images": images[..., None],
    "labels": classes if kind == "class" else findings,
    "split": np.array(["train"] * (n - 12) + ["test"] * 12),
    "class_names": np.array(names),
  }
  return arrays | changes


def write(
  folder, *, arrays=None, steps=12, classes=3, extra="balance=True", returns="recipe"
):
  """A pack and a config for it."""
  folder.mkdir(parents=True, exist_ok=True)
  np.savez(folder / "stripes.npz", **(stripes() if arrays is None else arrays))
  text = CONFIG.replace("PACK", str(folder / "stripes.npz")).replace("RETURNS", returns)
  text = text.replace("STEPS", str(steps)).replace("CLASSES", str(classes))
  path = folder / "small.py"
  path.write_text(text.replace("EXTRA", extra))
  return str(path)


def results(folder):
  return json.loads((folder / "results.json").read_text())


def test_a_classifier_is_trained_judged_and_shown(tmp_path, capsys):
  config = write(tmp_path, steps=40)
  out = tmp_path / "out"
  assert cli.main(["train", config, "--out", str(out)]) == 0
  shown, progress = capsys.readouterr()
  for word in ("balanced accuracy", "selected step", "recall", "both"):
    assert word in shown
  for word in ("40/40", "best"):
    assert word in progress
  found = results(out / "victim")
  assert str(out / "victim" / "results.json") in shown
  assert found["accuracy"] > 0.7
  assert found["images"] == 12
  assert set(found["classes"]) == {"rows", "columns", "both"}
  assert found["selected_step"] % 4 == 0
  assert 0.5 < found["validation_balanced_accuracy"] <= 1


def test_a_label_set_is_trained_and_judged_by_finding(tmp_path):
  config = write(tmp_path, arrays=stripes("set"), steps=40, classes=2, extra="")
  run = victim_job.prepare(config, out=tmp_path / "out")
  found = victim_job.train_all(run)["small"]
  assert found["auroc"] > 0.8
  assert set(found["classes"]) == {"rows", "columns"}
  assert found["classes"]["rows"]["positives"] == 10
  assert "validation_auroc" in found


def test_a_study_trains_each_of_its_victims(tmp_path, capsys):
  config = write(tmp_path, returns=STUDY)
  out = tmp_path / "out"
  words = ["train", config, "--out", str(out), "--no-progress", "--steps", "4"]
  assert cli.main(words) == 0
  assert str(out / "victims") in capsys.readouterr().out
  one, two = (results(out / "victims" / name) for name in "ab")
  assert one == two
  assert one["selected_step"] == 4


def fading_recipe(pack, **changes):
  """Learns, and from step 36 on breaks what it learned by far too large steps."""
  fields = {
    "model": ConvNet(num_classes=3, width=4, depth=2),
    "optimizer": optax.adam(optax.piecewise_constant_schedule(3e-2, {36: 100.0})),
    "data": (str(pack),),
    "holdout": 0.25,
    "train_steps": 48,
    "batch_size": 6,
    "balance": True,
    "checkpoint_every": 6,
  }
  return experiments.Recipe(**fields | changes)


def test_the_best_checkpoint_is_the_victim_and_not_the_last(tmp_path):
  write(tmp_path)
  recipe = fading_recipe(tmp_path / "stripes.npz")
  parts = victim_job.load(recipe)

  def train(name, steps=48, validation=parts.validation):
    changed = fading_recipe(tmp_path / "stripes.npz", train_steps=steps)
    folder = tmp_path / name
    return victims.train(changed, parts.train, folder, validation=validation)

  def score(variables):
    predict = assessment.predictor(recipe.model)
    return assessment.assess(predict, variables, parts.validation)["balanced_accuracy"]

  # Every candidate, as a training of its own that is selected on nothing.
  last = {n: train(f"to {n}", n, None).variables for n in range(6, 49, 6)}
  candidates = {n: score(variables) for n, variables in last.items()}
  best = max(candidates, key=lambda n: (candidates[n], n))
  assert candidates[48] < candidates[best] - 0.1
  found = train("selected")
  assert int(found.step) == best < 48
  assert float(found.score) == pytest.approx(candidates[best])
  helpers.assert_trees_equal(found.variables, last[best])


def test_a_killed_training_ends_with_the_same_bits_and_the_same_choice(tmp_path):
  config = write(tmp_path, steps=60)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  for steps in (1, 6):
    kill_after(steps, config, killed)
  assert not (killed / "victim" / "results.json").exists()
  for folder in (killed, whole):
    subprocess.run(command(config, folder), check=True, capture_output=True)
  assert results(killed / "victim") == results(whole / "victim")
  helpers.assert_trees_equal(stored(config, killed), stored(config, whole))


def stored(config, folder):
  """The last state and the best one, with the keys as numbers."""
  task = victim_job.prepare(config).tasks["small"]
  fresh = victims._initial(task.recipe, task.parts.train)
  start = functools.partial(victims._start, task.recipe, True, fresh)
  state = checkpoints.restore(folder / "victim/checkpoints", jax.eval_shape(start))
  key = jax.random.key_data(state.train.key)
  return state._replace(train=state.train._replace(key=key))


def command(config, folder):
  words = ["train", config, "--out", str(folder), "--no-progress"]
  return [sys.executable, "-m", "jaxadv", *words]


def kill_after(count, config, folder):
  """SIGKILL once `count` checkpoints were seen; the run must not have ended."""
  process = subprocess.Popen(command(config, folder), stdout=subprocess.DEVNULL)
  seen, deadline = set(), time.monotonic() + 300
  while len(seen) < count:
    seen |= {path.name for path in folder.glob("victim/checkpoints/step_*")}
    assert process.poll() is None, "the run ended before it could be killed"
    assert time.monotonic() < deadline
    time.sleep(0.002)
  os.kill(process.pid, signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL


def test_the_choice_does_not_depend_on_the_test_part(tmp_path):
  config = write(tmp_path / "a")
  arrays = stripes()
  arrays["images"][-12:] = 255 - arrays["images"][-12:]
  other = write(tmp_path / "b", arrays=arrays)
  one, two = (victim_job.prepare(c).tasks["small"] for c in (config, other))
  assert one.settings == two.settings


def test_another_augmentation_loss_or_selection_is_another_victim(tmp_path):
  write(tmp_path)
  pack = tmp_path / "stripes.npz"
  recipe = fading_recipe(pack)

  def differs(**changes):
    tasks = []
    for each in (recipe, fading_recipe(pack, **changes)):
      tasks.append(victim_job.plan(each, victim_job.load(each), tmp_path))
    one, two = (task.settings for task in tasks)
    return {name for name in one if one[name] != two[name]}

  assert differs() == set()
  assert differs(augment=None) == {"augment"}
  assert differs(balance=False) == {"balance"}
  assert differs(loss=training.dice_cross_entropy) == {"loss"}
  eps = 0.1
  assert differs(defence=defences.mart(eps)) == {"defence"}
  assert differs(monitor=attacks.pgd(eps)) == {"monitor"}
  assert differs(collapse=0.2) == {"collapse"}
  assert differs(checkpoint_every=5) == {"selected_on"}
  assert differs(holdout=0.5) == {"selected_on", "train_data"}
  assert differs(holdout=0.0) == {"selected_on", "train_data"}


NOT_BOTH = stripes(split=np.where(stripes()["labels"] == 2, "test", "train"))
BAD = [
  ({"classes": 2}, [], "gives logits (1, 2), labels of 3 classes need (1, 3)"),
  ({"arrays": NOT_BOTH}, [], "train part: no image of class both"),
  ({"arrays": stripes(n=19)}, [], "training images are fewer than a batch of 6; lower"),
  ({"arrays": stripes("set"), "classes": 2}, [], "balance needs one class per image"),
  ({"extra": "val_split='val'"}, [], "`val_split` and `holdout` are both set"),
  ({"extra": "collapse=0.0"}, [], "`collapse` is 0.0; write a fall above 0"),
  ({"extra": "defence=([], max)"}, [], "`defence`: TypeError: unhashable type: 'list'"),
  ({}, ["--pairs", "3"], "a Recipe has no num_pairs; leave the option out"),
  ({}, ["--steps", "0"], "`train_steps` is 0; write 1 or more"),
  ({}, ["--data", "missing"], "no file at 'missing'"),
  ({"arrays": stripes(images=np.zeros((48, 1, 1, 1), np.uint8))}, [], "at least 2"),
]


@pytest.mark.parametrize(("settings", "words", "message"), BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
  settings, words, message, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  config = write(tmp_path, **settings)
  before = sorted(tmp_path.rglob("*"))
  assert cli.main(["train", config, "--no-progress", *words]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1
  assert sorted(tmp_path.rglob("*")) == before


def test_a_selection_on_the_test_images_is_refused(tmp_path):
  """Without split words every fifth image is val and test alike."""
  arrays = stripes()
  arrays.pop("split")
  write(tmp_path, arrays=arrays)
  recipe = fading_recipe(tmp_path / "stripes.npz", holdout=0.0, val_split="val")
  with pytest.raises(victim_job.JobError, match=r"9 validation images are test images"):
    victim_job.load(recipe)


def test_a_segmentation_model_for_classes_is_refused(tmp_path):
  write(tmp_path)
  recipe = fading_recipe(tmp_path / "stripes.npz", model=UNet(num_classes=3, depth=2))
  with pytest.raises(victim_job.JobError, match=r"gives logits \(1, 8, 8, 3\)"):
    victim_job.plan(recipe, victim_job.load(recipe), tmp_path)


def test_training_starts_from_given_weights(tmp_path):
  model = ConvNet(num_classes=3, width=4, depth=2)
  folder = tmp_path / "data"
  write(folder)
  ones = lambda fresh: jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, "f"), fresh)
  recipe = experiments.Recipe(
    model=model,
    start=ones,
    optimizer=optax.set_to_zero(),
    data=(str(folder / "stripes.npz"),),
    train_steps=1,
  )
  parts = victim_job.load(recipe)
  task = victim_job.plan(recipe, parts, tmp_path / "victim")
  for leaf in jax.tree.leaves(victim_job.train(task).variables["params"]):
    assert (np.asarray(leaf) == 0.5).all()
  fresh = victim_job.plan(dataclasses.replace(recipe, start=None), parts, tmp_path)
  assert task.settings["start"] != fresh.settings["start"]

  def missing(fresh):
    raise FileNotFoundError("no weights at 'a.npz'")

  with pytest.raises(victim_job.JobError, match=r"`start`: .*no weights at 'a\.npz'"):
    victim_job.plan(dataclasses.replace(recipe, start=missing), parts, tmp_path)


def test_images_are_resized_on_request(tmp_path):
  folder = tmp_path / "data"
  write(folder)
  recipe = experiments.Recipe(
    model=ConvNet(num_classes=3, width=4, depth=2),
    optimizer=optax.sgd(0.1),
    data=(str(folder / "stripes.npz"),),
    holdout=0.25,
    side=12,
  )
  parts = victim_job.load(recipe)
  for part in (parts.train, parts.validation, parts.test):
    assert part.images.shape[1:] == (12, 12, 1)


def test_masks_are_selected_by_their_overlap(tmp_path, discs):
  recipe = experiments.Recipe(
    model=UNet(width=4, depth=1),
    optimizer=optax.adam(1e-2),
    data=(str(discs),),
    holdout=0.25,
    augment=None,
    train_steps=4,
    batch_size=2,
    checkpoint_every=2,
  )
  task = victim_job.plan(recipe, victim_job.load(recipe), tmp_path)
  found = victim_job.train(task).evaluation
  assert found["selected_step"] in (2, 4)
  assert 0 <= found["validation_iou"] <= 1
  assert found["images"] == 8


# Five grades are too hard for a few steps, and two steps from ImageNet are a start.
REAL = {"train_blood": 0.7, "train_modality": 0.7, "train_pneumonia": 0.7}
REAL |= {"train_retinopathy": 0.0, "train_blood_lite0": 0.2}


SLOW = ("train_blood_lite0",)  # minutes to compile


@pytest.mark.parametrize(
  ("name", "reach"),
  [
    pytest.param(*row, marks=pytest.mark.long if row[0] in SLOW else ())
    for row in REAL.items()
  ],
)
def test_the_real_packs(name, reach, tmp_path):
  path = os.path.join(os.path.dirname(__file__), "..", "configs", f"{name}.py")
  try:
    run = victim_job.prepare(path, quick=True, out=tmp_path)
  except victim_job.JobError as error:
    pytest.skip(f"no real pack: {error}")
  assert victim_job.train_all(run)[name]["balanced_accuracy"] > reach


def test_a_real_label_set(tmp_path):
  recipe = experiments.Recipe(
    model=ConvNet(num_classes=14, width=4, depth=3),
    optimizer=optax.adam(1e-2),
    data=("cxr_nih14_multilabel_128",),
    holdout=0.2,
    augment=None,
    train_steps=8,
    checkpoint_every=4,
  )
  try:
    parts = victim_job.load(recipe)
  except victim_job.JobError as error:
    pytest.skip(f"no real pack: {error}")
  found = victim_job.train(victim_job.plan(recipe, parts, tmp_path)).evaluation
  assert len(found["classes"]) == 14
  assert found["classes"]["Hernia"]["auroc"] is None
  assert found["images"] == len(data.load(recipe.data[0], split="test").images)


def rising(eps):
  """A fast defence on stripes, watched by a longer attack."""
  return {
    "defence": defences.fast_adversarial_training(eps),
    "monitor": attacks.pgd(eps, num_steps=5),
  }


def test_a_defended_victim_is_the_checkpoint_that_scores_best_under_the_monitor(
  tmp_path,
):
  write(tmp_path)
  recipe = fading_recipe(tmp_path / "stripes.npz", **rising(8 / 255))
  parts = victim_job.load(recipe)
  found = victims.train(
    recipe, parts.train, tmp_path / "run", validation=parts.validation
  )

  def score(attack):
    return assessment.assess(
      assessment.predictor(recipe.model),
      found.variables,
      parts.validation,
      attack=attack,
    )["balanced_accuracy"]

  assert 0 < int(found.step) < 48
  assert float(found.score) == pytest.approx(score(recipe.monitor))
  assert score(recipe.monitor) < score(combine.identity)


def test_a_collapsed_training_stops_and_stays_stopped(tmp_path):
  write(tmp_path)
  recipe = fading_recipe(
    tmp_path / "stripes.npz", train_steps=90, collapse=0.2, **rising(4 / 255)
  )
  parts = victim_job.load(recipe)
  folder = tmp_path / "run"
  train = functools.partial(
    victims.train, recipe, parts.train, folder, validation=parts.validation
  )
  found = train()
  stopped = checkpoints.latest(folder)
  assert 36 < stopped < 90  # the steps are far too large from 36 on
  helpers.assert_trees_equal(train(), found)
  assert checkpoints.latest(folder) == stopped


def diverging_recipe(pack, broken_from=13, **changes):
  """From one step on, updates are so large that nothing finite is left."""
  rate = optax.piecewise_constant_schedule(3e-2, {broken_from: 1e38})
  return fading_recipe(pack, optimizer=optax.sgd(rate), **changes)


def test_a_training_that_diverges_ends_with_the_best_before_and_says_where(tmp_path):
  write(tmp_path)
  recipe = diverging_recipe(tmp_path / "stripes.npz")
  parts = victim_job.load(recipe)
  task = victim_job.plan(recipe, parts, tmp_path / "run")
  first, again = (victim_job.train(task).evaluation for _ in range(2))
  assert first == again == results(tmp_path / "run")
  assert 0 < first["selected_step"] <= 12
  assert first["selected_step"] < first["collapsed_at"] < 48
  recipe = diverging_recipe(tmp_path / "stripes.npz", broken_from=1)
  task = victim_job.plan(recipe, parts, tmp_path / "never")
  with pytest.raises(victim_job.JobError, match=r"not finite; train it anew"):
    victim_job.train(task)


class Shifted(ConvNet):
  """A network that carries an array."""

  mean: np.ndarray = None


def test_a_model_that_cannot_be_hashed_is_refused(tmp_path):
  write(tmp_path)
  model = Shifted(num_classes=3, width=4, depth=2, mean=np.zeros(1))
  recipe = fading_recipe(tmp_path / "stripes.npz", model=model)
  with pytest.raises(victim_job.JobError, match=r"cannot be hashed.*; write tuples"):
    victim_job.plan(recipe, victim_job.load(recipe), tmp_path)


def test_a_step_gives_its_state_away_and_the_best_stays(tmp_path):
  write(tmp_path)
  recipe = fading_recipe(tmp_path / "stripes.npz")
  parts = victim_job.load(recipe)
  step = victims._step_of(recipe, parts.train)
  state = victims._start(recipe, True, victims._initial(recipe, parts.train))
  batch = next(data.batches(parts.train, 6, seed=0))
  after, _ = step(state.train, batch)
  judged = victims._judge(recipe, parts.validation, None, state.best, after)
  step(judged.train, batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(after.params))
  assert np.isfinite(jax.tree.leaves(judged.best.variables)[0]).all()


def test_weights_moved_up_the_loss_are_another_training(tmp_path):
  write(tmp_path)
  recipe = fading_recipe(tmp_path / "stripes.npz", train_steps=2, **rising(0.05))
  parts = victim_job.load(recipe)
  moved = dataclasses.replace(recipe, weights=training.adversarial_weights(0.1))
  trained = [
    victims.train(r, parts.train, tmp_path / name, validation=parts.validation)
    for r, name in ((recipe, "a"), (moved, "b"))
  ]
  kernels = [jax.tree.leaves(each.variables)[-1] for each in trained]
  assert np.abs(kernels[0] - kernels[1]).max() > 1e-5
  tasks = [victim_job.plan(r, parts, tmp_path) for r in (recipe, moved)]
  assert tasks[0].settings["defence"] != tasks[1].settings["defence"]
  with pytest.raises(experiments.ConfigError, match=r"`weights` is set without"):
    dataclasses.replace(moved, defence=None)


def test_what_watches_needs_images_to_watch(tmp_path):
  for field in ({"monitor": attacks.pgd(0.1)}, {"collapse": 0.2}):
    with pytest.raises(experiments.ConfigError, match=r"need validation images"):
      fading_recipe(tmp_path, holdout=0.0, **field)
  with pytest.raises(experiments.ConfigError, match=r"`loss` and `defence`"):
    fading_recipe(tmp_path, loss=training.focal(2.0), defence=defences.mart(0.1))
