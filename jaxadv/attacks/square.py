"""Square attack: random search with squares, which reads nothing but logits."""

import functools
import math

import jax
import jax.numpy as jnp
import optax

from jaxadv import inputs, losses, stepping, threats
from jaxadv.attacks.iterative import aim
from jaxadv.attacks.parts import Bounds, Scalar
from jaxadv.engine import Attack
from jaxadv.types import Array, AttackResult, Perturbation, Threat, example_keys, labels

__all__ = ["side", "square"]

# Squares tried so far, after each of which the area is halved.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000)


def square(
  eps: Scalar,
  *,
  num_steps: int = 1000,
  p_init: Scalar = 0.8,
  targeted: bool = False,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Square attack in Linf: needs no gradient, so it tells whether gradients mislead.

  The first query shows vertical stripes of `+-eps`. Each further one adds a square of
  `+-2 eps` in every channel to the best perturbation so far and is kept if it raises
  the margin of the decision:

      d' = project(d + 2 eps * colour * [in the square]),   d <- d' if m(d') > m(d)

  Args:
    eps: Linf radius.
    num_steps: queries at most; each is one call of the model on the whole batch.
    p_init: share of the image that the first squares cover, see `side`.
    targeted: `y` is what the attacker wants.
    bounds: valid range of images.

  Returns:
    An `Attack` on images or volumes `(B, ..., C)`. An example stops at its first
    success; its `steps` and `forwards` are the queries spent on it, `backwards` is 0
    and `losses` are the best margins so far.

  Raises:
    TypeError, ValueError: for a negative radius, a share outside [0, 1], `num_steps`
      below 1, images without pixels `(B, C)`, and labels outside the classes.

  Example:
    >>> predict = lambda x: jnp.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)
    >>> x, y = jnp.full((1, 4, 4, 1), 0.55), jnp.array([0])
    >>> result = square(0.1, num_steps=100)(jax.random.key(0), predict, x, y)
    >>> print(result.success, result.backwards)
    [ True] [0]

  Differs from the released code: its squares never touch the last row and column, and
  of volumes cubes are coloured.

  Reference: Andriushchenko et al., ECCV 2020, arXiv 1912.00049; the schedule as in
  AutoAttack (Croce and Hein, ICML 2020), where it does not depend on `num_steps`.
  """
  inputs.check_num_steps(num_steps)
  inputs.check_share("p_init", p_init)
  objective = aim(losses.margin, targeted)
  threat = _striped(threats.linf(eps, bounds=bounds), eps)
  start = functools.partial(stepping.start, threat, optax.identity(), random_start=True)
  propose = functools.partial(_propose, threat, eps, p_init)

  def evaluate(predict, x, target, state, delta):
    loss, sample = stepping.evaluate(
      objective,
      threat,
      predict,
      x,
      target=target,
      keys=state.key,
      progress=state.step / num_steps,
      delta=delta,
    )
    return loss, sample, jax.vmap(objective.success)(sample)

  def init(key, predict, x, y):
    inputs.check_batch(x, y, threat.bounds)
    if x.ndim < 3:
      raise ValueError(f"`x` has shape {x.shape}; squares need pixels, (B, H, W, C).")
    target = labels(predict, x, y)
    stepping.check_target(predict, x, target)
    return jax.vmap(start)(example_keys(key, len(x)), x), target

  def step(predict, x, target, state):
    tried = jax.vmap(propose)(state, x)
    loss, _, success = evaluate(predict, x, target, state, tried)
    state = jax.vmap(_accept)(state, tried, loss, success)
    return state, state.best_score

  def finish(predict, x, target, state, losses, followed=None):
    del followed  # the best point is known, and the model itself judges it
    loss, sample, success = evaluate(predict, x, target, state, state.delta)
    result = AttackResult(
      image=sample.image,
      delta=state.delta,
      score=loss,
      logits=sample.logits,
      losses=losses,
      success=success,
      steps=state.step,
      nonfinite=state.nonfinite + stepping.is_nonfinite(loss),
      forwards=state.step,
      backwards=jnp.zeros_like(state.step),
    )
    return jax.lax.stop_gradient(result)

  return Attack(init, step, finish, num_steps, can_stop=True)


def side(p_init: Scalar, shape: tuple[int, ...], tried: Array | int) -> Array:
  """Side of the next square of an image, in pixels.

  `round((p * pixels) ** (1 / len(shape)))`, with `p = p_init / 2^k` after `k` of 10,
  50, 200, 500, 1000, 2000 and 4000 squares; at least 1, and no longer than the image.

  Args:
    p_init: share of the image that the first squares cover.
    shape: of the image without its channels.
    tried: squares tried before this one.

  Returns:
    An int32.

  Example:
    >>> [int(side(0.8, (224, 224), n)) for n in (0, 10, 11, 4001)]
    [200, 200, 142, 18]
  """
  halvings = (jnp.asarray(tried) > jnp.array(_HALVED_AFTER)).sum()
  length = jnp.round((p_init * math.prod(shape) / 2.0**halvings) ** (1 / len(shape)))
  return jnp.clip(length, 1, min(shape)).astype(jnp.int32)


def _striped(threat: Threat, eps: Scalar) -> Threat:
  """The threat with stripes to start from: constant along the first axis."""

  def init(key, image):
    draws = jax.random.uniform(key, (1, *image.shape[1:]), image.dtype)
    return jnp.broadcast_to(eps * _signs(draws), image.shape)

  return threat._replace(init=init)


def _propose(threat, eps, p_init, state, image):
  """What ONE example is asked next: the stripes, then the best with a square more."""
  *shape, channels = image.shape
  length = side(p_init, tuple(shape), state.step - 1)
  # one draw for place and colour: a compiled program is mostly its random numbers
  key = jax.random.fold_in(state.key, state.step)
  draws = jax.random.uniform(key, (len(shape) + channels,), image.dtype)
  inside = _cube(draws[: len(shape)], shape, length)
  colour = _signs(draws[len(shape) :]).reshape(*(1 for _ in shape), channels)
  moved = state.delta + jnp.where(inside[..., None], 2 * eps * colour, 0)
  return jnp.where(state.step == 0, state.delta, threat.project(moved, image))


def _cube(draws, shape, length):
  """Where a square or cube of this side has its pixels, placed anywhere inside."""
  corner = jnp.floor(draws * (jnp.array(shape) - length + 1))
  inside = jnp.bool_(True)
  for n, place in enumerate(jnp.indices(shape, sparse=True)):
    inside = inside & (place >= corner[n]) & (place < corner[n] + length)
  return inside


def _signs(draws):
  return jnp.where(draws < 0.5, -1, 1)


def _accept(state: Perturbation, tried, loss, success) -> Perturbation:
  """Keeps for ONE example what fools or raises the margin; a fooled one rests."""
  runs = ~state.done
  better = runs & (success | (loss > state.best_score))
  delta = jnp.where(better, tried, state.delta)
  return state._replace(
    step=state.step + runs,
    delta=delta,
    best_delta=delta,
    best_score=jnp.where(better, loss, state.best_score),
    best_success=state.best_success | success,
    done=state.done | success,
    nonfinite=state.nonfinite + (runs & ~jnp.isfinite(loss)),
  )
