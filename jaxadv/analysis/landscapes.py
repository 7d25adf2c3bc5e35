"""The loss around an image, in the plane of the attack and of a random direction."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadv import losses
from jaxadv.types import (
  Array,
  Images,
  LossFn,
  Predict,
  Sample,
  call,
  example_keys,
  labels,
)

__all__ = ["Landscape", "landscape", "orthogonal"]

_ALONG = tuple(k / 4 for k in range(-4, 9))
_ACROSS = tuple(k / 4 for k in range(-6, 7))


class Landscape(NamedTuple):
  """Losses on a grid, one for each example.

  Attributes:
    loss: `(B, P, Q)` at `x + s (attacked - x) + t r`.
    along: `(P,)` the values of `s`: 0 is the clean image, 1 the attacked one.
    across: `(Q,)` the values of `t`, for `r` as long as the attack.
  """

  loss: Array
  along: Array
  across: Array


def landscape(
  key: Array,
  predict: Predict,
  x: Images,
  y: Any,
  *,
  attacked: Images,
  loss: LossFn = losses.task_loss,
  along: Sequence[float] = _ALONG,
  across: Sequence[float] = _ACROSS,
) -> Landscape:
  """Losses of every example on a plane through its clean and its attacked image.

  The images of the grid are not clipped: a plane stays one, and its border may lie
  outside [0, 1]. One point after the other goes through the model, B images at a time.

  Args:
    key: a typed key, or one per example `(B,)`; of the random directions.
    predict: images to logits, or to `(logits, features)`.
    x: `(B, ..., C)` clean images.
    y: labels `(B, ...)`, or a mapping with `"label"`, as for attacks.
    attacked: `(B, ..., C)` the same images, attacked. Where nothing moved, neither
      direction has any length, and the losses are all the same.
    loss: of one example; cross-entropy by default.
    along: P values of `s`; -1 to 2 by default.
    across: Q values of `t`; -1.5 to 1.5 by default.

  Returns:
    A `Landscape`.

  Raises:
    TypeError: for keys, as `types.example_keys`.
    ValueError: likewise, and for attacked images of another shape.

  Example:
    >>> predict = lambda x: x.sum(1, keepdims=True) * jnp.array([[1.0, -1.0]])
    >>> x, y = jnp.zeros((1, 8)), jnp.array([0])
    >>> found = landscape(jax.random.key(0), predict, x, y, attacked=x - 0.1)
    >>> found.loss.shape, round(found.loss[0, 4, 6].item(), 4)
    ((1, 13, 13), 0.6931)
  """
  if attacked.shape != x.shape:
    raise ValueError(f"`attacked` has shape {attacked.shape}, and `x` {x.shape}.")
  target = labels(predict, x, y)
  attack = attacked - x
  draws = jax.vmap(orthogonal)(example_keys(key, len(x)), attack)
  dtype = x.dtype
  s, t = (jnp.asarray(steps, dtype) for steps in (along, across))

  def at(point):
    delta = point[0] * attack + point[1] * draws
    logits, features = call(predict, x + delta)
    zeros = jnp.zeros(len(x), dtype)
    sample = Sample(x, x + delta, delta, logits, features, target, zeros)
    return jax.vmap(loss)(sample)

  grid = jnp.stack(jnp.meshgrid(s, t, indexing="ij"), -1).reshape(-1, 2)
  found = jax.lax.map(at, grid)
  return Landscape(found.T.reshape(len(x), len(s), len(t)), s, t)


def orthogonal(key: Array, attack: Array) -> Array:
  """A random direction at right angles to ONE perturbation, and as long as it.

  Random signs less their part along the attack: for an attack of signs, its values are
  about as large as those.

  Args:
    key: a typed key.
    attack: `(...)` perturbation.

  Returns:
    `(...)`; all zero when the attack is, or has a single value.

  Example:
    >>> found = orthogonal(jax.random.key(0), jnp.array([0.0, 4.0]))
    >>> print(jnp.abs(found))
    [4. 0.]
  """
  signs = jax.random.rademacher(key, attack.shape, attack.dtype)
  length = jnp.sqrt(jnp.square(attack).sum())
  unit = attack / jnp.where(length > 0, length, 1)
  free = signs - (signs * unit).sum() * unit
  left = jnp.sqrt(jnp.square(free).sum())
  return free * (length / jnp.where(left > 0, left, 1))
