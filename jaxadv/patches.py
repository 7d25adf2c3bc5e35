"""What convolutions, pools and their gradients share: taps of a window, axis labels."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Pads", "columns", "layout", "pads"]

Pads = tuple[tuple[int, int], ...]


def columns(
  image: jax.Array,
  window: tuple[int, ...],
  strides: tuple[int, ...],
  pads: Pads,
  *,
  dilation: tuple[int, ...] | None = None,
  fill: float = 0.0,
) -> list[jax.Array]:
  """What each tap of the window sees, taps in row-major order.

  Args:
    image: `(B, ..., C)`.
    window: side of the window per spatial axis; likewise the next two.
    strides: step between windows.
    pads: pixels added before and after.
    dilation: step between the taps of a window, 1 by default.
    fill: value of the added pixels.

  Returns:
    One `(B, ..., C)` per tap, with one pixel per window.

  Example:
    >>> image = jnp.arange(4.0).reshape(1, 4, 1)
    >>> [c.ravel().tolist() for c in columns(image, (2,), (2,), ((0, 0),))]
    [[0.0, 2.0], [1.0, 3.0]]
  """
  edges = [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)]
  padded = lax.pad(image, jnp.asarray(fill, image.dtype), edges)
  apart = dilation or (1,) * len(window)
  starts = [range(0, k * d, d) for k, d in zip(window, apart, strict=True)]
  sides = zip(padded.shape[1:-1], starts, strict=True)
  room = [n - first[-1] for n, first in sides]
  seen = []
  for start in itertools.product(*starts):
    ends = [first + n for first, n in zip(start, room, strict=True)]
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


def pads(
  sides: Sequence[int],
  window: Sequence[int],
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
) -> Pads:
  """Pixels before and after, per spatial axis.

  Args:
    sides: of the image.
    window: sides of the window.
    strides: steps between windows.
    padding: `"SAME"`, `"VALID"`, or what it returns.

  Example:
    >>> pads((8,), (3,), (2,), "SAME")
    ((0, 1),)
  """
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(sides, window, strides, padding)
  return tuple((int(low), int(high)) for low, high in padding)
