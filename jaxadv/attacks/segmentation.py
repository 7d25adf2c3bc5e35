"""Budgeted baselines on masks: SegPGD and CosPGD.

`y` is the true mask `(B, H, W)`, or the one the attacker wants when `targeted`; a
mapping with it under `"label"` may hold the pixels that count under `"mask"`. Plain
PGD, MI-FGSM and APGD attack masks too: see `jaxadv.attacks.iterative`.
"""

import functools

from jaxadv import inputs, losses, threats, transforms
from jaxadv.attacks.iterative import aim
from jaxadv.attacks.parts import Bounds, Scalar
from jaxadv.engine import Attack, gradient_attack

__all__ = ["cos_pgd", "seg_pgd"]


def seg_pgd(
  eps: Scalar,
  *,
  step_size: Scalar = 0.01,
  num_steps: int = 10,
  targeted: bool = False,
  random_start: bool = True,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """SegPGD: PGD whose loss shifts from correct to wrong pixels, see `losses.seg_pgd`.

  Args:
    eps: Linf radius.
    step_size: of the sign steps.
    num_steps: steps.
    targeted: `y` is the mask the attacker wants.
    random_start: start anywhere in the ball.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Reference: Gu et al., ECCV 2022, arXiv 2207.12391.
  """
  return _pixelwise(
    losses.seg_pgd, eps, step_size, num_steps, targeted, random_start, bounds
  )


def cos_pgd(
  eps: Scalar,
  *,
  step_size: Scalar = 0.01,
  num_steps: int = 10,
  targeted: bool = False,
  random_start: bool = True,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """CosPGD: PGD that weighs pixels by their alignment, see `losses.cos_pgd`.

  Arguments and result are those of `seg_pgd`.

  Reference: Agnihotri et al., ICML 2024, arXiv 2302.02213.
  """
  return _pixelwise(
    losses.cos_pgd, eps, step_size, num_steps, targeted, random_start, bounds
  )


def _pixelwise(loss, eps, step_size, num_steps, targeted, random_start, bounds):
  inputs.check_positive("step_size", step_size)
  score = losses.negate(losses.cross_entropy) if targeted else losses.cross_entropy
  loss = functools.partial(loss, targeted=targeted)
  return gradient_attack(
    aim(loss, targeted, score=score),
    threats.linf(eps, bounds=bounds),
    transforms.sign_step(step_size),
    num_steps=num_steps,
    random_start=random_start,
  )
