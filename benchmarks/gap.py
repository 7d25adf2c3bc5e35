"""GAP beside PGD and random signs at the same radius, on classes and on label sets.

    python benchmarks/gap.py --out runs/gap > docs/results/gap.md

Two victims are trained, or read from an earlier run: the blood cells of
`configs/train_blood.py` at 32 pixels, and chest X-rays with 14 findings at 64. Against
each, generators are trained on the images that the victim learned from, and everything
is judged on test images, as stored in 8 bits. No attack sees the truth: all compare
with what the victim decides on the clean image.

`pgd` and `universal` lead away from the decision, `pgd, opposite` to the least likely
class, or to the opposite of every label, `gap` likewise to the one or away; all by the
cross-entropy, but those named `margin`, on label sets, by `losses.label_margin`.
`fooled` is
the share of decisions that changed, with 95 % bootstrap intervals over the images,
`opposite` that of those at the least likely class, `size` the mean of the absolute
change in 1/255, and `gradients` how many of the victim an attack takes per image once
it is trained.

Other models: `table(compare(Task(name, predict, train, test), ...))`.
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxadv import (
  attacks,
  combine,
  config_files,
  data,
  experiments,
  generative,
  loops,
  losses,
  progress,
  records,
  scores,
  summaries,
  targets,
  threats,
  training,
  types,
  victim_job,
  victims,
)
from jaxadv.models import ConvNet, Generator

__all__ = ["Plan", "Task", "compare", "main", "table"]

BLOOD = pathlib.Path(__file__).parents[1] / "configs" / "train_blood.py"
CHEST = experiments.Recipe(
  model=ConvNet(num_classes=14, width=8, norm="batch"),
  optimizer=optax.adamw(1e-3, weight_decay=1e-2),
  data=("cxr_nih14_multilabel_128.npz",),
  side=64,
  augment=training.flips,
  train_steps=200,
  batch_size=32,
)


class Task(NamedTuple):
  """A victim and labelled images.

  Attributes:
    name: of the task.
    predict: images in [0, 1] to logits or `(logits, features)`.
    train: what generators see.
    test: what is attacked.
  """

  name: str
  predict: Callable[[jax.Array], Any]
  train: data.Dataset
  test: data.Dataset


class Plan(NamedTuple):
  """How hard the attacks try."""

  eps: float
  model: Generator = Generator(width=8, depth=2)
  learning_rate: float = 3e-3
  train_steps: int = 300
  craft_steps: int = 100
  batch: int = 16
  pgd_steps: int = 20


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", required=True, type=pathlib.Path)
  parser.add_argument("--eps", type=float, nargs="+", default=[4, 8], help="in 1/255")
  parser.add_argument("--steps", type=int, default=300, help="of each generator")
  options = parser.parse_args(arguments)
  print("# GAP beside PGD and random signs: all numbers")
  blood = config_files.load_config(BLOOD).experiment
  recipes = {"blood cells": dataclasses.replace(blood, side=32), "chest X-rays": CHEST}
  for name, recipe in recipes.items():
    task, about = trained(name, recipe, options.out / name.replace(" ", "_"))
    print(f"\n## {name}\n\n{about}", flush=True)
    for radius in options.eps:
      plan = Plan(radius / 255, train_steps=options.steps)
      print(f"\nRadius {radius:g}/255:\n", table(compare(task, plan)), sep="\n")
      print(flush=True)
  print(summaries.signature(summaries.origin()))


def trained(name, recipe, folder):
  """The victim of a recipe, its images, and how good it is."""
  work = victim_job.plan(recipe, victim_job.load(recipe), folder)
  with records.lock(folder):
    victim = victim_job.train(work, progress=progress.terminal)
  predict = functools.partial(victim.predict, victim.variables)
  found, (train, test) = victim.evaluation, (work.parts.train, work.parts.test)
  about = f"{len(train.images)} images to train on, {len(test.images)} to judge by; "
  about += f"clean accuracy {found['accuracy']:.3f}, AUROC {found['auroc']:.3f}."
  return Task(name, predict, train, test), about


def compare(task, plan):
  """`{attack: columns}` on the test images."""
  x = data.as_float(task.test.images)
  answer = jax.jit(lambda x: types.call(task.predict, x)[0])
  logits = functools.partial(loops.over_batches, answer, size=plan.batch)
  clean, wish = logits(x), _wishes(task, x, plan.batch)
  rows = {"none": _columns(task, clean, clean, wish, np.zeros(1))}
  for name, (attack, gradients, opposite) in _attacks(task, plan).items():
    y = wish["least_likely" if opposite else "predictions"]
    image = np.round(_attacked(task, attack, x, y, plan.batch) * 255) / 255
    row = _columns(task, clean, logits(image), wish, np.abs(image - x))
    rows[name] = row | {"gradients": str(gradients)}
  return rows


def table(rows):
  """A Markdown table."""
  heads = list(next(reversed(rows.values())))
  lines = [[f"`{n}`", *(row.get(h, "0") for h in heads)] for n, row in rows.items()]
  return summaries.markdown(["attack", *heads], lines)


def _attacks(task, plan):
  """`{name: (attack, gradients, whether its y is the opposite)}`."""
  eps, steps = plan.eps, {"num_steps": plan.pgd_steps}
  signs = attacks.random_universal(eps, kind="sign").init
  bits = lambda key, image: signs(key, image).delta
  random = threats.linf(eps)._replace(init=bits)
  away = {
    "prepare": targets.predictions,
    "loss": lambda z, y: -jnp.log(training.task_loss(z, y)),
  }
  rows = {
    "random signs": (_noise(random), 0, False),
    "pgd": (attacks.pgd(eps, **steps), plan.pgd_steps, False),
    "pgd, opposite": (attacks.pgd(eps, **steps, targeted=True), plan.pgd_steps, True),
    "gap, opposite": (_gap(task, plan), 0, False),
    "gap, away": (_gap(task, plan, **away), 0, False),
    "gap, universal": (_gap(task, plan, universal=True, **away), 0, False),
    "universal": (_universal(task, plan), 0, False),
  }
  if task.test.kind == "set":
    loss = lambda z, y: -losses.label_margin(types.decided(z, y))
    pgd = attacks.pgd(eps, **steps, loss=losses.label_margin)
    rows["pgd, margin"] = (pgd, plan.pgd_steps, False)
    gap = _gap(task, plan, prepare=targets.predictions, loss=loss)
    rows["gap, margin"] = (gap, 0, False)
  return rows


def _noise(threat):
  """Its own random signs for every image."""

  def attack(key, predict, x, y):
    delta = jax.vmap(threat.init)(types.example_keys(key, len(x)), x)
    return combine.identity(key, predict, jax.vmap(threat.apply)(x, delta), y)

  return attack


def _gap(task, plan, *, universal=False, **aim):
  """A trained generator as an attack."""
  image = jnp.asarray(data.as_float(task.train.images[:1]))
  variables = dict(jax.jit(plan.model.init)(jax.random.key(1), image))
  apply, params = victims.flax_apply(plan.model), variables.pop("params")
  if universal:
    noise = jax.random.uniform(jax.random.key(2), image.shape[1:])
    apply = generative.from_noise(apply, noise)
  rate = optax.cosine_decay_schedule(plan.learning_rate, plan.train_steps)
  tx = optax.adam(rate)
  state = training.init_state(jax.random.key(0), params, variables, tx)
  step = jax.jit(generative.gap_step(apply, task.predict, tx, plan.eps, **aim))
  batches = data.batches(task.train, plan.batch, seed=0)
  state = loops.fit(step, state, batches, num_steps=plan.train_steps)
  return generative.gap(generative.generator(apply, state), plan.eps)


def _universal(task, plan):
  """The universal perturbation by minibatch ascent, for comparison."""
  crafted = attacks.universal(plan.eps, num_steps=plan.craft_steps)
  image = jnp.asarray(data.as_float(task.train.images[0]))
  state = crafted.init(jax.random.key(0), image)
  step = jax.jit(functools.partial(crafted.step, task.predict))
  batches = data.batches(task.train, plan.batch, seed=0)
  state = loops.fit(step, state, batches, num_steps=plan.craft_steps)
  return combine.fixed(threats.linf(plan.eps), state.delta)


def _wishes(task, x, batch):
  """What is decided on the clean images, and the opposite of it."""

  def of(prepare):
    run = jax.jit(lambda x, y: prepare(task.predict, x, y)["label"])
    return loops.over_batches(run, x, task.test.labels, size=batch)

  return {name: of(getattr(targets, name)) for name in ("predictions", "least_likely")}


def _attacked(task, attack, x, y, batch):
  ids = np.arange(len(x))
  key = jax.random.key(3)

  @jax.jit
  def run(x, y, ids):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
    return attack(keys, task.predict, x, y).image

  return loops.over_batches(run, x, y, ids, size=batch)


def _columns(task, clean, logits, wish, moved):
  test = task.test
  several = test.kind == "set"
  decided = (logits > 0) if several else logits.argmax(1)
  changed = decided != wish["predictions"]
  there = decided == wish["least_likely"]
  if several:
    found = scores.label_sets(logits, test.labels, test.class_names)
    flips = scores.flipped_labels(clean, logits, test.labels, test.class_names)
    own = {"AUROC": found["auroc"]}
    own |= {head: flips[head] for head in ("hidden", "invented")}
    changed = changed.mean(1)
  else:
    found = scores.classification(logits, test.labels, test.class_names)
    own = {"accuracy": found["accuracy"], "opposite": there.mean()}
  share = summaries.interval(changed.astype(float))
  row = {"fooled": "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**share)}
  row |= {k: "-" if v is None else f"{v:.3f}" for k, v in own.items()}
  return row | {"size": f"{255 * moved.mean():.2f}"}


if __name__ == "__main__":
  main()
