"""Convolution, pooling and upsampling whose gradients stay fast inside compiled loops.

XLA for CPU brings convolutions into their fast form only in the entry computation of a
program. The input gradients that autodiff emits are not in that form, so inside `scan`,
`fori_loop` or `while_loop` they run 5 to 11 times slower than outside. Here every input
gradient is written as an ordinary convolution from the start. Depthwise convolutions
have no fast form at all; as sums of shifted images they run 20 to 80 times faster.
The gradient of the kernel is that of `weight_gradient`.

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

from jaxadv.models import patches, weight_gradient

__all__ = ["avg_pool", "conv_general_dilated", "depth_to_space", "max_pool"]


class _Spec(NamedTuple):
  """What is static about one convolution."""

  strides: tuple[int, ...]
  pads: patches.Pads
  precision: Any
  depthwise: bool = False
  own_weight_gradient: bool = True


class _Windows(NamedTuple):
  """What is static about one pooling: `sides` are those of the image."""

  window: tuple[int, ...]
  strides: tuple[int, ...]
  pads: patches.Pads
  sides: tuple[int, ...]


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
  fewer pixels than the kernel has taps, are matrix products; depthwise convolutions are
  sums of shifted images. With dilation, other groups or channels first there is no rule
  here, and `lax` gets the convolution unchanged.

  Args:
    lhs: `(B, ..., C)` images.
    rhs: `(..., C, F)` kernel; `(..., 1, C)` for C groups.
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
  groups = feature_group_count
  plain = _is_plain(lhs_dilation, rhs_dilation, batch_group_count)
  fits = _fits(lhs, rhs, dimension_numbers, groups)
  if not (plain and preferred_element_type is None and fits):
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
  pads = _pads(lhs, rhs.shape[:-2], window_strides, padding)
  spec = _Spec(
    tuple(window_strides), pads, precision, groups > 1, weight_gradient.enabled()
  )
  return _convolve(lhs, rhs, spec)


def max_pool(
  image: jax.Array,
  window: int = 2,
  *,
  strides: int | None = None,
  padding: str | Sequence[tuple[int, int]] = "VALID",
) -> jax.Array:
  """Largest value of every window; with the defaults an odd rest is dropped.

  The gradient goes to the first largest value of a window, as with `lax.reduce_window`
  (bit-equal), but by comparing positions in the window: `lax` emits
  `select_and_scatter`, which is 6 to 30 times slower on CPU.

  Args:
    image: `(B, ..., C)`.
    window: side of a window.
    strides: step between windows, the side by default.
    padding: `"SAME"`, `"VALID"` or `(low, high)` per spatial axis, with minus infinity.

  Returns:
    `(B, ..., C)`, one pixel per window.

  Example:
    >>> image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> max_pool(image)[0, ..., 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    >>> max_pool(image, 3, strides=2, padding="SAME")[0, ..., 0].tolist()
    [[10.0, 11.0], [14.0, 15.0]]
  """
  rank = image.ndim - 2
  sides, steps = (window,) * rank, (strides or window,) * rank
  pads = _pads(image, sides, steps, padding)
  return _pool(image, _Windows(sides, steps, pads, image.shape[1:-1]))


def avg_pool(
  image: jax.Array,
  window: int = 2,
  *,
  strides: int | None = None,
  padding: str | Sequence[tuple[int, int]] = "VALID",
  count_padding: bool = False,
) -> jax.Array:
  """Mean of every window; a depthwise convolution with a kernel of ones.

  Args:
    image: `(B, ..., C)`.
    window: side of a window.
    strides: step between windows, the side by default.
    padding: `"SAME"`, `"VALID"` or `(low, high)` per spatial axis.
    count_padding: whether pixels outside the image count as zeros (PyTorch's default)
      or are left out of the mean (Keras).

  Returns:
    `(B, ..., C)`, one pixel per window.

  Example:
    >>> image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> avg_pool(image)[0, ..., 0].tolist()
    [[2.5, 4.5], [10.5, 12.5]]
  """
  rank = image.ndim - 2
  steps = (strides or window,) * rank
  pads = _pads(image, (window,) * rank, steps, padding)
  ones = lambda n: jnp.ones((window,) * rank + (1, n), image.dtype)
  total = _convolve(image, ones(image.shape[-1]), _Spec(steps, pads, None, True))
  if count_padding:
    return total / window**rank
  pixels = jnp.ones((1, *image.shape[1:-1], 1), image.dtype)
  return total / _convolve(pixels, ones(1), _Spec(steps, pads, None, True))


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


def _pads(image, window, strides, padding):
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(image.shape[1:-1], window, strides, padding)
  return tuple((int(low), int(high)) for low, high in padding)


def _is_plain(lhs_dilation, rhs_dilation, batch_groups):
  dilations = (*(lhs_dilation or ()), *(rhs_dilation or ()))
  return all(n == 1 for n in (*dilations, batch_groups))


def _fits(lhs, rhs, dimension_numbers, groups):
  """Channels last, kernel `(..., in, out)`, sizes that belong together."""
  if lhs.ndim != rhs.ndim or not 3 <= lhs.ndim <= 5:
    return False
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  same = lhs.shape[-1] == groups * rhs.shape[-2] and lhs.dtype == rhs.dtype
  alone = groups == 1 or groups == lhs.shape[-1] == rhs.shape[-1]
  return same and alone and numbers == patches.layout(lhs.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(image, kernel, spec):
  return _run(image, kernel, spec)


def _convolve_forward(image, kernel, spec):
  return _run(image, kernel, spec), (image, kernel)


def _convolve_backward(spec, saved, cotangent):
  image, kernel = saved
  return (
    _image_gradient(spec, image.shape, kernel, cotangent),
    _kernel_gradient(spec, image, kernel, cotangent),
  )


def _kernel_gradient(spec, image, kernel, cotangent):
  # an explicit mesh axis on the batch: `lax` cannot follow it through our labels
  placed = any(jax.typeof(cotangent).sharding.spec)
  forward, shapes = _run, spec
  if spec.own_weight_gradient and not (spec.depthwise or placed):
    forward = weight_gradient.way(image, kernel, cotangent)
    shapes = weight_gradient.Shapes(*spec[:3])
  return weight_gradient.gradient(forward, image, kernel, cotangent, shapes=shapes)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _run(image, kernel, spec):
  window = kernel.shape[:-2]
  pixels = math.prod(image.shape[1:-1])
  if spec.depthwise:
    return _shifted_sum(image, kernel, spec)
  # XLA swaps map and kernel where the kernel is larger, and ends in a scalar loop
  if math.prod(window) == 1 or pixels < math.prod(window):
    return _matmul(image, kernel, spec)
  layout = patches.layout(image.ndim)
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
  columns = patches.columns(image, kernel.shape[:-2], spec.strides, spec.pads)
  matrix = kernel.reshape(-1, kernel.shape[-1])
  return jnp.dot(jnp.concatenate(columns, -1), matrix, precision=spec.precision)


def _shifted_sum(image, kernel, spec):
  """The depthwise convolution, summed in float32 at least."""
  wide = jnp.promote_types(image.dtype, jnp.float32)
  columns = patches.columns(image, kernel.shape[:-2], spec.strides, spec.pads)
  taps = kernel.reshape(-1, *(1,) * (image.ndim - 1), kernel.shape[-1]).astype(wide)
  products = [c.astype(wide) * tap for c, tap in zip(columns, taps, strict=True)]
  return functools.reduce(jnp.add, products).astype(image.dtype)


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
  flipped = jnp.flip(taps, axes)
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
  flipped = flipped if spec.depthwise else flipped.swapaxes(-1, -2)
  return _run(cotangent, flipped, spec._replace(strides=ones, pads=tuple(pads)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pool(image, windows):
  return _pool_forward(image, windows)[0]


def _pool_forward(image, windows):
  """The maximum, and the position inside its window of the first pixel that has it."""
  window, strides, pads, _ = windows
  parts = patches.columns(image, window, strides, pads, fill=-jnp.inf)
  best, where = parts[0], jnp.zeros(parts[0].shape, jnp.uint8)
  for position, part in enumerate(parts[1:], 1):
    where = jnp.where(part > best, jnp.uint8(position), where)
    best = jnp.maximum(part, best)
  return best, where


def _pool_backward(windows, where, cotangent):
  """What each tap sends back to the pixels it saw; the last tap met the first window.

  Padding between the pixels instead of scattering: XLA fuses all of it into one loop.
  """
  zero = jnp.zeros((), cotangent.dtype)
  axes = list(zip(*windows[1:], cotangent.shape[1:-1], strict=True))
  taps = list(enumerate(itertools.product(*map(range, windows.window))))
  pulled = []
  for position, tap in reversed(taps):
    edges = [
      (k - low, side - (k - low) - (n - 1) * stride - 1, stride - 1)
      for k, (stride, (low, _), side, n) in zip(tap, axes, strict=True)
    ]
    hit = jnp.where(where == position, cotangent, zero)
    pulled.append(lax.pad(hit, zero, [(0, 0, 0), *edges, (0, 0, 0)]))
  return (functools.reduce(jnp.add, pulled),)


_pool.defvjp(_pool_forward, _pool_backward)
