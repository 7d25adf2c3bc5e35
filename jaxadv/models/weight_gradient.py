"""The gradient of a convolution with respect to its kernel, fast on CPU.

    g[t, c, f] = sum_{b, q} x[b, s q + t - p, c] y[b, q, f]

for image `x`, cotangent `y`, stride `s` and padding `p`. This is a convolution again:
the channels of the image are its batch, the batch its channels, and the cotangent is
its kernel. Autodiff says so by labels alone. XLA for CPU moves the axes to match, but
only in the entry computation of a program; inside `scan`, `fori_loop` or `while_loop`
it falls into a scalar loop, about 100 times slower.

Here the forward pass is written so that its transpose has the axes in place. Only the
transpose ever runs.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import patches

__all__ = [
  "Shapes",
  "as_autodiff",
  "as_convolution",
  "as_product",
  "enabled",
  "gradient",
  "way",
]

_ENABLED = contextvars.ContextVar("jaxadv_weight_gradient", default=True)


class Shapes(NamedTuple):
  """What is static about one convolution.

  Attributes:
    strides: steps, one per spatial axis.
    pads: pixels before and after, per spatial axis.
    precision: as in `lax`.
  """

  strides: tuple[int, ...]
  pads: patches.Pads
  precision: Any = None


# (image, kernel, shapes) -> output
Forward = Callable[[jax.Array, jax.Array, Shapes], jax.Array]


def gradient(
  forward: Forward,
  image: jax.Array,
  kernel: Any,
  cotangent: jax.Array,
  *,
  shapes: Shapes,
) -> jax.Array:
  """The transpose of `forward` in its kernel.

  Args:
    forward: a way to write the convolution.
    image: `(B, ..., C)`.
    kernel: `(..., C, F)`, of which only shape and dtype matter.
    cotangent: `(B, ..., F)`, of the convolution's output.
    shapes: of the convolution.

  Returns:
    The gradient of the kernel, `(..., C, F)`.

  Example:
    >>> ones, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 3))
    >>> shapes = Shapes((1, 1), ((1, 1), (1, 1)))
    >>> g = gradient(as_convolution, ones, kernel, ones, shapes=shapes)
    >>> g[:, :, 0, 0].tolist()
    [[18.0, 24.0, 18.0], [24.0, 32.0, 24.0], [18.0, 24.0, 18.0]]
  """
  linear = lambda kernel: forward(image, kernel, shapes)
  return jax.linear_transpose(linear, jax.typeof(kernel))(cotangent)[0]


def as_convolution(image: jax.Array, kernel: jax.Array, shapes: Shapes) -> jax.Array:
  """The convolution with batch last; its transpose copies image and cotangent once.

  Args:
    image: `(B, ..., C)`.
    kernel: `(..., C, F)`.
    shapes: of the convolution.

  Returns:
    `(B, ..., F)`.

  Example:
    >>> image, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 5))
    >>> as_convolution(image, kernel, Shapes((2, 2), ((0, 1), (0, 1)))).shape
    (2, 2, 2, 5)
  """
  last, space = image.ndim - 1, tuple(range(1, image.ndim - 1))
  inner = tuple(axis - 1 for axis in space)
  # axes of batch, channels, space, then what the transpose reads as an ordinary layout
  out = lax.conv_general_dilated(
    image.transpose(last, *space, 0),
    kernel.transpose(last - 1, *inner, last),
    shapes.strides,
    shapes.pads,
    dimension_numbers=lax.ConvDimensionNumbers(
      (last, 0, *space), (last, 0, *space), (last - 1, last, *inner)
    ),
    precision=shapes.precision,
  )
  return out.transpose(last - 1, *inner, last)


def as_product(image: jax.Array, kernel: jax.Array, shapes: Shapes) -> jax.Array:
  """One matrix product; the image is copied once per tap.

  The matrices are two-dimensional: contracting all axes of two maps at once is up to
  four times slower.

  Args:
    image: `(B, ..., C)`.
    kernel: `(..., C, F)`.
    shapes: of the convolution.

  Returns:
    `(B, ..., F)`.

  Example:
    >>> image, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((1, 1, 3, 5))
    >>> as_product(image, kernel, Shapes((2, 2), ((0, 0), (0, 0)))).shape
    (2, 2, 2, 5)
  """
  seen = jnp.concatenate(patches.columns(image, kernel.shape[:-2], *shapes[:2]), -1)
  rows = seen.reshape(-1, seen.shape[-1])
  matrix = kernel.reshape(-1, kernel.shape[-1])
  out = jnp.dot(rows, matrix, precision=shapes.precision)
  return out.reshape(*seen.shape[:-1], -1)


def way(image: jax.Array, kernel: Any, cotangent: jax.Array) -> Forward:
  """Whose transpose is faster: a product for one tap, or for next to no map.

  XLA swaps map and kernel of a convolution whose kernel is larger, here the cotangent,
  and ends in a scalar loop; and where the map has fewer pixels than the window, the
  forward pass is a product already.

  Example:
    >>> image, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((1, 1, 3, 3))
    >>> way(image, kernel, image).__name__
    'as_product'
  """
  pixels, rows = math.prod(image.shape[1:-1]), math.prod(cotangent.shape[1:-1])
  taps = math.prod(kernel.shape[:-2])
  return as_product if taps == 1 or pixels < max(taps, rows) else as_convolution


def enabled() -> bool:
  """Whether convolutions traced now get these gradients.

  Where CPU is the default backend, and not under `as_autodiff`. Accelerators have
  kernels for the gradient that autodiff labels.
  """
  return _ENABLED.get() and jax.default_backend() == "cpu"


@contextlib.contextmanager
def as_autodiff() -> Iterator[None]:
  """Convolutions traced inside keep the weight gradient of autodiff.

  What was compiled outside stays as it is.

  Example:
    >>> with as_autodiff():
    ...   print(enabled())
    False
  """
  token = _ENABLED.set(False)
  try:
    yield
  finally:
    _ENABLED.reset(token)
