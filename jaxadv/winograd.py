"""3x3 convolutions in 16 products where there were 36: Winograd's F(2x2, 3x3).

    Y = A' ((G g G') * (B' d B)) A

for the kernel `g`, the 4x4 pixels `d` that a 2x2 tile of results `Y` sees, and a
product of channels in the place of `*`. `G g G'` is laid out once. The rounding is that
of the convolution within a small factor, as all but `G` are sums and differences.

Lavin and Gray 2016, arXiv 1509.09308.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxadv import canonical, patches
from jaxadv.convolving import Spec

__all__ = ["How", "convolve", "layout", "pays"]

Matrices = list[list[jax.Array]]  # 4 x 4 of `(C, F)`
_MAP = 2**23  # values of image and result
_G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
_TAPS = np.kron(_G, _G)  # `G g G'` as a product with the taps of `g` in a row


class How(NamedTuple):
  """What is static about it.

  Attributes:
    pads: pixels before and after, per spatial axis.
    precision: as in `lax`.
  """

  pads: patches.Pads
  precision: Any = None


def pays(shape: Sequence[int], spec: Spec, pixels: int) -> bool:
  """Whether it is for a convolution, and transforms cost less than products it saves.

  They need four times the memory of image and result: with maps that no cache keeps
  nothing is left of what they bring.

  Args:
    shape: of the kernel.
    spec: of the convolution.
    pixels: of the result, all images together.

  Example:
    >>> spec = Spec((1, 1), ((1, 1), (1, 1)), (1, 1))
    >>> pays((3, 3, 64, 128), spec, 2**13), pays((3, 3, 64, 64), spec, 2**13)
    (True, False)
  """
  *window, own, features = shape
  plain = (*window, *spec.strides, *spec.dilation) == (3, 3, 1, 1, 1, 1)
  deep, small = (
    own * features >= 40 * (own + features),
    pixels * (own + features) < _MAP,
  )
  return plain and spec.groups == 1 and deep and small


def layout(kernel: jax.Array) -> Matrices:
  """`G g G'`, for `convolve`.

  Args:
    kernel: `(3, 3, C, F)`.

  Example:
    >>> matrices = layout(jnp.ones((3, 3, 8, 5)))
    >>> len(matrices), len(matrices[0]), matrices[0][0].shape
    (4, 4, (8, 5))
  """
  *_, own, features = kernel.shape
  # one product: as sums they would be 16 programs for XLA to compile
  both = jnp.dot(_TAPS.astype(kernel.dtype), kernel.reshape(9, -1), precision="highest")
  grid = both.reshape(4, 4, own, features)
  return [[grid[a, b] for b in range(4)] for a in range(4)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(
  image: jax.Array, weights: tuple[Matrices, Matrices], how: How
) -> jax.Array:
  """The convolution with a 3x3 kernel, stride 1.

  Args:
    image: `(B, H, W, C)`.
    weights: `layout` of the kernel, and of that of its transpose, for the gradient;
      they get none themselves.
    how: padding and precision.

  Returns:
    `(B, H', W', F)`.

  Example:
    >>> image, kernel = jnp.ones((1, 5, 6, 2)), jnp.ones((3, 3, 2, 4))
    >>> both = layout(kernel), layout(kernel.swapaxes(2, 3))
    >>> convolve(image, both, How(((1, 1), (1, 1))))[0, :, :, 0].astype(int).tolist()[0]
    [8, 12, 12, 12, 12, 8]
  """
  sides = [n + sum(pad) - 2 for n, pad in zip(image.shape[1:-1], how.pads, strict=True)]
  tiles = [-(-n // 2) for n in sides]
  axes = zip(image.shape[1:-1], tiles, how.pads, strict=True)
  edges = [(low, 2 * t + 2 - n - low, 0) for n, t, (low, _) in axes]
  zero = jnp.zeros((), image.dtype)
  full = lax.pad(image, zero, [(0, 0, 0), *edges, (0, 0, 0)])
  every = lambda a, b: full[
    :, a : a + 2 * tiles[0] - 1 : 2, b : b + 2 * tiles[1] - 1 : 2
  ]
  seen = _both(_of_image, [[every(a, b) for b in range(4)] for a in range(4)])
  dot = functools.partial(jnp.dot, precision=how.precision)
  products = [list(map(dot, *rows)) for rows in zip(seen, weights[0], strict=True)]
  parts = [part for row in _both(_of_result, products) for part in row]
  result = canonical.interleave(parts, (2, 2))
  return result[:, : sides[0], : sides[1]]


def _forward(image, weights, how):
  return convolve(image, weights, how), weights


def _backward(how, weights, cotangent):
  pads = tuple((2 - low, 2 - high) for low, high in how.pads)
  return convolve(cotangent, weights[::-1], how._replace(pads=pads)), None


convolve.defvjp(_forward, _backward)


def _both(transform, grid):
  """A transform along the first axis, then along the second."""
  columns = [transform(column) for column in zip(*grid, strict=True)]
  return [transform(row) for row in zip(*columns, strict=True)]


def _of_image(d):
  return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _of_result(m):
  return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
