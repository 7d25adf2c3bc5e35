"""Targets: computed once per call, for the batch, before the loop.

Every function here is a `prepare` of an `Objective`: `(predict, x, y) -> target`, where
`y` is an array of labels or a mapping that holds them under `"label"`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import inputs
from jaxadv.types import Images, LossFn, Predict, PrepareFn, Sample, call, labels

__all__ = [
  "clean_logits",
  "constant",
  "gradient_weights",
  "guide_features",
  "least_likely",
  "predictions",
  "prototypes",
  "rivals",
]


def predictions(predict: Predict, x: Images, y: Any) -> dict[str, Any]:
  """The model's own clean decision as label; of the truth in `y` only the rank is read.

  Labels `(B, L)` beside logits `(B, L)` mean one yes or no per label, anything else, or
  none at all, means classes. Where `y` holds the decision already, as `y["decision"]`,
  no forward pass is spent. A `y["mask"]` of what counts stays.

  Raises:
    ValueError: for labels of the logits' rank and another shape, such as `(B, 1)`.

  Example:
    >>> predictions(lambda x: x, jnp.array([[0.1, 0.9]]), None)["label"].tolist()
    [1]
    >>> x = jnp.array([[0.1, -0.9]])
    >>> predictions(lambda x: x, x, jnp.array([[0, 0]]))["label"].tolist()
    [[1, 0]]
  """
  if isinstance(y, Mapping) and "decision" in y:
    return _masked(y["decision"], y)
  return _masked(_decision(call(predict, x)[0], y), y)


def least_likely(predict: Predict, x: Images, y: Any) -> dict[str, Any]:
  """The class with the smallest clean logit, per image or per pixel.

  Of labels `(B, L)`, see `predictions`, the opposite of what is decided.

  Example:
    >>> least_likely(lambda x: x, jnp.array([[0.1, 0.9]]), None)["label"].tolist()
    [0]
    >>> x = jnp.array([[0.1, -0.9]])
    >>> least_likely(lambda x: x, x, jnp.array([[0, 0]]))["label"].tolist()
    [[0, 1]]
  """
  return _masked(_decision(-call(predict, x)[0], y), y)


def constant(k: int | jax.Array) -> PrepareFn:
  """Class `k` for every image and pixel, or a set of L labels for every image.

  Args:
    k: the index of a class, or `(L,)` of 0 and 1; if traced it is not checked.

  Raises:
    TypeError: for a `k` that is no integer.
    ValueError: for a class or a number of labels that the model does not have.

  Example:
    >>> constant(1)(lambda x: x, jnp.zeros((3, 2)), None)["label"].tolist()
    [1, 1, 1]
    >>> hide_all = constant(jnp.zeros(2, int))
    >>> hide_all(lambda x: x, jnp.ones((2, 2)), None)["label"].tolist()
    [[0, 0], [0, 0]]
  """
  if isinstance(k, bool) or not jnp.issubdtype(jnp.result_type(k), jnp.integer):
    raise TypeError(f"target is {k!r}; write the index of a class, such as 0.")

  def prepare(predict, x, y):
    logits = jax.eval_shape(lambda image: call(predict, image)[0], x)
    shape = logits.shape if jnp.ndim(k) else logits.shape[:-1]
    if jnp.ndim(k) and jnp.shape(k) != logits.shape[1:]:
      raise ValueError(
        f"the target has labels {jnp.shape(k)}, and the logits are {logits.shape}; "
        "write one 0 or 1 for each label of the model."
      )
    if not isinstance(k, jax.core.Tracer):
      inputs.check_classes({"label": np.broadcast_to(k, shape)}, logits)
    return _masked(jnp.broadcast_to(k, shape), y)

  return prepare


def clean_logits(predict: Predict, x: Images, y: Any) -> dict[str, Any]:
  """The labels as given, and the clean logits under `"logits"`.

  Example:
    >>> target = clean_logits(lambda x: 2 * x, jnp.ones((1, 2)), jnp.array([0]))
    >>> target["logits"].tolist()
    [[2.0, 2.0]]
  """
  return labels(predict, x, y) | {"logits": call(predict, x)[0]}


def rivals(n: int) -> PrepareFn:
  """The label, and as `"rivals"` the `n` other classes with the highest clean logits.

  Raises:
    ValueError: for masks and label sets.

  Example:
    >>> target = rivals(2)(lambda x: x, jnp.array([[0.1, 0.9, 0.5]]), jnp.array([1]))
    >>> target["rivals"].tolist()
    [[2, 0]]
  """

  def prepare(predict, x, y):
    target = labels(predict, x, y)
    logits = call(predict, x)[0]
    if logits.ndim != 2 or jnp.ndim(target["label"]) != 1:
      raise ValueError(
        f"labels have shape {jnp.shape(target['label'])} and logits {logits.shape}; "
        "rivals are those of classes: labels (B,), logits (B, K)."
      )
    own = jax.nn.one_hot(target["label"], logits.shape[-1], dtype=bool)
    others = jnp.where(own, -jnp.inf, logits)
    _, ordered = jax.lax.top_k(others, min(n, logits.shape[-1] - 1))
    return target | {"rivals": ordered}

  return prepare


def guide_features(predict: Predict, x: Images, y: Any) -> dict[str, Any]:
  """Features of the clean image, and of the target image `y["image"]` where given.

  Returns:
    The entries of `y` but the image, `"clean_features"`, and `"features"` when there is
    a target image.

  Raises:
    ValueError: when `predict` returns no features.
  """
  target = labels(predict, x, y)
  image = target.pop("image", None)
  target["clean_features"] = _features(predict, x)
  if image is not None:
    target["features"] = _features(predict, image)
  return target


def prototypes(predict: Predict, x: Images, y: Any) -> dict[str, Any]:
  """Guide features for an arbitrary mask, built from the clean image itself.

  For each feature the prototype `c_k` of class k is its mean over the cells the model
  gives to k, and the guide is `sum_k pool(1[y = k]) c_k`, where `pool` is area
  averaging to the size of the feature.

  Returns:
    `"label"` (and `"mask"`), `"clean_features"` and `"features"`.
  """
  target = labels(predict, x, y)
  target.pop("image", None)
  logits, features = call(predict, x)
  _require(features)
  classes = logits.shape[-1]
  owned = jax.nn.one_hot(jnp.argmax(logits, -1), classes)
  wanted = jax.nn.one_hot(target["label"], classes)
  guides = {name: _recompose(f, owned, wanted) for name, f in features.items()}
  return target | {"clean_features": features, "features": guides}


def gradient_weights(loss: LossFn, prepare: PrepareFn = labels) -> PrepareFn:
  """Adds `"weights"`: one over the norm of each loss's gradient at the clean image.

  Weighted by them, losses of different scales pull alike at the start. Takes one
  forward pass and one pull-back per loss.

  Args:
    loss: one example -> `(S,)`.
    prepare: of the rest of the target, which `loss` may read.

  Returns:
    A prepare whose target has `"weights"` `(B, S)`; 0 where a gradient is.
  """

  def weigh(predict, x, y):
    target = prepare(predict, x, y)

    def at(image):
      logits, features = call(predict, image)
      progress = jnp.zeros(len(image))
      return jax.vmap(loss)(
        Sample(x, image, image - x, logits, features, target, progress)
      )

    values, pull_back = jax.vjp(at, x)
    rows = jnp.eye(values.shape[1], dtype=values.dtype)
    pulled = [pull_back(jnp.broadcast_to(row, values.shape))[0] for row in rows]
    norms = jnp.stack(
      [jnp.linalg.norm(g.reshape(len(x), -1), axis=1) for g in pulled], 1
    )
    return target | {"weights": jnp.where(norms > 0, 1 / norms, 0.0)}

  return weigh


def _masked(label, y):
  """A target of this label, and of the mask of what counts where `y` has one."""
  kept = isinstance(y, Mapping) and "mask" in y
  return {"label": label, "mask": y["mask"]} if kept else {"label": label}


def _decision(logits, y):
  label = y.get("label") if isinstance(y, Mapping) else y
  if label is None or jnp.ndim(label) != logits.ndim:
    return jnp.argmax(logits, -1)
  inputs.check_shapes({"label": label}, logits)
  return (logits > 0).astype(jnp.int32)


def _recompose(feature, owned, wanted):
  shape = feature.shape[1:-1]
  owned, wanted = _area_pool(owned, shape), _area_pool(wanted, shape)
  total = jnp.einsum("b...k,b...c->bkc", owned, feature)
  axes = tuple(range(1, owned.ndim - 1))
  weight = owned.sum(axes)[..., None]
  prototype = total / jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)
  return jnp.einsum("b...k,bkc->b...c", wanted, prototype)


def _area_pool(image, shape):
  for axis, size in enumerate(shape, start=1):
    matrix = _overlaps(size, image.shape[axis]).astype(image.dtype)
    image = jnp.moveaxis(jnp.tensordot(image, matrix, (axis, 1)), -1, axis)
  return image


def _overlaps(cells, pixels):
  """`(cells, pixels)`: share of each cell covered by each pixel; rows sum to one."""
  edges, grid = np.linspace(0, 1, cells + 1), np.linspace(0, 1, pixels + 1)
  low = np.maximum(edges[:-1, None], grid[None, :-1])
  high = np.minimum(edges[1:, None], grid[None, 1:])
  return np.maximum(high - low, 0) * cells


def _features(predict, image):
  features = call(predict, image)[1]
  _require(features)
  return features


def _require(features):
  if not features:
    raise ValueError(
      "this attack reads features; write a predict that returns (logits, features) "
      "with features a flat dict of arrays (B, ..., C)."
    )
