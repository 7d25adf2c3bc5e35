"""Adversarial training by name: the views a model is shown, and the loss on them.

A defence is two arguments of `jaxadv.training.adversarial_step`:

    step = training.adversarial_step(apply, tx, *defences.trades(2 / 255))

Radii are in the units of the image, in [0, 1]. Classes, label sets and masks go through
the same functions; for segmentation see the recipe with `attacks.seg_pgd`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxadv import combine, inputs, losses, targets, threats, training, transforms
from jaxadv.attacks import pgd
from jaxadv.engine import gradient_attack
from jaxadv.types import AttackFn, Objective

__all__ = [
  "Defence",
  "adversarial_training",
  "fast_adversarial_training",
  "maadvt",
  "mart",
  "mpadvt",
  "random_pgd",
  "trades",
]

Scalar = float | jax.Array
Bounds = tuple[float, float]


class Defence(NamedTuple):
  """What the model is trained on.

  Attributes:
    views: attacks, made anew in every step with the present weights.
    outer: lowered; of the logits of the views of one example, and its label.
  """

  views: tuple[AttackFn, ...]
  outer: training.OuterLoss


def adversarial_training(
  eps: Scalar, *, step_size: Scalar | None = None, num_steps: int = 10
) -> Defence:
  """PGD adversarial training: the loss at the end of an attack.

      min_w E[ L(y, f_w(x')) ],   x' from PGD with a random start

  Args:
    eps: Linf radius.
    step_size: default `2.5 * eps / num_steps`.
    num_steps: gradients per example and step.

  Returns:
    A defence of one view.

  Example:
    >>> len(adversarial_training(2 / 255).views)
    1

  Reference: Madry et al., ICLR 2018, arXiv 1706.06083.
  """
  attack = pgd(eps, step_size=step_size, num_steps=num_steps)
  return Defence((attack,), training.mean_cross_entropy)


def fast_adversarial_training(
  eps: Scalar, *, step_size: Scalar | None = None
) -> Defence:
  """One large step from a random start; may collapse, so watch it.

  `adversarial_training` with one step of `1.25 eps`. When the accuracy under a longer
  attack falls from one epoch to the next by more than 0.2, the model has learnt to hide
  its gradient from this one.

  Args:
    eps: Linf radius.
    step_size: default `1.25 * eps`.

  Returns:
    A defence of one view.

  Reference: Wong, Rice, Kolter, ICLR 2020, arXiv 2001.03994.
  """
  step_size = 1.25 * eps if step_size is None else step_size
  return adversarial_training(eps, step_size=step_size, num_steps=1)


def trades(
  eps: Scalar,
  *,
  step_size: Scalar | None = None,
  num_steps: int = 10,
  beta: Scalar = 6.0,
) -> Defence:
  """TRADES: the clean loss, and the divergence an attack on it can make.

  See `training.trades`. The attack raises that divergence from a start 0.001 N(0, 1)
  away, as at the clean image itself its gradient is 0.

  Args:
    eps: Linf radius.
    step_size: default `eps / 4`, the published 0.007 of 0.031.
    num_steps: gradients per example and step.
    beta: weight of the divergence.

  Returns:
    A defence of two views.

  Reference: Zhang et al., ICML 2019, arXiv 1901.08573.
  """
  objective = Objective(losses.kl_to_target, prepare=targets.clean_logits)
  attack = _from_nearby(objective, eps, step_size, num_steps)
  return Defence((combine.identity, attack), training.trades(beta))


def mart(
  eps: Scalar,
  *,
  step_size: Scalar | None = None,
  num_steps: int = 10,
  beta: Scalar = 6.0,
) -> Defence:
  """MART: a boosted loss of the attack, and drift where the clean image is unsure.

  See `training.misclassification_aware`.

  Args:
    eps: Linf radius.
    step_size: default `eps / 4`, the published 0.007 of 0.031.
    num_steps: gradients per example and step.
    beta: weight of the drift.

  Returns:
    A defence of two views.

  Reference: Wang et al., ICLR 2020.
  """
  attack = _from_nearby(Objective(losses.task_loss), eps, step_size, num_steps)
  return Defence((combine.identity, attack), training.misclassification_aware(beta))


def maadvt(
  eps: Scalar,
  *,
  step_size: Scalar | None = None,
  num_steps: int = 4,
  beta: Scalar = 6.0,
) -> Defence:
  """MAAdvT, misclassification-aware adversarial training of diagnostic models.

  Its released code is `mart` with these defaults, those of its skin images; for fundus
  images it takes `beta=8`. What the paper may add to it is not known to us. For label
  sets, which the released code has not, each label is a binary `mart`.

  Args:
    eps: Linf radius.
    step_size: default `eps / 4`.
    num_steps: gradients per example and step.
    beta: weight of the drift.

  Returns:
    A defence of two views.

  Differs from the released code: see `training.misclassification_aware`.
  Reference: Xu et al., "Towards evaluating the robustness of deep diagnostic models by
  adversarial attack", Medical Image Analysis 69 (2021).
  """
  return mart(eps, step_size=step_size, num_steps=num_steps, beta=beta)


def mpadvt(
  eps: tuple[float, float] = (1 / 255, 10 / 255),
  steps: tuple[int, int] = (1, 9),
  *,
  step_size: Scalar = 1 / 255,
  scaled_step: bool = False,
  clean: Scalar = 0.5,
) -> Defence:
  """MPAdvT, multi-perturbations adversarial training: every radius and strength.

  Each example of each step draws whether it stays clean, its radius and its number of
  steps; see `random_pgd`.

  Args:
    eps: least and largest Linf radius.
    steps: least and largest number of steps.
    step_size: of each step.
    scaled_step: steps of `max(step_size, 2.5 * eps / steps)`, which reach the radius.
    clean: probability of staying clean.

  Returns:
    A defence of one view.

  Example:
    >>> len(mpadvt().views)
    1

  Differs from the released code, which draws once per batch and counts radii, from 0.01
  to 0.04, in units of the normalised image: 0.2 to 1.6 grey levels for its skin images.
  Reference: Xu et al., "Towards evaluating the robustness of deep diagnostic models by
  adversarial attack", Medical Image Analysis 69 (2021).
  """
  view = random_pgd(
    eps, steps, step_size=step_size, scaled_step=scaled_step, clean=clean
  )
  return Defence((view,), training.mean_cross_entropy)


def random_pgd(
  eps: tuple[float, float],
  steps: tuple[int, int],
  *,
  step_size: Scalar = 1 / 255,
  scaled_step: bool = False,
  clean: Scalar = 0.0,
  bounds: Bounds = (0.0, 1.0),
) -> AttackFn:
  """PGD whose radius and number of steps are drawn for each example; one program.

      eps ~ U(eps), n ~ U{steps}, x' from n steps of PGD with a random start

  Args:
    eps: least and largest Linf radius.
    steps: least and largest number of steps; all examples cost the largest.
    step_size: of each step.
    scaled_step: steps of `max(step_size, 2.5 * eps / n)`.
    clean: probability that an example stays as it is.
    bounds: valid range of images.

  Returns:
    An attack.

  Raises:
    ValueError: for a range that is empty or negative, no steps, a negative step size
      and a probability outside [0, 1].

  Example:
    >>> attack = random_pgd((0.01, 0.1), (1, 3), step_size=0.05)
    >>> x, y = jnp.full((4, 2), 0.5), jnp.zeros(4, int)
    >>> moved = attack(jax.random.key(0), lambda x: x, x, y).image - x
    >>> bool((abs(moved) <= 0.1001).all() and (abs(moved) > 0).any())
    True
  """
  for name, pair in (("eps", eps), ("steps", steps)):
    inputs.check_interval(name, pair)
  for count in steps:
    inputs.check_num_steps(count)
  inputs.check_positive("step_size", step_size)
  inputs.check_share("clean", clean)
  low, high = steps

  def draw(key):
    eps_key, steps_key, clean_key = jax.random.split(key, 3)
    radius = jax.random.uniform(eps_key, (), minval=eps[0], maxval=eps[1])
    count = jax.random.randint(steps_key, (), low, high + 1)
    moves = ~jax.random.bernoulli(clean_key, clean)
    size = jnp.maximum(step_size, 2.5 * radius / count) if scaled_step else step_size
    return {"eps": radius * moves, "steps": count * moves, "step_size": size}

  def make(eps, steps, step_size):
    step = optax.chain(
      optax.scale_by_sign(),
      optax.scale_by_learning_rate(step_size),
      transforms.for_steps(steps),
    )
    threat = threats.linf(eps, bounds=bounds)
    return gradient_attack(Objective(losses.task_loss), threat, step, num_steps=high)

  return combine.random_budget(make, draw, bounds=bounds)


def _from_nearby(objective, eps, step_size, num_steps):
  """PGD from a start 0.001 N(0, 1) away, for losses without a gradient at the image."""
  inputs.check_positive("eps", eps)
  step_size = eps / 4 if step_size is None else step_size
  inputs.check_positive("step_size", step_size)
  threat = threats.linf(eps)
  return gradient_attack(
    objective,
    threat._replace(init=functools.partial(_nearby, threat)),
    optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(step_size)),
    num_steps=num_steps,
  )


def _nearby(threat, key, image):
  noise = 0.001 * jax.random.normal(key, image.shape, image.dtype)
  return threat.project(noise, image)
