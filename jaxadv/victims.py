"""The victim: a Flax model trained by the plain step, resumable, and its evaluation.

Works with any object that has Flax's `init(key, x)` and
`apply(variables, x, train=..., mutable=...)`; Flax itself is not imported.
"""

import functools
import hashlib
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import checkpoints, data, loops, masks, metrics, training
from jaxadv.experiments import Experiment
from jaxadv.progress import Progress, silent

__all__ = [
  "as_float",
  "describe",
  "evaluate",
  "fingerprint",
  "flax_apply",
  "predictions",
  "predictor",
  "train",
]

Variables = dict[str, Any]


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


def describe(experiment: Experiment, dataset: data.Dataset) -> dict[str, Any]:
  """What the trained weights depend on: two equal descriptions, one victim.

  Args:
    experiment: the settings.
    dataset: what the victim is trained on.

  Returns:
    A flat dict of JSON values. The optimizer, a pair of closures, is described by a
    hash of the program it traces to.
  """
  return {
    "model": _without_addresses(experiment.model),
    "optimizer": _program(experiment, dataset),
    "loss": getattr(experiment.loss, "__qualname__", repr(experiment.loss)),
    "augment": getattr(experiment.augment, "__qualname__", repr(experiment.augment)),
    "train_steps": experiment.train_steps,
    "batch_size": experiment.batch_size,
    "seed": experiment.seed,
    "train_data": fingerprint(dataset),
  }


def train(
  experiment: Experiment,
  dataset: data.Dataset,
  folder: pathlib.Path,
  *,
  progress: Progress = silent,
) -> Variables:
  """Trains the victim, or goes on from its last checkpoint, or just reads it.

  Args:
    experiment: the settings.
    dataset: training part, images `(N, H, W, C)`.
    folder: of the checkpoints.
    progress: shows the steps.

  Returns:
    The variables of the Flax module.

  Raises:
    ValueError: for a torn checkpoint, or one of another model.
  """
  done = checkpoints.latest(folder)
  start = functools.partial(_start, experiment, dataset)
  if done is None:
    state = jax.jit(start)()
  else:
    state = checkpoints.restore(folder, jax.eval_shape(start))
  left = experiment.train_steps - (done or 0)
  if left > 0:
    state = _fit(experiment, dataset, folder, state, left, progress)
  return {"params": state.params, **state.extra}


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
  """The decided mask of every image.

  Args:
    predict: from `predictor`.
    variables: of the module.
    images: `(N, H, W, C)` uint8, or float in [0, 1].
    batch_size: images per model call; the last batch is filled up.

  Returns:
    `(N, H, W)` int32.
  """
  masks = []
  for start in range(0, len(images), batch_size):
    batch = as_float(images[start : start + batch_size])
    missing = batch_size - len(batch)
    filled = np.pad(batch, [(0, missing)] + [(0, 0)] * (batch.ndim - 1))
    masks.append(np.asarray(_decide(predict, variables, filled))[: len(batch)])
  return np.concatenate(masks)


def as_float(images: np.ndarray) -> np.ndarray:
  """Images in [0, 1]: uint8 divided by 255, float as it is; float32."""
  scale = np.float32(255 if images.dtype == np.uint8 else 1)
  return images.astype(np.float32) / scale


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


def _logits(out):
  return out[0] if isinstance(out, tuple) else out


def _start(experiment, dataset):
  key = jax.random.key(experiment.seed)
  variables = dict(experiment.model.init(key, _example(dataset)))
  params = variables.pop("params")
  return training.init_state(key, params, variables, experiment.optimizer)


def _example(dataset):
  return jnp.zeros((1, *dataset.images.shape[1:]))


def _fit(experiment, dataset, folder, state, left, progress):
  total, done = experiment.train_steps, experiment.train_steps - left
  step = training.train_step(
    flax_apply(experiment.model),
    experiment.optimizer,
    experiment.loss,
    augment=experiment.augment,
  )
  batches = data.batches(
    dataset, experiment.batch_size, seed=experiment.seed, start=done
  )
  with progress("training", total, done) as advance:

    def on_step(n, state, metrics):
      advance(1, f"loss {float(metrics['loss']):.3f}")
      if (done + n) % experiment.checkpoint_every == 0 or n == left:
        checkpoints.save(folder, state, step=done + n)

    return loops.fit(jax.jit(step), state, batches, num_steps=left, on_step=on_step)


def _program(experiment, dataset):
  """Hash of the update's program, where learning rates and schedules are literals."""
  example = jax.eval_shape(lambda: _example(dataset))
  params = jax.eval_shape(experiment.model.init, jax.random.key(0), example)["params"]
  state = jax.eval_shape(experiment.optimizer.init, params)
  program = jax.make_jaxpr(experiment.optimizer.update)(params, state, params)
  return hashlib.sha256(_without_addresses(program).encode()).hexdigest()[:12]


def _without_addresses(value):
  return re.sub(r" at 0x\w+", "", str(value))


def fingerprint(dataset: data.Dataset) -> str:
  """Hash of images, labels and ids, to tell data sets apart."""
  digest = hashlib.sha256()
  for array in (dataset.images, dataset.labels, dataset.ids):
    digest.update(f"{array.shape} {array.dtype}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:12]
