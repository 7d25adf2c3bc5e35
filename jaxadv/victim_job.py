"""Victims of a config: their data found and checked, trained, judged and recorded.

`jaxadv train CONFIG` trains whatever the config has. Everything is stored in one folder
per victim, `victim/`, or `victims/NAME/` where a study has several:

    settings.json   what the weights depend on; another victim is refused
    checkpoints/    the last two states; a killed run goes on from there
    results.json    scores on the test part, which step was selected by which score,
                    and where training collapsed, if it did
"""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxadv import assessment, checkpoints, data, records, victims
from jaxadv.config_files import Config, load_config
from jaxadv.experiments import DefenceStudy, Recipe, UniversalStudy
from jaxadv.progress import Progress, named, silent

__all__ = [
  "JobError",
  "Parts",
  "Run",
  "Task",
  "Victim",
  "class_table",
  "load",
  "override",
  "plan",
  "prepare",
  "table",
  "train",
  "train_all",
]


class JobError(ValueError):
  """A job that cannot run; the message says why in one line."""


class Parts(NamedTuple):
  """The data of one victim.

  Attributes:
    source: what it was loaded from.
    train: what the victim learns from.
    validation: what it is selected on, if anything.
    test: what it is judged, and attacked, on.
  """

  source: str
  train: data.Dataset
  validation: data.Dataset | None
  test: data.Dataset


class Task(NamedTuple):
  """A victim to train; its input was checked, and nothing has been written.

  Attributes:
    recipe: how.
    parts: on what.
    folder: where to.
    settings: what the trained weights depend on.
  """

  recipe: Recipe
  parts: Parts
  folder: pathlib.Path
  settings: dict[str, Any]


class Victim(NamedTuple):
  """A trained model.

  Attributes:
    variables: of the Flax module.
    predict: `(variables, images) -> (logits, features)`.
    evaluation: what `results.json` holds.
  """

  variables: dict[str, Any]
  predict: Callable[[dict[str, Any], jax.Array], Any]
  evaluation: dict[str, Any]


class Run(NamedTuple):
  """The victims of a config.

  Attributes:
    folder: of everything.
    tasks: name to task; of a single victim the name is the config's.
    progress: shows what is done.
  """

  folder: pathlib.Path
  tasks: dict[str, Task]
  progress: Progress


def prepare(
  config: str | pathlib.Path | Config,
  *,
  quick: bool = False,
  source: str | None = None,
  out: str | None = None,
  overrides: Mapping[str, Any] | None = None,
  progress: Progress = silent,
) -> Run:
  """Reads the config and the data of every victim, and checks all before any trains.

  Args:
    config: a config file of any kind, or one that has been read.
    quick: asks the config for its smallest form.
    source: data source to use instead of the config's.
    out: folder of the run; `runs/NAME`, or `runs/NAME-quick`, by default.
    overrides: fields of every recipe to replace.
    progress: shows what is done.

  Returns:
    The checked run; nothing has been written.

  Raises:
    ConfigError: for a config that cannot be read or built.
    JobError: for data that cannot be found or does not fit, and for an override of a
      field that the config does not have.
  """
  if not isinstance(config, Config):
    config = load_config(config, quick=quick)
  folder = pathlib.Path(out or f"runs/{config.name}{'-quick' if quick else ''}")
  built = config.experiment
  several = isinstance(built, UniversalStudy | DefenceStudy)
  recipes = built.victims if several else {config.name: built}
  recipes = {k: override(recipe, overrides or {}) for k, recipe in recipes.items()}
  parts = load(next(iter(recipes.values())), source)  # the victims of a study share it

  def place(name):
    return folder / "victims" / name if several else folder / "victim"

  tasks = {name: plan(recipe, parts, place(name)) for name, recipe in recipes.items()}
  return Run(folder, tasks, progress)


def override(recipe: Recipe, fields: Mapping[str, Any]) -> Recipe:
  """The recipe with some fields replaced.

  Raises:
    ConfigError: for values that cannot work.
    JobError: for a field that this kind of recipe does not have.
  """
  known = {field.name for field in dataclasses.fields(recipe)}
  unknown = ", ".join(sorted(fields.keys() - known))
  if unknown:
    raise JobError(f"a {type(recipe).__name__} has no {unknown}; leave the option out.")
  return dataclasses.replace(recipe, **fields)


def load(recipe: Recipe, source: str | None = None) -> Parts:
  """The data of a victim, found and checked.

  Args:
    recipe: which parts of which source.
    source: to use instead of the recipe's.

  Returns:
    The first source that is found, in parts.

  Raises:
    JobError: for data that cannot be found, and for parts that do not fit each other.
  """
  candidates = recipe.data if source is None else (source,)
  try:
    parts = _parts(recipe, _first_found(candidates))
  except (OSError, ValueError, KeyError) as error:
    raise JobError(f"data: {error}") from error
  _check_parts(recipe, parts)
  return parts


def plan(recipe: Recipe, parts: Parts, folder: pathlib.Path) -> Task:
  """A victim to train, once recipe, data and model are seen to fit.

  Raises:
    JobError: for a class without training images, fewer images than a batch, labels
      that cannot be balanced, a model that cannot take the images or gives other logits
      than the labels need, and a `start`, `loss` or `augment` that fails.
  """
  try:
    if recipe.balance or parts.train.kind == "class":
      data.members(parts.train)
  except ValueError as error:
    raise JobError(f"{recipe.train_split} part: {error}") from error
  images = len(parts.train.images)
  if images < recipe.batch_size:
    raise JobError(
      f"{images} training images are fewer than a batch of {recipe.batch_size}; lower "
      "`batch_size`."
    )
  _check_model(recipe, parts.train)
  try:
    settings = victims.describe(recipe, parts.train, parts.validation)
  except ValueError as error:
    raise JobError(str(error)) from error
  return Task(recipe, parts, folder, settings)


