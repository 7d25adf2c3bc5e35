"""What the engine's loops are made of: start, evaluate, judge, keep, advance.

`evaluate`, `pull_back` and `judge` see the batch, as they call the model or map over
it; the others are written for ONE perturbation.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxadv import inputs, reduction
from jaxadv.types import (
  Array,
  Images,
  Objective,
  Perturbation,
  Predict,
  Sample,
  Target,
  Threat,
  call,
)

__all__ = [
  "Verdict",
  "advance",
  "as_float",
  "check_state",
  "check_target",
  "evaluate",
  "freeze",
  "is_nonfinite",
  "judge",
  "parts",
  "pull_back",
  "remember",
  "start",
]

Transform: TypeAlias = optax.GradientTransformationExtraArgs
# delta (B, ...) -> losses (B,) or (B, S), and the samples they were read from
LossAt = Callable[[Any], tuple[Array, Sample]]


class Verdict(NamedTuple):
  """What is known about a point that may be kept; leaves lead with the batch or not.

  Attributes:
    score: compared across steps.
    distance: squared L2 distance from the clean image.
    delta: the perturbation.
    success: bool.
  """

  score: Array
  distance: Array
  delta: Any
  success: Array


def start(
  threat: Threat, transform: Transform, key: Array, image: Array, *, random_start: bool
) -> Perturbation:
  """The state before the first step: zero, or a random point of the threat."""
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
    best_score=as_float(-jnp.inf),
    best_success=jnp.bool_(False),
    done=jnp.bool_(False),
    nonfinite=jnp.int32(0),
  )


def evaluate(
  objective: Objective,
  threat: Threat,
  predict: Predict,
  x: Images,
  *,
  target: Target,
  keys: Array,
  progress: Array,
  delta: Any,
) -> tuple[Array, Sample]:
  """Losses `(B,)` or `(B, S)` at `delta`, and the samples they were read from."""
  image = jax.vmap(threat.apply)(x, delta)
  logits, features = objective.forward(predict, keys, image, x)
  inputs.check_shapes(target, logits)
  sample = Sample(x, image, delta, logits, features, target, progress)
  return as_float(jax.vmap(objective.loss)(sample)), sample


def pull_back(loss_at: LossAt, delta: Any) -> tuple[Array, Any, Sample]:
  """One forward pass; one pull-back per loss, cost convention (minus the loss).

  Returns:
    Losses, gradients with leading axes `(B,)` or `(B, S)`, samples.
  """
  loss, pull, sample = jax.vjp(loss_at, delta, has_aux=True)
  if loss.ndim == 1:
    (gradient,) = pull(-jnp.ones_like(loss))
    return loss, gradient, sample
  one_hot = -jnp.eye(loss.shape[1], dtype=loss.dtype)
  pulled = [pull(jnp.broadcast_to(row, loss.shape))[0] for row in one_hot]
  return loss, jax.tree.map(lambda *g: jnp.stack(g, 1), *pulled), sample


def judge(objective: Objective, sample: Sample, loss: Array) -> Verdict:
  """What `remember` compares, for each example of the batch."""
  score = loss if objective.score is None else jax.vmap(objective.score)(sample)
  score = as_float(score).reshape(loss.shape[0], -1).sum(1)
  moved = as_float(sample.image - sample.clean)
  distance = jnp.square(moved).reshape(loss.shape[0], -1).sum(1)
  success = jax.vmap(objective.success)(sample)
  return Verdict(score, distance, sample.delta, success)


def remember(keep: str, state: Perturbation, verdict: Verdict) -> Perturbation:
  """Notes the best perturbation of ONE example; successes come before the rest."""
  if keep == "last":
    return state
  success = verdict.success & (keep == "smallest")
  value = jnp.where(success, -verdict.distance, verdict.score)
  higher = (success == state.best_success) & (value > state.best_score)
  better = ((success & ~state.best_success) | higher) & ~state.done
  return state._replace(
    best_delta=_select(better, verdict.delta, state.best_delta),
    best_score=jnp.where(better, value, state.best_score),
    best_success=state.best_success | success,
  )


def advance(
  threat: Threat,
  transform: Transform,
  state: Perturbation,
  gradient: Any,
  *,
  loss: Array,
  sample: Sample | None = None,
  success: Array | None = None,
) -> Perturbation:
  """Moves ONE perturbation; a non-finite gradient counts, and moves nothing there.

  A universal perturbation has no sample, and its projection sees no image.
  """
  finite = jax.tree.map(jnp.isfinite, gradient)
  bad = ~jax.tree.reduce(jnp.logical_and, jax.tree.map(jnp.all, finite))
  gradient = jax.tree.map(
    lambda g, ok: jnp.where(ok, g, jnp.zeros_like(g)), gradient, finite
  )

  def project(delta):
    return threat.project(delta, None if sample is None else sample.clean)

  updates, opt = transform.update(
    gradient,
    state.opt,
    state.delta,
    value=-loss,
    sample=sample,
    project=project,
    success=success,
  )
  return state._replace(
    step=state.step + 1,
    delta=project(optax.apply_updates(state.delta, updates)),
    opt=opt,
    nonfinite=state.nonfinite + (bad | is_nonfinite(loss[None])[0]),
  )


def freeze(done: Array, old: Perturbation, new: Perturbation) -> Perturbation:
  """`new`, or `old` where the example is done, now or before."""
  done = old.done | done
  return _select(done, old, new)._replace(done=done)


def is_nonfinite(loss: Array) -> Array:
  """`(B,)` bool: some loss of the example is not finite."""
  return ~jnp.isfinite(loss).reshape(loss.shape[0], -1).all(1)


def as_float(value: Any) -> Array:
  """The default float: a half-precision model cannot change the state's type."""
  return jnp.asarray(value, jnp.result_type(float))


