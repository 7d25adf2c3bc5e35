"""The job of `jaxadv defend`: train models with defences, attack them, doubt it all.

Everything is stored under one folder, and every finished piece survives a kill:

    settings.json              what the run is; another run is refused
    victims/NAME SEED/         checkpoints and evaluation of a trained model
    attacked/NAME SEED/EPS.npz logits under every attack at this radius
    results.json, report.html  one row per model and radius, and the checks

Beside the defended models stands the plain one, of the same network, data and seeds.
"""

import dataclasses
import io
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxadv
from jaxadv import (
  budgets,
  data,
  defence_report,
  distributed,
  fingerprints,
  loops,
  preemption,
  records,
  robustness,
  summaries,
  trust,
  victim_job,
)
from jaxadv.config_files import Config, load_config
from jaxadv.experiments import DefenceStudy
from jaxadv.progress import Progress, named, silent
from jaxadv.victim_job import JobError

__all__ = ["Run", "defend", "prepare"]

# At other radii than the study's, the attack that finds most on its own.
_ELSEWHERE = ("clean", "apgd")


class Run(NamedTuple):
  """A job whose input was checked.

  Attributes:
    config: the file and what it builds.
    study: its study with the overrides applied.
    victims: the models to train, with their data.
    test: the images that are attacked.
    settings: what the rows depend on.
  """

  config: Config
  study: DefenceStudy
  victims: victim_job.Run
  test: data.Dataset
  settings: dict[str, Any]

  @property
  def folder(self) -> pathlib.Path:
    """Where everything goes."""
    return self.victims.folder


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
    config_path: a config that returns a `DefenceStudy`.
    quick: asks the config for its smallest form.
    source: data source to use instead of the config's.
    out: folder of the run; `runs/NAME`, or `runs/NAME-quick`, by default.
    overrides: fields of the recipe to replace; `seed` stands for the study's `seeds`.
    progress: shows what is done.

  Returns:
    The checked run; nothing has been written.

  Raises:
    ConfigError: for a config that cannot be read or built.
    JobError: for another kind of config, for data that cannot be found or does not fit,
      for masks, and for a defence or a monitor that cannot be built.
  """
  config = load_config(config_path, quick=quick)
  if not isinstance(config.experiment, DefenceStudy):
    found = type(config.experiment).__name__
    raise JobError(f"{config_path} returns a {found}; this needs a DefenceStudy.")
  fields = dict(overrides or {})
  seeds = (fields.pop("seed"),) if "seed" in fields else config.experiment.seeds
  study = dataclasses.replace(config.experiment, seeds=seeds)
  prepared = victim_job.prepare(
    dataclasses.replace(config, experiment=study),
    quick=quick,
    source=source,
    out=out,
    overrides=fields,
    progress=progress,
  )
  test = next(iter(prepared.tasks.values())).parts.test
  if test.kind == "mask":
    raise JobError("labels are masks; this needs classes or label sets.")
  if study.num_images is not None and study.num_images < len(test.images):
    _, test = data.hold_out(test, study.num_images / len(test.images))
  settings = {
    "config": config.code,
    "quick": quick,
    "seeds": list(seeds),
    "effort": study.effort and list(study.effort),
    "views": list(robustness.VIEWS),
    "test_data": fingerprints.dataset(test),
    "jaxadv": jaxadv.__version__,
    "jax": jax.__version__,
  }
  return Run(config, study, prepared, test, settings)


def defend(run: Run) -> dict[str, Any]:
  """Runs the whole job, or what is left of it; returns what `results.json` holds.

  Raises:
    RecordError: when the folder holds another run, or another run is using it.
    JobError: for a model whose logits are not finite, on clean or on attacked images,
      and a torn checkpoint.
  """
  started = time.perf_counter()
  with records.lock(run.folder):
    records.check_same_run(run.folder / "settings.json", run.settings)
    evaluations = {}
    for name, task in run.victims.tasks.items():
      progress = named(run.victims.progress, name)
      victim = victim_job.train(task, progress=progress)
      evaluations[name] = victim.evaluation
      _attack(run, name, victim, progress)
    return distributed.by_first(_conclude, run, evaluations, started)


def _conclude(run, evaluations, started):
  """Results and report, from what is stored."""
  results = _results(run, evaluations, time.perf_counter() - started)
  records.write_json(run.folder / "results.json", results)
  page = defence_report.page(results)
  records.write_atomically(run.folder / "report.html", page)
  return results


def _attack(run, name, victim, progress):
  """Stores the logits of one model under the attacks at every radius."""
  missing = distributed.by_first(_missing, run, name)
  if not missing:
    return
  with progress("attacking", len(missing), 0) as advance:
    for eps in missing:
      views = robustness.VIEWS if eps == run.study.eps else _ELSEWHERE
      model, effort = (victim.predict, victim.variables), run.study.effort
      try:
        found = robustness.measure(*model, run.test, eps, names=views, effort=effort)
      except ValueError as error:
        raise JobError(f"{name}: {error}") from error
      file = io.BytesIO()
      np.savez(file, allow_pickle=False, **found)
      records.write_atomically(_file(run, name, eps), file.getvalue())
      preemption.check()
      advance(1, f"{255 * eps:g}/255")


def _missing(run, name):
  return [eps for eps in run.study.radii if not _file(run, name, eps).exists()]


def _file(run, name, eps):
  return run.folder / "attacked" / name / f"{255 * eps:g}.npz"


def _rows(run):
  """One flat row per model and radius: every rate of every view."""
  for name, task in run.victims.tasks.items():
    for eps in run.study.radii:
      with np.load(_file(run, name, eps)) as found:
        rates = robustness.rates(dict(found), run.test)
      row = {"model": name, "kind": _kind(name), "seed": task.recipe.seed, "eps": eps}
      for view, scores in rates.items():
        row |= {f"{score} {view}": value for score, value in scores.items()}
      yield row


def _checks(run, name):
  """What `trust.judge` says of a model, as JSON."""
  with np.load(_file(run, name, run.study.eps)) as found:
    verdict = trust.judge(dict(found), run.test)
  return [check._asdict() for check in verdict.checks]


def _gradients(run):
  """Kind of model -> gradients per image and step of the views it is trained on."""
  part = run.victims.tasks[next(iter(run.victims.tasks))].parts.train
  image, label = jnp.zeros((1, *part.images.shape[1:])), part.labels[:1]
  key, classes = jax.random.key(0), len(part.class_names)
  linear = lambda x: x.reshape(1, -1)[:, :classes]
  return {
    name: sum(int(view(key, linear, image, label).backwards[0]) for view in views)
    for name, (views, _) in run.study.defences.items()
  }


def _spread(run):
  """Standard deviation of the training images, per channel: what models divide by."""
  part = next(iter(run.victims.tasks.values())).parts.train
  moments = loops.over_batches(_moments, part.images, size=64).mean(0)
  return np.sqrt(np.maximum(moments[1] - moments[0] ** 2, 0))


def _moments(images):
  """Mean and mean square per image and channel, `(B, 2, C)`."""
  pixels = np.asarray(data.as_float(images), float)  # JAX's have 32 bits
  pixels = pixels.reshape(len(images), -1, images.shape[-1])
  return np.stack([pixels.mean(1), np.square(pixels).mean(1)], 1)


def _kind(name):
  return name.rpartition(" ")[0]


def _results(run, evaluations, seconds):
  return {
    "name": run.config.name,
    "source": pathlib.Path(next(iter(run.victims.tasks.values())).parts.source).name,
    "classes": list(run.test.class_names),
    "labels": run.test.kind,
    "images": len(run.test.images),
    "eps": run.study.eps,
    "radii": list(run.study.radii),
    "budget": budgets.beside(run.study.eps, _spread(run)),
    "gradients": _gradients(run),
    "models": evaluations,
    "checks": {name: _checks(run, name) for name in evaluations},
    "rows": list(_rows(run)),
    "seed": list(run.study.seeds),
    "wall_seconds": seconds,
    "config": {"digest": run.config.digest, "text": run.config.text},
    **summaries.origin(),
  }