def train_all(run: Run) -> dict[str, dict[str, Any]]:
  """Trains every victim, or reads what is done; returns the evaluations by name.

  Raises:
    RecordError: when a folder holds another victim, or another run is using it.
  """
  with records.lock(run.folder):
    return {
      name: train(task, progress=named(run.progress, name)).evaluation
      for name, task in run.tasks.items()
    }


def train(task: Task, *, progress: Progress = silent) -> Victim:
  """Trains one victim and stores its evaluation; the caller holds the folder's lock.

  Args:
    task: from `plan`.
    progress: shows the steps.

  Returns:
    The victim.

  Raises:
    RecordError: when the folder holds another victim.
    JobError: for a torn checkpoint, or one of another model, and for logits that are
      not finite.
  """
  recipe, parts, folder, settings = task
  records.check_same_run(folder / "settings.json", settings)
  predict = assessment.predictor(recipe.model)
  try:
    variables, step, score = victims.train(
      recipe,
      parts.train,
      folder / "checkpoints",
      validation=parts.validation,
      settings=settings,
      progress=progress,
    )
    evaluation = assessment.assess(predict, variables, parts.test)
  except ValueError as error:
    raise JobError(f"{folder}: {error}") from error
  if parts.validation is not None:
    shown = "validation" if recipe.monitor is None else "monitored"
    name = f"{shown}_{assessment.SCORES[parts.validation.kind]}"
    known = float(score) if math.isfinite(score) else None
    evaluation |= {name: known, "selected_step": int(step)}
    last = checkpoints.latest(folder / "checkpoints") or 0
    if last < recipe.train_steps:
      evaluation["collapsed_at"] = last
  records.write_json(folder / "results.json", evaluation)
  return Victim(variables, predict, evaluation)


def table(
  evaluations: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], list[list[str]]]:
  """Heads and lines, a line per victim; a score that is not defined is a dash.

  Example:
    >>> table({"small": {"accuracy": 0.5, "auroc": None, "classes": {}}})
    (['victim', 'accuracy', 'auroc'], [['small', '0.5', '-']])
  """
  lines = {
    victim: {k: v for k, v in found.items() if not isinstance(v, dict | list)}
    for victim, found in evaluations.items()
  }
  return _grid("victim", lines)


def class_table(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Heads and lines, a line per class, or finding, of one victim.

  Example:
    >>> class_table({"classes": {"cat": {"recall": 0.5, "images": 4}}})
    (['class', 'recall', 'images'], [['cat', '0.5', '4']])
  """
  return _grid("class", evaluation["classes"])


def _grid(first, lines):
  heads = list(dict.fromkeys(head for line in lines.values() for head in line))
  cells = [
    [name, *("-" if line.get(h) is None else f"{line[h]:.4g}" for h in heads)]
    for name, line in lines.items()
  ]
  return [first, *(head.replace("_", " ") for head in heads)], cells


def _first_found(candidates):
  found = filter(None, map(_available, candidates))
  return next(found, None) or data.resolve(candidates[-1])  # says where it looked


def _available(source):
  """The source as `data.load` takes it, or `None` when it is not on this machine."""
  if source in (None, "phantoms"):
    return "phantoms"
  if source.startswith("tfds:"):
    return source
  try:
    return str(data.resolve(source))
  except FileNotFoundError:
    return None


def _parts(recipe, name):
  def part(split):
    found = data.load(None if name == "phantoms" else name, split=split)
    return found if recipe.side is None else data.resize(found, recipe.side)

  train_set, validation = part(recipe.train_split), None
  if recipe.val_split is not None:
    validation = part(recipe.val_split)
  elif recipe.holdout:
    train_set, validation = data.hold_out(train_set, recipe.holdout)
  return Parts(name, train_set, validation, part(recipe.test_split))


def _check_parts(recipe, parts):
  for part, word in ((parts.validation, "validation"), (parts.test, "test")):
    if part is None:
      continue
    here, there = parts.train.images.shape, part.images.shape
    if here[1:] != there[1:]:
      raise JobError(f"train images are {here}, {word} images {there}.")
    if part.kind != parts.train.kind or part.class_names != parts.train.class_names:
      raise JobError(f"train and {word} part have other classes; use one source.")
  # A source without split words gives the same images to val and test.
  if parts.validation is not None and recipe.val_split is not None:
    shared = _digests(parts.validation) & _digests(parts.test)
    if shared:
      raise JobError(
        f"{len(shared)} validation images are test images too; write a `holdout`."
      )


def _digests(part):
  return {hashlib.sha256(image.tobytes()).digest() for image in part.images}


def _check_model(recipe, dataset):
  try:
    hash(recipe.model)
  except TypeError as error:
    raise JobError(
      "the model has attributes that cannot be hashed, such as arrays; write tuples."
    ) from error
  try:
    given = victims.outputs(recipe.model, dataset)[0].shape
  except (TypeError, ValueError) as error:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise JobError(f"the model cannot take these images: {line}") from error
  pixels = dataset.labels.shape[1:] if dataset.kind == "mask" else ()
  needed = (1, *pixels, len(dataset.class_names))
  if given != needed:
    raise JobError(
      f"the model gives logits {given}, labels of {len(dataset.class_names)} classes "
      f"need {needed}; write `num_classes={needed[-1]}`, or choose another model."
    )
