"""What `freeze` puts in the place of primitives: tables, and a rule for each entry.

A rule gets a step, and returns a function of the step's inputs to the list of its
outputs, or `None` where it has nothing better than the primitive.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import canonical, convolving, few_rows, pooling, winograd
from jaxadv.folding import Step, Unknown

__all__ = ["ONCE", "RULES", "Rule"]

Rule = Callable[[Step], Callable[..., list[Any]] | None]
_TAPS = 64  # windows with more are left to XLA: each tap is an operation of its own


class _How(NamedTuple):
  """What is static about a convolution: its sides, and whether it is the transpose."""

  spec: convolving.Spec
  sides: tuple[int, ...]
  transposed: bool


def convolution(step, *, once=False):
  """A convolution, or a transposed one, whose transpose is an ordinary convolution."""
  found = _read(step)
  return found and _placed(step, _fastest(found, step.outputs[0].aval, once))


def convolution_on_gpu(step):
  """Those that cuDNN is slow at: as matrix products, or depthwise as sums."""
  found = _read(step)
  slow = found and _is_slow_on_gpu(found, step)
  return _placed(step, _canonical(*found)) if slow else None


def _read(step):
  """The kernel `(..., C / groups, F)` and how it is applied, `None` without a rule."""
  params, (_, kernel) = step.params, step.inputs
  numbers, spread = params["dimension_numbers"], max(params["lhs_dilation"]) > 1
  dtype, size = step.outputs[0].aval.dtype, step.outputs[0].aval.size
  if (
    not size
    or isinstance(kernel, Unknown)
    or not 3 <= kernel.ndim <= 5
    or params["batch_group_count"] > 1
    or (spread and max(params["window_strides"]) > 1)
    or {jnp.result_type(kernel), step.unknown[0].aval.dtype} != {dtype}
  ):
    return None
  out, own, given = numbers.rhs_spec[0], numbers.rhs_spec[1], numbers.rhs_spec[2:]
  kernel = jnp.transpose(kernel, (*given, own, out))
  return (_transposed if spread else _plain)(step, kernel)


def _placed(step, linear):
  """The linear function with the axes of the step."""
  numbers = step.params["dimension_numbers"]
  before, to = _last(numbers.lhs_spec), _last(numbers.out_spec)
  after = tuple(sorted(range(len(to)), key=to.__getitem__))

  def call(image, _):
    found = linear(jnp.transpose(image, before))
    return [jnp.transpose(found, after)]

  return call


def _fastest(found, out, once):
  """On CPU."""
  kernel, how = found
  spec, pixels = how.spec, out.size // kernel.shape[-1]
  exact = jnp.issubdtype(out.dtype, jnp.floating) and out.dtype.itemsize >= 4
  if not how.transposed and _lasts(kernel, once):
    if spec.groups == 1 and few_rows.pays(pixels, kernel.size):
      return _product_of_seen(kernel, spec)
    if exact and winograd.pays(kernel.shape, spec, pixels):
      tiled = winograd.How(spec.pads, spec.precision)
      both = _tiles(kernel)
      return lambda image: winograd.convolve(image, both, tiled)
  return _canonical(kernel, how)


def _is_slow_on_gpu(found, step):
  """As measured: one tap, less map than taps, depthwise, blocks that are apart."""
  kernel, how = found
  spec, window = how.spec, kernel.shape[:-2]
  if how.transposed:
    return window == spec.strides
  if spec.groups > 1:
    return spec.groups == kernel.shape[-1]
  numbers, shape = step.params["dimension_numbers"], step.outputs[0].aval.shape
  made = math.prod(shape[axis] for axis in numbers.out_spec[2:])
  taps = math.prod(window)
  return set(spec.strides) == {1} and (taps == 1 or made < taps)


def _canonical(kernel, how):
  weights = kernel, _layouts(kernel, how.spec)
  return lambda image: _linear(image, weights, how)


def _lasts(weights, once):
  """Whether to copy them into another layout: they are constants, or used again."""
  return not (once and isinstance(weights, jax.core.Tracer))


@jax.jit
def _tiles(kernel):
  return winograd.layout(kernel), winograd.layout(canonical.turned(kernel, 1))


def _plain(step, kernel):
  params = step.params
  spec = convolving.Spec(
    params["window_strides"],
    params["padding"],
    params["rhs_dilation"],
    params["feature_group_count"],
    params["precision"],
  )
  shape, numbers = step.inputs[0].aval.shape, params["dimension_numbers"]
  sides = tuple(shape[axis] for axis in numbers.lhs_spec[2:])
  return kernel, _How(spec, sides, False)


def _transposed(step, kernel):
  """The convolution that it is the transpose of: kernel flipped, padding mirrored."""
  params, numbers = step.params, step.params["dimension_numbers"]
  dilation, groups = params["rhs_dilation"], params["feature_group_count"]
  sides = tuple(step.outputs[0].aval.shape[axis] for axis in numbers.out_spec[2:])
  window = kernel.shape[:-2]
  reach = [(n - 1) * d for n, d in zip(window, dilation, strict=True)]
  pads = tuple(
    (far - low, far - high)
    for far, (low, high) in zip(reach, params["padding"], strict=True)
  )
  spec = convolving.Spec(
    params["lhs_dilation"], pads, dilation, groups, params["precision"]
  )
  return canonical.turned(kernel, groups), _How(spec, sides, True)


_layouts = jax.jit(canonical.layouts, static_argnums=1)


def _last(numbers):
  """The axes of a convolution's array, channels last."""
  return (numbers[0], *numbers[2:], numbers[1])


