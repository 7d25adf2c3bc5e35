"""Losses of ONE example that read no logits: features, bands and size of the change.

`jaxadv.losses` offers them with all others. Features and their references, which
`jaxadv.targets` prepares, are cast to the default float first.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxadv import filters, inputs
from jaxadv.types import LossFn, Sample

__all__ = [
  "band_energy",
  "feature_cosine",
  "feature_distance",
  "feature_similarity",
  "low_frequency_energy",
  "squared_l2",
]


def feature_distance(name: str) -> LossFn:
  """Mean square distance to `target["features"][name]`; ValueError without it."""

  def loss(sample):
    feature, guide = _feature_pair(sample, name, "features")
    return jnp.square(feature - guide).mean()

  return loss


def feature_cosine(name: str, *, reference: str = "features") -> LossFn:
  """Cosine of a feature, averaged over space, with that of a reference image.

  Args:
    name: feature of the model; `(..., C)` is averaged to `(C,)` first.
    reference: entry of the target that holds the reference features: `"features"` for
      the guide image, `"clean_features"` for the clean one.

  Returns:
    A loss in [-1, 1].
  """

  def loss(sample):
    feature, guide = _feature_pair(sample, name, reference)
    return _cosine(_pool(feature), _pool(guide))

  return loss


def feature_similarity(
  name: str, kind: Literal["ssah", "src", "tgt", "pair"] = "ssah", *, slack: float = 0.2
) -> LossFn:
  """How much an image still looks like its source and not like its target, in features.

  With cosines `s` to the clean and `t` to the target image: `src = s`, `tgt = -t`,
  `pair = s - t`, and `ssah = max(0, w_s s - w_t t)` with detached self-paced weights
  `w_s = max(0, s - slack)`, `w_t = max(0, 1 + slack - t)`. Attacks lower it.

  Args:
    name: feature of the model.
    kind: which of the four.
    slack: the margin m of SSAH.

  Returns:
    A loss.

  Reference: SSAH, Luo et al., CVPR 2022, arXiv 2203.05151.
  """
  source = feature_cosine(name, reference="clean_features")
  target = feature_cosine(name)

  def ssah(sample):
    s, t = source(sample), target(sample)
    away = jax.lax.stop_gradient(jnp.maximum(0, s - slack))
    towards = jax.lax.stop_gradient(jnp.maximum(0, 1 + slack - t))
    return jnp.maximum(0, away * s - towards * t)

  kinds: dict[str, LossFn] = {
    "ssah": ssah,
    "src": source,
    "tgt": lambda sample: -target(sample),
    "pair": lambda sample: source(sample) - target(sample),
  }
  if kind not in kinds:
    raise ValueError(f"`kind` is {kind!r}; write one of {', '.join(kinds)}.")
  return kinds[kind]


def low_frequency_energy(cutoff: float | jax.Array) -> LossFn:
  """`||P d||_2^2` of `d = image - clean`, with `P` the low-pass at `cutoff`."""
  return band_energy(functools.partial(filters.low_pass, cutoff=cutoff))


def band_energy(band: Callable[[jax.Array], jax.Array]) -> LossFn:
  """`||P d||_2^2` of the change `d = image - clean`, for an orthogonal projector `P`.

  Its gradient is `2 P d`, taken analytically: one filter per step instead of two.

  Args:
    band: the projector, for instance `filters.haar_low_pass`.

  Returns:
    A loss, >= 0.
  """

  @jax.custom_vjp
  def energy(delta):
    return jnp.square(band(delta)).sum()

  def forward(delta):
    low = band(delta)
    return jnp.square(low).sum(), low

  energy.defvjp(forward, lambda low, g: (2 * g * low,))
  return lambda sample: energy(sample.image - sample.clean)


def squared_l2(sample: Sample) -> jax.Array:
  """`||image - clean||_2^2` over the whole image."""
  return jnp.square(sample.image - sample.clean).sum()


def _feature_pair(sample, name, reference):
  inputs.check_feature(name, sample.features)
  if reference not in sample.target:
    raise ValueError(
      f"the target has no {reference!r}; prepare it with targets.guide_features and "
      'y={"label": ..., "image": target_image}.'
    )
  dtype = jnp.result_type(float)
  guide = sample.target[reference][name]
  return sample.features[name].astype(dtype), guide.astype(dtype)


def _pool(feature):
  return feature.mean(tuple(range(feature.ndim - 1)))


def _cosine(a, b):
  tiny = jnp.finfo(a.dtype).tiny
  squares = jnp.square(a).sum() * jnp.square(b).sum()
  return (a * b).sum() / jnp.sqrt(jnp.maximum(squares, tiny))
