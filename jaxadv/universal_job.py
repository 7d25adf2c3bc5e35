"""The job of `jaxadv uap`: train victims, craft universal perturbations, judge them.

Everything is stored under one folder, and every finished piece survives a kill:

    settings.json                     what the run is; another run is refused
    victims/VICTIM/                   checkpoints and evaluation of a trained model
    perturbations/VICTIM/SHARE/NAME/  checkpoints, uap.npy, uap.png, and, written
                                      last, outcome.json with every count
    perturbations/VICTIM/SHARE/       per_image.json: fooling by PGD, image by image
    results.json, report.html         one row per victim, share and perturbation

Both random controls stand beside the perturbations of every victim and share, and what
attacks on single images reach.
"""

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxadv
from jaxadv import (
  attacks,
  checkpoints,
  crafting,
  data,
  fingerprints,
  outcomes,
  records,
  report,
  summaries,
  universal_report,
  victim_job,
  victims,
)
from jaxadv.experiments import Config, UniversalStudy, load_config
from jaxadv.progress import Progress, silent
from jaxadv.victim_job import JobError

__all__ = ["CONTROLS", "Cell", "Run", "craft", "prepare", "radius", "subject"]

# Name -> drawn, not crafted: what any perturbation of that size does.
CONTROLS = {
  "random ball": functools.partial(attacks.random_universal, kind="ball"),
  "random sign": functools.partial(attacks.random_universal, kind="sign"),
}
_RATES = ("fooling", "error", "clean_error", "targeted", "moved", "one_class")


class Run(NamedTuple):
  """A job whose input was checked.

  Attributes:
    config: the file and what it builds.
    study: its study with the overrides applied.
    victims: the victims to train, with their data.
    settings: what the rows depend on.
  """

  config: Config
  study: UniversalStudy
  victims: victim_job.Run
  settings: dict[str, Any]

  @property
  def folder(self) -> pathlib.Path:
    """Where everything goes."""
    return self.victims.folder

  @property
  def parts(self) -> victim_job.Parts:
    """The data, the same for all victims."""
    return next(iter(self.victims.tasks.values())).parts

  @property
  def plans(self) -> dict[str, crafting.Plan]:
    """Name -> how it is crafted, in the order of the report; controls come last."""
    study = self.study

    def plan(make, target=None, steps=study.craft_steps):
      rest = study.craft_batch, study.seed, study.checkpoint_every
      return crafting.Plan(make, study.norm, target, steps, *rest)

    plans = {name: plan(make) for name, make in study.perturbations.items()}
    for k, name in _aims(study, self.parts.train.class_names).items():
      plans[name] = plan(study.targeted, k)
    for name, make in CONTROLS.items():
      plans[name] = plan(make, steps=0)
    return plans


