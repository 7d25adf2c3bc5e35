"""Convolution, pooling and upsampling whose gradients stay fast inside compiled loops.

XLA for CPU brings convolutions into their fast form only in the entry computation of a
program. The input gradients that autodiff emits are not in that form, so inside `scan`,
`fori_loop` or `while_loop` they run 5 to 11 times slower than outside. Here every input
gradient is written as an ordinary convolution from the start.

Arrays are `(B, ..., C)`, channels last, with one to three spatial axes. Gradients are
those of autodiff up to rounding. Reverse mode only: `jax.jvp` is refused by JAX.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["conv_general_dilated", "depth_to_space", "max_pool"]

Pads = tuple[tuple[int, int], ...]


class _Spec(NamedTuple):
  """What is static about one convolution."""

  strides: tuple[int, ...]
  pads: Pads
  precision: Any


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  batch_group_count: int = 1,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """`lax.conv_general_dilated` with an input gradient that is an ordinary convolution.

  The gradient with respect to the image convolves the cotangent with the flipped
  kernel, input and output channels swapped; a stride splits it into one small
  convolution per phase, so no zeros are multiplied. One-pixel kernels, and maps with
  fewer pixels than the kernel has taps, are matrix products. Dilated, grouped and
  channels-first convolutions have no rule here and go to `lax` unchanged.

  Args:
    lhs: `(B, ..., C)` images.
    rhs: `(..., C, F)` kernel.
    window_strides: one stride per spatial axis.
    padding: `"SAME"`, `"VALID"` or `(low, high)` per spatial axis.
    lhs_dilation: as in `lax`; likewise the arguments below.
    rhs_dilation: as in `lax`.
    dimension_numbers: as in `lax`.
    feature_group_count: as in `lax`.
    batch_group_count: as in `lax`.
    precision: as in `lax`.
    preferred_element_type: as in `lax`.

  Returns:
    `(B, ..., F)`, what `lax.conv_general_dilated` returns.

  Example:
    >>> image, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    >>> layout = ("NHWC", "HWIO", "NHWC")
    >>> conv_general_dilated(
    ...   image, kernel, (1, 1), "SAME", dimension_numbers=layout
    ... ).shape
    (1, 8, 8, 4)

    In Flax: `nn.Conv(8, (3, 3), conv_general_dilated=conv_general_dilated)`.
  """
  plain = _is_plain(lhs_dilation, rhs_dilation, feature_group_count, batch_group_count)
  if not (
    plain and preferred_element_type is None and _fits(lhs, rhs, dimension_numbers)
  ):
    return lax.conv_general_dilated(
      lhs,
      rhs,
      window_strides,
      padding,
      lhs_dilation=lhs_dilation,
      rhs_dilation=rhs_dilation,
      dimension_numbers=dimension_numbers,
      feature_group_count=feature_group_count,
      batch_group_count=batch_group_count,
      precision=precision,
      preferred_element_type=preferred_element_type,
    )
  if isinstance(padding, str):
    sizes = lhs.shape[1:-1], rhs.shape[:-2]
    padding = lax.padtype_to_pads(*sizes, window_strides, padding)
  pads = tuple((int(low), int(high)) for low, high in padding)
  return _convolve(lhs, rhs, _Spec(tuple(window_strides), pads, precision))


def max_pool(image: jax.Array, window: int = 2) -> jax.Array:
  """Largest value of every block of `window` pixels per side; an odd rest is dropped.

  The gradient goes to the first largest value of a block, as with `lax.reduce_window`
  (bit-equal), but by comparing block positions: `lax` emits `select_and_scatter`, which
  is 30 times slower on CPU.

  Args:
    image: `(B, ..., C)`.
    window: side of a block, which is also the stride.

  Returns:
    `(B, ..., C)` with sides divided by `window`, rounded down.

  Example:
    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, ..., 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
  """
  kept = (slice(0, n - n % window) for n in image.shape[1:-1])
  return _pool(image[(slice(None), *kept)], window)


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


def _is_plain(lhs_dilation, rhs_dilation, feature_groups, batch_groups):
  dilations = (*(lhs_dilation or ()), *(rhs_dilation or ()))
  return all(n == 1 for n in (*dilations, feature_groups, batch_groups))


def _fits(lhs, rhs, dimension_numbers):
  """Channels last, kernel `(..., in, out)`, sizes that belong together."""
  if lhs.ndim != rhs.ndim or not 3 <= lhs.ndim <= 5:
    return False
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  same = lhs.shape[-1] == rhs.shape[-2] and lhs.dtype == rhs.dtype
  return same and numbers == _layout(lhs.ndim)


def _layout(ndim):
  space = tuple(range(1, ndim - 1))
  images = (0, ndim - 1, *space)
  kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
  return lax.ConvDimensionNumbers(images, kernel, images)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(image, kernel, spec):
  return _run(image, kernel, spec)


def _convolve_forward(image, kernel, spec):
  return _run(image, kernel, spec), (image, kernel)


def _convolve_backward(spec, saved, cotangent):
  image, kernel = saved
  kernel_gradient = jax.linear_transpose(lambda k: _run(image, k, spec), kernel)
  return _image_gradient(spec, image.shape, kernel, cotangent), *kernel_gradient(
    cotangent
  )


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _run(image, kernel, spec):
  window = kernel.shape[:-2]
  pixels = math.prod(image.shape[1:-1])
  # XLA swaps map and kernel where the kernel is larger, and ends in a scalar loop
  if math.prod(window) == 1 or pixels < math.prod(window):
    return _matmul(image, kernel, spec)
  layout = _layout(image.ndim)
  return lax.conv_general_dilated(
    image,
    kernel,
    spec.strides,
    spec.pads,
    dimension_numbers=layout,
    precision=spec.precision,
  )


def _matmul(image, kernel, spec):
  """The convolution as one product of shifted images and the kernel."""
  window = kernel.shape[:-2]
  pads = [(0, 0, 0), *((*pad, 0) for pad in spec.pads), (0, 0, 0)]
  padded = lax.pad(image, jnp.zeros((), image.dtype), pads)
  sides = list(zip(padded.shape[1:-1], window, spec.strides, strict=True))
  columns = []
  for start in itertools.product(*map(range, window)):
    ends = [first + n - k + 1 for first, (n, k, _) in zip(start, sides, strict=True)]
    columns.append(padded[(slice(None), *map(slice, start, ends, spec.strides))])
  matrix = kernel.reshape(-1, kernel.shape[-1])
  return jnp.dot(jnp.concatenate(columns, -1), matrix, precision=spec.precision)


def _image_gradient(spec, shape, kernel, cotangent):
  """One ordinary convolution of the cotangent per phase of the stride, interleaved.

  Along an axis, row `i = s q + r - p` of the image met tap `r + s m` in output row
  `q - m`; so phase `r` convolves the cotangent with the taps `r, r + s, ...` flipped.
  """
  phases = [
    _phase(spec, shape, kernel, cotangent, phase)
    for phase in itertools.product(*map(range, spec.strides))
  ]
  if len(phases) == 1:
    return phases[0]
  mixed = depth_to_space(jnp.concatenate(phases, -1), spec.strides)
  axes = zip(spec.strides, spec.pads, shape[1:-1], strict=True)
  kept = (slice(low % s, low % s + n) for s, (low, _), n in axes)
  return mixed[(slice(None), *kept)]


def _phase(spec, shape, kernel, cotangent, phase):
  taps = kernel[tuple(map(slice, phase, (None,) * len(phase), spec.strides))]
  axes = tuple(range(taps.ndim - 2))
  flipped = jnp.flip(taps, axes).swapaxes(-1, -2)
  pads, rows = [], []
  for axis, (stride, (low, _)) in enumerate(zip(spec.strides, spec.pads, strict=True)):
    first = low // stride
    count = -(-(low % stride + shape[1 + axis]) // stride)
    pads.append(
      (taps.shape[axis] - 1 - first, first + count - cotangent.shape[1 + axis])
    )
    rows.append(count)
  if 0 in taps.shape:
    return jnp.zeros((shape[0], *rows, shape[-1]), cotangent.dtype)
  ones = (1,) * len(pads)
  return _run(cotangent, flipped, _Spec(ones, tuple(pads), spec.precision))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pool(image, window):
  return _pool_forward(image, window)[0]


def _pool_forward(image, window):
  """The maximum, and the position inside its block of the first pixel that has it."""
  starts = itertools.product(range(window), repeat=image.ndim - 2)
  parts = [image[(slice(None), *(slice(k, None, window) for k in s))] for s in starts]
  best, where = parts[0], jnp.zeros(parts[0].shape, jnp.uint8)
  for position, part in enumerate(parts[1:], 1):
    where = jnp.where(part > best, jnp.uint8(position), where)
    best = jnp.maximum(part, best)
  return best, where


def _pool_backward(window, where, cotangent):
  rank = cotangent.ndim - 2
  batch, *sides, channels = cotangent.shape
  spread = [size for n in sides for size in (n, 1)]
  blocks = [size for _ in sides for size in (1, window)]
  position = jnp.arange(window**rank, dtype=jnp.uint8).reshape(1, *blocks, 1)
  hit = where.reshape(batch, *spread, channels) == position
  pulled = jnp.where(hit, cotangent.reshape(batch, *spread, channels), 0)
  return (pulled.reshape(batch, *[n * window for n in sides], channels),)


_pool.defvjp(_pool_forward, _pool_backward)
