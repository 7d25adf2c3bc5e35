"""Pieces shared by the named attacks."""

import functools
from typing import Any, Literal

import jax
import optax

from jaxadv import inputs, losses, threats, transforms
from jaxadv.types import LossFn, Objective, PrepareFn, Threat, labels, reached

__all__ = [
  "Bounds",
  "Keep",
  "Scalar",
  "box",
  "clip_peaks",
  "homing",
  "mask_objective",
  "minus_distance",
  "momentum",
  "unit_step",
]

Scalar = float | jax.Array
Bounds = tuple[Any, Any]
Keep = Literal["last", "best", "smallest"]


def mask_objective(
  loss: LossFn, threshold: float, prepare: PrepareFn = labels
) -> Objective:
  """Raises `loss`; success is an IoU of at least `threshold` with the wanted mask."""
  inputs.check_positive("threshold", threshold)
  success = functools.partial(reached, threshold=threshold)
  return Objective(loss, prepare=prepare, success=success)


def minus_distance(term: LossFn) -> LossFn:
  """ASMA's objective: the attack term minus the squared L2 distance."""
  return lambda sample: term(sample) - losses.squared_l2(sample)


def box(bits: int | None, bounds: Bounds) -> Threat:
  """The valid range, at images as they are or as stored in `bits`."""
  threat = threats.box(bounds=bounds)
  return threat if bits is None else threats.stored(threat, bits=bits)


def momentum(decay: Scalar) -> optax.GradientTransformation:
  """MI-FGSM's momentum: `m <- decay * m + g / ||g||_1`, with `decay >= 0`."""
  inputs.check_positive("decay", decay)
  return optax.chain(transforms.normalize(1), optax.trace(decay))


def unit_step() -> optax.GradientTransformation:
  """L2-normalised gradient with RMS 1 per value."""
  return optax.chain(transforms.normalize(2), transforms.scale_by_size())


def homing(
  shrink: Scalar, constrain: transforms.GiveUp
) -> optax.GradientTransformation:
  """Unit steps until success, then home; see `transforms.shrink_on_success`."""
  return optax.chain(
    unit_step(), transforms.shrink_on_success(shrink=shrink, constrain=constrain)
  )


def clip_peaks(peak: Scalar, floor: Scalar) -> transforms.GiveUp:
  """Gives up the share `peak * amount` of the largest value, down to a floor."""
  return lambda delta, amount, first: transforms.clip_peaks(
    delta, peak * amount, first=first, floor=floor
  )
