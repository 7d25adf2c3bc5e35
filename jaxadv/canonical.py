"""The transpose of a convolution, as ordinary convolutions.

    x = A' y     the gradient of the convolution `A` with respect to its image

See `convolving` for `A`: kernel `K`, stride `s`, dilation `d`, padding `p`. XLA for CPU
brings convolutions into their fast form only in the entry computation of a program, and
what autodiff or `lax.conv_transpose` emit is not in that form: inside `scan`,
`fori_loop` or `while_loop` it runs 5 to 11 times slower than outside. Here `A'` is
written as convolutions in the fast form from the start, one per phase of the stride, so
that no zeros are multiplied.

Arrays are `(B, ..., C)`, channels last, with one to three spatial axes.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import convolving, patches
from jaxadv.convolving import Spec

__all__ = ["depth_to_space", "interleave", "layouts", "transpose", "turned"]


def layouts(kernel: jax.Array, spec: Spec) -> list[jax.Array]:
  """The kernels of the transpose, laid out: flipped and with channels swapped.

  Along an axis, tap `t` of the kernel brought row `i = s j + r` of the image to row
  `(i + p - t) / s` of the result. So phase `r` convolves the cotangent with every `s`th
  tap, flipped. With `(-p) mod s` zeros before its first tap, and zeros after its last,
  the kernel has as many taps in each phase, and one convolution makes them all; so it
  is done where it costs no zeros or the image has few channels.

  Args:
    kernel: `(..., C / groups, F)`.
    spec: of the convolution.

  Returns:
    Kernels `(..., F / groups, C)`, one per phase, or one `(..., F, phases C)` for all.

  Example:
    >>> kernel, pads = jnp.ones((3, 3, 8, 4)), ((1, 1),) * 2
    >>> [k.shape for k in layouts(kernel, Spec((2, 2), pads, (1, 1)))]
    [(1, 1, 4, 8), (1, 2, 4, 8), (2, 1, 4, 8), (2, 2, 4, 8)]
    >>> [k.shape for k in layouts(kernel, Spec((3, 3), ((0, 0),) * 2, (1, 1)))]
    [(1, 1, 4, 72)]
  """
  if not _splits(spec):
    return [turned(kernel, spec.groups)]
  full, lows = _filled(kernel, spec), [low for low, _ in spec.pads]
  *window, own, features = full.shape
  thin = full.size < 2 * kernel.size and convolving.is_thin((*window, features, own))
  together = spec.groups == 1 and (full.size == kernel.size or thin)
  if together:
    kernel, lows = full, [0] * len(lows)
  parts = [
    turned(kernel[_every(phase, lows, spec.strides)], spec.groups)
    for phase in itertools.product(*map(range, spec.strides))
  ]
  return [jnp.concatenate(parts, -1)] if together else parts


def transpose(
  cotangent: jax.Array,
  kernels: Sequence[jax.Array],
  spec: Spec,
  sides: Sequence[int],
) -> jax.Array:
  """The transpose of `convolving.apply` in its image.

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
  phases = list(itertools.product(*map(range, spec.strides)))
  if len(kernels) < len(phases):  # all in one, which reaches as far as the last
    phases = phases[-1:]
  parts = [
    _phase(cotangent, kernel, phase, spec, sides)
    for phase, kernel in zip(phases, kernels, strict=True)
  ]
  if math.prod(spec.strides) == 1:
    return parts[0]
  if len(parts) < math.prod(spec.strides):  # all in one
    mixed = depth_to_space(parts[0], spec.strides)
  else:
    mixed = interleave(parts, spec.strides)
  return mixed[(slice(None), *map(slice, sides))]


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
  *outer, channels = image.shape
  parts = image.reshape(*outer, *blocks, channels // math.prod(blocks))
  return _merged(parts, len(blocks))


def interleave(parts: Sequence[jax.Array], blocks: Sequence[int]) -> jax.Array:
  """One image of many: pixel `(i, j)` of every part goes into block `(i, j)`.

  Args:
    parts: one `(B, ..., C)` for each position inside a block, in row-major order.
    blocks: factor by which each spatial axis grows.

  Returns:
    `(B, block * ..., C)`.

  Example:
    >>> parts = [jnp.full((1, 2, 1), k) for k in (1, 2, 3)]
    >>> interleave(parts, (3,))[0, :, 0].tolist()
    [1, 2, 3, 1, 2, 3]
  """
  # on an axis of their own, for XLA takes longer where they lie among the channels
  stacked = jnp.stack(parts, -2)
  *outer, _, channels = stacked.shape
  return _merged(stacked.reshape(*outer, *blocks, channels), len(blocks))


def _merged(parts, rank):
  """`(B, ..., blocks, C)` with each block's axis beside its axis of the image."""
  axes = [axis for k in range(1, rank + 1) for axis in (k, k + rank)]
  mixed = parts.transpose(0, *axes, 2 * rank + 1)
  for axis in range(1, rank + 1):  # one at a time, as explicit mesh axes need it
    mixed = lax.collapse(mixed, axis, axis + 2)
  return mixed


def _splits(spec):
  """Whether the taps of a window fall into phases; dilated ones may skip some."""
  return all(d == 1 or s == 1 for d, s in zip(spec.dilation, spec.strides, strict=True))


def _filled(kernel, spec):
  """With zeros before the first and after the last taps: as many in each phase."""
  axes = zip(kernel.shape[:-2], spec.strides, spec.pads, strict=True)
  edges = [(-low % s, -(-low % s + n) % s) for n, s, (low, _) in axes]
  return jnp.pad(kernel, [*edges, (0, 0), (0, 0)])


def _every(phase, pads, strides):
  """The taps of a phase."""
  axes = zip(phase, pads, strides, strict=True)
  return tuple(slice((r + low) % s, None, s) for r, low, s in axes)


def _phase(cotangent, kernel, phase, spec, sides):
  """The rows of one phase; those beyond the image are cut off later."""
  pads, rows = [], []
  for axis, (r, stride, (low, _), d) in enumerate(zip(phase, *spec[:3], strict=True)):
    ahead, count = (r + low) // stride, -(-sides[axis] // stride)
    reach = (kernel.shape[axis] - 1) * d
    pads.append((reach - ahead, count + ahead - cotangent.shape[1 + axis]))
    rows.append(count)
  if 0 in kernel.shape:
    inner = tuple(range(1, cotangent.ndim))  # zeros with the placement of the batch
    nothing = jnp.zeros_like(cotangent).sum(inner, keepdims=True)
    return jnp.broadcast_to(nothing, (len(cotangent), *rows, kernel.shape[-1]))
  ones = (1,) * len(pads)
  one = spec._replace(strides=ones, pads=tuple(pads))
  thin = spec.groups == 1 and convolving.is_thin(kernel.shape)
  way = convolving.shifted_products if thin else convolving.apply
  return way(cotangent, kernel, one)


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
