"""Attacks made of attacks: an `AttackFn` in, an `AttackFn` out."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxadv import types
from jaxadv.types import Array, AttackFn, AttackResult, Images, Predict, Sample

__all__ = ["best_of", "identity", "with_restarts"]


def identity(key: Array, predict: Predict, x: Images, y: Any) -> AttackResult:
  """The clean view: no perturbation, and success where the model errs by itself.

  Example:
    >>> result = identity(
    ...   jax.random.key(0), lambda x: x, jnp.array([[0.2, 0.7]]), jnp.array([0]))
    >>> result.success.tolist()
    [True]
  """
  types.example_keys(key, x.shape[0])
  target = types.labels(predict, x, y)
  logits, features = types.call(predict, x)
  delta = jnp.zeros_like(x)
  count = jnp.zeros(x.shape[0], jnp.int32)
  sample = Sample(x, x, delta, logits, features, target, count / 1)
  success = jax.vmap(types.fooled)(sample)
  score = success.astype(jnp.result_type(float))
  result = AttackResult(
    image=x,
    delta=delta,
    score=score,
    logits=logits,
    losses=jnp.zeros((0, *score.shape)),
    success=success,
    steps=count,
    nonfinite=count + ~jnp.isfinite(logits).reshape(len(x), -1).all(1),
    forwards=count + 1,
    backwards=count,
  )
  return jax.lax.stop_gradient(result)


def best_of(*attacks: AttackFn) -> AttackFn:
  """Per example, the result of the attack that did best: success first, then score.

  Counts of steps and passes are those of all attacks together, and a non-finite value
  in any of them stays on record. Scores should be comparable, so give the attacks the
  same objective score.

  Args:
    *attacks: at least one; each gets a key of its own.

  Returns:
    An attack whose `losses` are those of the chosen run, padded with their last value
    when the runs differ in length.

  Raises:
    ValueError: without attacks.
  """
  if not attacks:
    raise ValueError("best_of() got no attacks; write best_of(first, second).")

  def attack(key, predict, x, y):
    keys = types.example_keys(key, x.shape[0])
    results = [
      run(jax.vmap(jax.random.fold_in, (0, None))(keys, i), predict, x, y)
      for i, run in enumerate(attacks)
    ]
    length = max(len(r.losses) for r in results)
    best = _pad(results[0], length)
    for other in results[1:]:
      best = _better(best, _pad(other, length))
    return best

  return attack


def with_restarts(attack: AttackFn, n: int) -> AttackFn:
  """The best of `n` runs with independent random streams, per example.

  Raises:
    ValueError: for `n < 1`.
  """
  if n < 1:
    raise ValueError(f"`n` is {n}; an attack needs at least 1 run.")
  return best_of(*[attack] * n)


def _better(a, b):
  higher = (b.success == a.success) & (b.score > a.score)
  take_b = (b.success & ~a.success) | higher

  def choose(new, old):
    where = take_b.reshape(take_b.shape + (1,) * (new.ndim - 1))
    return jnp.where(where, new, old)

  chosen = jax.tree.map(
    choose, b._replace(losses=_rows(b)), a._replace(losses=_rows(a))
  )
  return chosen._replace(
    losses=jnp.moveaxis(chosen.losses, 0, 1),
    steps=a.steps + b.steps,
    nonfinite=a.nonfinite + b.nonfinite,
    forwards=a.forwards + b.forwards,
    backwards=a.backwards + b.backwards,
  )


def _rows(result):
  return jnp.moveaxis(result.losses, 1, 0)


def _pad(result, length):
  missing = length - len(result.losses)
  pads = [(0, missing)] + [(0, 0)] * (result.losses.ndim - 1)
  mode = "edge" if len(result.losses) else "constant"
  return result._replace(losses=jnp.pad(result.losses, pads, mode=mode))
