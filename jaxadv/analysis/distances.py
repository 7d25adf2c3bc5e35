"""How far an attack moves an image inside a network, layer by layer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxadv import inputs
from jaxadv.types import Array, Images, Predict, call

__all__ = ["cosine_distance", "layer_distances"]


def cosine_distance(a: Array, b: Array) -> Array:
  """`1 - cos(a, b)` of two activations of ONE example, over all their values.

  Args:
    a: `(...)` float.
    b: `(...)` float, of the same shape.

  Returns:
    A scalar in [0, 2]; 0 when both are zero, 1 when one is.

  Example:
    >>> cosine_distance(jnp.array([1.0, 0.0]), jnp.array([0.0, 3.0])).item()
    1.0
  """
  a, b = (v.ravel().astype(jnp.result_type(float)) for v in (a, b))
  # of vectors of length 1, half the squared distance is 1 - cos without cancellation
  parts = jnp.square(_unit(a) - _unit(b)).sum() / 2
  one = a.any() ^ b.any()
  return jnp.where(one, 1.0, parts)


def layer_distances(
  predict: Predict, x: Images, attacked: Images, *, names: Sequence[str]
) -> Array:
  """The cosine distance of features, clean to attacked.

  Args:
    predict: images to `(logits, features)`.
    x: `(B, ..., C)` clean images.
    attacked: `(B, ..., C)` the same images, attacked.
    names: N features; `splitting.feature_names` has all, in the order of the network.

  Returns:
    `(B, N)` in [0, 2].

  Raises:
    ValueError: for a name that the model does not have.

  Example:
    >>> predict = lambda x: (x, {"half": x / 2, "square": x**2})
    >>> x, attacked = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 1.0]])
    >>> print(layer_distances(predict, x, attacked, names=["half", "square"]).round(3))
    [[0.293 0.293]]
  """
  _, before = call(predict, x)
  _, after = call(predict, attacked)
  for name in names:
    inputs.check_choice("feature", name, sorted(before))
  distance = jax.vmap(cosine_distance)
  return jnp.stack([distance(before[name], after[name]) for name in names], -1)


def _unit(v):
  """Divided by its norm; the squares of small values would vanish. Zero stays."""
  largest = jnp.abs(v).max()
  scaled = v / jnp.where(largest > 0, largest, 1)
  return scaled / jnp.sqrt(jnp.maximum(jnp.square(scaled).sum(), 1))
