"""The victim: a Flax model trained by the plain step, resumable, and its evaluation.

Works with any object that has Flax's `init(key, x)` and
`apply(variables, x, train=..., mutable=...)`; Flax itself is not imported.

With validation images the checkpoint carries the best variables so far beside the
current ones: whatever moment a run is killed at, it goes on to the same choice.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import (
  checkpoints,
  data,
  fingerprints,
  loops,
  masks,
  metrics,
  scores,
  training,
)
from jaxadv.experiments import Recipe
from jaxadv.progress import Progress, silent
from jaxadv.types import call

__all__ = [
  "SCORES",
  "Trained",
  "assess",
  "describe",
  "evaluate",
  "flax_apply",
  "outputs",
  "predictions",
  "predictor",
  "train",
]

Variables = dict[str, Any]
# By the kind of label: the score that selects a victim, and the loss it learns by.
SCORES = {"mask": "iou", "class": "balanced_accuracy", "set": "auroc"}
_LOSSES = {
  "mask": training.dice_cross_entropy,
  "class": training.cross_entropy,
  "set": training.binary_cross_entropy,
}


class Trained(NamedTuple):
  """A victim, and the training step it is from.

  Attributes:
    variables: of the Flax module.
    step: int32, steps taken.
    score: float32, on the validation images; `-inf` without any.
  """

  variables: Variables
  step: jax.Array
  score: jax.Array


class _State(NamedTuple):
  """What a checkpoint holds; `best` is `None` without validation images."""

  train: training.TrainState
  best: Trained | None


def flax_apply(model: Any) -> training.ApplyFn:
  """A Flax module as `apply(params, extra, images, train) -> (logits, extra)`.

  `extra` holds the collections beside `params`, such as batch statistics; training
  updates them, evaluation does not. Features the module returns are dropped.
  """

  def apply(params, extra, images, train):
    variables = {"params": params, **extra}
    if not (train and extra):
      return _logits(model.apply(variables, images, train=train)), extra
    out, extra = model.apply(variables, images, train=True, mutable=list(extra))
    return _logits(out), extra

  return apply


def describe(
  recipe: Recipe, dataset: data.Dataset, validation: data.Dataset | None = None
) -> dict[str, Any]:
  """What the trained weights depend on: two equal descriptions, one victim.

  Args:
    recipe: the settings.
    dataset: what the victim is trained on.
    validation: what it is selected on.

  Returns:
    A flat dict of JSON values. Optimizer, loss and augmentation, which are closures,
    are described by a hash of the program they trace to.
  """
  image, label = jnp.zeros(dataset.images.shape[1:]), jnp.asarray(dataset.labels[0])
  logits = jnp.zeros(outputs(recipe.model, dataset)[0].shape[1:])
  augment = recipe.augment
  return {
    "model": fingerprints.text(recipe.model),
    "start": recipe.start and fingerprints.arrays(_initial(recipe, dataset)),
    "optimizer": _update_program(recipe, dataset),
    "loss": _named("loss", _loss(recipe, dataset), logits, label),
    "augment": augment and _named("augment", augment, jax.random.key(0), image, label),
    "train_steps": recipe.train_steps,
    "batch_size": recipe.batch_size,
    "balance": recipe.balance,
    "seed": recipe.seed,
    "train_data": fingerprints.dataset(dataset),
    # Only checkpoints are candidates, so their spacing decides with the images.
    "selected_on": validation
    and f"{fingerprints.dataset(validation)} every {recipe.checkpoint_every} steps",
  }


def outputs(model: Any, dataset: data.Dataset) -> tuple[Any, dict[str, Any]]:
  """Shapes of the logits `(1, ..., K)` and features of one image; nothing is computed.

  Raises:
    ValueError: from a model that cannot take the images.
  """

  def run(key):
    image = _example(dataset)
    variables = model.init(key, image)
    return call(functools.partial(predictor(model), variables), image)

  return jax.eval_shape(run, jax.random.key(0))


def train(
  recipe: Recipe,
  dataset: data.Dataset,
  folder: pathlib.Path,
  *,
  validation: data.Dataset | None = None,
  progress: Progress = silent,
) -> Trained:
  """Trains the victim, or goes on from its last checkpoint, or just reads it.

  Args:
    recipe: the settings.
    dataset: training part, images `(N, H, W, C)`.
    folder: of the checkpoints.
    validation: images on which every checkpoint is scored, by mean IoU of masks,
      balanced accuracy of classes, mean AUROC of label sets. The victim is the
      checkpoint that scores best, of equal ones the last. Never the test part: the
      published code selects there, and its clean accuracies are flattered by it.
    progress: shows the steps.

  Returns:
    The best checkpoint; the last one without validation images.

  Raises:
    ValueError: for a torn checkpoint, or one of another model; with `recipe.balance`,
      for labels that cannot be balanced.
  """
  done = checkpoints.latest(folder)
  start = functools.partial(_start, recipe, validation is not None)
  if done is None:
    state = jax.jit(start)(_initial(recipe, dataset))
  else:
    shapes = jax.eval_shape(recipe.model.init, jax.random.key(0), _example(dataset))
    state = checkpoints.restore(folder, jax.eval_shape(start, shapes))
  if (done or 0) < recipe.train_steps:
    state = _fit(recipe, dataset, validation, folder, state, done or 0, progress)
  return state.best or _trained(state.train)


def predictor(model: Any) -> Callable[[Variables, jax.Array], Any]:
  """`(variables, images) -> (logits, features)` of a Flax module in evaluation mode."""
  return functools.partial(model.apply, train=False)


def predictions(
  predict: Callable[[Variables, jax.Array], Any],
  variables: Variables,
  images: np.ndarray,
  *,
  batch_size: int = 8,
) -> np.ndarray:
  """The decided class of every image, or of each of its pixels.

  Args:
    predict: from `predictor`.
    variables: of the module.
    images: `(N, H, W, C)` uint8, or float in [0, 1].
    batch_size: images per model call; the last batch is filled up.

  Returns:
    `(N,)` or `(N, H, W)` int32.
  """
  call = lambda batch: _decide(predict, variables, data.as_float(batch))
  return loops.over_batches(call, images, size=batch_size)


def assess(
  predict: Callable[[Variables, jax.Array], Any],
  variables: Variables,
  dataset: data.Dataset,
  *,
  batch_size: int = 8,
) -> dict[str, Any]:
  """How good a victim is on labelled images, by the kind of their labels.

  Args:
    predict: from `predictor`.
    variables: of the module.
    dataset: what it is judged on.
    batch_size: images per model call.

  Returns:
    For masks what `evaluate` gives, for classes `scores.classification`, for label sets
    `scores.label_sets`.

  Raises:
    ValueError: where logits of classes or label sets are not finite.
  """
  if dataset.kind == "mask":
    decided = predictions(predict, variables, dataset.images, batch_size=batch_size)
    return evaluate(decided, dataset)
  call = lambda batch: _answer(predict, variables, data.as_float(batch))
  logits = loops.over_batches(call, dataset.images, size=batch_size)
  broken = int((~np.isfinite(logits)).any(1).sum())
  if broken:
    raise ValueError(
      f"on {broken} of {len(logits)} images the victim's logits are not finite; train "
      "it anew, with a smaller learning rate."
    )
  report = scores.label_sets if dataset.kind == "set" else scores.classification
  return report(logits, dataset.labels, dataset.class_names)


def evaluate(prediction: np.ndarray, dataset: data.Dataset) -> dict[str, float]:
  """Mean over the images of IoU, Dice and pixel accuracy against the labels.

  Args:
    prediction: `(N, H, W)` int.
    dataset: labelled images.

  Returns:
    `{"iou", "dice", "pixel_accuracy", "images"}`. For more than two classes IoU and
    Dice are means over the classes present in an image.
  """
  num_classes = len(dataset.class_names)

  def one(mask, label):
    return {
      "iou": masks.iou(mask, label, num_classes),
      "dice": metrics.dice(mask, label, num_classes),
      "pixel_accuracy": masks.pixel_accuracy(mask, label),
    }

  measured = jax.jit(jax.vmap(one))(prediction, dataset.labels)
  means = {name: float(value.mean()) for name, value in measured.items()}
  return means | {"images": len(prediction)}


@functools.partial(jax.jit, static_argnums=0)
def _decide(predict, variables, images):
  return jnp.argmax(_logits(predict(variables, images)), -1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _answer(predict, variables, images):
  return _logits(predict(variables, images))


def _logits(out):
  return out[0] if isinstance(out, tuple) else out


def _loss(recipe, dataset):
  return recipe.loss or _LOSSES[dataset.kind]


def _initial(recipe, dataset):
  """The variables that training starts from; `recipe.start` sees arrays, no tracers."""
  key = jax.random.key(recipe.seed)
  fresh = jax.jit(recipe.model.init)(key, _example(dataset))
  if recipe.start is None:
    return fresh
  return _blamed("start", recipe.start, fresh)


def _blamed(name, function, *arguments):
  """Calls a part of a config; what it raises names the part."""
  try:
    return function(*arguments)
  except Exception as error:  # a config's part may fail in any way
    raise ValueError(f"`{name}`: {type(error).__name__}: {error}") from error


def _start(recipe, selects, variables):
  key, variables = jax.random.key(recipe.seed), dict(variables)
  params = variables.pop("params")
  state = training.init_state(key, params, variables, recipe.optimizer)
  return _State(state, _trained(state) if selects else None)


def _trained(state, score=-jnp.inf):
  variables = {"params": state.params, **state.extra}
  return Trained(variables, state.step, jnp.float32(score))


def _example(dataset):
  return jnp.zeros((1, *dataset.images.shape[1:]))


def _fit(recipe, dataset, validation, folder, state, done, progress):
  """From checkpoint to checkpoint, so that a choice is stored with what it is among."""
  step = training.train_step(
    flax_apply(recipe.model),
    recipe.optimizer,
    _loss(recipe, dataset),
    augment=recipe.augment,
  )
  step, predict = jax.jit(step), predictor(recipe.model)
  batches = data.batches(
    dataset, recipe.batch_size, seed=recipe.seed, start=done, balance=recipe.balance
  )
  total, every = recipe.train_steps, recipe.checkpoint_every
  with progress("training", total, done) as advance:
    while done < total:
      count = min(every - done % every, total - done)
      on_step = functools.partial(_show, advance, state.best)
      last = loops.fit(step, state.train, batches, num_steps=count, on_step=on_step)
      state = _State(last, _better(state.best, last, predict, validation))
      done += count
      checkpoints.save(folder, state, step=done)
  return state


def _show(advance, best, n, state, metrics):
  del n, state
  note = f"loss {float(metrics['loss']):.3f}"
  if best is not None and best.step:
    note += f", best {float(best.score):.3f} at {int(best.step)}"
  advance(1, note)


def _better(best, state, predict, validation):
  """The best so far, or the state where it scores as well: it has learned longer."""
  if best is None:
    return None
  found = assess(predict, _trained(state).variables, validation)
  score = found[SCORES[validation.kind]]
  now = _trained(state, -jnp.inf if score is None else score)
  return now if now.score >= best.score else best


def _update_program(recipe, dataset):
  """Hash of the optimizer's update, where learning rates and schedules are literals."""
  example = jax.eval_shape(lambda: _example(dataset))
  params = jax.eval_shape(recipe.model.init, jax.random.key(0), example)["params"]
  state = jax.eval_shape(recipe.optimizer.init, params)
  return fingerprints.program(recipe.optimizer.update, params, state, params)


def _named(part, function, *arguments):
  name = getattr(function, "__qualname__", type(function).__name__)
  return f"{name} {_blamed(part, fingerprints.program, function, *arguments)}"
