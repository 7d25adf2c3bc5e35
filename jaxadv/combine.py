"""Attacks made of attacks: an `AttackFn` in, an `AttackFn` out."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxadv import inputs, stepping, types
from jaxadv.engine import Attack
from jaxadv.freezing import freeze
from jaxadv.types import (
  Array,
  AttackFn,
  AttackResult,
  Images,
  Predict,
  Sample,
  Threat,
  example_keys,
)

__all__ = [
  "best_of",
  "bf16",
  "fixed",
  "identity",
  "one_of",
  "random_budget",
  "with_restarts",
]


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


def fixed(threat: Threat, delta: Any) -> AttackFn:
  """The view through ONE perturbation: a universal one, or a random control.

  Args:
    threat: how it is applied; `threats.stored(threat)` rounds the image to 8 bits.
    delta: without a batch axis, such as `state.delta` of a universal attack.

  Returns:
    An attack without steps; success is that of `identity`.

  Example:
    >>> from jaxadv import threats
    >>> shift = fixed(threats.linf(0.6), jnp.array([0.6, 0.0]))
    >>> x, y = jnp.array([[0.25, 0.75]]), jnp.array([1])
    >>> result = shift(jax.random.key(0), lambda x: x, x, y)
    >>> print(result.image, result.success)
    [[0.85 0.75]] [ True]
  """

  def attack(key, predict, x, y):
    image = jax.vmap(threat.apply, (0, None))(x, delta)
    return identity(key, predict, image, y)._replace(delta=image - x)

  return attack


def one_of(threat: Threat, pool: Any, *, share: float = 0.5) -> AttackFn:
  """The view through one of several perturbations, drawn for each example.

  Args:
    threat: how it is applied.
    pool: `(M, ..., C)`, M perturbations.
    share: probability that an example gets one; it stays clean otherwise.

  Returns:
    An attack without steps; success is that of `identity`.

  Raises:
    ValueError: for a share outside [0, 1].

  Example:
    >>> from jaxadv import threats
    >>> pool = jnp.array([[0.1, 0.0], [0.0, 0.1]])
    >>> view = one_of(threats.box(), pool, share=1.0)
    >>> key, x = jax.random.key(0), jnp.full((100, 2), 0.5)
    >>> moved = view(key, lambda x: x, x, jnp.zeros(100, int)).image - x
    >>> bool(jnp.allclose(moved.sum(1), 0.1)), bool((moved > 0.05).any(0).all())
    (True, True)
  """
  inputs.check_share("share", share)

  def draw(key, image):
    which_key, whether_key = jax.random.split(key)
    delta = pool[jax.random.randint(which_key, (), 0, len(pool))]
    chosen = jax.random.bernoulli(whether_key, share)
    return jnp.where(chosen, threat.apply(image, delta), image)

  def attack(key, predict, x, y):
    image = jax.vmap(draw)(example_keys(key, len(x)), x)
    return identity(key, predict, image, y)._replace(delta=image - x)

  return attack


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


def bf16(attack: Attack) -> Attack:
  """The attack along gradients from convolutions and products in bfloat16.

  Perturbation, losses and what is between the products stay in float32, and the model
  itself gives the verdict: success never rests on the narrow numbers, though it may
  differ from that of the same steps in float32, as any rounding tips some signs. When
  to stop, and which point to keep, the narrow model says. Products that a model hides
  in a gradient of its own or in a `while_loop`, and depthwise convolutions of
  `jaxadv.models`, which are none, stay in float32.

  Args:
    attack: an `Attack`. Models and images of other types than float32 stay as they are.

  Returns:
    An `Attack`. On CPU its model also went through `jaxadv.freeze`.

  Raises:
    TypeError: for anything but an `Attack`.

  Example:
    >>> from jaxadv import attacks
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> attack = bf16(attacks.pgd(0.1, num_steps=5))
    >>> result = attack(jax.random.key(0), lambda x: x @ weights, x, y)
    >>> print(result.image.round(2), result.logits.dtype)
    [[0.39999998 0.39999998]] float32
  """
  if not isinstance(attack, Attack):
    raise TypeError(
      f"got {type(attack).__name__}; write an Attack, such as attacks.pgd(0.01), "
      "before it is combined with others."
    )
  narrow = lambda predict, x: freeze(attack.followed(predict, x), x, bf16=True)
  return attack._replace(surrogate=narrow)


def random_budget(
  make: Callable[..., AttackFn],
  sample_hparams: Callable[[Array], Mapping[str, Any]],
  *,
  bounds: tuple[Any, Any] | None = (0.0, 1.0),
) -> AttackFn:
  """An attack whose parameters are drawn for each example: one program for all of them.

  Args:
    make: `(**parameters) -> attack`; the parameters are traced, so they may be radii,
      step sizes and weights, but no `num_steps`: `transforms.for_steps` stops early.
    sample_hparams: `key -> parameters` of ONE example; floats are cast to the images'
      precision.
    bounds: of images, checked here, as `make` sees one traced example at a time.

  Returns:
    An attack; example `i` is attacked by `make(**sample_hparams(key_i))`.

  Example:
    >>> from jaxadv import attacks
    >>> draw = lambda key: {"eps": jax.random.uniform(key, maxval=0.3)}
    >>> attack = random_budget(attacks.fgsm, draw)
    >>> x, y = jnp.full((3, 2), 0.5), jnp.zeros(3, int)
    >>> moved = attack(jax.random.key(0), lambda x: x, x, y).image - x
    >>> len({round(size, 4) for size in abs(moved[:, 0]).tolist()})
    3
  """

  def attack(key, predict, x, y):
    inputs.check_batch(x, y, bounds)
    stepping.check_target(predict, x, types.labels(predict, x, y))

    def one(key, x, y):
      draw_key, key = jax.random.split(key)
      alone = jax.tree.map(lambda leaf: leaf[None], (x, y))
      run = make(**_cast(sample_hparams(draw_key), x.dtype))
      result = run(key[None], predict, *alone)
      losses = jnp.moveaxis(result.losses, 1, 0)
      return jax.tree.map(lambda leaf: leaf[0], result._replace(losses=losses))

    result = jax.vmap(one)(example_keys(key, len(x)), x, y)
    return result._replace(losses=jnp.moveaxis(result.losses, 0, 1))

  return attack


def _cast(values, dtype):
  floating = lambda v: jnp.issubdtype(jnp.result_type(v), jnp.floating)
  return jax.tree.map(lambda v: jnp.asarray(v, dtype) if floating(v) else v, values)


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
