"""Flax layers shared by the models: convolution, norm, upsampling, crop.

Built on `jaxadv.models.convolution`, so that gradients cost the same inside a compiled
loop as outside. Arrays are `(B, ..., C)` with two or three spatial axes.
"""

import math
from typing import Any, Literal, get_args

import flax.linen as nn
import jax

from jaxadv.models import convolution

__all__ = ["ConvBlock", "Norm", "NormName", "PaddingName", "Upsample", "center_crop"]

NormName = Literal["group", "batch", "none"]
PaddingName = Literal["SAME", "VALID"]


class Norm(nn.Module):
  """Group norm, batch norm or nothing.

  Attributes:
    kind: `"group"` (8 groups, or the greatest common divisor of 8 and the channels;
      every example on its own), `"batch"` (running statistics unless `train`) or
      `"none"`.
    dtype: compute dtype, `None` for the dtype of the input.
  """

  kind: NormName = "group"
  dtype: Any = None

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
    """`(B, ..., C)` to the same shape; `ValueError` for another kind."""
    if self.kind not in get_args(NormName):
      raise ValueError(f"`norm` is {self.kind!r}; write one of {get_args(NormName)}.")
    if self.kind == "group":
      groups = math.gcd(image.shape[-1], 8)
      return nn.GroupNorm(groups, dtype=self.dtype)(image)
    if self.kind == "batch":
      norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)
      return norm(image)
    return image


class ConvBlock(nn.Module):
  """Twice: 3-wide convolution, norm, relu.

  Attributes:
    features: output channels.
    norm: see `Norm`.
    padding: `"SAME"` keeps the sides, `"VALID"` shortens them by 4.
    dtype: compute dtype, `None` for the dtype of the input.
  """

  features: int
  norm: NormName = "group"
  padding: PaddingName = "SAME"
  dtype: Any = None

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
    """`(B, ..., C)` to `(B, ..., features)`, after the relu."""
    for _ in range(2):
      image = nn.Conv(
        self.features,
        (3,) * (image.ndim - 2),
        padding=self.padding,
        use_bias=self.norm == "none",
        kernel_init=nn.initializers.he_normal(),
        dtype=self.dtype,
        conv_general_dilated=convolution.conv_general_dilated,
      )(image)
      image = nn.relu(Norm(self.norm, self.dtype)(image, train))
    return image


class Upsample(nn.Module):
  """Transposed convolution, kernel and stride 2: a pixel becomes a 2-wide block.

  Written as a dense layer and `depth_to_space`; the weights are those of a transposed
  convolution, `C * 2**rank * features + features` of them.

  Attributes:
    features: output channels.
    dtype: compute dtype, `None` for the dtype of the input.
  """

  features: int
  dtype: Any = None

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """`(B, ..., C)` to `(B, 2 * ..., features)`."""
    rank = image.ndim - 2
    dense = nn.Dense(2**rank * self.features, use_bias=False, dtype=self.dtype)
    grown = convolution.depth_to_space(dense(image), (2,) * rank)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return grown + bias.astype(grown.dtype).reshape((1,) * (rank + 1) + (-1,))


def center_crop(image: jax.Array, sides: tuple[int, ...]) -> jax.Array:
  """The middle of every spatial axis; the longer rest is cut at the far end.

  Args:
    image: `(B, ..., C)`.
    sides: spatial shape to keep.

  Returns:
    `(B, *sides, C)`.

  Raises:
    ValueError: when a side to keep is longer than the image.

  Example:
    >>> import jax.numpy as jnp
    >>> center_crop(jnp.arange(5.0).reshape(1, 5, 1), (3,))[0, :, 0].tolist()
    [1.0, 2.0, 3.0]
  """
  spare = [have - want for have, want in zip(image.shape[1:-1], sides, strict=True)]
  if min(spare) < 0:
    raise ValueError(f"cannot keep {sides} of an image with sides {image.shape[1:-1]}.")
  kept = (slice(s // 2, s // 2 + n) for s, n in zip(spare, sides, strict=True))
  return image[(slice(None), *kept)]
