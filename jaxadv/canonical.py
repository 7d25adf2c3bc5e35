"""A convolution and its transpose, both as ordinary convolutions.

    y = A x      y[q, f] = sum_{t, c} K[t, c, f] x[s q + d t - p, c]
    x = A' y     the gradient of `A` with respect to the image

for kernel `K`, stride `s`, dilation `d` and padding `p`. XLA for CPU brings
convolutions into their fast form only in the entry computation of a program, and what
autodiff or `lax.conv_transpose` emit is not in that form: inside `scan`, `fori_loop` or
`while_loop` it runs 5 to 11 times slower than outside. Here `A'` is written as
convolutions in the fast form from the start, one per phase of the stride, so no zeros
are multiplied.

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

__all__ = ["Spec", "apply", "depth_to_space", "layouts", "transpose", "turned"]


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

  One-pixel kernels, and maps with fewer pixels than the kernel has taps, are matrix
  products; depthwise convolutions, which have no fast form at all, are sums of shifted
  images, 20 to 80 times faster.

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
  window = kernel.shape[:-2]
  if 1 < spec.groups == image.shape[-1] == kernel.shape[-1]:
    return _shifted_sum(image, kernel, spec)
  # XLA swaps map and kernel where the kernel is larger, and ends in a scalar loop
  tiny = math.prod(image.shape[1:-1]) < math.prod(window)
  if spec.groups == 1 and (tiny or math.prod(window) == 1):
    return _matmul(image, kernel, spec)
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


def layouts(kernel: jax.Array, spec: Spec) -> list[jax.Array]:
  """The kernels of the transpose, laid out: flipped and with channels swapped.

  Along an axis, row `i = s q + r - p` of the image met tap `r + s m` in output row
  `q - m`; so phase `r` convolves the cotangent with the taps `r, r + s, ...` flipped.
  Phases with as many taps share one convolution.

  Args:
    kernel: `(..., C / groups, F)`.
    spec: of the convolution.

  Returns:
    Kernels `(..., F / groups, C)`, one per phase, or one `(..., F, phases C)` for all.

  Example:
    >>> kernel, pads = jnp.ones((3, 3, 8, 4)), ((1, 1),) * 2
    >>> [k.shape for k in layouts(kernel, Spec((2, 2), pads, (1, 1)))]
    [(2, 2, 4, 8), (2, 1, 4, 8), (1, 2, 4, 8), (1, 1, 4, 8)]
    >>> [k.shape for k in layouts(kernel, Spec((3, 3), pads, (1, 1)))]
    [(1, 1, 4, 72)]
  """
  nothing = (None,) * len(spec.strides)
  steps = spec.strides if _splits(spec) else nothing
  parts = [
    turned(kernel[tuple(map(slice, phase, nothing, steps))], spec.groups)
    for phase in _phases(spec)
  ]
  alike = len({part.shape for part in parts}) == 1 and spec.groups == 1
  return [jnp.concatenate(parts, -1)] if alike else parts


def transpose(
  cotangent: jax.Array,
  kernels: Sequence[jax.Array],
  spec: Spec,
  sides: Sequence[int],
) -> jax.Array:
  """The transpose of `apply` in its image.

  Args:
    cotangent: `(B, ..., F)`, of the output.
    kernels: from `layouts`.
    spec: of the convolution.
    sides: of the image.

  Returns:
    `(B, *sides, C)`.

  Example:
    >>> kernel, spec = jnp.ones((2, 2, 3, 4)), Spec((2, 2), ((0, 0),) * 2, (1, 1))
    >>> transpose(jnp.ones((1, 4, 4, 4)), layouts(kernel, spec), spec, (8, 8)).shape
    (1, 8, 8, 3)
  """
  if not _splits(spec):
    return _spread(cotangent, kernels[0], spec, sides)
  parts = [_phase(cotangent, kernel, spec, sides) for kernel in kernels]
  if math.prod(spec.strides) == 1:
    return parts[0]
  mixed = depth_to_space(jnp.concatenate(parts, -1), spec.strides)
  axes = zip(spec.strides, spec.pads, sides, strict=True)
  kept = (slice(low % s, low % s + n) for s, (low, _), n in axes)
  return mixed[(slice(None), *kept)]


def turned(kernel: jax.Array, groups: int) -> jax.Array:
  """The kernel flipped, with input and output channels swapped inside each group.

  Args:
    kernel: `(..., C / groups, F)`.
    groups: of channels.

  Returns:
    `(..., F / groups, C)`.

  Example:
    >>> turned(jnp.arange(6.0).reshape(3, 1, 2), 1)[..., 0].tolist()
    [[4.0, 5.0], [2.0, 3.0], [0.0, 1.0]]
  """
  flipped = jnp.flip(kernel, tuple(range(kernel.ndim - 2)))
  *window, inner, outer = kernel.shape
  parts = flipped.reshape(*window, inner, groups, outer // groups)
  return parts.swapaxes(-3, -1).reshape(*window, outer // groups, groups * inner)


def depth_to_space(image: jax.Array, blocks: Sequence[int]) -> jax.Array:
  """Moves channels into space: `(B, ..., prod(blocks) * C)` to `(B, block * ..., C)`.

  After a dense layer this is a transposed convolution whose kernel and stride are both
  `blocks`.

  Args:
    image: `(B, ..., prod(blocks) * C)`; the position inside a block is the major part
      of the channel index, in row-major order.
    blocks: factor by which each spatial axis grows.

  Returns:
    `(B, block * ..., C)`.

  Example:
    >>> depth_to_space(jnp.arange(4.0).reshape(1, 1, 1, 4), (2, 2))[0, ..., 0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
  """
  batch, *sides, channels = image.shape
  rank = len(sides)
  parts = image.reshape(batch, *sides, *blocks, channels // math.prod(blocks))
  order = [axis for k in range(rank) for axis in (1 + k, 1 + rank + k)]
  grown = [n * block for n, block in zip(sides, blocks, strict=True)]
  return parts.transpose(0, *order, 2 * rank + 1).reshape(batch, *grown, -1)


def _splits(spec):
  """Whether the taps of a window fall into phases; dilated ones may skip some."""
  return all(d == 1 or s == 1 for d, s in zip(spec.dilation, spec.strides, strict=True))


def _phases(spec):
  return itertools.product(*map(range, spec.strides if _splits(spec) else ()))


def _phase(cotangent, kernel, spec, sides):
  """The rows of one phase, or of all that have as many taps."""
  pads, rows = [], []
  for axis, (stride, (low, _), d) in enumerate(zip(*spec[:3], strict=True)):
    first = low // stride
    count = -(-(low % stride + sides[axis]) // stride)
    reach = (kernel.shape[axis] - 1) * d
    pads.append((reach - first, first + count - cotangent.shape[1 + axis]))
    rows.append(count)
  if 0 in kernel.shape:
    return jnp.zeros((len(cotangent), *rows, kernel.shape[-1]), cotangent.dtype)
  ones = (1,) * len(pads)
  return apply(cotangent, kernel, spec._replace(strides=ones, pads=tuple(pads)))


def _spread(cotangent, kernel, spec, sides):
  """With zeros between the rows of the cotangent."""
  pads = []
  for axis, (stride, (low, _), d) in enumerate(zip(*spec[:3], strict=True)):
    reach = (kernel.shape[axis] - 1) * d
    rows = (cotangent.shape[1 + axis] - 1) * stride + 1
    pads.append((reach - low, low + sides[axis] - rows))
  return lax.conv_general_dilated(
    cotangent,
    kernel,
    (1,) * len(pads),
    pads,
    lhs_dilation=spec.strides,
    rhs_dilation=spec.dilation,
    dimension_numbers=patches.layout(cotangent.ndim),
    feature_group_count=spec.groups,
    precision=spec.precision,
  )


def _matmul(image, kernel, spec):
  """The convolution as one product of shifted images and the kernel."""
  columns = _columns(image, kernel, spec)
  matrix = kernel.reshape(-1, kernel.shape[-1])
  return jnp.dot(jnp.concatenate(columns, -1), matrix, precision=spec.precision)


def _shifted_sum(image, kernel, spec):
  """The depthwise convolution, summed in float32 at least."""
  wide = jnp.promote_types(image.dtype, jnp.float32)
  columns = _columns(image, kernel, spec)
  taps = kernel.reshape(-1, *(1,) * (image.ndim - 1), kernel.shape[-1]).astype(wide)
  products = [c.astype(wide) * tap for c, tap in zip(columns, taps, strict=True)]
  return functools.reduce(jnp.add, products).astype(image.dtype)


def _columns(image, kernel, spec):
  return patches.columns(
    image, kernel.shape[:-2], spec.strides, spec.pads, dilation=spec.dilation
  )