class Cell(NamedTuple):
  """One cell of the grid: a victim, a radius, a perturbation."""

  victim: str
  share: float
  name: str


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
    config_path: a config that returns a `UniversalStudy`.
    quick: asks the config for its smallest form.
    source: data source to use instead of the config's.
    out: folder of the run; `runs/NAME`, or `runs/NAME-quick`, by default.
    overrides: fields of every recipe to replace; `seed` also replaces the study's.
    progress: shows what is done.

  Returns:
    The checked run; nothing has been written.

  Raises:
    ConfigError: for a config that cannot be read or built.
    JobError: for another kind of config, for data that cannot be found, does not fit,
      has other labels than classes, or fewer training images than a batch, for a
      target outside the classes, and for a perturbation that cannot be built.
  """
  config = load_config(config_path, quick=quick)
  if not isinstance(config.experiment, UniversalStudy):
    found = type(config.experiment).__name__
    raise JobError(f"{config_path} returns a {found}; this needs a UniversalStudy.")
  seed = {k: v for k, v in (overrides or {}).items() if k == "seed"}
  study = dataclasses.replace(config.experiment, **seed)
  prepared = victim_job.prepare(
    config, quick=quick, source=source, out=out, overrides=overrides, progress=progress
  )
  test_set = next(iter(prepared.tasks.values())).parts.test
  settings = {
    "config": config.code,
    "quick": quick,
    "seed": study.seed,
    "craft_batch": study.craft_batch,
    "norm": f"{study.norm} {study.norm_channels}",
    "test_data": fingerprints.dataset(test_set),
    "jaxadv": jaxadv.__version__,
    "jax": jax.__version__,
  }
  run = Run(config, study, prepared, settings)
  _check(run)
  return run._replace(settings=settings | {"perturbations": _programs(run)})


def craft(run: Run) -> dict[str, Any]:
  """Runs the whole job, or what is left of it; returns what `results.json` holds.

  Raises:
    RecordError: when the folder holds another run, or another run is using it.
    JobError: for a victim whose logits are not finite, and a torn checkpoint.
  """
  started = time.perf_counter()
  with records.lock(run.folder):
    records.check_same_run(run.folder / "settings.json", run.settings)
    evaluations = {}
    for name, task in run.victims.tasks.items():
      attacked, evaluations[name] = _trained(run, task)
      for share in run.study.shares:
        _measure_per_image(run, attacked, name, share)
      for cell in _cells(run, name):
        if not _is_done(run, cell):
          _craft_cell(run, attacked, cell)
    results = _results(run, evaluations, time.perf_counter() - started)
    page = universal_report.page(results, list(_exhibits(run)))
    records.write_json(run.folder / "results.json", results)
    records.write_atomically(run.folder / "report.html", page)
  return results


def subject(run: Run, name: str) -> crafting.Subject:
  """A victim of the run, trained or read, with its decisions on the clean images.

  Raises:
    RecordError: when the folder holds another run, or another run is using it.
  """
  with records.lock(run.folder):
    records.check_same_run(run.folder / "settings.json", run.settings)
    return _trained(run, run.victims.tasks[name])[0]


def _trained(run, task):
  """The victim with its clean decisions, and its evaluation."""
  victim = victim_job.train(task, progress=run.victims.progress)
  parts = task.parts.train, task.parts.test
  with _refused(task.folder):
    attacked = crafting.subject(victim.predict, victim.variables, *parts)
  return attacked, victim.evaluation


@contextlib.contextmanager
def _refused(folder):
  try:
    yield
  except ValueError as error:
    raise JobError(f"{folder}: {error}") from error


def _check(run):
  """Refuses what only data and study together show."""
  study, parts = run.study, run.parts
  if parts.train.kind != "class":
    raise JobError(f"labels are of kind {parts.train.kind!r}; this needs classes.")
  images, classes = len(parts.train.images), len(parts.train.class_names)
  if images < study.craft_batch:
    raise JobError(
      f"{images} training images are fewer than a batch of {study.craft_batch}; lower "
      "`craft_batch`."
    )
  wrong = [k for k in study.targets or () if not 0 <= k < classes]
  if wrong:
    raise JobError(f"`targets` has {wrong[0]}; the classes are 0..{classes - 1}.")
  aims = list(_aims(study, parts.train.class_names).values())
  names = [*study.perturbations, *aims, *CONTROLS]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise JobError(f"two perturbations are called {twice[0]!r}; rename one.")


def _programs(run):
  """Name -> hash of its crafting step, traced with outputs like the first victim's."""
  task = next(iter(run.victims.tasks.values()))
  part, programs = run.parts.train, {}
  outputs = victims.outputs(task.recipe.model, part)
  for name, plan in run.plans.items():
    try:
      programs[name] = crafting.program(plan, part, outputs)
    except Exception as error:  # a config's part may fail in any way
      raise JobError(
        f"perturbation {name!r}: {type(error).__name__}: {error}; write a function "
        "`(eps, *, norm, num_steps) -> Universal`, with `target` where it has one."
      ) from error
  return programs


def _aims(study, class_names) -> dict[int, str]:
  """Target -> name of the perturbation, which is also a folder."""
  if study.targeted is None:
    return {}
  targets = range(len(class_names)) if study.targets is None else study.targets
  return {k: "to " + re.sub(r"[^\w.+-]+", "-", class_names[k]) for k in targets}


def _all_cells(run: Run) -> Iterator[Cell]:
  for name in run.study.victims:
    yield from _cells(run, name)


def _cells(run: Run, victim: str) -> Iterator[Cell]:
  for share in run.study.shares:
    for name in run.plans:
      yield Cell(victim, share, name)


def _measure_per_image(run, subject, victim, share):
  """What attacks on single images reach, once per victim and share."""
  file = _folder(run, Cell(victim, share, "")) / "per_image.json"
  if not file.exists():
    eps = radius(run, share)
    rate = crafting.per_image(subject, eps, norm=run.study.norm)
    records.write_json(file, {"eps": eps, "fooling": rate})


def radius(run: Run, share: float) -> float:
  """The radius of a share of the mean norm of the training images."""
  study = run.study
  return crafting.radius(run.parts.train.images, share, study.norm, study.norm_channels)