def _product_of_seen(kernel, spec):
  """Of all that windows see, of few pixels, and the kernel."""
  times = _few_rows_times(kernel.reshape(-1, kernel.shape[-1]), spec.precision)
  return lambda image: times(convolving.all_seen(image, kernel.shape[:-2], spec))


def _few_rows_times(matrix, precision):
  matrices = matrix, jnp.transpose(matrix)

  def call(x):
    found = few_rows.times(x.reshape(-1, len(matrix)), matrices, precision)
    return found.reshape(*x.shape[:-1], -1)

  return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(image, weights, how):
  kernel, kernels = weights
  if how.transposed:
    return canonical.transpose(image, kernels, how.spec, how.sides)
  return convolving.apply(image, kernel, how.spec)


def _linear_forward(image, weights, how):
  return _linear(image, weights, how), weights


def _linear_backward(how, weights, cotangent):
  back = how._replace(transposed=not how.transposed)
  return _linear(cotangent, weights, back), None


_linear.defvjp(_linear_forward, _linear_backward)


def product(step, *, once=False):
  """`x W` for few rows and a large matrix, see `few_rows`."""
  params, (rows, matrix), (out,) = step.params, step.inputs, step.outputs
  (last, first), batched = params["dimension_numbers"]
  known = isinstance(rows, Unknown) and not isinstance(matrix, Unknown)
  if (
    not (known and _lasts(matrix, once) and out.aval.size and jnp.ndim(matrix) == 2)
    or (len(first), last) != (1, (rows.aval.ndim - 1,))
    or any(batched)
    or {jnp.result_type(matrix), rows.aval.dtype} != {out.aval.dtype}
  ):
    return None
  matrix = jnp.transpose(matrix, (first[0], 1 - first[0]))
  if not few_rows.pays(out.aval.size // matrix.shape[1], matrix.size):
    return None
  times = _few_rows_times(matrix, params["precision"])
  return lambda x, _: [times(x)]


def max_pool(step):
  """Windows over any axes, without `select_and_scatter`."""
  return _windows(step, pooling.max_windows)


def max_pool_on_gpu(step):
  """Where windows do not overlap: there alone it is faster."""
  params = step.params
  sides = zip(params["window_dimensions"], params["window_strides"], strict=True)
  return max_pool(step) if all(n <= s for n, s in sides) else None


def sum_pool(step):
  """A sum of shifted images; of whole axes, a plain sum."""
  params, sides = step.params, step.inputs[0].aval.shape
  window = params["window_dimensions"]
  axes = tuple(axis for axis, n in enumerate(window) if n > 1)
  covered = all(window[axis] == sides[axis] for axis in axes)
  skips = any(
    s > 1 for n, s in zip(window, params["window_strides"], strict=True) if n == 1
  )
  if axes and covered and not skips and not np.any(params["padding"]):
    return lambda image: [image.sum(axes, keepdims=True)]
  return _windows(step, pooling.sum_windows)


def _windows(step, pool):
  """`pool` over the axes between the first and the last; these are added if needed."""
  params, sides = step.params, step.params["window_dimensions"]
  dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
  if dilated or not 1 < math.prod(sides) <= _TAPS:
    return None
  axes = list(zip(sides, params["window_strides"], params["padding"], strict=True))
  idle = (1, 1, (0, 0))
  new = tuple(end for end in (0, -1) if axes[end] != idle)
  inner = axes[0 not in new : len(axes) - (-1 not in new)]

  def call(image):
    wide = jnp.expand_dims(image, new)
    return [jnp.squeeze(pool(wide, *zip(*inner, strict=True)), new)]

  return call


# backend -> primitive -> rule, for a program of more than one gradient
RULES: Mapping[str, Mapping[str, Rule]] = {
  "cpu": {
    "conv_general_dilated": convolution,
    "dot_general": product,
    "reduce_window_max": max_pool,
    "reduce_window_sum": sum_pool,
  },
  "gpu": {
    "conv_general_dilated": convolution_on_gpu,
    "reduce_window_max": max_pool_on_gpu,
  },
}
# for a program of one
ONCE: Mapping[str, Mapping[str, Rule]] = {
  "cpu": {
    **RULES["cpu"],
    "conv_general_dilated": functools.partial(convolution, once=True),
    "dot_general": functools.partial(product, once=True),
  },
  "gpu": RULES["gpu"],
}
