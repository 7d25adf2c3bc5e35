"""Universal perturbations: ONE perturbation that changes the decision on most images.

Each is a `Universal`: `init(key, image) -> state`, `step(predict, state, batch) ->
(state, metrics)`; drive it with `jaxadv.loops.fit`, read `state.delta`, apply it with
`jaxadv.combine.fixed`. The radius counts in the units of the image;
`jaxadv.threats.share_of_norm` gives it as a share of the mean image norm.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxadv import inputs, losses, stepping, targets, threats, transforms
from jaxadv.attacks.iterative import fgsm
from jaxadv.attacks.parts import Bounds, Scalar, momentum
from jaxadv.engine import Universal, universal_attack
from jaxadv.types import (
  AttackFn,
  LossFn,
  Objective,
  PrepareFn,
  Threat,
  call,
  decided,
  fooled,
  reached,
)

__all__ = [
  "random_universal",
  "sequential_universal",
  "targeted_universal",
  "universal",
]

_THREATS = {"linf": threats.linf, "l2": threats.l2}
Norm = Literal["linf", "l2"]


def universal(
  eps: Scalar,
  *,
  norm: Norm = "linf",
  step_size: Scalar | optax.Schedule | None = None,
  num_steps: int | None = None,
  decay: Scalar | None = None,
  transform: optax.GradientTransformation | None = None,
  loss: LossFn | None = None,
  prepare: PrepareFn = targets.predictions,
  microbatches: int | None = None,
  axis_name: str | None = None,
  bounds: Bounds = (0.0, 1.0),
) -> Universal:
  """Minibatch ascent on the capped cross-entropy: the form that scales to a pod.

      g = mean_i grad min(CE(c_i, f(clip(x_i + v))), 2)
      m <- decay m + g / ||g||_1,  v <- project(v + step_size * direction(m))

  with `direction` the sign (Linf) or `m / ||m||` (L2). The cap keeps images that are
  fooled already, those whose class is left with less than an eighth, from leading the
  others.

  Args:
    eps: radius.
    norm: of the ball.
    step_size: in the norm, a number or an optax schedule. By default `0.3 * eps`; where
      `num_steps` is given it falls to 0 along a cosine, in L2 from `eps`, in Linf from
      `0.3 * eps`, or from `4 * eps / num_steps` where that is more and up to `eps`.
      Large first steps leave the class that the first batches happen to point at, but
      in Linf, where every value takes the whole step, they may find no better one.
    num_steps: steps you are going to take; only the default step size reads it.
    decay: of the momentum; by default there is none.
    transform: in place of step size and momentum, such as `optax.adam(1e-3)`; it sees
      the mean gradient of the cost, minus the loss.
    loss: raised on average; `losses.until_fooled(losses.cross_entropy)` skips images
      that are fooled already, as the iterative algorithm does. It stays another
      algorithm: no step is tested before it is taken.
    prepare: what the loss compares with: the model's clean decision, read from
      `batch["decision"]` or computed by one more forward pass. `jaxadv.types.labels`
      takes the truth, `batch["label"]`.
    microbatches: as for `jaxadv.universal_attack`.
    axis_name: of the mapped axis of devices, under `pmap` or `shard_map`.
    bounds: valid range of images.

  Returns:
    A `Universal`.

  Raises:
    ValueError: for a negative radius or step, an unknown norm, and a `transform` beside
      a step size or a decay.

  Example:
    >>> uap = universal(0.2, num_steps=5)
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> batch = {"image": jnp.full((4, 2), 0.5)}
    >>> state = uap.init(jax.random.key(0), batch["image"][0])
    >>> for _ in range(5):
    ...   state, metrics = uap.step(lambda x: x @ weights, state, batch)
    >>> print(state.delta)
    [-0.2 -0.2]

  Differs from the released code of sgd-uap: a constant step of 0.8 eps and a cap of 12
  (10 on CIFAR), which stall (see docs/universal.md), and the truth as label.

  Reference: Shafahi et al., AAAI 2020, arXiv 1811.11304.
  """
  loss = losses.cap(losses.task_loss, 2.0) if loss is None else loss
  return universal_attack(
    Objective(loss, prepare=prepare),
    _threat(eps, norm, bounds),
    _ascent(eps, norm, step_size, num_steps, decay, transform),
    microbatches=microbatches,
    axis_name=axis_name,
  )


def targeted_universal(
  eps: Scalar,
  *,
  target: int | jax.Array,
  norm: Norm = "linf",
  step_size: Scalar | optax.Schedule | None = None,
  num_steps: int | None = None,
  decay: Scalar | None = None,
  transform: optax.GradientTransformation | None = None,
  loss: LossFn = losses.task_loss,
  microbatches: int | None = None,
  axis_name: str | None = None,
  bounds: Bounds = (0.0, 1.0),
) -> Universal:
  """Minibatch descent on the cross-entropy towards one class.

  `universal` with `-CE(target, f(clip(x_i + v)))`, and no cap: it would silence the
  images that are still far from the target.

  Args:
    eps: radius.
    target: class every image is to be taken for, or a set of labels `(L,)`.
    norm: of the ball.
    step_size: as for `universal`.
    num_steps: as for `universal`.
    decay: of the momentum.
    transform: as for `universal`.
    loss: lowered on average; `losses.until_reached(losses.cross_entropy)` skips images
      that are at the target already, as the iterative algorithm does.
    microbatches: as for `jaxadv.universal_attack`.
    axis_name: of the mapped axis of devices, under `pmap` or `shard_map`.
    bounds: valid range of images.

  Returns:
    A `Universal`; `success` among its metrics is the share decided as `target`.

  Raises:
    ValueError: as for `universal`, and for a target outside the model's classes.

  Example:
    >>> uap = targeted_universal(0.2, target=1, num_steps=5)
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> batch = {"image": jnp.full((4, 2), 0.5)}
    >>> state = uap.init(jax.random.key(0), batch["image"][0])
    >>> for _ in range(5):
    ...   state, metrics = uap.step(lambda x: x @ weights, state, batch)
    >>> print(state.delta)
    [-0.2 -0.2]

  Differs from the released code of sgd-uap, which keeps the cap here too, and from the
  medical study, which goes image by image: `sequential_universal(target=...)`.

  Reference: Shafahi et al., AAAI 2020, arXiv 1811.11304; the aim is that of Hirano et
  al., BMC Medical Imaging 21:9 (2021).
  """
  objective = Objective(
    losses.negate(loss),
    prepare=targets.constant(target),
    success=reached,
  )
  return universal_attack(
    objective,
    _threat(eps, norm, bounds),
    _ascent(eps, norm, step_size, num_steps, decay, transform),
    microbatches=microbatches,
    axis_name=axis_name,
  )


def sequential_universal(
  eps: Scalar,
  *,
  attack: AttackFn | None = None,
  norm: Norm = "linf",
  target: int | jax.Array | None = None,
  bounds: Bounds = (0.0, 1.0),
) -> Universal:
  """The published iterative algorithm: one image at a time, with an acceptance test.

  For each image that `v` does not fool yet, the inner attack starts from `x_i + v`; if
  it succeeds, `v <- project(v + what it added)`, otherwise `v` stays. One step visits
  the images of the batch in order. The reference on small data: it cannot be spread
  over devices, as every acceptance changes `v` for the next image.

  Args:
    eps: radius.
    attack: inner attack, targeted when `target` is given. By default one sign step of
      0.0012 in [0, 1], the published 0.0024 on images in [-1, 1], whatever the norm;
      `attacks.deepfool(num_steps=10)` gives the algorithm of Moosavi-Dezfooli et al.
    norm: of the ball.
    target: class every image is to be taken for, or a set of labels `(L,)`; by default
      any but the clean decision.
    bounds: valid range of images; `(-jnp.inf, jnp.inf)` is the released code, which
      never clips.

  Returns:
    A `Universal`; its metrics are `success`, the share fooled when visited,
    `accepted`, the share whose step was taken, and `nonfinite`, how many had logits or
    gradients that were not finite: those count as neither.

  Raises:
    ValueError: for a negative radius, an unknown norm, and labels outside the classes.

  Example:
    >>> uap = sequential_universal(0.6, attack=fgsm(0.5))
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> batch = {"image": jnp.array([[0.4, 0.4], [0.5, 0.5]])}
    >>> state = uap.init(jax.random.key(0), batch["image"][0])
    >>> predict = lambda x: (x - 0.2) @ weights
    >>> state, metrics = uap.step(predict, state, batch)
    >>> print(state.delta, metrics["accepted"])
    [-0.4 -0.4] 0.5

  Differs from the released code, which shuffles the images, makes up to 15 passes and
  stops when all are fooled: here that is up to whoever draws the batches. It takes the
  cross-entropy of clipped probabilities, whose gradient is 0 where the model is sure,
  and its projection divides by the norm plus 1e-7. DeepFool counts as a success there
  only when it needed less than its last step.

  Reference: Hirano et al., BMC Medical Imaging 21:9 (2021); Moosavi-Dezfooli et al.,
  CVPR 2017, arXiv 1610.08401.
  """
  threat = _threat(eps, norm, bounds)
  attack = (
    fgsm(0.0012, targeted=target is not None, bounds=bounds)
    if attack is None
    else attack
  )
  prepare = targets.predictions if target is None else targets.constant(target)
  start = universal_attack(Objective(losses.margin), threat, optax.identity())
  judge = fooled if target is None else reached

  def step(predict, state, batch):
    x, y, weight, ids = stepping.parts(batch, threat)
    stepping.check_state(state, jax.eval_shape(start.init, state.key, x[0]))
    wishes = prepare(predict, x, y)
    stepping.check_target(predict, x, wishes)
    step_key = jax.random.fold_in(state.key, state.step)

    def visit(delta, example):
      image, wish, number, weight = example
      start = threat.apply(image, delta)[None]
      logits = call(predict, start)[0][0]
      done = judge(decided(logits, wish))

      def move():
        key = jax.random.fold_in(step_key, number)
        y = jax.tree.map(lambda v: v[None], wish)
        result = attack(key, predict, start, y if "mask" in y else y["label"])
        moved = threat.project(delta + (result.image - start)[0], None)
        there = judge(decided(result.logits[0], wish))
        accepted = there & jnp.isfinite(moved).all()
        return jnp.where(accepted, moved, delta), accepted, result.nonfinite[0] > 0

      def keep():
        return delta, jnp.bool_(False), jnp.bool_(False)

      moved, accepted, bad = jax.lax.cond(done | (weight == 0), keep, move)
      bad = (bad | ~jnp.isfinite(logits).all()) & (weight > 0)
      return moved, (weight * done, weight * accepted, bad)

    delta, seen = jax.lax.scan(visit, state.delta, (x, wishes, ids, weight))
    hits, accepted, bad = seen[0].sum(), seen[1].sum(), seen[2].sum(dtype=jnp.int32)
    count = jnp.maximum(weight.sum(), jnp.finfo(weight.dtype).tiny)
    state = state._replace(step=state.step + 1, delta=delta, best_delta=delta)
    state = state._replace(nonfinite=state.nonfinite + bad)
    rates = {"success": hits / count, "accepted": accepted / count}
    return state, rates | {"nonfinite": bad}

  return Universal(start.init, step)


def random_universal(
  eps: Scalar,
  *,
  norm: Norm = "linf",
  kind: Literal["ball", "sign"] = "ball",
  bounds: Bounds = (0.0, 1.0),
) -> Universal:
  """The control: one random perturbation, which no step changes.

  `"ball"` is uniform in the ball, as published; in Linf its mean size is half the
  radius, so it is a weak control. `"sign"` has every value at `+-eps`, or at
  `+-eps / sqrt(D)` in L2, and is as large as any perturbation allowed.

  Args:
    eps: radius.
    norm: of the ball.
    kind: of the draw.
    bounds: valid range of images.

  Returns:
    A `Universal`.

  Raises:
    ValueError: for a negative radius, an unknown norm and an unknown kind.

  Example:
    >>> state = random_universal(0.2, kind="sign").init(jax.random.key(0), jnp.ones(3))
    >>> print(jnp.abs(state.delta))
    [0.2 0.2 0.2]

  Differs from the control of the study, `random_sphere` of ART, in the second kind.

  Reference: Hirano et al., BMC Medical Imaging 21:9 (2021).
  """
  inputs.check_choice("kind", kind, ("ball", "sign"))
  threat = _threat(eps, norm, bounds)
  if kind == "sign":
    threat = threat._replace(init=functools.partial(_signs, eps, norm))
  objective = Objective(losses.task_loss, prepare=targets.predictions)
  return universal_attack(objective, threat, optax.set_to_zero(), random_start=True)


def _threat(eps, norm, bounds) -> Threat:
  inputs.check_choice("norm", norm, tuple(_THREATS))
  return _THREATS[norm](eps, bounds=bounds)


def _ascent(eps, norm, step_size, num_steps, decay, transform):
  if num_steps is not None:
    inputs.check_num_steps(num_steps)
  if transform is not None:
    if step_size is not None or decay is not None:
      raise ValueError("`transform` replaces `step_size` and `decay`; leave them out.")
    return transform
  if step_size is not None and not callable(step_size):
    inputs.check_positive("step_size", step_size)
  if step_size is None and num_steps is None:
    step_size = 0.3 * eps
  elif step_size is None:
    first = 1.0 if norm == "l2" else min(1.0, max(0.3, 4 / num_steps))
    step_size = optax.cosine_decay_schedule(first * eps, num_steps)
  direction = optax.scale_by_sign() if norm == "linf" else transforms.normalize(2)
  step = optax.chain(direction, optax.scale_by_learning_rate(step_size))
  return optax.chain(momentum(0.0 if decay is None else decay), step)


def _signs(eps, norm, key, image):
  size = eps if norm == "linf" else eps / jnp.sqrt(image.size)
  return size * jax.random.rademacher(key, image.shape, image.dtype)
