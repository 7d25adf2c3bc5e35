"""Pools whose gradients stay fast inside compiled loops.

`lax` pulls a maximum back by `select_and_scatter`, which is 5 to 8 times slower on CPU
than what is here: shifted images, compared or added.

Arrays are `(B, ..., C)`, channels last, with any number of spatial axes. Gradients are
those of autodiff; of the maximum bit for bit, for finite images and but for the sign of
zeros. Reverse mode only.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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
  `select_and_scatter`, which is 5 to 8 times slower on CPU.

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
  """Where windows lie; one number per spatial axis."""

  window: tuple[int, ...]
  strides: tuple[int, ...]
  pads: patches.Pads
  sides: tuple[int, ...]


def _windows(image, window, strides, padding):
  rank = image.ndim - 2
  sides, steps = (window,) * rank, (strides or window,) * rank
  return sides, steps, patches.pads(image.shape[1:-1], sides, steps, padding)


def _columns(image, windows, **options):
  return patches.columns(
    image, windows.window, windows.strides, windows.pads, **options
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max(image, windows):
  return _max_forward(image, windows)[0]


def _max_forward(image, windows):
  """The maximum, and the position inside its window of the first pixel that has it."""
  parts = _columns(image, windows, fill=-jnp.inf)
  best, where = parts[0], jnp.zeros(parts[0].shape, jnp.uint8)
  for position, part in enumerate(parts[1:], 1):
    where = jnp.where(part > best, jnp.uint8(position), where)
    best = jnp.maximum(part, best)
  return best, where


def _max_backward(windows, where, cotangent):
  apart = all(n <= s for n, s in zip(windows.window, windows.strides, strict=True))
  join = _dilated if apart else _interleaved
  return (join(_phases(cotangent, windows, where), windows),)


_max.defvjp(_max_forward, _max_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum(image, windows):
  return _sum_forward(image, windows)[0]


def _sum_forward(image, windows):
  wide = image.astype(jnp.promote_types(image.dtype, jnp.float32))
  return functools.reduce(jnp.add, _columns(wide, windows)).astype(image.dtype), None


def _sum_backward(windows, _, cotangent):
  wide = cotangent.astype(jnp.promote_types(cotangent.dtype, jnp.float32))
  found = _interleaved(_phases(wide, windows), windows)
  return (found.astype(cotangent.dtype),)


_sum.defvjp(_sum_forward, _sum_backward)


def _phases(cotangent, windows, where=None):
  """What windows send back to the pixels they saw, or to the one that `where` tells.

  Tap `k` of window `q` saw row `i = s q + k - p`: always one of the same phase `i % s`,
  and there row `i // s = q + (k - p) // s`. A phase that no tap saw is left out.
  """
  taps = itertools.product(*map(range, windows.window))
  seen = [_seen(tap, windows) for tap in taps]
  shifts = [shift for shift, _ in seen]
  given = _shifted(cotangent, shifts, windows)
  if where is not None:
    told, zero = _shifted(where, shifts, windows), jnp.zeros((), cotangent.dtype)
    given = [
      jnp.where(found == position, part, zero)
      for position, (found, part) in enumerate(zip(told, given, strict=True))
    ]
  phases: dict[tuple[int, ...], jax.Array] = {}
  for (_, phase), part in reversed(list(zip(seen, given, strict=True))):
    phases[phase] = phases[phase] + part if phase in phases else part
  return phases


def _seen(tap, windows):
  """By how many rows a tap shifts windows, and the phase of the rows; per axis both."""
  axes = zip(tap, windows.pads, windows.strides, strict=True)
  shift, phase = zip(*(divmod(k - low, s) for k, (low, _), s in axes), strict=True)
  return shift, phase


def _shifted(array, shifts, windows):
  """By every shift, with as many rows as phases have, and zeros around."""
  rows = [-(-n // s) for n, s in zip(windows.sides, windows.strides, strict=True)]
  most = [max(own) for own in zip(*shifts, strict=True)]
  least = [min(own) for own in zip(*shifts, strict=True)]
  axes = zip(most, least, rows, array.shape[1:-1], strict=True)
  edges = [(high, n - low - made, 0) for high, low, n, made in axes]
  zero = jnp.zeros((), array.dtype)
  full = lax.pad(array, zero, [(0, 0, 0), *edges, (0, 0, 0)])
  parts = []
  for shift in shifts:
    starts = [high - k for high, k in zip(most, shift, strict=True)]
    spans = [slice(k, k + n) for k, n in zip(starts, rows, strict=True)]
    parts.append(full[(slice(None), *spans)])
  return parts


def _interleaved(phases, windows):
  """The image whose phases they are.

  XLA computes what these come from once for each of them, in `_dilated` for every tap.
  """
  every = list(itertools.product(*map(range, windows.strides)))
  if len(phases) < len(every):
    return _dilated(phases, windows)
  # not by `interleave`: XLA sees there that a sum gives all the same, and repeats it
  parts = jnp.concatenate([phases[phase] for phase in every], -1)
  mixed = canonical.depth_to_space(parts, windows.strides)
  return mixed[(slice(None), *map(slice, windows.sides))]


def _dilated(phases, windows):
  """The same as a sum, with zeros between the rows: one loop over the image."""
  parts = []
  for phase, part in phases.items():
    axes = zip(phase, windows.strides, windows.sides, part.shape[1:-1], strict=True)
    edges = [(r, n - r - (rows - 1) * s - 1, s - 1) for r, s, n, rows in axes]
    zero = jnp.zeros((), part.dtype)
    parts.append(lax.pad(part, zero, [(0, 0, 0), *edges, (0, 0, 0)]))
  return functools.reduce(jnp.add, parts)
