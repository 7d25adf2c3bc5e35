"""Convolution whose gradients stay fast inside compiled loops.

The input gradient is that of `canonical`, the gradient of the kernel that of
`weight_gradient`.

Arrays are `(B, ..., C)`, channels last, with one to three spatial axes. Gradients are
those of autodiff up to rounding. Reverse mode only: `jax.jvp` is refused by JAX.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jaxadv import canonical, convolving, patches
from jaxadv.models import weight_gradient

__all__ = ["conv_general_dilated"]


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

  With `lhs_dilation`, batch groups or channels first there is no rule here, and `lax`
  gets the convolution unchanged; `jaxadv.freeze` has rules for the first and the last.

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
    >>> import jax.numpy as jnp
    >>> image, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    >>> layout = ("NHWC", "HWIO", "NHWC")
    >>> conv_general_dilated(
    ...   image, kernel, (1, 1), "SAME", dimension_numbers=layout
    ... ).shape
    (1, 8, 8, 4)

    In Flax: `nn.Conv(8, (3, 3), conv_general_dilated=conv_general_dilated)`.
  """
  plain = set(lhs_dilation or ()) <= {1} and batch_group_count == 1
  fits = _fits(lhs, rhs, dimension_numbers, feature_group_count)
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
  dilation = tuple(rhs_dilation or (1,) * (lhs.ndim - 2))
  reach = [(n - 1) * d + 1 for n, d in zip(rhs.shape[:-2], dilation, strict=True)]
  strides = tuple(window_strides)
  pads = patches.pads(lhs.shape[1:-1], reach, strides, padding)
  spec = convolving.Spec(strides, pads, dilation, feature_group_count, precision)
  return _convolve(lhs, rhs, spec, weight_gradient.enabled())


def _fits(lhs, rhs, dimension_numbers, groups):
  """Channels last, kernel `(..., in, out)`, sizes that belong together."""
  if lhs.ndim != rhs.ndim or not 3 <= lhs.ndim <= 5:
    return False
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  same = lhs.shape[-1] == groups * rhs.shape[-2] and lhs.dtype == rhs.dtype
  return same and rhs.shape[-1] % groups == 0 and numbers == patches.layout(lhs.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(image, kernel, spec, own_weight_gradient):
  del own_weight_gradient
  return convolving.apply(image, kernel, spec)


def _convolve_forward(image, kernel, spec, own_weight_gradient):
  return _convolve(image, kernel, spec, own_weight_gradient), (image, kernel)


def _convolve_backward(spec, own_weight_gradient, saved, cotangent):
  image, kernel = saved
  kernels = canonical.layouts(kernel, spec)
  return (
    canonical.transpose(cotangent, kernels, spec, image.shape[1:-1]),
    _kernel_gradient(spec, own_weight_gradient, image, kernel, cotangent),
  )


def _kernel_gradient(spec, own, image, kernel, cotangent):
  # an explicit mesh axis on the batch: `lax` cannot follow it through our labels
  placed = any(jax.typeof(cotangent).sharding.spec)
  if own and spec.groups == 1 and set(spec.dilation) == {1} and not placed:
    way = weight_gradient.way(image, kernel, cotangent)
    shapes = weight_gradient.Shapes(spec.strides, spec.pads, spec.precision)
    return weight_gradient.gradient(way, image, kernel, cotangent, shapes=shapes)
  linear = lambda kernel: convolving.apply(image, kernel, spec)
  return jax.linear_transpose(linear, jax.typeof(kernel))(cotangent)[0]


_convolve.defvjp(_convolve_forward, _convolve_backward)
