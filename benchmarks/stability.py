"""SMIA against PGD: how much harm they do, and how steady their paths are.

    python benchmarks/stability.py configs/train_*.py configs/smia_nuclei.py \
      --out runs/stability

For every config: the victim is trained, or read from an earlier run, and its test
images are attacked, untargeted, by `smia` with several weights and by `pgd` with the
same radius, step, random starts and number of gradients, and once more with so many
more steps that it takes as long as `smia` by the clock. Printed per task, in Markdown:
means over the images of the mean over the keys, with 95 % bootstrap intervals over the
images; standard deviations over the images with intervals over the keys; and SMIA minus
PGD on the same images. After several tasks, the main columns of all of them, and the
spread over them of the relative drop. Every finished task stays; a second call goes on
with the next.

`clean` and `attacked` are the IoU of a mask, or the share of right decisions, and
`harm` what is lost of it; `margin` is that of the truth;
`flips` and `cosine` say how steady the gradients are, over all values and over those
that are neither at the surface of the ball nor at an end of the range (`free`), and
over the others (`held`).

For one label of two classes SMIA takes the same steps as PGD, whatever its weight: no
gain can show there at equal gradients, and at equal time PGD goes further. On masks of
two classes the two differ only in how they weigh pixels.

Other models: `tables(compare(Task(name, predict, images, labels), ...))`.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import (
  attacks,
  data,
  fingerprints,
  losses,
  masks,
  metrics,
  progress,
  records,
  stability,
  summaries,
  victim_job,
)
from jaxadv.types import call

__all__ = ["Task", "compare", "main", "tables"]

WEIGHTS = (0.0, 0.25, 0.5, 1.0)
STEADY = ("flips", "flips free", "flips held", "cosine", "cosine free", "cosine held")
MEANS = ("clean", "attacked", "harm", "success", "margin", "l2", *STEADY)
SPREADS = ("margin", "l2")
PAIRED = ("harm", "margin", *STEADY)
EXCERPT = ("harm", "margin", "flips free", "cosine free")


class Task(NamedTuple):
  """A model and labelled images.

  Attributes:
    name: of the task.
    predict: images in [0, 1] to logits or `(logits, features)`.
    images: `(N, ..., C)` float32 in [0, 1].
    labels: `(N,)`, masks `(N, H, W)` or label sets `(N, L)`.
  """

  name: str
  predict: Callable[[jax.Array], Any]
  images: np.ndarray
  labels: np.ndarray


class Comparison(NamedTuple):
  """What came of one task.

  Attributes:
    task: its name.
    about: what its classes allow to conclude.
    steps: of each attack, one gradient each.
    seconds: of each attack, per image.
    columns: `{attack: {column: (keys, images)}}`.
    origin: what made the numbers.
  """

  task: str
  about: str
  steps: dict[str, int]
  seconds: dict[str, float]
  columns: dict[str, dict[str, np.ndarray]]
  origin: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("configs", nargs="+", type=pathlib.Path)
  parser.add_argument("--out", required=True, type=pathlib.Path)
  parser.add_argument("--quick", action="store_true", help="the configs' quick form")
  parser.add_argument("--images", type=int, default=32)
  parser.add_argument("--eps", type=float, default=4.0, help="radius in 1/255")
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--keys", type=int, default=5)
  parser.add_argument("--batch", type=int, default=8)
  options = parser.parse_args(arguments)
  done = []
  print("# SMIA against PGD: all numbers")
  for path in options.configs:
    done.append(_compared(path, options))
    print(tables(done[-1]), flush=True)
  if len(done) > 1:
    print(excerpt(done), over_tasks(done), sep="\n")


def _compared(path, options):
  """The comparison of one config, from its file where it is finished."""
  task = trained(path, options)  # sees that the folder holds this very victim
  settings = f"{options.eps:g} {options.steps} {options.images} {options.keys}"
  file = options.out / path.stem / f"comparison {settings} {_program(task)}.json"
  if not file.exists():
    eps, keys, batch = options.eps / 255, options.keys, options.batch
    done = compare(task, eps=eps, num_steps=options.steps, keys=keys, batch=batch)
    records.write_json(file, done._replace(columns=_jsonable(done.columns))._asdict())
  found = Comparison(**json.loads(file.read_text()))
  return found._replace(columns=_arrays(found.columns))


def _program(task):
  """Hash of the attacks as they are now: a change in the library is measured anew."""
  key, x, y = jax.random.key(0), task.images[:1], task.labels[:1]
  options = {"step_size": 0.01, "num_steps": 2}
  arms = (
    attacks.pgd(0.04, loss=losses.task_loss, **options),
    attacks.smia(0.04, **options),
  )
  both = lambda x, y: [arm(key, task.predict, x, y) for arm in arms]
  return fingerprints.program(both, x, y)


def _jsonable(columns):
  """Lists with null for NaN, which a direction without values has and JSON has not."""
  return _each(columns, lambda v: np.where(np.isnan(v), None, v).tolist())


def _arrays(lists):
  return _each(lists, lambda v: np.array(v, float))


def _each(columns, change):
  return {
    name: {column: change(values) for column, values in mine.items()}
    for name, mine in columns.items()
  }


def trained(path, options):
  """The victim of a config and some of its test images with their truth."""
  run = victim_job.prepare(
    path,
    quick=options.quick,
    out=str(options.out / path.stem),
    progress=progress.terminal,
  )
  (work,) = run.tasks.values()
  with records.lock(run.folder):
    victim = victim_job.train(work, progress=run.progress)
  test = work.parts.test
  predict = functools.partial(victim.predict, victim.variables)
  # packs are sorted by class: a draw, the same for everyone
  order = np.random.default_rng(0).permutation(len(test.images))
  chosen = np.sort(order[: options.images])
  images = data.as_float(test.images[chosen])
  return Task(path.stem, predict, images, test.labels[chosen])


def compare(task, *, eps, num_steps=20, keys=5, batch=8, weights=WEIGHTS):
  """Runs every attack with every key on every image."""
  options = {"step_size": eps / 4, "random_start": True}
  pgd = functools.partial(attacks.pgd, eps, loss=losses.task_loss, **options)
  smia = functools.partial(attacks.smia, eps, num_steps=num_steps, **options)
  arms = {"pgd": pgd(num_steps=num_steps)}
  arms |= {f"smia {weight:g}": smia(weight=weight) for weight in weights}
  seconds = _seconds(task, arms, batch)
  ratio = statistics.median(seconds[name] / seconds["pgd"] for name in list(arms)[1:])
  longer = {"pgd, equal time": pgd(num_steps=max(1, round(num_steps * ratio)))}
  arms |= longer
  seconds |= _seconds(task, longer, batch)
  columns = {name: _columns(task, arm, eps, keys, batch) for name, arm in arms.items()}
  steps = {name: arm.num_steps for name, arm in arms.items()}
  return Comparison(
    task.name, _about(task), steps, seconds, columns, summaries.origin()
  )


def tables(comparison):
  """Two Markdown tables: every attack, and SMIA minus PGD."""
  columns, pgd = comparison.columns, comparison.columns["pgd"]
  lines = [
    [
      f"`{name}`",
      str(comparison.steps[name]),
      f"{1e3 * comparison.seconds[name]:.1f}",
      *(_interval(mine[column].mean(0)) for column in MEANS),
      *(_interval(mine[column].std(1)) for column in SPREADS),
    ]
    for name, mine in columns.items()
  ]
  others = [name for name in columns if name != "pgd"]
  gaps = [[f"`{name}`", *_gaps(comparison, name, PAIRED)] for name in others]
  keys, images = pgd["harm"].shape
  about = f"{images} images, {keys} keys. {comparison.about}"
  heads = ["attack", "gradients", "ms per image", *MEANS]
  heads += [f"sd of {column}" for column in SPREADS]
  parts = [f"\n## {comparison.task}", about, summaries.markdown(heads, lines)]
  parts += ["Minus `pgd`:", summaries.markdown(["attack", *PAIRED], gaps)]
  parts += [summaries.signature(comparison.origin)]
  return "\n\n".join(parts)


def excerpt(comparisons, arms=("smia 0.5", "smia 1", "pgd, equal time")):
  """One Markdown table of several tasks: the main columns, minus those of PGD."""
  lines = []
  for comparison in comparisons:
    for name in arms:
      pair = (comparison.columns[one]["margin"].std(1).mean() for one in (name, "pgd"))
      spread = " / ".join(f"{value:.3f}" for value in pair)
      steps, gaps = comparison.steps[name], _gaps(comparison, name, EXCERPT)
      lines.append([comparison.task, f"`{name}`", str(steps), *gaps, spread])
  heads = ["task", "attack", "gradients", *EXCERPT, "sd of margin, its / `pgd`"]
  return "\n## Minus `pgd`\n\n" + summaries.markdown(heads, lines)


def over_tasks(comparisons, draws=2000):
  """Spread over the tasks of the relative drop of the metric, per attack.

  The interval is over the images: they are drawn anew, with replacement, in every task.
  """
  rng = np.random.default_rng(0)
  lines = []
  for name in comparisons[0].columns:
    found = [c.columns[name] for c in comparisons]
    values = [[c["clean"].mean(0), c["attacked"].mean(0)] for c in found]

    def spread(picks, values=values):
      pairs = zip(values, picks, strict=True)
      means = np.array([[part[pick].mean() for part in task] for task, pick in pairs])
      return float(stability.spread_over_tasks(*means.T))

    counts = [len(task[0]) for task in values]
    whole = spread([np.arange(n) for n in counts])
    drawn = [spread([rng.integers(0, n, n) for n in counts]) for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    lines.append([f"`{name}`", f"{whole:.3f} [{low:.3f}, {high:.3f}]"])
  heads = ["attack", f"sd of the drop over {len(comparisons)} tasks"]
  return "\n## All tasks\n\n" + summaries.markdown(heads, lines)


def _columns(task, attack, eps, keys, batch):
  """`{column: (keys, images)}`; the last batch is filled up and cut."""
  total = len(task.images)
  program = jax.jit(functools.partial(_measure, attack, task.predict, eps))
  runs = []
  for key in jax.random.split(jax.random.key(0), keys):
    parts = []
    for start in range(0, total, batch):
      index = np.minimum(np.arange(start, start + batch), total - 1)
      own = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
      parts.append(program(own, task.images[index], task.labels[index]))
    runs.append(jax.tree.map(lambda *leaf: np.concatenate(leaf)[:total], *parts))
  return jax.tree.map(lambda *leaf: np.stack(leaf), *runs)


def _measure(attack, predict, eps, keys, x, y):
  """Columns `(B,)` of one attack on one batch."""
  result, path = stability.watch(attack)(keys, predict, x, y)
  loose = jax.vmap(functools.partial(stability.free, eps=eps))(path.delta, x)
  flips, cosine = map(jax.vmap, (stability.sign_flips, stability.direction_consistency))
  metric = jax.vmap(_metric)
  clean, attacked = metric(call(predict, x)[0], y), metric(result.logits, y)
  return {
    "clean": clean,
    "attacked": attacked,
    "harm": clean - attacked,
    "success": result.success.astype(float),
    "margin": jax.vmap(stability.true_margin)(result.logits, y),
    "l2": jax.vmap(metrics.l2)(result.image - x),
    "flips": flips(path.gradient),
    "flips free": flips(path.gradient, loose),
    "flips held": flips(path.gradient, ~loose),
    "cosine": cosine(path.gradient),
    "cosine free": cosine(path.gradient, loose),
    "cosine held": cosine(path.gradient, ~loose),
  }


def _metric(logits, label):
  """IoU of a mask; share of right decisions of a class or label set."""
  decided = masks.decision(logits, label)
  if logits.ndim == label.ndim + 1 and label.ndim:
    return masks.iou(decided, label, logits.shape[-1])
  return jnp.mean(decided == label)


def _seconds(task, arms, batch, repeats=5):
  """Seconds per image of each attack, median; the attacks take turns."""
  x, y = task.images[:batch], task.labels[:batch]
  key, times = jax.random.key(0), {name: [] for name in arms}
  calls = {
    name: jax.jit(lambda x, y, arm=arm: arm(key, task.predict, x, y))
    for name, arm in arms.items()
  }
  for turn in range(repeats + 1):
    for name, run in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(run(x, y))
      if turn:  # the first one compiles
        times[name].append((time.perf_counter() - start) / len(x))
  return {name: statistics.median(values) for name, values in times.items()}


def _about(task):
  """The confound of two classes, where it applies."""
  logits = jax.eval_shape(lambda x: call(task.predict, x)[0], task.images[:1])
  if logits.shape == task.labels[:1].shape or logits.shape[-1] > 2:
    return f"{logits.shape[-1]} classes or labels: SMIA can differ from PGD."
  if task.labels.ndim == 1:
    return (
      "**One label of two classes: every SMIA follows the path of PGD, and no gain can "
      "show at equal gradients.**"
    )
  return "Two classes per pixel: SMIA differs from PGD in the weights of pixels only."


def _gaps(comparison, name, columns):
  """One attack minus PGD on the same images, as intervals."""
  mine, pgd = comparison.columns[name], comparison.columns["pgd"]
  return [_interval((mine[column] - pgd[column]).mean(0)) for column in columns]


def _interval(values):
  found = summaries.interval(values)
  if found["mean"] is None:
    return "-"
  return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


if __name__ == "__main__":
  main()
