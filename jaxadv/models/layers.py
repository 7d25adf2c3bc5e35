"""Flax layers shared by the models: convolution, norm, head, upsampling, crop.

Built on `jaxadv.models.convolution`, so that gradients cost the same inside a compiled
loop as outside. Arrays are `(B, ..., C)` with two or three spatial axes.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxadv import canonical
from jaxadv.models import convolution

__all__ = [
  "ConvBlock",
  "ConvNorm",
  "Norm",
  "NormName",
  "PaddingName",
  "Style",
  "Upsample",
  "VariantName",
  "center_crop",
  "check_image",
  "convolve",
  "head",
  "is_keras",
  "scaled",
]

NormName = Literal["group", "batch", "none"]
PaddingName = Literal["SAME", "VALID"]
# whose details a classifier has, where Keras and torchvision differ
VariantName = Literal["keras", "torch"]
# int or one per axis; a name, or an int on both sides of both axes
Window = int | tuple[int, int]
Padding = int | PaddingName


class Norm(nn.Module):
  """Group norm, batch norm or nothing.

  Attributes:
    kind: `"group"` (8 groups, or the greatest common divisor of 8 and the channels;
      every example on its own), `"batch"` (running statistics unless `train`) or
      `"none"`.
    dtype: compute dtype, `None` for the dtype of the input.
    epsilon: what batch norm adds to the variance.
  """

  kind: NormName = "group"
  dtype: Any = None
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
    """`(B, ..., C)` to the same shape; `ValueError` for another kind."""
    if self.kind not in get_args(NormName):
      raise ValueError(f"`norm` is {self.kind!r}; write one of {get_args(NormName)}.")
    if self.kind == "group":
      groups = math.gcd(image.shape[-1], 8)
      return nn.GroupNorm(groups, dtype=self.dtype)(image)
    if self.kind == "batch":
      return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=self.epsilon,
        dtype=self.dtype,
      )(image)
    return image


def convolve(
  features: int,
  window: Window,
  *,
  strides: int = 1,
  padding: Padding = "SAME",
  depthwise: bool = False,
  bias: bool = False,
  dtype: Any = None,
  name: str | None = None,
) -> nn.Conv:
  """`nn.Conv` in 2-D, with our gradients and He initialisation.

  Example:
    >>> import jax.numpy as jnp
    >>> image = jnp.zeros((1, 9, 9, 3))
    >>> conv = convolve(4, 7, strides=2, padding=3)
    >>> conv.init_with_output(jax.random.key(0), image)[0].shape
    (1, 5, 5, 4)
  """
  return nn.Conv(
    features,
    (window, window) if isinstance(window, int) else window,
    strides=strides,
    padding=padding,
    feature_group_count=features if depthwise else 1,
    use_bias=bias,
    kernel_init=nn.initializers.he_normal(),
    dtype=dtype,
    conv_general_dilated=convolution.conv_general_dilated,
    name=name,
  )


class Style(NamedTuple):
  """What all convolutions of a classifier have in common.

  Attributes:
    norm: see `Norm`; with `"none"` every convolution has a bias.
    epsilon: see `Norm`.
    bias: whether a convolution has a bias although a norm follows it.
    dtype: compute dtype, `None` for the dtype of the input.
  """

  norm: NormName = "batch"
  epsilon: float = 1e-5
  bias: bool = False
  dtype: Any = None


class ConvNorm(nn.Module):
  """Convolution `conv`, norm `norm`, activation.

  Attributes:
    features: output channels.
    window: side of the kernel, or one per axis.
    style: norm, bias and dtype.
    strides: one for both axes.
    padding: `"SAME"`, `"VALID"`, or pixels on every side.
    depthwise: every channel by itself; `features` are then the input channels.
    activation: applied last; `None` for none.
  """

  features: int
  window: Window
  style: Style = Style()
  strides: int = 1
  padding: Padding = "SAME"
  depthwise: bool = False
  activation: Callable[[jax.Array], jax.Array] | None = nn.relu

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
    """`(B, H, W, C)` to `(B, H', W', features)`."""
    style = self.style
    image = convolve(
      self.features,
      self.window,
      strides=self.strides,
      padding=self.padding,
      depthwise=self.depthwise,
      bias=style.bias or style.norm == "none",
      dtype=style.dtype,
      name="conv",
    )(image)
    image = Norm(style.norm, style.dtype, style.epsilon, name="norm")(image, train)
    return self.activation(image) if self.activation else image


def head(pooled: jax.Array, num_classes: int) -> jax.Array:
  """Dense layer `head`, in float32 at least; only inside a compact `__call__`."""
  dtype = jnp.promote_types(pooled.dtype, jnp.float32)
  return nn.Dense(num_classes, dtype=dtype, name="head")(pooled)


def scaled(channels: int, width: float) -> int:
  """`channels * width`, rounded to a multiple of 8, of which one is kept at least.

  Raises:
    ValueError: for a `width` not above 0.

  Example:
    >>> scaled(64, 0.25), scaled(80, 0.25), scaled(16, 0.1), scaled(1088, 1.0)
    (16, 24, 8, 1088)
  """
  if not width > 0:
    raise ValueError(f"`width` is {width}; write a factor above 0, such as 0.25.")
  return max(8, 8 * math.floor(channels * width / 8 + 0.5))


def check_image(image: jax.Array, smallest: int) -> None:
  """Refuses what a classifier whose smallest side is `smallest` cannot take.

  Raises:
    TypeError: for images that are not float.
    ValueError: for a rank other than 4, other than 1 or 3 channels, shorter sides.

  Example:
    >>> check_image(jax.numpy.zeros((1, 20, 64, 3)), 32)
    Traceback (most recent call last):
    ...
    ValueError: the sides (20, 64) are too small; this network needs 32 at least. ...
  """
  if not jax.numpy.issubdtype(image.dtype, jax.numpy.floating):
    raise TypeError(f"images have dtype {image.dtype}; divide by 255 first.")
  if image.ndim != 4:
    raise ValueError(
      f"the image batch has shape {image.shape}; a classifier needs (B, H, W, C). "
      "Write x[None] for a single image."
    )
  if image.shape[-1] not in (1, 3):
    raise ValueError(
      f"the image batch has shape {image.shape}; there must be 1 or 3 channels, last. "
      "Write x.transpose(0, 2, 3, 1) if the channels come first."
    )
  sides = image.shape[1:-1]
  if min(sides) < smallest:
    raise ValueError(
      f"the sides {sides} are too small; this network needs {smallest} at least. "
      "Pad or resize the images."
    )


def is_keras(variant: VariantName) -> bool:
  """Whether a classifier follows Keras; `ValueError` for a third name.

  Example:
    >>> is_keras("keras"), is_keras("torch")
    (True, False)
  """
  if variant not in get_args(VariantName):
    raise ValueError(f"`variant` is {variant!r}; write one of {get_args(VariantName)}.")
  return variant == "keras"


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
    grown = canonical.depth_to_space(dense(image), (2,) * rank)
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
