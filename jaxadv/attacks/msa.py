"""Multi-scale attack on masks: our reconstruction, made good and read plainly.

`y` is the mask the attacker wants, or a mapping with it under `"label"`, the image it
belongs to under `"image"` and the pixels that count under `"mask"`. Reconstructed from
the abstract: no code or full text was available, and no number obtained here reproduces
a published one.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxadv import losses, targets, threats, transforms
from jaxadv.attacks import parts
from jaxadv.attacks.parts import Bounds, Scalar
from jaxadv.engine import Attack, gradient_attack
from jaxadv.types import LossFn, labels

__all__ = ["msa", "msa_literal"]


def msa(
  *,
  num_steps: int = 200,
  taps: Sequence[str] | None = None,
  omega: float = 0.1,
  shrink: Scalar = 0.1,
  peak: Scalar = 0.4,
  floor: Scalar = 0.6,
  bits: int | None = 8,
  threshold: float = 0.95,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Multi-scale attack, our reconstruction made good.

  Raises `m / |g_0| - (omega / L) sum_l d_l / |g_l|`: `m` is the margin of the pixels
  that are still wrong, `d_l` the distance of feature `l` to that of the target image,
  and every scale is divided by the norm of its input gradient at the clean image, so
  that a step costs one gradient whatever the number of scales. On success the
  perturbation shrinks and its largest values are clipped; everything is scored at the
  stored image.

  Args:
    num_steps: steps, one gradient each; `1 + L` more are taken before the first.
    taps: names of features; default all of them.
    omega: weight of the features together.
    shrink: see `transforms.shrink_on_success`.
    peak: share of the largest value clipped by the first success.
    floor: what is left of the largest value, in units of the RMS and relative to the
      first success.
    bits: attack the image as stored in this many bits.
    threshold: IoU that counts as success.
    bounds: valid range of images.

  Returns:
    An `Attack`. Without `y["image"]` the features of the target are composed from class
    prototypes of the clean image (`targets.prototypes`).

  Differs from the paper in ways nobody outside can know: only its abstract was
  available. `msa_literal` is the plain reading of it.

  Reference: Shao et al., Information Sciences 554, 2021 (reconstruction).
  """
  scales = _scales(losses.active_margin, taps)

  def loss(sample):
    terms = sample.target["weights"] * scales(sample)
    return (jnp.asarray(_shares(omega, terms.size)) * terms).sum()

  return gradient_attack(
    parts.mask_objective(loss, threshold, targets.gradient_weights(scales, guides)),
    parts.box(bits, bounds),
    parts.homing(shrink, parts.clip_peaks(peak, floor)),
    num_steps=num_steps,
    random_start=False,
    keep="smallest",
  )


def msa_literal(
  *,
  num_steps: int = 500,
  taps: Sequence[str] | None = None,
  omega: float = 0.2,
  far: Scalar = 1e-4,
  near: Scalar = 1e-5,
  eps: Scalar | None = None,
  threshold: float = 0.95,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Multi-scale attack, the plain reading of the abstract (reconstruction R1).

  Cross-entropy and feature distances at every tap, each input gradient normalised,
  summed with weight `omega / L`; L2-normalised steps whose RMS falls from `far` to
  `near` as the IoU rises.

  Args:
    num_steps: steps.
    taps: names of features; default all of them.
    omega: weight of the features together.
    far: RMS of a step at IoU 0.
    near: RMS of a step at IoU 1.
    eps: optional Linf radius.
    threshold: IoU that counts as success.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Reference: Shao et al., Information Sciences 554, 2021 (reconstruction).
  """
  return gradient_attack(
    parts.mask_objective(
      _scales(losses.negate(losses.cross_entropy), taps), threshold, guides
    ),
    threats.box(bounds=bounds) if eps is None else threats.linf(eps, bounds=bounds),
    optax.chain(
      _multi_scale(omega),
      parts.unit_step(),
      transforms.scale_by_mask_iou(near - far, far),
    ),
    num_steps=num_steps,
    random_start=False,
    keep="smallest",
  )


def guides(predict: Any, x: jax.Array, y: Any) -> dict[str, Any]:
  """Features of the target image where `y` has one, of class prototypes otherwise."""
  has_image = "image" in labels(predict, x, y)
  prepare = targets.guide_features if has_image else targets.prototypes
  return prepare(predict, x, y)


def _scales(mask_loss: LossFn, taps: Sequence[str] | None) -> LossFn:
  """The mask loss and, for every tap, minus the feature distance: `(1 + L,)`."""

  def loss(sample):
    names = sorted(sample.features) if taps is None else taps
    distances = [-losses.feature_distance(name)(sample) for name in names]
    return jnp.stack([mask_loss(sample), *distances])

  return loss


def _multi_scale(omega: float) -> optax.GradientTransformation:
  return transforms.combine_normalized(functools.partial(_shares, omega))


def _shares(omega, count):
  """Weight of the mask loss and, shared by the others, of the features."""
  return [1.0] + [omega / max(count - 1, 1)] * (count - 1)
