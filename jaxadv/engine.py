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
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxadv import inputs, reduction, stepping
from jaxadv.types import (
  Array,
  AttackResult,
  Images,
  Objective,
  Perturbation,
  Predict,
  SuccessFn,
  Target,
  Threat,
  example_keys,
)

__all__ = ["Attack", "Universal", "gradient_attack", "universal_attack"]


class Attack(NamedTuple):
  """An attack that can be called, or stepped by hand.

  Attributes:
    init: `(key, predict, x, y) -> (state, target)`; leaves of both have leading axis B.
    step: `(predict, x, target, state) -> (state, losses (B,))`.
    finish: `(predict, x, target, state, losses) -> AttackResult`; a sixth argument is
      the model that the steps followed, if it was another.
    num_steps: steps at most.
    can_stop: whether examples stop early, so that the loop may end early.
    follow: `step` that also returns the gradient `(B, ...)` of the objective there.
    surrogate: `(predict, x) -> predict`, the model whose gradients the steps follow,
      in place of the attacked one, which keeps the verdict; `None` for that one. It
      also says when to stop and which point to keep.
  """

  init: Callable[..., tuple[Perturbation, Target]]
  step: Callable[..., tuple[Perturbation, Array]]
  finish: Callable[..., AttackResult]
  num_steps: int
  can_stop: bool = False
  follow: Callable[..., tuple[Perturbation, Array, Any]] | None = None
  surrogate: Callable[[Predict, Images], Predict] | None = None

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
    followed = self.followed(predict, x)
    step = functools.partial(self.step, followed, x, target)
    loop = _while_any_runs if self.can_stop else _scan
    state, losses = loop(step, state, self.num_steps)
    return self.finish(predict, x, target, state, losses, followed)

  def run_stepwise(
    self, key: Array, predict: Predict, x: Images, y: Any
  ) -> AttackResult:
    """The same numbers from a host loop over the compiled step.

    For models whose gradient is slow inside compiled loops on CPU, and to watch an
    attack at work. Arguments, result and errors are those of a call.
    """
    state, target = self.init(key, predict, x, y)
    followed = self.followed(predict, x)
    step = jax.jit(functools.partial(self.step, followed))
    losses: list[Array] = []
    while len(losses) < self.num_steps and not (self.can_stop and state.done.all()):
      state, loss = step(x, target, state)
      losses.append(loss)
    losses += losses[-1:] * (self.num_steps - len(losses))
    return self.finish(predict, x, target, state, jnp.stack(losses), followed)

  def followed(self, predict: Predict, x: Images) -> Predict:
    """The model whose gradients the steps follow."""
    return predict if self.surrogate is None else self.surrogate(predict, x)


class Universal(NamedTuple):
  """A universal perturbation in the making: one state, any number of batches.

  Attributes:
    init: `(key, image) -> Perturbation` without a batch axis; of `image`, one example,
      only shape and dtype matter.
    step: `(predict, state, batch) -> (state, metrics)`, to be jitted by the caller.
      `batch` holds `image (B, ..., C)`, what the objective's `prepare` reads (usually
      `label`), and optionally `weight (B,)`, 0 for padding, and `id (B,)`.
  """

  init: Callable[[Array, Array], Perturbation]
  step: Callable[
    [Predict, Perturbation, Mapping[str, Any]], tuple[Perturbation, dict[str, Array]]
  ]


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
  inputs.check_choice("keep", keep, ("last", "best", "smallest"))
  transform = optax.with_extra_args_support(transform)
  start = functools.partial(stepping.start, threat, transform)
  remember = functools.partial(stepping.remember, keep)
  evaluate = functools.partial(_evaluate, objective, threat, num_steps)
  advance = functools.partial(_advance, objective, threat, transform)

  def init(key, predict, x, y):
    inputs.check_batch(x, y, threat.bounds)
    target = jax.lax.stop_gradient(objective.prepare(predict, x, y))
    stepping.check_target(predict, x, target)
    each = functools.partial(start, random_start=random_start)
    return jax.vmap(each)(example_keys(key, x.shape[0]), x), target

  def follow(predict, x, target, state):
    loss_at = functools.partial(evaluate, predict, x, target, state)
    loss, cost, sample = stepping.pull_back(loss_at, state.delta)
    state = jax.vmap(remember)(state, stepping.judge(objective, sample, loss))
    done = jnp.zeros_like(state.done) if stop is None else jax.vmap(stop)(sample)
    state = jax.vmap(advance)(state, cost, loss, sample, done)
    return state, loss, jax.tree.map(jnp.negative, cost)

  def step(predict, x, target, state):
    return follow(predict, x, target, state)[:2]

  def finish(predict, x, target, state, losses, followed=None):
    followed = predict if followed is None else followed
    counted, passed = _counting(followed)
    loss, sample = evaluate(counted, x, target, state, state.delta)
    state = jax.vmap(remember)(state, stepping.judge(objective, sample, loss))
    delta = state.delta if keep == "last" else state.best_delta
    if keep != "last" or followed is not predict:
      loss, sample = evaluate(predict, x, target, state, delta)
    verdict = stepping.judge(objective, sample, loss)
    result = AttackResult(
      image=sample.image,
      delta=delta,
      score=verdict.score,
      logits=sample.logits,
      losses=losses,
      success=verdict.success,
      steps=state.step,
      nonfinite=state.nonfinite + stepping.is_nonfinite(loss),
      forwards=sum(passed) // x.shape[0] * state.step,
      backwards=loss.size // x.shape[0] * state.step,
    )
    return jax.lax.stop_gradient(result)

  return Attack(init, step, finish, num_steps, stop is not None, follow)