def _craft_cell(run, subject, cell):
  folder, plan = _folder(run, cell), run.plans[cell.name]
  eps = radius(run, cell.share)
  started = time.perf_counter()
  label = f"{cell.victim} {cell.share:.0%} {cell.name}"
  show = run.victims.progress if plan.steps else silent
  places = folder / "checkpoints"
  with show(label, plan.steps, checkpoints.latest(places) or 0) as advance:

    def on_step(n, state, metrics):
      advance(1, f"fooled {float(metrics['success']):.2f}")

    with _refused(places):
      state = crafting.craft(plan, subject, eps, folder=places, on_step=on_step)
  seconds = time.perf_counter() - started
  tables = crafting.measure(subject, state.delta)
  _store(folder, np.asarray(state.delta))
  record = {
    "eps": eps,
    "target": plan.target,
    "steps": plan.steps,
    "seconds": seconds,
    "l2": float(jnp.linalg.norm(state.delta.ravel())),
    "linf": float(jnp.abs(state.delta).max()),
    "nonfinite": int(state.nonfinite),
    "counts": {
      k: {v: t.tolist() for v, t in views.items()} for k, views in tables.items()
    },
  }
  records.write_json(folder / "outcome.json", record)


def _store(folder, delta):
  """The perturbation as numbers and as a picture."""
  file = io.BytesIO()
  np.save(file, delta)
  records.write_atomically(folder / "uap.npy", file.getvalue())
  picture, _ = universal_report.pattern(delta)
  records.write_atomically(folder / "uap.png", report.png(picture))


def _folder(run, cell):
  place = run.folder / "perturbations" / cell.victim / f"{cell.share:g}" / cell.name
  return pathlib.Path(place)


def _is_done(run, cell):
  return (_folder(run, cell) / "outcome.json").exists()


def _record(run, cell):
  return json.loads((_folder(run, cell) / "outcome.json").read_text())


def _row(run, cell):
  """One flat row: what was crafted, its rates, and those of the controls beside it."""
  record = _record(run, cell)
  counts, target = record.pop("counts"), record["target"]
  row = {"victim": cell.victim, "share": cell.share, "perturbation": cell.name}
  row |= record
  for split, views in counts.items():
    for view, table in views.items():
      rates = outcomes.rates(np.asarray(table), target=target)
      row |= {f"{name}_{split}_{view}": rates.get(name) for name in _RATES}
  fooled = outcomes.rates(np.asarray(counts["test"]["stored"]))["per_class"]
  for name, rate in zip(run.parts.test.class_names, fooled, strict=True):
    row[f"fooling_test_stored of {name}"] = rate
  alone = _folder(run, cell._replace(name="")) / "per_image.json"
  row["fooling_per_image"] = json.loads(alone.read_text())["fooling"]
  for control in CONTROLS:
    table = _record(run, cell._replace(name=control))["counts"]["test"]["stored"]
    rates = outcomes.rates(np.asarray(table), target=target)
    for name in ("fooling", "targeted"):
      row[f"{name}_{control.replace(' ', '_')}"] = rates.get(name)
  return {k: None if v != v else v for k, v in row.items()}


def _exhibits(run) -> Iterator[universal_report.Exhibit]:
  """A test image with each crafted perturbation of the middle share, as stored."""
  view, shares = crafting.VIEWS["stored"], run.study.shares
  clean = data.as_float(run.parts.test.images[:1])[0]
  for cell in _all_cells(run):
    if cell.name in CONTROLS or cell.share != shares[len(shares) // 2]:
      continue
    delta = np.load(_folder(run, cell) / "uap.npy")
    attacked = np.asarray(view.apply(clean, delta))
    table = np.asarray(_record(run, cell)["counts"]["test"]["stored"])
    title = f"{cell.victim}, {cell.name}, {cell.share:.1%}"
    yield universal_report.Exhibit(
      title, delta, report.as_bytes(clean), report.as_bytes(attacked), table
    )


def _results(run, evaluations, seconds):
  rows = [_row(run, cell) for cell in _all_cells(run)]
  return {
    "name": run.config.name,
    "source": pathlib.Path(run.parts.source).name,
    "classes": list(run.parts.test.class_names),
    "victims": evaluations,
    "rows": rows,
    "seed": run.study.seed,
    "norm": run.study.norm,
    "wall_seconds": seconds,
    "craft_seconds": sum(row["seconds"] for row in rows),
    "config": {"digest": run.config.digest, "text": run.config.text},
    **summaries.origin(),
  }
