"""Momentum, adaptive step, feature cosine, low-frequency constraint: reconstructions.

`y` is the mask the attacker wants, or a mapping with it under `"label"`, the image it
belongs to under `"image"` and the pixels that count under `"mask"`. Reconstructed from
the abstract: no code or full text was available, and no number obtained here reproduces
a published one.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxadv import filters, inputs, losses, targets, threats, transforms
from jaxadv.attacks import parts
from jaxadv.attacks.parts import Bounds, Scalar
from jaxadv.engine import Attack, gradient_attack
from jaxadv.types import LossFn, Threat

__all__ = ["mafl", "mafl_linf", "mafl_literal"]


def mafl(
  *,
  num_steps: int = 200,
  feature: str = "bottleneck",
  similarity: Literal["ssah", "src", "tgt", "pair"] = "ssah",
  similarity_weight: float = 0.1,
  low_band: Literal["fft", "haar"] = "fft",
  cutoff: float = 0.25,
  band_shrink: Scalar = 0.6,
  decay: float = 0.5,
  shrink: Scalar = 0.1,
  peak: Scalar = 0.7,
  floor: Scalar = 0.65,
  bits: int | None = 8,
  threshold: float = 0.95,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Momentum, adaptive step, feature cosine, low-frequency constraint: made good.

  Our reconstruction. Raises the margin of the pixels that are still wrong minus
  `similarity_weight` times the feature similarity, with momentum; on success the
  perturbation shrinks, its largest values are clipped, and its low band shrinks
  further, down to a floor: low frequencies stay close to those of the clean image.

  Args:
    num_steps: steps.
    feature: whose cosine similarity is lowered.
    similarity: see `losses.feature_similarity`; without `y["image"]` it is `src`.
    similarity_weight: its weight.
    low_band: the band: a disc of the Fourier transform, or one Haar level.
    cutoff: radius of the disc, cycles per pixel.
    band_shrink: share of the low band given up by the first success.
    decay: of the momentum.
    shrink: see `transforms.shrink_on_success`.
    peak: share of the largest value clipped by the first success.
    floor: what is left of the low band's share of the energy, and of the largest value
      in units of the RMS, relative to the first success.
    bits: attack the image as stored in this many bits.
    threshold: IoU that counts as success.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Differs from the paper in ways nobody outside can know: only its abstract was
  available. `mafl_literal` is the plain reading of it.

  Reference: Sun et al., J. Med. Imaging 12(4):044501, 2025 (reconstruction).
  """
  band = _band(low_band, cutoff)
  alike = _similarity(feature, similarity)
  clip = parts.clip_peaks(peak, floor)

  def give_up(delta, amount, first):
    delta = transforms.shrink_band(
      delta, band, band_shrink * amount, first=first, floor=floor
    )
    return clip(delta, amount, first)

  return gradient_attack(
    parts.mask_objective(
      lambda s: losses.active_margin(s) - similarity_weight * alike(s),
      threshold,
      targets.guide_features,
    ),
    parts.box(bits, bounds),
    optax.chain(parts.momentum(decay), parts.homing(shrink, give_up)),
    num_steps=num_steps,
    random_start=False,
    keep="smallest",
  )


