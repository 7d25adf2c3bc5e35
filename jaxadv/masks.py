"""Decisions and overlaps of ONE example, shared by losses, criteria and metrics.

Logits are `(K,)` for a class, `(..., K)` for a mask or volume and `(L,)` for a label
set; labels have the shape of the decision. `valid` marks the pixels that count (all
when `None`): pixels with an "ignore" label are excluded everywhere in the same way.
"""

import jax
import jax.numpy as jnp

__all__ = ["decision", "iou", "pixel_accuracy"]


def decision(logits: jax.Array, label: jax.Array) -> jax.Array:
  """What the model decides: classes by `argmax` (ties to the lowest), labels by sign.

  Args:
    logits: `(..., K)` for classes and masks, `(L,)` for a label set.
    label: `(...)` int for classes and masks, `(L,)` for a label set. Only its rank is
      read: equal ranks mean one independent yes-or-no decision per entry.

  Returns:
    An int32 array of the shape of `label`.

  Example:
    >>> decision(jnp.array([0.1, 2.0, -1.0]), jnp.array(0)).item()
    1
    >>> decision(jnp.array([0.1, -2.0]), jnp.array([1, 1])).tolist()
    [1, 0]
  """
  if jnp.ndim(logits) == jnp.ndim(label):
    return (logits > 0).astype(jnp.int32)
  return jnp.argmax(logits, -1).astype(jnp.int32)


def pixel_accuracy(
  prediction: jax.Array, label: jax.Array, valid: jax.Array | None = None
) -> jax.Array:
  """Share of the valid pixels with `prediction == label`.

  Args:
    prediction: `(...)` int decision.
    label: `(...)` int.
    valid: `(...)` bool, or `None` for every pixel.

  Returns:
    A float scalar in [0, 1]; 1 when no pixel is valid.

  Example:
    >>> pixel_accuracy(jnp.array([0, 1, 1, 0]), jnp.array([1, 1, 0, 0])).item()
    0.5
  """
  valid = jnp.ones(jnp.shape(label), bool) if valid is None else valid
  return _ratio(((prediction == label) & valid).sum(), valid.sum())


def iou(
  prediction: jax.Array,
  label: jax.Array,
  num_classes: int,
  valid: jax.Array | None = None,
) -> jax.Array:
  """Intersection over union of one predicted mask with one label mask.

  `|A and B| / |A or B|` of class 1 for two classes; for more, the mean over the
  classes present in the prediction or the label. Counted in integers.

  Args:
    prediction: `(...)` int mask.
    label: `(...)` int mask.
    num_classes: K, static.
    valid: `(...)` bool, or `None` for every pixel.

  Returns:
    A float scalar in [0, 1]; 1 when both masks are empty.

  Example:
    >>> print(iou(jnp.array([0, 1, 1, 0]), jnp.array([1, 1, 0, 0]), 2).round(4))
    0.3333

  Differs from the original ASMA code, which gives 0/0 for two empty masks and whose
  product formula is meaningless beyond two classes.
  """
  valid = jnp.ones(jnp.shape(label), bool) if valid is None else valid
  classes = jnp.arange(1 if num_classes == 2 else 0, num_classes)
  hits = _members(prediction, classes) & valid[None]
  wanted = _members(label, classes) & valid[None]
  union = _count(hits | wanted)
  per_class = _ratio(_count(hits & wanted), union)
  present = union > 0
  return _ratio((per_class * present).sum(), present.sum())


def _members(mask, classes):
  return mask[None] == classes.reshape((-1,) + (1,) * jnp.ndim(mask))


def _count(hits):
  return hits.sum(axis=tuple(range(1, hits.ndim)))


def _ratio(part, whole):
  """`part / whole` in the default float, 1 where there is nothing to share."""
  share = part / jnp.maximum(whole, 1).astype(jnp.result_type(float))
  return jnp.where(whole > 0, share, 1)
