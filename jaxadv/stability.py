"""How steady an attack is: four measures of its variance, for comparing attacks.

The first two read the gradients that an attack followed, which `watch` takes down; the
other two its outcome on a set of images and on a set of tasks. A sign step moves a
value to the surface of the ball and leaves it there, and its gradient may then look
steady for that reason alone: take the first two also over the values that are `free`.

Definitions are ours: the SMIA paper (arXiv 2103.05232) promises small variance, and its
text was not available.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadv.engine import Attack
from jaxadv.types import Array, AttackResult

__all__ = [
  "Path",
  "direction_consistency",
  "free",
  "sign_flips",
  "spread",
  "spread_over_tasks",
  "true_margin",
  "watch",
]


class Path(NamedTuple):
  """What an attack went through, one entry per example and step.

  Attributes:
    delta: `(B, T, ...)` perturbation before each step.
    gradient: `(B, T, ...)` of the objective there, which the attack raises.
  """

  delta: Array
  gradient: Array


def watch(attack: Attack) -> Callable[..., tuple[AttackResult, Path]]:
  """The attack as a function that also returns its path.

  Args:
    attack: of the engine, with an array as its perturbation and one loss, that takes
      all its steps: an example that stands still would look steady.

  Returns:
    `(key, predict, x, y) -> (result, path)`, the result being that of the attack.

  Raises:
    ValueError: for an attack that stops early, and for one without `follow`.

  Example:
    >>> from jaxadv import attacks
    >>> attack = attacks.pgd(0.2, num_steps=3, random_start=False)
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> _, path = watch(attack)(jax.random.key(0), lambda x: x @ weights, x, y)
    >>> path.delta.shape, bool((path.gradient < 0).all())
    ((1, 3, 2), True)
  """
  if attack.can_stop:
    raise ValueError("the attack stops early; build it without `stop` to watch it.")
  follow = attack.follow
  if follow is None:
    raise ValueError("the attack has no `follow`; build it by `gradient_attack`.")

  def run(key, predict, x, y):
    state, target = attack.init(key, predict, x, y)
    followed = attack.followed(predict, x)

    def step(state, _):
      moved, losses, gradient = follow(followed, x, target, state)
      return moved, (losses, Path(state.delta, gradient))

    state, (losses, path) = jax.lax.scan(step, state, length=attack.num_steps)
    path = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), path)
    return attack.finish(predict, x, target, state, losses, followed), path

  return run


def free(
  delta: Array, clean: Array, eps: Any, *, bounds: tuple[Any, Any] = (0.0, 1.0)
) -> Array:
  """Values neither on the surface of the Linf ball nor at an end of the range.

  Args:
    delta: `(T, ...)` perturbations of one image.
    clean: `(...)` that image.
    eps: radius; a thousandth of it counts as nothing, for the roundings.
    bounds: valid range of images.

  Returns:
    `(T, ...)` bool.

  Example:
    >>> free(jnp.array([[0.1, 0.05, 0.05]]), jnp.array([0.5, 0.5, 0.95]), 0.1).tolist()
    [[False, True, False]]
  """
  image, slack = clean[None] + delta, 1e-3 * eps
  inside = (image > bounds[0] + slack) & (image < bounds[1] - slack)
  return inside & (jnp.abs(delta) < eps - slack)


def sign_flips(gradients: Array, where: Array | None = None) -> Array:
  """Share of values whose gradient changes its sign from one step to the next.

  `mean 1[sign(g_t) != sign(g_{t-1})]` over values and steps `t >= 1`.

  Args:
    gradients: `(T, ...)` of one image.
    where: `(T, ...)` bool, the values that count; both ends of a step have to.

  Returns:
    A scalar in [0, 1]; NaN when nothing counts.

  Example:
    >>> sign_flips(jnp.array([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])).item()
    0.5
  """
  signs = jnp.sign(gradients)
  return jnp.mean(signs[1:] != signs[:-1], where=_pairs(gradients, where))


def direction_consistency(gradients: Array, where: Array | None = None) -> Array:
  """Mean cosine of each gradient with the one before it.

  `mean cos(g_t, g_{t-1})` over `t >= 1`, among the steps where neither is 0.

  Args:
    gradients: `(T, ...)` of one image.
    where: `(T, ...)` bool, the values that count; both ends of a step have to.

  Returns:
    A scalar in [-1, 1]; NaN when nothing counts.

  Example:
    >>> direction_consistency(jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]])).item()
    0.5
  """
  pairs = _pairs(gradients, where)
  before, after = (jnp.where(pairs, g, 0) for g in (gradients[:-1], gradients[1:]))
  axes = tuple(range(1, gradients.ndim))
  moves = before.any(axes) & after.any(axes)
  cosines = jax.vmap(lambda a, b: (_unit(a) * _unit(b)).sum())(before, after)
  return jnp.mean(cosines, where=moves)


def true_margin(logits: Array, label: Array) -> Array:
  """How sure one example still is of the truth: `z_y - max_{k != y} z_k`.

  Args:
    logits: `(K,)`, `(..., K)` or `(L,)`.
    label: `()`, `(...)` or `(L,)`; for a label set the margin is `(2y - 1) z`.

  Returns:
    A scalar, the mean over pixels or labels; negative where the decision is wrong.

  Example:
    >>> true_margin(jnp.array([3.0, 1.0, 0.5]), jnp.array(0)).item()
    2.0
  """
  if logits.shape == label.shape:
    return jnp.mean(jnp.where(label, logits, -logits))
  truth = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
  right = jnp.where(truth, logits, -jnp.inf).max(-1)
  return jnp.mean(right - jnp.where(truth, -jnp.inf, logits).max(-1))


def spread(values: Array) -> Array:
  """Standard deviation over images, for instance of `true_margin` or the L2 norm.

  Example:
    >>> spread(jnp.array([1.0, 3.0])).item()
    1.0
  """
  return jnp.std(values)


def spread_over_tasks(clean: Array, attacked: Array) -> Array:
  """Standard deviation over tasks of the drop `(clean - attacked) / clean`, at one eps.

  Args:
    clean: `(N,)` metric of each task before the attack, above 0.
    attacked: `(N,)` after it.

  Returns:
    A scalar >= 0.

  Example:
    >>> spread_over_tasks(jnp.array([0.5, 1.0]), jnp.array([0.25, 0.0])).item()
    0.25
  """
  return jnp.std((clean - attacked) / clean)


def _pairs(gradients, where):
  """Which values count from one step to the next, `(T - 1, ...)`."""
  if where is None:
    return jnp.ones(gradients[1:].shape, bool)
  return where[1:] & where[:-1]


def _unit(g):
  """Divided by its norm; the squares of a small gradient would vanish. Zero stays."""
  largest = jnp.abs(g).max()
  scaled = g / jnp.where(largest > 0, largest, 1)
  return scaled / jnp.sqrt(jnp.maximum(jnp.square(scaled).sum(), 1))