def mafl_literal(
  *,
  num_steps: int = 500,
  feature: str = "bottleneck",
  similarity: Literal["ssah", "src", "tgt", "pair"] = "ssah",
  similarity_weight: float = 0.1,
  low_band: Literal["fft", "haar"] = "haar",
  cutoff: float = 0.25,
  constraint: Literal["penalty", "project"] = "penalty",
  penalty: float = 0.01,
  margin: bool = False,
  decay: float = 1.0,
  scale: Scalar = 1e-3,
  gain: Scalar = 10.0,
  threshold: float = 0.95,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """MAFL read as "ASMA with add-ons" (reconstruction).

  Ascends `A - w C - penalty ||P d||^2` with momentum on the gradient and ASMA's
  multiplier `scale (1 + gain * IoU)`; `A` sums `z_y` over the wrong pixels and divides
  by all, `C` is the feature similarity, `P` the low band, penalised or projected away.

  Args:
    num_steps: steps.
    feature: whose cosine similarity is lowered.
    similarity: see `losses.feature_similarity`.
    similarity_weight: `w`.
    low_band: `"fft"` disc or one `"haar"` level.
    cutoff: radius of the disc, cycles per pixel.
    constraint: penalise the low band, or remove it after every step.
    penalty: weight of the penalty.
    margin: raise the margin instead of the raw logit.
    decay: of the momentum.
    scale: RMS of the first step.
    gain: of the multiplier with the IoU.
    threshold: IoU that counts as success.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Raises:
    ValueError: for an unknown constraint or band.

  Reference: Sun et al., J. Med. Imaging 12(4):044501, 2025 (reconstruction).
  """
  if constraint not in ("penalty", "project"):
    raise ValueError(f'`constraint` is {constraint!r}; write "penalty" or "project".')
  band = _band(low_band, cutoff)
  projecting = constraint == "project"
  return gradient_attack(
    parts.mask_objective(
      _literal_loss(
        losses.mask_margin if margin else losses.mask_logits,
        _similarity(feature, similarity),
        similarity_weight,
        losses.band_energy(band),
        0.0 if projecting else penalty,
      ),
      threshold,
      targets.guide_features,
    ),
    _without(band, bounds) if projecting else threats.box(bounds=bounds),
    optax.chain(
      transforms.scale_by_first_norm(),
      optax.trace(decay),
      transforms.scale_by_size(),
      transforms.scale_by_mask_iou(gain * scale, scale),
    ),
    num_steps=num_steps,
    random_start=False,
    keep="smallest",
  )


def mafl_linf(
  eps: Scalar,
  *,
  num_steps: int = 100,
  feature: str = "bottleneck",
  similarity: Literal["ssah", "src", "tgt", "pair"] = "ssah",
  similarity_weight: float = 0.1,
  penalty: float = 0.01,
  cutoff: float = 0.25,
  decay: float = 1.0,
  threshold: float = 0.95,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """MAFL inside an Linf ball (reconstruction): sign steps of `2 eps / num_steps`.

  Ascends `A - w C - penalty ||P d||^2` as `mafl_literal` does, `A` of margins, with the
  momentum of MI-FGSM.

  Args:
    eps: Linf radius.
    num_steps: steps.
    feature: whose cosine similarity is lowered.
    similarity: see `losses.feature_similarity`.
    similarity_weight: `w`.
    penalty: weight of the low band's energy.
    cutoff: radius of the disc, cycles per pixel.
    decay: of the momentum.
    threshold: IoU that counts as success.
    bounds: valid range of images.

  Returns:
    An `Attack`; of the steps it returns the last.

  Reference: Sun et al., J. Med. Imaging 12(4):044501, 2025 (reconstruction).
  """
  inputs.check_positive("eps", eps)
  inputs.check_num_steps(num_steps)
  loss = _literal_loss(
    losses.mask_margin,
    _similarity(feature, similarity),
    similarity_weight,
    losses.low_frequency_energy(cutoff),
    penalty,
  )
  return gradient_attack(
    parts.mask_objective(loss, threshold, targets.guide_features),
    threats.linf(eps, bounds=bounds),
    optax.chain(parts.momentum(decay), transforms.sign_step(2 * eps / num_steps)),
    num_steps=num_steps,
    random_start=False,
  )


def _literal_loss(term, alike, similarity_weight, energy, penalty) -> LossFn:
  def loss(s):
    pixels = jnp.size(s.target["label"])
    return term(s) / pixels - similarity_weight * alike(s) - penalty * energy(s)

  return loss


def _similarity(feature: str, kind: Any) -> LossFn:
  """The similarity asked for, or `src` where the target has no image."""
  source = losses.feature_similarity(feature, "src")
  asked = losses.feature_similarity(feature, kind)
  return lambda s: (asked if "features" in s.target else source)(s)


def _band(name: str, cutoff: float) -> Callable[[jax.Array], jax.Array]:
  bands: dict[str, Callable[[jax.Array], jax.Array]] = {
    "fft": functools.partial(filters.low_pass, cutoff=cutoff),
    "haar": filters.haar_low_pass,
  }
  if name not in bands:
    raise ValueError(f"`low_band` is {name!r}; write one of {', '.join(bands)}.")
  return bands[name]


def _without(band, bounds) -> Threat:
  return threats.additive(
    lambda delta: delta - band(delta), lambda key, like: 0 * like, bounds=bounds
  )