def universal_attack(
  objective: Objective,
  threat: Threat,
  transform: optax.GradientTransformation,
  *,
  random_start: bool = False,
  example: optax.GradientTransformation | None = None,
  microbatches: int | None = None,
  axis_name: str | None = None,
) -> Universal:
  """Raises an objective on average over images by ONE perturbation.

      g = sum_i weight_i g_i / sum_i weight_i,   delta <- project(delta + transform(-g))

  The sums run over the whole batch, wherever its parts lie: on arrays sharded over
  devices the compiler adds them up, under `pmap` or `shard_map` give `axis_name`. The
  division comes before any sign, so equal shares of the devices do not matter. Only the
  last bits depend on the number of devices; with `microbatches` not even those.

  Args:
    objective: what to raise, as for `gradient_attack`.
    threat: what is allowed; its projection is called without an image.
    transform: optax transform of the mean cost gradient.
    random_start: start at `threat.init` instead of zero.
    example: stateless transform of each example's gradient before the mean, for
      instance `transforms.normalize(2)`, so that no example outweighs the others.
    microbatches: equal parts of a batch, over all devices, that pass the model one
      after another and are added up in order, see `jaxadv.reduction`: less memory, and
      the same bits on any number of devices that divides it. On several devices it
      needs `axis_name`.
    axis_name: of the mapped axis of devices.

  Returns:
    A `Universal`. Its metrics are `loss` and `success`, weighted means over the batch
    before the step, and `nonfinite`, the number of examples left out because their loss
    or gradient was not finite.

  Example:
    >>> from jaxadv import losses, threats
    >>> sign = optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(0.1))
    >>> uap = universal_attack(Objective(losses.cross_entropy), threats.linf(0.2), sign)
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> batch = {"image": jnp.full((4, 2), 0.5), "label": jnp.zeros(4, int)}
    >>> state = uap.init(jax.random.key(0), batch["image"][0])
    >>> for _ in range(3):
    ...   state, metrics = uap.step(lambda x: x @ weights, state, batch)
    >>> print(state.delta, metrics["success"])
    [-0.2 -0.2] 0.0
  """
  transform = optax.with_extra_args_support(transform)

  def init(key, image):
    inputs.check_image(image)
    example_keys(key, 1)  # refuses what is not a typed threefry key
    # No image bounds it: what is cut off at one may be needed at the next.
    free = threat._replace(project=lambda delta, _: threat.project(delta, None))
    return stepping.start(free, transform, key, image, random_start=random_start)

  def step(predict, state, batch):
    x, y, weight, ids = stepping.parts(batch, threat, axis_name)
    stepping.check_state(state, jax.eval_shape(init, state.key, x[0]))
    measure = functools.partial(_sums, objective, threat, example, predict, state)
    sums = reduction.total(
      measure, (x, y, weight, ids), microbatches=microbatches, axis_name=axis_name
    )
    means, nonfinite = reduction.means(sums)
    gradient = means.pop("gradient")
    state = stepping.advance(threat, transform, state, gradient, loss=means["loss"])
    state = state._replace(best_delta=state.delta)
    state = state._replace(nonfinite=state.nonfinite + nonfinite)
    return state, means | {"nonfinite": nonfinite}

  return Universal(init, step)


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


def _evaluate(objective, threat, num_steps, predict, x, target, state, delta):
  return stepping.evaluate(
    objective,
    threat,
    predict,
    x,
    target=target,
    keys=jax.vmap(jax.random.fold_in)(state.key, state.step),
    progress=state.step / num_steps,
    delta=delta,
  )


def _advance(objective, threat, transform, state, gradient, loss, sample, done):
  """Moves ONE perturbation, or leaves it where it is once it is done."""
  success = objective.success(sample)
  moved = stepping.advance(
    threat, transform, state, gradient, loss=loss, sample=sample, success=success
  )
  return stepping.freeze(done, state, moved)


def _each(example, gradient):
  if example is None:
    return gradient
  return jax.vmap(lambda g: example.update(g, example.init(g))[0])(gradient)


def _sums(objective, threat, example, predict, state, rows):
  """Loss, success and gradient, added up over some rows of a batch."""
  x, y, weight, ids = rows
  target = jax.lax.stop_gradient(objective.prepare(predict, x, y))
  stepping.check_target(predict, x, target)
  step_key = jax.random.fold_in(state.key, state.step)
  loss_at = functools.partial(
    stepping.evaluate,
    objective,
    threat,
    predict,
    x,
    target=target,
    keys=jax.vmap(jax.random.fold_in, (None, 0))(step_key, ids),
    progress=jnp.zeros(len(x)),
  )
  everywhere = jax.tree.map(
    lambda d: jnp.broadcast_to(d, (len(x), *d.shape)), state.delta
  )
  loss, gradient, sample = stepping.pull_back(
    lambda delta: loss_at(delta=delta), everywhere
  )
  terms = {"loss": loss, "success": jax.vmap(objective.success)(sample)}
  terms["gradient"] = _each(example, gradient)
  return reduction.weighted(terms, weight)


def _counting(predict):
  """The model, and a list that grows by the images of every call: forward passes.

  The last evaluation is counted, as it is like that of a step: tracing the model for
  the count alone would take as long as tracing it once more for the program.
  """
  passed: list[int] = []

  def counted(image):
    passed.append(image.shape[0])
    return predict(image)

  return counted, passed
