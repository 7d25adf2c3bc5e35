"""A convolution, in the form that is fastest on CPU.

    y[q, f] = sum_{t, c} K[t, c, f] x[s q + d t - p, c]

for kernel `K`, stride `s`, dilation `d` and padding `p`. Most are left to XLA; where it
has no fast form, or a slow one, they are matrix products or sums.

Arrays are `(B, ..., C)`, channels last, with one to three spatial axes.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import patches

__all__ = ["Spec", "all_seen", "apply", "is_thin", "shifted_products"]

_FEW = 64  # pixels, all images together, up to which a product beats a convolution


class Spec(NamedTuple):
  """What is static about one convolution; one number per spatial axis.

  Attributes:
    strides: steps between windows.
    pads: pixels before and after.
    dilation: steps between the taps of a window.
    groups: of channels that do not see each other.
    precision: as in `lax`.
  """

  strides: tuple[int, ...]
  pads: patches.Pads
  dilation: tuple[int, ...]
  groups: int = 1
  precision: Any = None


def apply(image: jax.Array, kernel: jax.Array, spec: Spec) -> jax.Array:
  """The convolution, in the way that is fastest on CPU.

  One-pixel kernels, few pixels, and fewer pixels than taps are one matrix product;
  depthwise convolutions, which have no fast form at all, are sums of shifted images, 20
  to 80 times faster.

  Args:
    image: `(B, ..., C)`.
    kernel: `(..., C / groups, F)`.
    spec: of the convolution.

  Returns:
    `(B, ..., F)`.

  Example:
    >>> image, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    >>> apply(image, kernel, Spec((2, 2), ((0, 1), (0, 1)), (1, 1))).shape
    (1, 4, 4, 4)
  """
  if 1 < spec.groups == image.shape[-1] == kernel.shape[-1]:
    return _shifted_sum(image, kernel, spec)
  if spec.groups == 1 and _is_product(image, kernel, spec):
    return _product(image, kernel, spec)
  if spec.groups == 1 and kernel.shape[-2] == 3 and 16 < kernel.shape[-1] <= 32:
    # XLA is 2 to 14 times slower at three channels than at four, there alone
    image, kernel = _pad(image, -1), _pad(kernel, -2)
  return lax.conv_general_dilated(
    image,
    kernel,
    spec.strides,
    spec.pads,
    rhs_dilation=spec.dilation,
    dimension_numbers=patches.layout(image.ndim),
    feature_group_count=spec.groups,
    precision=spec.precision,
  )


def shifted_products(image: jax.Array, kernel: jax.Array, spec: Spec) -> jax.Array:
  """`apply` as what each pixel gives to each tap, shifted and summed.

  Where `is_thin` it takes a fifth to all of the time of a convolution.

  Args:
    image: `(B, ..., C)`.
    kernel: `(..., C, F)`.
    spec: of the convolution, whose strides and groups are 1.

  Returns:
    `(B, ..., F)`, summed in float32 at least.

  Example:
    >>> image, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 1))
    >>> spec = Spec((1, 1), ((0, 0), (0, 0)), (1, 1))
    >>> bool((shifted_products(image, kernel, spec) == 27).all())
    True
  """
  *window, own, features = kernel.shape
  matrix = jnp.moveaxis(kernel, -2, 0).reshape(own, -1)
  wide = jnp.promote_types(image.dtype, jnp.float32)
  given = jnp.dot(image, matrix, precision=spec.precision).astype(wide)
  given = given.reshape(*image.shape[:-1], -1, features)
  sides = zip(image.shape[1:-1], _sides(image, kernel, spec), strict=True)
  axes = list(zip(sides, *spec[1:3], strict=True))
  parts = []
  for k, tap in enumerate(itertools.product(*map(range, window))):
    fronts = [low - d * t for t, (_, (low, _), d) in zip(tap, axes, strict=True)]
    edges = [(f, m - n - f, 0) for f, ((n, m), *_) in zip(fronts, axes, strict=True)]
    full = [(0, 0, 0), *edges, (0, 0, 0)]
    parts.append(lax.pad(given[..., k, :], jnp.zeros((), wide), full))
  return functools.reduce(jnp.add, parts).astype(image.dtype)


def is_thin(shape: Sequence[int]) -> bool:
  """Whether a kernel `(..., C, F)` has so few features that products per tap pay.

  Example:
    >>> is_thin((7, 7, 64, 3)), is_thin((3, 3, 128, 32))
    (True, False)
  """
  *window, own, features = shape  # as measured: beyond either they bring nothing
  return features <= 12 and math.prod(window) * features <= 3 * own


def _is_product(image, kernel, spec):
  taps = math.prod(kernel.shape[:-2])
  seen, made = math.prod(image.shape[1:-1]), math.prod(_sides(image, kernel, spec))
  # XLA swaps map and kernel where the kernel is larger, and ends in a scalar loop
  few = min(seen, made) < taps or len(image) * made <= _FEW
  return taps == 1 or (made > 0 and few)


def _sides(image, kernel, spec):
  """Of the result."""
  axes = zip(image.shape[1:-1], kernel.shape[:-2], *spec[:3], strict=True)
  reach = [(n + sum(pad) - (k - 1) * d - 1) // s + 1 for n, k, s, pad, d in axes]
  return [max(0, n) for n in reach]


def all_seen(image: jax.Array, window: tuple[int, ...], spec: Spec) -> jax.Array:
  """What each window sees, `(B, ..., C)` to `(B, ..., taps C)`, taps major.

  Example:
    >>> spec = Spec((1,), ((0, 0),), (1,))
    >>> all_seen(jnp.arange(3.0).reshape(1, 3, 1), (2,), spec)[0].tolist()
    [[0.0, 1.0], [1.0, 2.0]]
  """
  return jnp.concatenate(_columns(image, window, spec), -1)


def _columns(image, window, spec):
  return patches.columns(image, window, spec.strides, spec.pads, dilation=spec.dilation)


def _pad(array, axis):
  """One zero more at the end of an axis."""
  edges = [(0, 0)] * array.ndim
  edges[axis] = (0, 1)
  return jnp.pad(array, edges)


def _product(image, kernel, spec):
  seen = all_seen(image, kernel.shape[:-2], spec)
  matrix = kernel.reshape(-1, kernel.shape[-1])
  return jnp.dot(seen, matrix, precision=spec.precision)


def _shifted_sum(image, kernel, spec):
  """The depthwise convolution, summed in float32 at least."""
  wide = jnp.promote_types(image.dtype, jnp.float32)
  columns = _columns(image, kernel.shape[:-2], spec)
  taps = kernel.reshape(-1, *(1,) * (image.ndim - 1), kernel.shape[-1]).astype(wide)
  products = [c.astype(wide) * tap for c, tap in zip(columns, taps, strict=True)]
  return functools.reduce(jnp.add, products).astype(image.dtype)
