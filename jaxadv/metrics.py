"""How far an attack got and what it cost: overlaps, distances, visibility.

Functions of ONE example, to be mapped with `jax.vmap`; only `segmentation_report` takes
a batch. Images are `(..., C)` floats in [0, 1]; all distances are on that scale. For
two classes IoU and Dice are those of class 1; for more, means over the classes present
in either mask.
"""

from collections.abc import Callable

import dm_pix
import jax
import jax.numpy as jnp

from jaxadv import filters, masks
from jaxadv.masks import iou, pixel_accuracy
from jaxadv.types import Array, Images, Predict, call

__all__ = [
  "dice",
  "iou",
  "l2",
  "linf",
  "low_band_fraction",
  "pixel_accuracy",
  "psnr",
  "round8",
  "segmentation_report",
  "ssim",
]


def dice(
  prediction: Array, label: Array, num_classes: int, valid: Array | None = None
) -> Array:
  """Dice overlap `2 |A and B| / (|A| + |B|)` of two masks, counted in integers.

  Args:
    prediction: `(...)` int mask.
    label: `(...)` int mask.
    num_classes: K, static.
    valid: `(...)` bool, or `None` for every pixel.

  Returns:
    A float scalar in [0, 1]; 1 when both masks are empty.

  Example:
    >>> dice(jnp.array([0, 1, 1, 0]), jnp.array([1, 1, 0, 0]), 2).item()
    0.5
  """
  valid = jnp.ones(label.shape, bool) if valid is None else valid
  scores, present = [], []
  for k in range(1 if num_classes == 2 else 0, num_classes):
    hit, wanted = (prediction == k) & valid, (label == k) & valid
    total = hit.sum() + wanted.sum()
    common = 2 * (hit & wanted).sum().astype(jnp.result_type(float))
    scores.append(common / jnp.maximum(total, 1))
    present.append(total > 0)
  count = jnp.stack(present).sum()
  mean = jnp.stack(scores).sum() / jnp.maximum(count, 1)
  return jnp.where(count > 0, mean, 1)


def l2(delta: Array) -> Array:
  """Euclidean norm over all values of one perturbation.

  Example:
    >>> l2(jnp.array([3.0, 4.0])).item()
    5.0
  """
  return jnp.sqrt(jnp.square(delta).sum())


def linf(delta: Array) -> Array:
  """Largest absolute value of one perturbation.

  Example:
    >>> linf(jnp.array([3.0, -4.0])).item()
    4.0
  """
  return jnp.abs(delta).max()


def psnr(clean: Array, image: Array) -> Array:
  """Peak signal-to-noise ratio `-10 log10(mean (image - clean)^2)` in dB.

  Args:
    clean: `(..., C)` in [0, 1].
    image: like `clean`.

  Returns:
    A float scalar; infinity for equal images.

  Example:
    >>> print(psnr(jnp.full((4, 1), 0.5), jnp.full((4, 1), 0.6)).round(3))
    20.0
  """
  error = jnp.square(image - clean).mean()
  decibels = -10 * jnp.log10(jnp.where(error > 0, error, 1))
  return jnp.where(error > 0, decibels, jnp.inf)


def ssim(clean: Array, image: Array) -> Array:
  """Structural similarity: 11-pixel Gaussian of width 1.5, K1 0.01, K2 0.03 (dm-pix).

  Args:
    clean: `(H, W, C)` in [0, 1], or `(D, H, W, C)`, for which it is the mean over the D
      slices. A side below 11 pixels shortens the window to that side.
    image: like `clean`.

  Returns:
    A float scalar, 1 for equal images. In float32 about 1e-4 accurate in flat regions.

  Example:
    >>> ssim(jnp.zeros((16, 16, 1)), jnp.zeros((16, 16, 1))).item()
    1.0

  Reference: Wang et al., IEEE TIP 13(4), 2004.
  """
  if clean.ndim == 4:
    return jax.vmap(ssim)(clean, image).mean()
  window = min(11, *clean.shape[:2])
  return dm_pix.ssim(clean, image, filter_size=window)


