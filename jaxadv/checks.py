"""Eager checks, once before and once after an attack: is the evidence what it seems?"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadv import inputs, types
from jaxadv.types import AttackResult, Images, Predict, Threat

__all__ = ["Report", "check_model", "check_result"]


class Report(NamedTuple):
  """What was looked at, and what was wrong with it.

  Attributes:
    problems: one sentence per failed check; empty when all is well.
  """

  problems: tuple[str, ...]

  @property
  def ok(self) -> bool:
    """Whether every check passed."""
    return not self.problems

  def raise_if_any(self) -> None:
    """Raises `ValueError` with every problem, if there is one."""
    if self.problems:
      raise ValueError(" ".join(self.problems))


def check_model(predict: Predict, x: Images, y: Any) -> Report:
  """Looks for what makes attacks on a model fail silently or mean nothing.

  Logits and not probabilities; the same answer twice; the same answer for an image
  alone and in the batch (batch norm in training mode fails here); a finite, non-zero
  input gradient for every image.

  Args:
    predict: the model.
    x: `(B, ..., C)` float images in [0, 1], at least two, from the real data.
    y: their labels, or a mapping with `"label"`.

  Returns:
    A `Report`.

  Raises:
    TypeError, ValueError: for input no attack would accept.

  Example:
    >>> x, y = jnp.array([[0.2, 0.9], [0.7, 0.1]]), jnp.array([1, 0])
    >>> check_model(lambda x: 5 * x, x, y).ok
    True
    >>> print(check_model(lambda x: 5 * (x - x.mean()), x, y).problems[0])
    An image alone and in the batch gets different logits (by up to 0.375): put the
    model in evaluation mode.
  """
  inputs.check_batch(x, y, None)
  target = types.labels(predict, x, y)
  logits, _ = types.call(predict, x)
  inputs.check_shapes(target, logits)
  inputs.check_classes(target, logits)
  found = (
    _finite(logits),
    _not_probabilities(logits),
    _deterministic(predict, x, logits),
    _independent(predict, x, logits),
    _has_gradient(predict, x, target["label"]),
  )
  return Report(tuple(problem for problem in found if problem))


def check_result(result: AttackResult, threat: Threat, x: Images) -> Report:
  """Checks that attacked images are what the threat allows.

  The perturbation is inside the threat, the image is the one it gives, and both are
  finite; distances are compared to 1e-6 of the range.

  Args:
    result: of an attack.
    threat: the threat it was given.
    x: `(B, ..., C)` the clean images.

  Returns:
    A `Report`.

  Example:
    >>> from jaxadv import attacks, threats
    >>> x = jnp.array([[0.2, 0.9]])
    >>> result = attacks.pgd(0.1)(jax.random.key(0), lambda x: x, x, jnp.array([1]))
    >>> check_result(result, threats.linf(0.1), x).ok
    True
    >>> print(check_result(result, threats.linf(0.05), x).problems[0])
    The perturbation of image 0 leaves the threat by 0.05.
  """
  projected = jax.vmap(threat.project)(result.delta, x)
  applied = jax.vmap(threat.apply)(x, result.delta)
  found = [
    _apart(result.delta, projected, "The perturbation", "leaves the threat"),
    _apart(result.image, applied, "The attacked copy", "is not the threat's image"),
  ]
  if not jnp.isfinite(result.image).all():
    found.append("Some attacked images are not finite.")
  return Report(tuple(problem for problem in found if problem))


def _apart(a, b, what, verb):
  distance = jnp.abs(a - b).reshape(len(a), -1).max(1)
  worst = int(distance.argmax())
  if distance[worst] > 1e-6:
    return f"{what} of image {worst} {verb} by {float(distance[worst]):.3g}."
  return None


def _finite(logits):
  if not jnp.isfinite(logits).all():
    return "Some logits are not finite on clean images."
  return None


def _not_probabilities(logits):
  sums = jnp.abs(logits.sum(-1) - 1) < 1e-3
  if logits.shape[-1] > 1 and bool((sums & (logits.min(-1) >= 0)).all()):
    return "The outputs are probabilities: return logits, before the softmax."
  return None


def _deterministic(predict, x, logits):
  if not jnp.array_equal(types.call(predict, x)[0], logits, equal_nan=True):
    return "Two calls give different logits: switch dropout off."
  return None


def _independent(predict, x, logits):
  alone = types.call(predict, x[:1])[0]
  gap = float(jnp.abs(alone - logits[:1]).max())
  if gap > 1e-3 * float(1 + jnp.abs(logits).max()):
    return (
      f"An image alone and in the batch gets different logits (by up to {gap:.3g}): "
      "put the model in evaluation mode."
    )
  return None


def _has_gradient(predict, x, label):
  def confidence(image):
    logits = types.call(predict, image)[0]
    if logits.shape == label.shape:
      return jnp.abs(logits).sum()
    return jax.nn.log_softmax(logits).max(-1).sum()

  gradient = jax.grad(confidence)(x).reshape(len(x), -1)
  if not jnp.isfinite(gradient).all():
    return "The input gradient is not finite for some clean images."
  zero = jnp.flatnonzero(~gradient.any(1))
  if zero.size:
    return f"The input gradient of image {int(zero[0])} is zero: gradients are masked."
  return None
