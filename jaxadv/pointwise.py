"""What losses are made of: values per pixel or per label of ONE example.

Logits are `(K,)` of a class, `(..., K)` of a mask or volume and `(L,)` of a label set.
They are cast to the default float first, so that a half-precision model is attacked in
single precision.
"""

import jax
import jax.numpy as jnp
import optax

from jaxadv import masks
from jaxadv.types import Sample, valid_pixels

__all__ = [
  "cross_entropies",
  "divergences",
  "gaps",
  "is_label_set",
  "log_losses",
  "logits",
  "margins",
  "mean",
  "one_hot",
  "pick",
  "rivals",
  "wrong",
]

Array = jax.Array


def logits(sample: Sample) -> Array:
  """The logits in the default float."""
  return sample.logits.astype(jnp.result_type(float))


def one_hot(sample: Sample) -> Array:
  """`(..., K)` bool, true at the label."""
  classes = jnp.arange(sample.logits.shape[-1])
  label = _class_index(sample.target["label"], sample.logits)
  return label[..., None] == classes.reshape((1,) * label.ndim + (-1,))


def pick(z: Array, index: Array) -> Array:
  """`z[..., index]` without a gather, whose gradient would be a slow scatter on CPU."""
  index = _class_index(index, z)
  classes = jnp.arange(z.shape[-1]).reshape((1,) * index.ndim + (-1,))
  return jnp.where(index[..., None] == classes, z, 0).sum(-1)


def gaps(sample: Sample) -> Array:
  """`z_k - z_y`, exactly 0 at the label."""
  z = logits(sample)
  return z - pick(z, sample.target["label"])[..., None]


def rivals(sample: Sample) -> Array:
  """`z_k - z_y`, minus infinity at the label."""
  return jnp.where(one_hot(sample), -jnp.inf, gaps(sample))


def margins(sample: Sample) -> Array:
  """`z_y - max_{k != y} z_k`, negative where the decision is not the label."""
  return -rivals(sample).max(-1)


def cross_entropies(sample: Sample) -> Array:
  """`-log p_y`."""
  # the gradient of `logsumexp(z) - z_y` has `p_y - 1` in it, 0 in float32 once the
  # label leads by 17: a sign step then follows one class and not the difference of two
  return jax.nn.softplus(jax.nn.logsumexp(rivals(sample), -1))


def log_losses(sample: Sample) -> Array:
  """`-log p(label)`: `cross_entropies` of classes, and the same of every label."""
  if not is_label_set(sample):
    return cross_entropies(sample)
  return optax.sigmoid_binary_cross_entropy(logits(sample), sample.target["label"])


def divergences(sample: Sample) -> Array:
  """`KL(q || p)` from the prediction `q` made of `target["logits"]`."""
  z, wanted = logits(sample), sample.target["logits"].astype(jnp.result_type(float))
  if is_label_set(sample):
    z, wanted = (jnp.stack([v, jnp.zeros_like(v)], -1) for v in (z, wanted))
  log_q = jax.nn.log_softmax(wanted)
  return (jnp.exp(log_q) * (log_q - jax.nn.log_softmax(z))).sum(-1)


def is_label_set(sample: Sample) -> bool:
  """Whether every logit is a decision of its own."""
  return jnp.shape(sample.target["label"]) == sample.logits.shape


def wrong(sample: Sample) -> Array:
  """Where a valid decision differs from the label."""
  label = sample.target["label"]
  return (masks.decision(sample.logits, label) != label) & valid_pixels(sample)


def mean(values: Array, sample: Sample) -> Array:
  """Over the valid pixels or labels; 0 where there are none."""
  valid = valid_pixels(sample)
  return jnp.where(valid, values, 0).sum() / jnp.maximum(valid.sum(), 1)


def _class_index(index, z):
  index = jnp.asarray(index)
  if index.ndim != z.ndim - 1:
    raise ValueError(
      f"this loss is one of classes, and the label {index.shape} is no class index for "
      f"logits {z.shape}; for label sets write loss=losses.task_loss, margin or "
      "label_margin."
    )
  return index
