"""Walks a finished attack straight back towards the clean image."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxadv import inputs, types
from jaxadv.types import AttackFn, Predict, Sample, SuccessFn, Threat

__all__ = ["line_search"]


def line_search(
  attack: AttackFn,
  threat: Threat,
  *,
  success: SuccessFn = types.reached,
  num_steps: int = 10,
) -> AttackFn:
  """The shortest success found by bisection between the clean and the attacked image.

  An attack that keeps a point beyond the decision threshold pays for its overshoot;
  this takes it back, at one forward pass per step and no gradient. Comparing
  minimum-distortion attacks without it partly compares overshoots.

  Args:
    attack: any attack with an array as perturbation.
    threat: how a shorter perturbation is applied, for instance `stored(box())`.
    success: one example -> bool.
    num_steps: halvings of the interval; the factor is found to `2^-num_steps`.

  Returns:
    An attack: each example is the shortest success met, or the attack's own result if
    there was none. `score`, `losses` and `steps` stay those of the attack.

  Example:
    >>> from jaxadv import attacks, threats
    >>> near = line_search(
    ...   attacks.pgd(0.4, random_start=False), threats.box(), success=types.fooled)
    >>> result = near(
    ...   jax.random.key(0), lambda x: jnp.stack([x[..., 0], 0.4 + 0 * x[..., 0]], -1),
    ...   jnp.array([[0.5]]), jnp.array([0]))
    >>> print(result.image.round(2), result.success)
    [[0.39999998]] [ True]
  """
  inputs.check_num_steps(num_steps)

  def search(key, predict, x, y):
    result = attack(key, predict, x, y)
    target = types.labels(predict, x, y)
    judge = _judge(predict, threat, success, x, target)

    def halve(carry, _):
      low, high, best = carry
      middle = (low + high) / 2
      trial = judge(_scale(result.delta, middle), best)
      hit = trial.success
      best = _where(hit, trial, best)
      return (jnp.where(hit, low, middle), jnp.where(hit, middle, high), best), None

    ends = jnp.zeros(x.shape[0], x.dtype), jnp.ones(x.shape[0], x.dtype)
    start = _where(result.success, judge(result.delta, result), result)
    (_, _, best), _ = jax.lax.scan(halve, (*ends, start), length=num_steps)
    best = _where(best.success, best, result)
    return best._replace(forwards=result.forwards + num_steps + 1, losses=result.losses)

  return search


def _judge(predict: Predict, threat, success, x, target) -> Any:
  """Applies a perturbation and books what the model makes of it."""

  def judge(delta, result):
    image = jax.vmap(threat.apply)(x, delta)
    logits, features = types.call(predict, image)
    progress = jnp.ones(x.shape[0])
    sample = Sample(x, image, delta, logits, features, target, progress)
    hit = jax.vmap(success)(sample)
    return result._replace(image=image, delta=delta, logits=logits, success=hit)

  return judge


def _scale(delta, factor):
  return delta * factor.reshape(factor.shape + (1,) * (delta.ndim - 1))


def _where(condition, new, old):
  def choose(a, b):
    return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - 1)), a, b)

  # the history (T, B) is the same in both and has no leading batch axis
  keep = {"losses": old.losses}
  return jax.tree.map(
    choose, new._replace(losses=()), old._replace(losses=())
  )._replace(**keep)
