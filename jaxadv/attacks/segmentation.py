"""Attacks on masks: ASMA exactly, MSA and MAFL as our reconstructions, and baselines.

`y` is the mask `(B, H, W)` the attacker wants, or a mapping with it under `"label"`, the
image it belongs to under `"image"` (read by MSA and MAFL) and the pixels that count
under `"mask"`. Volumes `(B, D, H, W, C)` work alike. Success is an IoU of at least
`threshold` with the wanted mask.

MSA and MAFL are reconstructed from their abstracts: no code or full text was available.
No number obtained with them reproduces a published one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxadv import filters, inputs, losses, masks, targets, threats, transforms
from jaxadv.attacks.iterative import Bounds, Scalar, aim
from jaxadv.engine import Attack, gradient_attack
from jaxadv.types import LossFn, Objective, Threat, call, labels, reached

__all__ = [
  "asma",
  "asma_calibrated",
  "cos_pgd",
  "mafl",
  "mafl_linf",
  "mafl_literal",
  "msa",
  "msa_literal",
  "seg_pgd",
]

Keep = Literal["last", "best", "smallest"]


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
    _mask_objective(_minus_distance(losses.mask_logits), threshold),
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
    _mask_objective(_minus_distance(term), threshold),
    _box(bits, bounds),
    optax.chain(
      transforms.scale_by_first_norm(),
      transforms.scale_by_size(),
      transforms.scale_by_mask_iou(gain * scale, scale),
    ),
    num_steps=num_steps,
    random_start=False,
    keep=keep,
  )


def msa(
  *,
  num_steps: int = 200,
  taps: Sequence[str] | None = None,
  omega: float = 0.1,
  kappa: float = 0.5,
  trim: float = 0.03,
  first: Scalar = 1e-2,
  last: Scalar = 2e-4,
  shrink: Scalar = 0.05,
  peak: Scalar = 0.3,
  bits: int | None = 8,
  threshold: float = 0.95,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Multi-scale attack, our reconstruction made good.

  The direction is `g_0 + sum_l (omega / L) g_l`, every `g` normalised: `g_0` of a hinge
  on the mask, `g_l` of the distance of feature `l` to that of the target image. Steps
  shrink on success and clip the largest values, at the stored image.

  Args:
    num_steps: steps; each pulls back one gradient per tap and one for the mask.
    taps: names of features; default all of them.
    omega: weight of the features together.
    kappa: margin of the hinge in logits.
    trim: share of the target's foreground left out, see `losses.mask_hinge`.
    first: first step, RMS per value.
    last: last step, RMS per value.
    shrink: see `transforms.shrink_on_success`.
    peak: share of the largest value clipped by the first success.
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
  return gradient_attack(
    _mask_objective(
      _scales(losses.mask_hinge(kappa, trim=trim), taps), threshold, guides
    ),
    _box(bits, bounds),
    optax.chain(
      _multi_scale(omega),
      _homing(first, last, shrink, functools.partial(_clip_peaks, peak)),
    ),
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

  Cross-entropy and feature distances at every tap, each input gradient normalised, summed
  with weight `omega / L`; L2-normalised steps whose RMS falls from `far` to `near` as the
  IoU rises.

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
    _mask_objective(
      _scales(losses.negate(losses.cross_entropy), taps), threshold, guides
    ),
    threats.box(bounds=bounds) if eps is None else threats.linf(eps, bounds=bounds),
    optax.chain(_multi_scale(omega), _unit_step(), _by_iou(far, near)),
    num_steps=num_steps,
    random_start=False,
    keep="smallest",
  )


def mafl(
  *,
  num_steps: int = 200,
  feature: str = "bottleneck",
  similarity: Literal["ssah", "src", "tgt", "pair"] = "ssah",
  similarity_weight: float = 0.1,
  low_band: Literal["fft", "haar"] = "fft",
  cutoff: float = 0.25,
  band_shrink: Scalar = 0.1,
  decay: float = 0.5,
  kappa: float = 0.5,
  trim: float = 0.03,
  first: Scalar = 1e-2,
  last: Scalar = 2e-4,
  shrink: Scalar = 0.03,
  peak: Scalar = 0.3,
  bits: int | None = 8,
  threshold: float = 0.95,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Momentum, adaptive step, feature cosine, low-frequency constraint: made good.

  Our reconstruction. Raises a hinge on the mask minus `similarity_weight` times the
  feature similarity, with momentum; on success the perturbation shrinks, its largest
  values are clipped, and its low band shrinks further: low frequencies stay those of the
  clean image.

  Args:
    num_steps: steps.
    feature: whose cosine similarity is lowered.
    similarity: see `losses.feature_similarity`; without `y["image"]` it is `src`.
    similarity_weight: its weight.
    low_band: the band: a disc of the Fourier transform, or one Haar level.
    cutoff: radius of the disc, cycles per pixel.
    band_shrink: share of the low band given up by the first success.
    decay: of the momentum.
    kappa: margin of the hinge in logits.
    trim: share of the target's foreground left out.
    first: first step, RMS per value.
    last: last step, RMS per value.
    shrink: see `transforms.shrink_on_success`.
    peak: share of the largest value clipped by the first success.
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
  hinge = losses.mask_hinge(kappa, trim=trim)
  alike = _similarity(feature, similarity)

  def give_up(delta, amount):
    delta = delta - band_shrink * amount * band(delta)
    return _clip_peaks(peak, delta, amount)

  return gradient_attack(
    _mask_objective(
      lambda s: hinge(s) - similarity_weight * alike(s),
      threshold,
      targets.guide_features,
    ),
    _box(bits, bounds),
    optax.chain(_momentum(decay), _homing(first, last, shrink, give_up)),
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

  Ascends `mean_active z_y - w C - penalty ||P d||^2` with momentum on the gradient and
  ASMA's multiplier `scale (1 + gain * IoU)`; `C` is the feature similarity and `P` the
  low band, penalised or projected away.

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
    _mask_objective(
      _literal_loss(
        losses.mask_margin if margin else losses.mask_logits,
        _similarity(feature, similarity),
        similarity_weight,
        losses.low_frequency_energy(band),
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

  Ascends `mean_active margin - w C - penalty ||P d||^2` with the momentum of MI-FGSM.

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
  loss = _literal_loss(
    losses.mask_margin,
    _similarity(feature, similarity),
    similarity_weight,
    losses.low_frequency_energy(_band("fft", cutoff)),
    penalty,
  )
  return gradient_attack(
    _mask_objective(loss, threshold, targets.guide_features),
    threats.linf(eps, bounds=bounds),
    optax.chain(_momentum(decay), transforms.sign_step(2 * eps / num_steps)),
    num_steps=num_steps,
    random_start=False,
  )


def guides(predict: Any, x: jax.Array, y: Any) -> dict[str, Any]:
  """Features of the target image where `y` has one, of class prototypes otherwise."""
  has_image = "image" in labels(predict, x, y)
  prepare = targets.guide_features if has_image else targets.prototypes
  return prepare(predict, x, y)


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


def _mask_objective(loss, threshold, prepare=labels):
  inputs.check_positive("threshold", threshold)
  success = functools.partial(reached, threshold=threshold)
  return Objective(loss, prepare=prepare, success=success)


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


def _minus_distance(term: LossFn) -> LossFn:
  return lambda sample: term(sample) - losses.squared_l2(sample)


def _scales(mask_loss: LossFn, taps: Sequence[str] | None) -> LossFn:
  """The mask loss and, for every tap, minus the feature distance: `(1 + L,)`."""

  def loss(sample):
    names = sorted(sample.features) if taps is None else taps
    distances = [-losses.feature_distance(name)(sample) for name in names]
    return jnp.stack([mask_loss(sample), *distances])

  return loss


def _multi_scale(omega: float) -> optax.GradientTransformation:
  def weights(count):
    return [1.0] + [omega / max(count - 1, 1)] * (count - 1)

  return transforms.combine_normalized(weights)


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
  bands = {
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


def _box(bits: int | None, bounds: Bounds) -> Threat:
  box = threats.box(bounds=bounds)
  return box if bits is None else threats.stored(box, bits=bits)


def _unit_step() -> optax.GradientTransformation:
  return optax.chain(transforms.normalize(2), transforms.scale_by_size())


def _by_iou(far, near):
  return transforms.scale_by_mask_iou(near - far, far)


def _momentum(decay):
  return optax.chain(transforms.normalize(1), optax.trace(decay))


def _homing(first, last, shrink, constrain):
  """Unit steps that shrink on success."""
  return optax.chain(
    _unit_step(),
    transforms.shrink_on_success(
      first=first, last=last, shrink=shrink, constrain=constrain
    ),
  )


def _clip_peaks(peak, delta, amount):
  return transforms.clip_peaks(delta, peak * amount)
