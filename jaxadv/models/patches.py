"""What convolutions, pools and their gradients share: taps of a window, axis labels."""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["columns", "layout"]

Pads = tuple[tuple[int, int], ...]


def columns(
  image: jax.Array,
  window: tuple[int, ...],
  strides: tuple[int, ...],
  pads: Pads,
  *,
  fill: float = 0.0,
) -> list[jax.Array]:
  """What each tap of the window sees, taps in row-major order.

  Args:
    image: `(B, ..., C)`.
    window: side of the window per spatial axis; likewise the next two.
    strides: step between windows.
    pads: pixels added before and after.
    fill: their value.

  Returns:
    One `(B, ..., C)` per tap, with one pixel per window.

  Example:
    >>> image = jnp.arange(4.0).reshape(1, 4, 1)
    >>> [c.ravel().tolist() for c in columns(image, (2,), (2,), ((0, 0),))]
    [[0.0, 2.0], [1.0, 3.0]]
  """
  edges = [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)]
  padded = lax.pad(image, jnp.asarray(fill, image.dtype), edges)
  sides = list(zip(padded.shape[1:-1], window, strides, strict=True))
  seen = []
  for start in itertools.product(*map(range, window)):
    ends = [first + n - k + 1 for first, (n, k, _) in zip(start, sides, strict=True)]
    seen.append(padded[(slice(None), *map(slice, start, ends, strides))])
  return seen


def layout(ndim: int) -> lax.ConvDimensionNumbers:
  """Channels last: images `(B, ..., C)`, kernel `(..., C, F)`.

  Example:
    >>> layout(4).rhs_spec
    (3, 2, 0, 1)
  """
  space = tuple(range(1, ndim - 1))
  images = (0, ndim - 1, *space)
  kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
  return lax.ConvDimensionNumbers(images, kernel, images)