def _select(condition, new, old):
  """`new` where `condition`, leaf by leaf, typed keys included."""
  return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def parts(
  batch: Mapping[str, Any], threat: Threat, axis_name: str | None = None
) -> tuple[Images, dict[str, Any], Array, Array]:
  """Images, what `prepare` reads, weights and ids of a batch of a universal attack.

  Raises:
    TypeError, ValueError: as `jaxadv.inputs.check_batch` and `as_weights`.
  """
  x = batch["image"]
  place = reduction.places(len(x), axis_name)
  ids = batch.get("id", place)
  y = {k: v for k, v in batch.items() if k not in ("image", "weight")}
  inputs.check_batch(x, {"label": place} | y, threat.bounds)
  y.pop("id", None)
  return x, y, inputs.as_weights(batch.get("weight"), len(x)), ids


def check_target(predict: Predict, x: Images, target: Target) -> None:
  """Compares labels with the model's classes, where they are concrete.

  Raises:
    TypeError: without labels.
    ValueError: for labels that do not fit the logits, or outside the classes.
  """
  if "label" not in target:
    raise TypeError('`prepare` returned no "label"; every target has one.')
  if isinstance(target["label"], jax.core.Tracer):
    return
  logits, _ = jax.eval_shape(lambda image: call(predict, image), x)
  inputs.check_shapes(target, logits)
  inputs.check_classes(target, logits)


def check_state(state: Perturbation, want: Perturbation) -> None:
  """Compares a state with the one this attack would start from on these images.

  Raises:
    ValueError: for a perturbation of other shapes, which would be broadcast, or the
      state of another rule.
  """
  got, due = (jax.tree.map(jnp.shape, tree.delta) for tree in (state, want))
  if got != due:
    raise ValueError(
      f"the perturbation has shape {got}, and an image of the batch needs {due}; start "
      "with init(key, image), `image` one of the batch."
    )
  kept, needed = (str(jax.tree.structure(tree)) for tree in (state, want))
  if kept != needed:
    raise ValueError(
      "the state is one of another attack, or of another step rule; start with "
      "init(key, image) of the attack whose step is taken."
    )
