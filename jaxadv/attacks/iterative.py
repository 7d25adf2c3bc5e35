"""Iterated gradient attacks inside a ball, for classes, label sets, masks and volumes.

The same functions attack all of them: the loss decides. `targeted=True` makes `y` what
the attacker wants. Radii and step sizes are in the units of the image and may be
traced.
"""

from typing import Any, Literal

import jax.numpy as jnp
import optax

from jaxadv import forwards, inputs, losses, targets, threats, transforms
from jaxadv.attacks.parts import Bounds, Keep, Scalar, momentum
from jaxadv.engine import Attack, gradient_attack
from jaxadv.types import LossFn, Objective, SuccessFn, Threat, reached

__all__ = ["apgd", "di_fgsm", "fgsm", "mi_fgsm", "pgd", "ti_fgsm"]

_THREATS = {"linf": threats.linf, "l2": threats.l2, "l1": threats.l1}


def aim(loss: LossFn, targeted: bool, **parts: Any) -> Objective:
  """Raises the loss away from the label, or lowers it towards a target."""
  if targeted:
    return Objective(losses.negate(loss), **{"success": reached} | parts)
  return Objective(loss, **parts)


def fgsm(
  eps: Scalar,
  *,
  loss: LossFn = losses.task_loss,
  targeted: bool = False,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Fast gradient sign method: one step of size `eps`, no random start.

  `x' = clip(x + eps * sign(grad loss), bounds)`

  Args:
    eps: Linf radius.
    loss: raised, or lowered when targeted.
    targeted: `y` is what the attacker wants.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Raises:
    ValueError: for a negative radius, and labels outside the classes.

  Example:
    >>> import jax
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> result = fgsm(0.1)(jax.random.key(0), lambda x: x @ weights, x, y)
    >>> print(result.image.round(2))
    [[0.39999998 0.39999998]]

  Reference: Goodfellow et al., ICLR 2015, arXiv 1412.6572.
  """
  return pgd(
    eps,
    step_size=eps,
    num_steps=1,
    loss=loss,
    targeted=targeted,
    random_start=False,
    bounds=bounds,
  )


def pgd(
  eps: Scalar,
  *,
  step_size: Scalar | None = None,
  num_steps: int = 10,
  norm: Literal["linf", "l2", "l1"] = "linf",
  loss: LossFn = losses.task_loss,
  targeted: bool = False,
  random_start: bool = True,
  keep: Keep = "last",
  stop: SuccessFn | None = None,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Projected gradient descent in a ball.

  `x <- project(x + step_size * direction(grad loss))`, with the steepest direction of
  the norm: sign, L2-normalised, or the 1 % largest entries.

  Args:
    eps: radius.
    step_size: length of a step in the norm; default `2.5 * eps / num_steps`.
    num_steps: steps.
    norm: of the ball.
    loss: raised, or lowered when targeted.
    targeted: `y` is what the attacker wants.
    random_start: start anywhere in the ball.
    keep: which point to return, see `jaxadv.engine.gradient_attack`.
    stop: freezes an example, for instance `jaxadv.types.fooled`.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Raises:
    ValueError: for a negative radius or step and an unknown norm.

  Example:
    >>> import jax
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> result = pgd(0.1, num_steps=5)(jax.random.key(0), lambda x: x @ weights, x, y)
    >>> print(result.image.round(2))
    [[0.39999998 0.39999998]]

  Reference: Madry et al., ICLR 2018, arXiv 1706.06083.
  """
  inputs.check_choice("norm", norm, tuple(_THREATS))
  step_size = _step_size(eps, step_size, num_steps, 2.5)
  directions = {
    "linf": optax.scale_by_sign(),
    "l2": transforms.normalize(2),
    "l1": transforms.sparse_sign(),
  }
  return gradient_attack(
    aim(loss, targeted),
    _THREATS[norm](eps, bounds=bounds),
    optax.chain(directions[norm], optax.scale_by_learning_rate(step_size)),
    num_steps=num_steps,
    random_start=random_start,
    keep=keep,
    stop=stop,
  )


def mi_fgsm(
  eps: Scalar,
  *,
  step_size: Scalar | None = None,
  num_steps: int = 10,
  decay: Scalar = 1.0,
  loss: LossFn = losses.task_loss,
  targeted: bool = False,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Momentum iterative FGSM.

  `m <- decay * m + g / ||g||_1`, `x <- project(x + step_size * sign(m))`

  Args:
    eps: Linf radius.
    step_size: default `eps / num_steps`.
    num_steps: steps.
    decay: of the momentum.
    loss: raised, or lowered when targeted.
    targeted: `y` is what the attacker wants.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Raises:
    ValueError: for a negative radius, step or decay, and labels outside the classes.

  Example:
    >>> import jax
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> attack = mi_fgsm(0.1, num_steps=5)
    >>> result = attack(jax.random.key(0), lambda x: x @ weights, x, y)
    >>> print(result.image.round(2))
    [[0.39999998 0.39999998]]

  Differs from the released code, which divides by the mean absolute gradient: the
  momentum is then only scaled, and the signs are the same.

  Reference: Dong et al., CVPR 2018, arXiv 1710.06081.
  """
  return _momentum(eps, step_size, num_steps, decay, aim(loss, targeted), bounds)


def di_fgsm(
  eps: Scalar,
  *,
  step_size: Scalar | None = None,
  num_steps: int = 10,
  decay: Scalar = 1.0,
  probability: Scalar = 0.5,
  shrink: Scalar = 0.9,
  fill: Scalar = 0.0,
  loss: LossFn = losses.task_loss,
  targeted: bool = False,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Momentum iterative FGSM on diverse inputs, for attacks that transfer.

  The gradient is taken at a copy that is, with some probability, shrunk and laid at a
  random place: `m <- decay * m + g / ||g||_1`, `x <- project(x + step_size * sign(m))`.
  For classes and label sets: a mask would have to move with the image.

  Args:
    eps: Linf radius.
    step_size: default `eps / num_steps`.
    num_steps: steps.
    decay: of the momentum; 0 for none.
    probability: of changing an example in a step.
    shrink: smallest scale.
    fill: value around the shrunk image: that of its background.
    loss: raised, or lowered when targeted.
    targeted: `y` is what the attacker wants.
    bounds: valid range of images.

  Returns:
    An `Attack`; its losses are those of the copies it saw, while score, logits and
    success are those of the image itself.

  Raises:
    ValueError: for a negative radius, step or decay, shares outside [0, 1], labels
      outside the classes, and masks.

  Example:
    >>> import jax
    >>> predict = lambda x: jnp.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)
    >>> x, y = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> result = di_fgsm(0.1, num_steps=5)(jax.random.key(0), predict, x, y)
    >>> print(result.image.mean().round(2))
    0.39999998

  Differs from the released code, see `jaxadv.forwards.input_diversity`.

  Reference: Xie et al., CVPR 2019, arXiv 1803.06978.
  """
  diverse = forwards.input_diversity(probability=probability, shrink=shrink, fill=fill)
  options = eps, step_size, num_steps, decay
  attack = _momentum(*options, aim(loss, targeted, forward=diverse), bounds)
  plain = _momentum(*options, aim(loss, targeted), bounds)
  return attack._replace(finish=plain.finish)


def ti_fgsm(
  eps: Scalar,
  *,
  step_size: Scalar | None = None,
  num_steps: int = 10,
  decay: Scalar = 1.0,
  sigma: Scalar = 7 / 3,
  size: int = 15,
  loss: LossFn = losses.task_loss,
  targeted: bool = False,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Momentum iterative FGSM with a smoothed gradient, for attacks that transfer.

  `m <- decay * m + G g / ||G g||_1`, `x <- project(x + step_size * sign(m))` with a
  Gaussian filter `G`.

  Args:
    eps: Linf radius.
    step_size: default `eps / num_steps`.
    num_steps: steps.
    decay: of the momentum; 0 for none.
    sigma: of the Gaussian in pixels; the default is that of the released code, 15 taps
      on [-3, 3].
    size: odd number of its taps.
    loss: raised, or lowered when targeted.
    targeted: `y` is what the attacker wants.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Raises:
    ValueError: for a negative radius, step or decay, `sigma` not above 0, an even
      size, and labels outside the classes.

  Example:
    >>> import jax
    >>> predict = lambda x: jnp.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)
    >>> x, y = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> result = ti_fgsm(0.1, num_steps=5)(jax.random.key(0), predict, x, y)
    >>> print(result.image.mean().round(2))
    0.39999998

  Differs from the released code as `mi_fgsm` does.

  Reference: Dong et al., CVPR 2019, arXiv 1904.02884.
  """
  smooth = transforms.smooth(sigma, size=size)
  objective = aim(loss, targeted)
  return _momentum(eps, step_size, num_steps, decay, objective, bounds, smooth)


def apgd(
  eps: Scalar,
  *,
  num_steps: int = 100,
  norm: Literal["linf", "l2"] = "linf",
  loss: LossFn = losses.task_loss,
  targeted: bool = False,
  rho: float = 0.75,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Auto-PGD: no step size to choose; returns the point that fools most.

  See `jaxadv.apgd.scale_by_apgd` for the rule. `loss=losses.dlr` is safe for any number
  of classes: below three it becomes the scaled margin. The point returned is the one
  with the largest margin, so an example fooled at any step is a success.

  Args:
    eps: radius.
    num_steps: steps.
    norm: of the ball.
    loss: raised, or lowered when targeted.
    targeted: `y` is what the attacker wants.
    rho: share of rises in a window that counts as progress.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Raises:
    ValueError: for a negative radius, another norm, and labels outside the classes.

  Example:
    >>> import jax
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> result = apgd(0.1, num_steps=5)(jax.random.key(0), lambda x: x @ weights, x, y)
    >>> print(result.image.round(2))
    [[0.39999998 0.39999998]]

  Differs from the released code, which returns the last point that fooled.

  Reference: Croce and Hein, ICML 2020, arXiv 2003.01690.
  """
  if norm not in ("linf", "l2"):
    raise ValueError(f'`norm` is {norm!r}; apgd knows "linf" and "l2".')
  inputs.check_positive("eps", eps)
  inputs.check_num_steps(num_steps)
  score = losses.negate(losses.margin) if targeted else losses.margin
  return gradient_attack(
    aim(loss, targeted, score=score, prepare=targets.clean_logits),
    _on_the_sphere(_THREATS[norm](eps, bounds=bounds), eps, norm),
    transforms.scale_by_apgd(eps, num_steps, norm=norm, rho=rho),
    num_steps=num_steps,
    keep="best",
  )


def _momentum(eps, step_size, num_steps, decay, objective, bounds, *first):
  """Signs of MI-FGSM's momentum of the gradient, or of what `first` makes of it."""
  step_size = _step_size(eps, step_size, num_steps, 1.0)
  return gradient_attack(
    objective,
    threats.linf(eps, bounds=bounds),
    optax.chain(*first, momentum(decay), transforms.sign_step(step_size)),
    num_steps=num_steps,
    random_start=False,
  )


def _step_size(eps, step_size, num_steps, reach):
  """The step asked for, or the one that walks `reach * eps` in all."""
  inputs.check_positive("eps", eps)
  inputs.check_num_steps(num_steps)
  if step_size is None:
    return reach * eps / num_steps
  inputs.check_positive("step_size", step_size)
  return step_size


def _on_the_sphere(threat: Threat, eps: Scalar, norm: str) -> Threat:
  """The threat with random starts stretched to the surface of the ball."""

  def init(key, image):
    delta = threat.init(key, jnp.zeros_like(image))
    size = jnp.abs(delta).max() if norm == "linf" else jnp.linalg.norm(delta.ravel())
    return eps * delta / jnp.maximum(size, jnp.finfo(delta.dtype).tiny)

  return threat._replace(init=init)
