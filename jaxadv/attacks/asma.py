"""Adaptive segmentation mask attack: exactly, and calibrated.

`y` is the mask `(B, H, W)` the attacker wants, or a mapping with it under `"label"` and
the pixels that count under `"mask"`. Volumes `(B, D, H, W, C)` work alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxadv import losses, masks, threats, transforms
from jaxadv.attacks import parts
from jaxadv.attacks.parts import Bounds, Keep, Scalar
from jaxadv.engine import Attack, gradient_attack
from jaxadv.types import call

__all__ = ["asma", "asma_calibrated"]


def asma(
  *,
  tau: Scalar = 1e-7,
  beta: Scalar = 1e-6,
  num_steps: int = 2501,
  keep: Keep = "last",
  threshold: float = 0.95,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Adaptive segmentation mask attack, the reference preset.

  Plain ascent of `J = sum_active z_y - ||d||_2^2` with multiplier `tau + beta * IoU`:

      x' = x + alpha g;   alpha <- tau + beta * IoU(f(x'), y);   x <- clip(x')

  The IoU is measured at the unclipped point, with a second forward pass, and is 0
  before the first step, as in the original code. `tau` and `beta` belong to the network
  they were chosen for: on another one use `asma_calibrated`.

  Args:
    tau: multiplier before anything is reached.
    beta: gain of the multiplier with the IoU.
    num_steps: steps; the reference runs all and returns the last.
    keep: which point to return.
    threshold: IoU that counts as success.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Differs from the original code only in the IoU of two empty masks (1, not 0/0) and of
  more than two classes (mean over the classes present).

  Reference: Ozbulak et al., MICCAI 2019, arXiv 1907.13124.
  """
  base = gradient_attack(
    parts.mask_objective(parts.minus_distance(losses.mask_logits), threshold),
    threats.box(bounds=bounds),
    _scale_by_measured_iou(tau),
    num_steps=num_steps,
    random_start=False,
    keep=keep,
  )

  def step(predict, x, target, state):
    state, loss = base.step(predict, x, target, state)
    logits, _ = call(predict, x + state.opt.unclipped)
    multiplier = tau + beta * jax.vmap(_target_iou)(logits, target)
    opt = state.opt._replace(multiplier=multiplier.astype(x.dtype))
    return state._replace(opt=opt), loss

  def finish(*args):
    result = base.finish(*args)
    return result._replace(forwards=2 * result.forwards)

  return base._replace(step=step, finish=finish)


def asma_calibrated(
  *,
  scale: Scalar = 1e-3,
  gain: Scalar = 10.0,
  num_steps: int = 200,
  margin: bool = False,
  keep: Keep = "smallest",
  bits: int | None = None,
  threshold: float = 0.95,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """ASMA with a multiplier calibrated to each image and network.

  As `asma`, with `alpha = c (1 + gain * IoU)` and `c` such that the first step has RMS
  `scale` per value. The IoU comes from the same forward pass as the gradient.

  Args:
    scale: RMS of the first step; sweep it, the best value belongs to model and size.
    gain: `beta / tau`; 10 in the reference.
    num_steps: steps.
    margin: raise `z_y - max z_other` instead of the raw logit.
    keep: which point to return.
    bits: attack the image as stored in this many bits.
    threshold: IoU that counts as success.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Reference: Ozbulak et al., MICCAI 2019, arXiv 1907.13124; the calibration is ours.
  """
  term = losses.mask_margin if margin else losses.mask_logits
  return gradient_attack(
    parts.mask_objective(parts.minus_distance(term), threshold),
    parts.box(bits, bounds),
    optax.chain(
      transforms.scale_by_first_norm(),
      transforms.scale_by_size(),
      transforms.scale_by_mask_iou(gain * scale, scale),
    ),
    num_steps=num_steps,
    random_start=False,
    keep=keep,
  )


class _AsmaState(NamedTuple):
  multiplier: jax.Array
  unclipped: jax.Array


def _scale_by_measured_iou(tau):
  """Descends by the multiplier measured after the last step; keeps the new point."""

  def init(params):
    return _AsmaState(jnp.asarray(tau, params.dtype), jnp.zeros_like(params))

  def update(g, state, params=None, **extra):
    del extra
    step = -state.multiplier.astype(g.dtype) * g
    return step, _AsmaState(state.multiplier, params + step)

  return optax.GradientTransformationExtraArgs(init, update)


def _target_iou(logits, target):
  label = target["label"]
  prediction = masks.decision(logits, label)
  return masks.iou(prediction, label, logits.shape[-1], target.get("mask"))
