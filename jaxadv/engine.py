"""The engine: the only file with a loop over steps.

One step of one perturbation `d`, with `cost = -objective.loss`:

    sample   = everything known at d           one model call for the whole batch
    updates  = transform.update(d cost / d d)  optax, mapped over the examples
    d        = project(d + updates)            always last

The model sees the batch; everything else is written for one example and mapped, so the
result for an example cannot depend on its neighbours. Transforms may name the keyword
arguments `value` (cost), `sample`, `project` and `success`; optax passes over the rest.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxadv import inputs
from jaxadv.types import (
  Array,
  AttackResult,
  Images,
  Objective,
  Perturbation,
  Predict,
  Sample,
  SuccessFn,
  Target,
  Threat,
  call,
  example_keys,
)

__all__ = ["Attack", "gradient_attack"]


class Attack(NamedTuple):
  """An attack that can be called, or stepped by hand.

  Attributes:
    init: `(key, predict, x, y) -> (state, target)`; leaves of both have leading axis B.
    step: `(predict, x, target, state) -> (state, losses (B,))`.
    finish: `(predict, x, target, state, losses) -> AttackResult`.
    num_steps: steps at most.
    can_stop: whether examples stop early, so that the loop may end early.
  """

  init: Callable[..., tuple[Perturbation, Target]]
  step: Callable[..., tuple[Perturbation, Array]]
  finish: Callable[..., AttackResult]
  num_steps: int
  can_stop: bool = False

  def __call__(self, key: Array, predict: Predict, x: Images, y: Any) -> AttackResult:
    """Attacks a batch in one compiled loop.

    Args:
      key: one typed key, or one per example.
      predict: images to logits or `(logits, features)`, pure, in evaluation mode.
      x: `(B, ..., C)` float32 or float64 clean images inside the bounds.
      y: labels `(B,)` or `(B, H, W)`, or a mapping with `"label"`. For a targeted
        attack it is what the attacker wants.

    Returns:
      An `AttackResult`.

    Raises:
      TypeError, ValueError: for bad input, before the first step.
    """
    state, target = self.init(key, predict, x, y)
    step = functools.partial(self.step, predict, x, target)
    loop = _while_any_runs if self.can_stop else _scan
    state, losses = loop(step, state, self.num_steps)
    return self.finish(predict, x, target, state, losses)

  def run_stepwise(
    self, key: Array, predict: Predict, x: Images, y: Any
  ) -> AttackResult:
    """The same numbers from a host loop over the compiled step.

    For models whose gradient is slow inside compiled loops on CPU, and to watch an
    attack at work. Arguments, result and errors are those of a call.
    """
    state, target = self.init(key, predict, x, y)
    step = jax.jit(functools.partial(self.step, predict))
    losses: list[Array] = []
    while len(losses) < self.num_steps and not (self.can_stop and state.done.all()):
      state, loss = step(x, target, state)
      losses.append(loss)
    losses += losses[-1:] * (self.num_steps - len(losses))
    return self.finish(predict, x, target, state, jnp.stack(losses))


def gradient_attack(
  objective: Objective,
  threat: Threat,
  transform: optax.GradientTransformation,
  *,
  num_steps: int,
  random_start: bool = True,
  keep: Literal["last", "best", "smallest"] = "last",
  stop: SuccessFn | None = None,
) -> Attack:
  """Raises an objective inside a threat by gradient steps.

  Args:
    objective: what to raise; sums over examples, so none scales another.
    threat: what is allowed.
    transform: optax transform of the cost gradient of one example, for instance
      `optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(0.01))`. For a
      loss of S values its first link receives a gradient with a leading axis S.
    num_steps: steps at most, static.
    random_start: start at `threat.init` instead of zero.
    keep: which point to return: the last, the one with the best score, or the success
      with the smallest L2 distance (the best score until there is a success).
    stop: one example -> bool; a stopped example is frozen, and the loop ends when all
      are.

  Returns:
    An `Attack`.

  Raises:
    TypeError, ValueError: for `num_steps` below 1 and an unknown `keep`.

  Example:
    >>> from jaxadv import losses, threats
    >>> sign = optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(0.1))
    >>> attack = gradient_attack(
    ...   Objective(losses.cross_entropy), threats.linf(0.2), sign, num_steps=3,
    ...   random_start=False)
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> result = attack(jax.random.key(0), lambda x: x @ weights, x, y)
    >>> print(result.image.round(2), result.success)
    [[0.29999998 0.29999998]] [False]
  """
  inputs.check_num_steps(num_steps)
  if keep not in ("last", "best", "smallest"):
    raise ValueError(f'`keep` is {keep!r}; write "last", "best" or "smallest".')
  transform = optax.with_extra_args_support(transform)
  evaluate = functools.partial(_evaluate, objective, threat, num_steps)
  keeping = functools.partial(_keep, keep)

  def init(key, predict, x, y):
    inputs.check_batch(x, y, threat.bounds)
    target = jax.lax.stop_gradient(objective.prepare(predict, x, y))
    _check_target(predict, x, target)
    start = functools.partial(_start, threat, transform, random_start)
    return jax.vmap(start)(example_keys(key, x.shape[0]), x), target

  def step(predict, x, target, state):
    loss, gradient, sample = _gradient(evaluate, predict, x, target, state)
    state = jax.vmap(keeping)(state, *_judge(objective, sample, loss))
    done = jnp.zeros_like(state.done) if stop is None else jax.vmap(stop)(sample)
    advance = functools.partial(_advance, threat, transform, objective.success)
    return jax.vmap(advance)(state, gradient, loss, sample, done), loss

  def finish(predict, x, target, state, losses):
    loss, sample = evaluate(predict, x, target, state, state.delta)
    state = jax.vmap(keeping)(state, *_judge(objective, sample, loss))
    delta = state.delta if keep == "last" else state.best_delta
    if keep != "last":
      loss, sample = evaluate(predict, x, target, state, delta)
    score, _, _, success = _judge(objective, sample, loss)
    forwards, backwards = _passes(evaluate, predict, x, target, state)
    result = AttackResult(
      image=sample.image,
      delta=delta,
      score=score,
      logits=sample.logits,
      losses=losses,
      success=success,
      steps=state.step,
      nonfinite=state.nonfinite + _is_nonfinite(loss),
      forwards=forwards * state.step,
      backwards=backwards * state.step,
    )
    return jax.lax.stop_gradient(result)

  return Attack(init, step, finish, num_steps, stop is not None)


def _scan(step, state, num_steps):
  return jax.lax.scan(lambda s, _: step(s), state, length=num_steps)


def _while_any_runs(step, state, num_steps):
  """Like `_scan`, but ends when every example is done; its losses then stand still."""
  loss = jax.eval_shape(step, state)[1]
  history = jnp.zeros((num_steps, *loss.shape), loss.dtype)

  def runs(carry):
    t, state, _ = carry
    return (t < num_steps) & ~state.done.all()

  def body(carry):
    t, state, history = carry
    state, loss = step(state)
    return t + 1, state, history.at[t].set(loss)

  t, state, history = jax.lax.while_loop(runs, body, (0, state, history))
  rows = jnp.minimum(jnp.arange(num_steps), t - 1)
  return state, history[rows]


def _start(threat, transform, random_start, key, image):
  init_key, key = jax.random.split(key)
  delta = threat.init(init_key, image)
  if not random_start:
    delta = jax.tree.map(jnp.zeros_like, delta)
  delta = threat.project(delta, image)
  return Perturbation(
    step=jnp.int32(0),
    key=key,
    delta=delta,
    opt=transform.init(delta),
    best_delta=delta,
    best_score=_as_float(-jnp.inf),
    best_success=jnp.bool_(False),
    done=jnp.bool_(False),
    nonfinite=jnp.int32(0),
  )


def _evaluate(objective, threat, num_steps, predict, x, target, state, delta):
  """Losses `(B,)` or `(B, S)` at `delta`, and the samples they were read from."""
  keys = jax.vmap(jax.random.fold_in)(state.key, state.step)
  image = jax.vmap(threat.apply)(x, delta)
  logits, features = objective.forward(predict, keys, image, x)
  inputs.check_shapes(target, logits)
  progress = state.step / num_steps
  sample = Sample(x, image, delta, logits, features, target, progress)
  return _as_float(jax.vmap(objective.loss)(sample)), sample


def _gradient(evaluate, predict, x, target, state):
  """One forward pass; one pull-back per loss, cost convention (minus the loss)."""
  objective_at = functools.partial(evaluate, predict, x, target, state)
  loss, pull_back, sample = jax.vjp(objective_at, state.delta, has_aux=True)
  if loss.ndim == 1:
    (gradient,) = pull_back(-jnp.ones_like(loss))
    return loss, gradient, sample
  one_hot = -jnp.eye(loss.shape[1], dtype=loss.dtype)
  pulled = [pull_back(jnp.broadcast_to(row, loss.shape))[0] for row in one_hot]
  return loss, jax.tree.map(lambda *g: jnp.stack(g, 1), *pulled), sample


def _judge(objective, sample, loss):
  """Score, squared distance, perturbation and success of each example."""
  score = loss if objective.score is None else jax.vmap(objective.score)(sample)
  score = _as_float(score).reshape(loss.shape[0], -1).sum(1)
  moved = _as_float(sample.image - sample.clean)
  distance = jnp.square(moved).reshape(loss.shape[0], -1).sum(1)
  return score, distance, sample.delta, jax.vmap(objective.success)(sample)


def _keep(keep, state, score, distance, delta, success):
  """Remembers the best perturbation of ONE example; successes come before the rest."""
  if keep == "last":
    return state
  success = success & (keep == "smallest")
  value = jnp.where(success, -distance, score)
  higher = (success == state.best_success) & (value > state.best_score)
  better = ((success & ~state.best_success) | higher) & ~state.done
  return state._replace(
    best_delta=_select(better, delta, state.best_delta),
    best_score=jnp.where(better, value, state.best_score),
    best_success=state.best_success | success,
  )


def _advance(threat, transform, success, state, gradient, loss, sample, done):
  """Moves ONE perturbation, or leaves it where it is once it is done."""
  finite = jax.tree.map(jnp.isfinite, gradient)
  bad = ~jax.tree.reduce(jnp.logical_and, jax.tree.map(jnp.all, finite))
  gradient = jax.tree.map(
    lambda g, ok: jnp.where(ok, g, jnp.zeros_like(g)), gradient, finite
  )

  def project(delta):
    return threat.project(delta, sample.clean)

  updates, opt = transform.update(
    gradient,
    state.opt,
    state.delta,
    value=-loss,
    sample=sample,
    project=project,
    success=success(sample),
  )
  moved = state._replace(
    step=state.step + 1,
    delta=project(optax.apply_updates(state.delta, updates)),
    opt=opt,
    nonfinite=state.nonfinite + (bad | _is_nonfinite(loss[None])[0]),
  )
  done = state.done | done
  return _select(done, state, moved)._replace(done=done)


def _passes(evaluate, predict, x, target, state):
  """Forward and backward passes per example and step, counted from the shapes."""
  images = 0

  def counted(image):
    nonlocal images
    images += image.shape[0]
    return predict(image)

  loss, _ = jax.eval_shape(lambda s: evaluate(counted, x, target, s, s.delta), state)
  return images // x.shape[0], loss.size // x.shape[0]


def _check_target(predict, x, target):
  """Compares labels with the model's classes, where they are concrete."""
  if "label" not in target:
    raise TypeError('`prepare` returned no "label"; every target has one.')
  if isinstance(target["label"], jax.core.Tracer):
    return
  logits, _ = jax.eval_shape(lambda image: call(predict, image), x)
  inputs.check_shapes(target, logits)
  inputs.check_classes(target, logits)


def _select(condition, new, old):
  """`new` where `condition`, leaf by leaf, typed keys included."""
  return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def _is_nonfinite(loss):
  return ~jnp.isfinite(loss).reshape(loss.shape[0], -1).all(1)


def _as_float(value):
  """The default float: a half-precision model cannot change the state's type."""
  return jnp.asarray(value, jnp.result_type(float))
