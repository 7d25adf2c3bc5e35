"""Pools whose gradients stay fast inside compiled loops.

`lax` pulls a maximum back by `select_and_scatter`, which is 4 to 15 times slower on CPU
than what is here: shifted images, compared or added.

Arrays are `(B, ..., C)`, channels last, with any number of spatial axes. Gradients are
those of autodiff; of the maximum bit for bit. Reverse mode only.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import canonical, patches

__all__ = ["avg_pool", "max_pool", "max_windows", "sum_windows"]


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
  `select_and_scatter`, which is 4 to 15 times slower on CPU.

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
  return max_windows(image, *_windows(image, window, strides, padding))


def avg_pool(
  image: jax.Array,
  window: int = 2,
  *,
  strides: int | None = None,
  padding: str | Sequence[tuple[int, int]] = "VALID",
  count_padding: bool = False,
) -> jax.Array:
  """Mean of every window.

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
  windows = _windows(image, window, strides, padding)
  total = sum_windows(image, *windows)
  if count_padding:
    return total / window ** (image.ndim - 2)
  return total / sum_windows(
    jnp.ones((1, *image.shape[1:-1], 1), image.dtype), *windows
  )


def max_windows(
  image: jax.Array,
  window: tuple[int, ...],
  strides: tuple[int, ...],
  pads: patches.Pads,
) -> jax.Array:
  """`max_pool` with one number per spatial axis.

  Args:
    image: `(B, ..., C)`.
    window: sides of a window, at most 256 pixels in all.
    strides: steps between windows.
    pads: pixels before and after.

  Returns:
    `(B, ..., C)`, one pixel per window.
  """
  return _max(image, _Windows(window, strides, pads, image.shape[1:-1]))


def sum_windows(
  image: jax.Array,
  window: tuple[int, ...],
  strides: tuple[int, ...],
  pads: patches.Pads,
) -> jax.Array:
  """Sum of every window, in float32 at least.

  Args:
    image: `(B, ..., C)`.
    window: sides of a window.
    strides: steps between windows.
    pads: pixels before and after, with zeros.

  Returns:
    `(B, ..., C)`, one pixel per window.
  """
  return _sum(image, _Windows(window, strides, pads, image.shape[1:-1]))


class _Windows(NamedTuple):
  """Where windows lie, per spatial axis."""

  sides: tuple[int, ...]
  strides: tuple[int, ...]
  pads: patches.Pads
  image: tuple[int, ...]


def _windows(image, window, strides, padding):
  rank = image.ndim - 2
  sides, steps = (window,) * rank, (strides or window,) * rank
  return sides, steps, patches.pads(image.shape[1:-1], sides, steps, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max(image, windows):
  return _max_forward(image, windows)[0]


def _max_forward(image, windows):
  """The maximum, and the position inside its window of the first pixel that has it."""
  parts = patches.columns(image, *windows[:3], fill=-jnp.inf)
  best, where = parts[0], jnp.zeros(parts[0].shape, jnp.uint8)
  for position, part in enumerate(parts[1:], 1):
    where = jnp.where(part > best, jnp.uint8(position), where)
    best = jnp.maximum(part, best)
  return best, where


def _max_backward(windows, where, cotangent):
  return (_spread(cotangent, windows, where),)


_max.defvjp(_max_forward, _max_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum(image, windows):
  wide = image.astype(jnp.promote_types(image.dtype, jnp.float32))
  parts = patches.columns(wide, *windows[:3])
  return functools.reduce(jnp.add, parts).astype(image.dtype)


def _sum_forward(image, windows):
  return _sum(image, windows), None


def _sum_backward(windows, _, cotangent):
  wide = cotangent.astype(jnp.promote_types(cotangent.dtype, jnp.float32))
  return (_spread(wide, windows).astype(cotangent.dtype),)


_sum.defvjp(_sum_forward, _sum_backward)


def _spread(cotangent, windows, where=None):
  """What windows send back to the pixels they saw, or to the one that `where` tells.

  The phases of the stride one by one, then interleaved. As a sum over all taps, with
  zeros between the pixels, XLA would compute what the cotangent comes from once more
  for each tap, in one loop full of branches.
  """
  parts = [
    _phase(cotangent, windows, where, phase)
    for phase in itertools.product(*map(range, windows.strides))
  ]
  mixed = canonical.depth_to_space(jnp.concatenate(parts, -1), windows.strides)
  return mixed[(slice(None), *map(slice, windows.image))]


def _phase(cotangent, windows, where, phase):
  taps, pads = _seen(windows, cotangent.shape[1:-1], phase)
  shifts = tuple(max(1, len(own)) for own in taps)
  columns = lambda array: patches.columns(array, shifts, (1,) * len(shifts), pads)
  parts = columns(cotangent)
  if not all(taps):
    return jnp.zeros_like(parts[0])
  if where is not None:
    inside = itertools.product(*taps)
    positions = [int(np.ravel_multi_index(tap, windows.sides)) for tap in inside]
    parts = [
      jnp.where(found == position, part, jnp.zeros((), part.dtype))
      for found, position, part in zip(columns(where), positions, parts, strict=True)
    ]
  return functools.reduce(jnp.add, parts)


def _seen(windows, made, phase):
  """Per axis the taps that saw a phase, and pads that put their windows beside it.

  Row `s j + r` was seen by tap `k` of window `j + (r + p - k) / s` where that is whole.
  """
  taps, pads = [], []
  axes = zip(phase, made, *windows, strict=True)
  for r, count, side, stride, (low, _), pixels in axes:
    ahead, first = divmod(r + low, stride)
    taps.append(range(first, side, stride)[::-1])  # the last one met the first window
    rows, reach = -(-pixels // stride), max(0, len(taps[-1]) - 1)
    pads.append((reach - ahead, rows + ahead - count))
  return taps, tuple(pads)