def low_band_fraction(delta: Array, cutoff: float | Array = 0.25) -> Array:
  """Share of the energy in low frequencies, `||P delta||^2 / ||delta||^2`.

  `P` keeps the spatial frequencies within `cutoff` cycles per pixel, per channel.

  Args:
    delta: `(..., C)` float, one perturbation.
    cutoff: radius of the disc; 0.5 is Nyquist.

  Returns:
    A float scalar in [0, 1]; 0 for a perturbation of zero.

  Example:
    >>> flat = jnp.ones((8, 8, 1))
    >>> low_band_fraction(flat).item()
    1.0
  """
  space = tuple(range(delta.ndim - 1))
  power = jnp.square(jnp.abs(jnp.fft.fftn(delta, axes=space)))
  low = filters.low_pass_mask(delta.shape[:-1], cutoff)[..., None]
  total = power.sum()
  return jnp.where(total > 0, (power * low).sum() / jnp.where(total > 0, total, 1), 0)


def round8(image: Array) -> Array:
  """The image as an 8-bit file stores it: `round(255 x) / 255`.

  Example:
    >>> (round8(jnp.array([0.0, 0.001, 0.003])) * 255).tolist()
    [0.0, 0.0, 1.0]
  """
  return jnp.round(255 * image) / 255


def segmentation_report(
  predict: Predict,
  clean: Images,
  image: Images,
  *,
  target: Array,
  clean_prediction: Array,
  mask: Array | None = None,
) -> dict[str, Array]:
  """Everything reported per attacked image, as it is and as stored in 8 bits.

  Runs the model twice: on `image`, and on `round8(image)`.

  Args:
    predict: images to logits `(B, ..., K)` or `(logits, features)`.
    clean: `(B, ..., C)` in [0, 1].
    image: like `clean`, attacked.
    target: `(B, ...)` int, the wanted masks.
    clean_prediction: `(B, ...)` int, the predicted masks of `clean`.
    mask: optional `(B, ...)` bool, pixels that count; all by default.

  Returns:
    `(B,)` float arrays: `iou`, `dice` and `pixel_accuracy` with the target; `clean_iou`
    with the clean prediction; `l2`, `linf`, `psnr`, `ssim` and `low_band` (see
    `low_band_fraction`) of the change; and each again with the suffix `_8bit`.

  Example:
    >>> predict = lambda x: jnp.concatenate([0.5 - x, x - 0.5], -1)
    >>> clean, image = jnp.full((1, 16, 16, 1), 0.2), jnp.full((1, 16, 16, 1), 0.7)
    >>> wish, before = jnp.ones((2, 1, 16, 16), int) * jnp.array([1, 0]).reshape(
    ...   2, 1, 1, 1)
    >>> report = segmentation_report(
    ...   predict, clean, image, target=wish, clean_prediction=before)
    >>> report["iou"].item(), report["clean_iou"].item(), report["linf"].item()
    (1.0, 0.0, 0.5)
  """
  valid = jnp.ones(target.shape, bool) if mask is None else mask
  report: dict[str, Array] = {}
  for suffix, shown in (("", image), ("_8bit", round8(image))):
    logits, _ = call(predict, shown)
    measured = _reached(logits, target, clean_prediction, valid) | _moved(clean, shown)
    report |= {name + suffix: value for name, value in measured.items()}
  return report


def _reached(logits, target, clean_prediction, valid):
  decided = jax.vmap(masks.decision)(logits, target)
  classes = logits.shape[-1]

  def overlap(measure: Callable, label):
    return jax.vmap(lambda a, b, v: measure(a, b, classes, v))(decided, label, valid)

  return {
    "iou": overlap(iou, target),
    "dice": overlap(dice, target),
    "pixel_accuracy": jax.vmap(pixel_accuracy)(decided, target, valid),
    "clean_iou": overlap(iou, clean_prediction),
  }


def _moved(clean, image):
  delta = image - clean
  return {
    "l2": jax.vmap(l2)(delta),
    "linf": jax.vmap(linf)(delta),
    "psnr": jax.vmap(psnr)(clean, image),
    "ssim": jax.vmap(ssim)(clean, image),
    "low_band": jax.vmap(low_band_fraction)(delta),
  }
