"""How good a Flax model is on labelled images, clean or under an attack."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import combine, data, loops, masks, metrics, scores
from jaxadv.freezing import freeze
from jaxadv.types import AttackFn, call

__all__ = [
  "SCORES",
  "NotFinite",
  "answers",
  "assess",
  "evaluate",
  "predictions",
  "predictor",
]

Variables = dict[str, Any]
Predictor = Callable[[Variables, jax.Array], Any]
# By the kind of label: the score that selects a model.
SCORES = {"mask": "iou", "class": "balanced_accuracy", "set": "auroc"}
_OVERLAPS = "dice", "iou", "pixel_accuracy"


class NotFinite(ValueError):
  """A model that answers NaN or infinity; the message says on how many images."""


@functools.cache
def predictor(model: Any) -> Predictor:
  """`(variables, images) -> (logits, features)` of a Flax module in evaluation mode.

  Of equal modules it is the same function, whose compiled programs serve all of them.

  Raises:
    TypeError: for a module with attributes that cannot be hashed, such as arrays.
  """
  return functools.partial(model.apply, train=False)


def predictions(
  predict: Predictor,
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
  decide = lambda batch: _decide(predict, variables, data.as_float(batch))
  return loops.over_batches(decide, images, size=batch_size)


def answers(
  predict: Predictor,
  variables: Variables,
  dataset: data.Dataset,
  *,
  attack: AttackFn = combine.identity,
  seed: int = 0,
  batch_size: int = 8,
) -> np.ndarray:
  """The logits on images of a data set as an attack shows them.

  Args:
    predict: from `predictor`.
    variables: of the module.
    dataset: images and labels, which the attack gets.
    attack: an image draws from `fold_in(key(seed), id)`, whatever the batches.
    seed: of the attack.
    batch_size: images per model call; the last batch is filled up.

  Returns:
    `(N, ...)` float.
  """
  answer = _answering(predict, attack, variables, seed)
  return loops.over_batches(answer, *_examples(dataset), size=batch_size)


def assess(
  predict: Predictor,
  variables: Variables,
  dataset: data.Dataset,
  *,
  attack: AttackFn = combine.identity,
  seed: int = 0,
  batch_size: int = 8,
) -> dict[str, Any]:
  """How good a model is on labelled images, by the kind of their labels.

  Args:
    predict: from `predictor`.
    variables: of the module.
    dataset: what it is judged on.
    attack: what the images go through before.
    seed: of the attack.
    batch_size: images per model call.

  Returns:
    For masks what `evaluate` gives, for classes `scores.classification`, for label sets
    `scores.label_sets`.

  Raises:
    NotFinite: where logits are not finite.
  """
  answer = _answering(predict, attack, variables, seed)
  if dataset.kind == "mask":  # four numbers are kept of an image, and no logits
    judge = functools.partial(_judged, answer, len(dataset.class_names))
    found = loops.over_batches(judge, *_examples(dataset), size=batch_size)
    _check_finite(found[:, 0] == 1)
    return _means(found[:, 1:])
  logits = loops.over_batches(answer, *_examples(dataset), size=batch_size)
  _check_finite(np.isfinite(logits).all(1))
  report = scores.label_sets if dataset.kind == "set" else scores.classification
  return report(logits, dataset.labels, dataset.class_names)


def evaluate(prediction: np.ndarray, dataset: data.Dataset) -> dict[str, float]:
  """Mean over the images of IoU, Dice and pixel accuracy against the labels.

  Args:
    prediction: `(N, H, W)` int.
    dataset: labelled images.

  Returns:
    `{"dice", "iou", "pixel_accuracy", "images"}`. For more than two classes IoU and
    Dice are means over the classes present in an image.
  """
  overlap = functools.partial(_overlap, len(dataset.class_names))
  return _means(loops.over_batches(overlap, prediction, dataset.labels, size=8))


def _examples(dataset):
  return dataset.ids.astype(np.int32), dataset.images, dataset.labels


def _answering(predict, attack, variables, seed):
  """`(ids, images, labels)` of a batch to its logits."""
  key = jax.random.key(seed)
  return lambda ids, images, labels: _answer(
    predict, attack, variables, key, ids, data.as_float(images), labels
  )


def _check_finite(finite):
  broken = int((~finite).sum())
  if broken:
    raise NotFinite(
      f"on {broken} of {len(finite)} images the victim's logits are not finite; train "
      "it anew, with a smaller learning rate."
    )


def _judged(answer, num_classes, ids, images, labels):
  """`(B, 4)`: whether the logits are finite, then `_OVERLAPS`."""
  logits = np.asarray(answer(ids, images, labels))
  finite = np.isfinite(logits).reshape(len(logits), -1).all(1)
  return np.column_stack([finite, _overlap(num_classes, logits.argmax(-1), labels)])


@functools.partial(jax.jit, static_argnums=0)
def _overlap(num_classes, prediction, labels):
  def one(mask, label):
    dice = metrics.dice(mask, label, num_classes)
    iou = masks.iou(mask, label, num_classes)
    return jnp.stack([dice, iou, masks.pixel_accuracy(mask, label)])

  return jax.vmap(one)(prediction, labels)


def _means(overlaps):
  columns = zip(_OVERLAPS, overlaps.T, strict=True)
  means = {name: float(jnp.mean(column)) for name, column in columns}
  return means | {"images": len(overlaps)}


@functools.partial(jax.jit, static_argnums=0)
def _decide(predict, variables, images):
  logits, _ = call(functools.partial(predict, variables), images)
  return jnp.argmax(logits, -1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer(predict, attack, variables, key, ids, images, labels):
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
  model = freeze(functools.partial(predict, variables), images)
  return attack(keys, model, images, labels).logits
