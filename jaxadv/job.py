"""The main job: train a victim or load it, attack pairs of images, keep every row.

Everything is stored under one folder, and every finished piece survives a kill:

    settings.json        what the run is; another run is refused
    victim/              checkpoints, settings and evaluation of the trained model
    images/ATTACK/*.png  the attacked images as stored, 8 bits
    rows.csv             one row per pair and attack, appended batch by batch; of
                         several processes the second writes rows-0001.csv and so on
    results.json         means, intervals, paired ratios, versions, config
    gallery.png, report.html

Pairs are attacked in fixed batches, each from keys made of the two image ids, so a row
does not depend on where a run was interrupted.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

import jaxadv
from jaxadv import (
  assessment,
  data,
  distributed,
  fingerprints,
  preemption,
  records,
  report,
  summaries,
  trials,
  victim_job,
)
from jaxadv.config_files import Config, load_config
from jaxadv.experiments import Experiment
from jaxadv.progress import Progress, silent
from jaxadv.victim_job import JobError

__all__ = ["JobError", "Run", "attack", "prepare"]

Variables = dict[str, Any]


class Run(NamedTuple):
  """A job whose input was checked.

  Attributes:
    config: the file and what it builds.
    experiment: its experiment with the overrides applied.
    task: the victim, and the data.
    folder: where everything goes.
    settings: what the rows depend on.
    progress: shows what is done.
  """

  config: Config
  experiment: Experiment
  task: victim_job.Task
  folder: pathlib.Path
  settings: dict[str, Any]
  progress: Progress

  @property
  def test_set(self) -> data.Dataset:
    """What is attacked."""
    return self.task.parts.test


class Victim(NamedTuple):
  """A trained model and what it says about the test images.

  Attributes:
    variables: of the Flax module.
    predict: `(variables, images) -> (logits, features)`.
    masks: `(N, H, W)` predictions of the test images.
    evaluation: means against the labels.
  """

  variables: Variables
  predict: Callable[[Variables, jax.Array], Any]
  masks: np.ndarray
  evaluation: dict[str, float]


def prepare(
  config_path: str | pathlib.Path,
  *,
  quick: bool = False,
  source: str | None = None,
  out: str | None = None,
  overrides: Mapping[str, Any] | None = None,
  progress: Progress = silent,
) -> Run:
  """Reads the config and the data, and checks both, before anything is computed.

  Args:
    config_path: the config file.
    quick: asks the config for its smallest form.
    source: data source to use instead of the config's.
    out: folder of the run; `runs/NAME`, or `runs/NAME-quick`, by default.
    overrides: fields of the `Experiment` to replace.
    progress: shows what is done.

  Returns:
    The checked run; nothing has been written.

  Raises:
    ConfigError: for a config that cannot be read or built.
    JobError: for data that cannot be found or does not fit.
  """
  config = load_config(config_path, quick=quick)
  if not isinstance(config.experiment, Experiment):
    found = type(config.experiment).__name__
    raise JobError(f"{config_path} returns a {found}; this needs an Experiment.")
  experiment = dataclasses.replace(config.experiment, **(overrides or {}))
  parts = victim_job.load(experiment, source)
  _check_images(parts.test)
  folder = pathlib.Path(out or f"runs/{config.name}{'-quick' if quick else ''}")
  task = victim_job.plan(experiment, parts, folder / "victim")
  settings = task.settings | {
    "config": config.code,
    "quick": quick,
    "num_pairs": experiment.num_pairs,
    "attack_batch": experiment.attack_batch,
    "threshold": experiment.threshold,
    "max_initial_iou": experiment.max_initial_iou,
    "test_data": fingerprints.dataset(parts.test),
    "jaxadv": jaxadv.__version__,
    "jax": jax.__version__,
  }
  return Run(config, experiment, task, folder, settings, progress)


def attack(run: Run) -> dict[str, Any]:
  """Runs the whole job, or what is left of it; returns what `results.json` holds.

  Raises:
    RecordError: when the folder holds another run, or another run is using it.
    JobError: when the victim's predictions admit no pair.
  """
  started = time.perf_counter()
  with records.lock(run.folder):
    records.check_same_run(run.folder / "settings.json", run.settings)
    victim = _victim(run)
    scene = _scene(run, victim)
    for name in run.experiment.attacks:
      _attack_pairs(run, scene, name)
    return distributed.by_first(_conclude, run, victim, scene, started)


def _check_images(test_set):
  shape = test_set.images.shape
  if len(shape) != 4 or shape[-1] not in (1, 3):
    raise JobError(f"test images are {shape}; the job needs (N, H, W, 1 or 3).")
  if test_set.kind != "mask":
    raise JobError(f"labels are {test_set.labels.shape}; the job needs one mask each.")


def _victim(run):
  victim = victim_job.train(run.task, progress=run.progress)
  masks = assessment.predictions(victim.predict, victim.variables, run.test_set.images)
  return Victim(victim.variables, victim.predict, masks, victim.evaluation)


def _scene(run, victim):
  experiment, test_set = run.experiment, run.test_set
  try:
    pairs = data.pairs(
      test_set.images,
      victim.masks,
      num=experiment.num_pairs,
      seed=experiment.seed,
      num_classes=len(test_set.class_names),
      max_iou=experiment.max_initial_iou,
    )
  except ValueError as error:
    raise JobError(f"no pair to attack: {error}") from error
  return trials.Scene(
    victim.predict,
    victim.variables,
    data.as_float(test_set.images),
    victim.masks,
    test_set.ids,
    pairs,
    jax.random.key(experiment.seed),
    experiment.threshold,
  )


def _attack_pairs(run, scene, name):
  """Runs one attack on every batch that lacks a row or an image.

  Of several processes each takes whole batches, and writes their rows and images.
  """
  process, processes = jax.process_index(), jax.process_count()
  recorded, open_batches = distributed.by_first(_open, run, scene, name)
  if not open_batches:
    return
  known = set(recorded)
  size, total = run.experiment.attack_batch, len(scene.pairs.source)
  done = total - sum(map(len, open_batches))
  with run.progress(name, total, done) as advance:
    program = trials.compile_attack(scene, run.experiment.attacks[name], size)
    for first in range(0, len(open_batches), processes):
      turn, note = open_batches[first : first + processes], ""
      for numbers in turn[process : process + 1]:  # the last turn may be short
        rows, images = trials.run_batch(scene, program, numbers, size)
        _store(run, name, numbers, images)
        new = [{"attack": name, **row} for row in rows if row["pair"] not in known]
        records.append_rows(_rows_path(run, process), new)
        note = f"IoU {np.mean([row['iou_8bit'] for row in rows]):.3f}"
      preemption.check()
      advance(sum(map(len, turn)), note)
  distributed.barrier("attacked")


def _store(run, name, numbers, images):
  for number, image in zip(numbers, images, strict=True):
    path = _image_path(run, name, number)
    records.write_atomically(path, report.png(image), own=True)


def _open(run, scene, name):
  """Numbers of the pairs that have rows, and the batches that lack something."""
  size, total = run.experiment.attack_batch, len(scene.pairs.source)
  recorded = _recorded(run, scene, name)
  stored = {n for n in recorded if _image_path(run, name, n).exists()}
  batches = [list(batch) for batch in trials.batches(total, size)]
  lacking = [batch for batch in batches if not stored.issuperset(batch)]
  return sorted(recorded), lacking


def _recorded(run, scene, name):
  """Numbers of the pairs this attack has rows of; rows of other pairs are refused."""
  recorded = set()
  for row in _rows(run):
    number, total = row["pair"], len(scene.pairs.source)
    pair = trials.place(scene, number) if number < total else {}
    if any(pair.get(end) != row[end] for end in ("source", "target")):
      raise JobError(f"{run.folder}/rows*.csv have rows of other pairs; delete them.")
    if row["attack"] == name:
      recorded.add(number)
  return recorded


def _rows(run):
  """The rows as numbers, attacks in the order of the config, pairs in order."""
  order = {name: i for i, name in enumerate(run.experiment.attacks)}
  rows = [
    {name: _number(name, value) for name, value in row.items()}
    for shard in sorted(run.folder.glob("rows*.csv"))
    for row in records.read_rows(shard)
  ]
  unknown = sorted({row["attack"] for row in rows} - order.keys())
  if unknown:
    shards = f"{run.folder}/rows*.csv"
    raise JobError(f"{shards} have rows of {unknown}, no attacks here; delete them.")
  return sorted(rows, key=lambda row: (order[row["attack"]], row["pair"]))


def _rows_path(run, process):
  """The file of a process: `rows.csv`, or `rows-0001.csv` and so on."""
  return run.folder / (f"rows-{process:04d}.csv" if process else "rows.csv")


def _number(name, value):
  if name in summaries.LABELS:
    return value if name == "attack" else int(value)
  return float(value)


def _image_path(run, name, number):
  return run.folder / "images" / name / f"{number:04d}.png"


def _read_image(path):
  with Image.open(path) as image:
    pixels = np.asarray(image)
  return pixels.reshape(*pixels.shape[:2], -1)


def _results(run, victim, scene, seconds):
  rows, experiment = _rows(run), run.experiment
  return {
    "name": run.config.name,
    "source": pathlib.Path(run.task.parts.source).name,
    "attacks": summaries.summarize(rows, baseline=experiment.baseline),
    "baseline": experiment.baseline,
    "pairs": len(scene.pairs.source),
    "threshold": experiment.threshold,
    "victim": victim.evaluation | run.task.settings,
    "seed": experiment.seed,
    "wall_seconds": seconds,
    "attack_seconds": sum(row["seconds"] for row in rows),
    "forwards": int(sum(row["forwards"] for row in rows)),
    "backwards": int(sum(row["backwards"] for row in rows)),
    "config": {"digest": run.config.digest, "text": run.config.text},
    "settings": {k: v for k, v in run.settings.items() if k != "config"},
    **summaries.origin(),
  }


def _conclude(run, victim, scene, started):
  """Results, gallery and report, from what is stored."""
  results = _results(run, victim, scene, time.perf_counter() - started)
  panels = list(_panels(run, victim, scene))
  gallery = report.gallery(panels)
  records.write_json(run.folder / "results.json", results)
  records.write_atomically(run.folder / "gallery.png", gallery)
  page = report.page(results, _rows(run), panels)
  records.write_atomically(run.folder / "report.html", page)
  return results


def _panels(run, victim, scene):
  """What the gallery shows, from the files as stored."""
  shown = range(min(run.experiment.gallery, len(scene.pairs.source)))
  rows = {(row["attack"], row["pair"]): row for row in _rows(run)}
  for name in run.experiment.attacks:
    images = np.stack([_read_image(_image_path(run, name, n)) for n in shown])
    after = assessment.predictions(victim.predict, victim.variables, images)
    for number in shown:
      source, target = scene.pairs.source[number], scene.pairs.target[number]
      yield report.Panel(
        rows[name, number],
        report.as_bytes(scene.images[source]),
        images[number],
        scene.masks[target],
        scene.masks[source],
        after[number],
      )
