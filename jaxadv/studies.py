"""Sets of attacks that are compared with each other, at equal numbers of gradients."""

import functools

from jaxadv import attacks, line_search, threats, types
from jaxadv.types import AttackFn

__all__ = ["UNET_SCALES", "minimum_distortion"]

# The mask and nine features of our U-Net: MSA weighs each by one gradient.
UNET_SCALES = 10


def minimum_distortion(
  gradients: int = 200,
  *,
  threshold: float = 0.95,
  scales: tuple[float, ...] = (3e-4, 1e-3, 3e-3),
) -> dict[str, AttackFn]:
  """MSA and MAFL, as reconstructed, against a sweep of calibrated ASMA.

  Every attack scores the image as stored in 8 bits and keeps the success with the
  smallest L2 distance. ASMA's is then searched back to the threshold, so that its
  overshoot counts for nobody. MSA takes the gradients of its scales before its first
  step, and so many steps less.

  Args:
    gradients: pulled back by each attack.
    threshold: target IoU that counts as success.
    scales: ASMA's first steps, RMS per value.

  Returns:
    Name to attack, ASMA's first.

  Example:
    >>> list(minimum_distortion(20, scales=(1e-3,)))
    ['asma 0.001', 'msa', 'mafl']
  """
  searched = functools.partial(
    line_search.line_search,
    threat=threats.stored(threats.box()),
    success=functools.partial(types.reached, threshold=threshold),
  )
  asma = functools.partial(
    attacks.asma_calibrated, num_steps=gradients, bits=8, threshold=threshold
  )
  baselines = {f"asma {scale:g}": searched(asma(scale=scale)) for scale in scales}
  return baselines | {
    "msa": attacks.msa(num_steps=gradients - UNET_SCALES, threshold=threshold),
    "mafl": attacks.mafl(num_steps=gradients, threshold=threshold),
  }
