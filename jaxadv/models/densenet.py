"""Densely connected networks for classification.

`predict` for the attacks is `lambda x: model.apply(variables, x)`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxadv import pooling
from jaxadv.models import layers, preprocessing

__all__ = ["DenseNet", "densenet121", "densenet169"]


class DenseNet(nn.Module):
  """Every layer sees all maps before it and adds `growth` channels.

  A layer is norm, relu, 1-wide convolution to `4 * growth`, norm, relu, 3-wide
  convolution. Between two stages, channels and sides are halved. Sides of 29 pixels or
  more.

  Attributes:
    num_classes: K.
    blocks: layers per stage.
    growth: channels that a layer adds.
    width: factor on `growth` and on the 64 channels of the stem.
    norm: `"batch"` as published, `"group"` (independent of the batch) or `"none"`.
    variant: the epsilon of the norms, 1.001e-5 or 1e-5.
    preprocess: see `preprocessing.preprocess`.
    dtype: compute dtype, such as `jnp.bfloat16`; `None` for that of the input.
      Parameters are float32, and so are the logits (float64 for float64 images).

  Example:
    >>> model = DenseNet(3, blocks=(2, 2, 2, 2), width=0.25)
    >>> key, images = jax.random.key(0), jnp.zeros((2, 32, 32, 1))
    >>> outputs, _ = jax.eval_shape(model.init_with_output, key, images)
    >>> logits, features = outputs
    >>> logits.shape, features["stage1"].shape
    ((2, 3), (2, 8, 8, 32))

  Reference: Huang, Liu, van der Maaten, Weinberger, CVPR 2017, arXiv 1608.06993.
  """

  num_classes: int = 2
  blocks: Sequence[int] = (6, 12, 24, 16)
  growth: int = 32
  width: float = 1.0
  norm: layers.NormName = "batch"
  variant: layers.VariantName = "torch"
  preprocess: preprocessing.PreprocessName = "none"
  dtype: Any = None

  @nn.compact
  def __call__(
    self, image: jax.Array, train: bool = False
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits and features.

    Args:
      image: `(B, H, W, C)` float in [0, 1], C 1 or 3.
      train: whether batch norm uses, and updates, the statistics of this batch.

    Returns:
      Logits `(B, K)` and the features `stem` (before the pool), `stage1` .. `stage4`
      (the last after its norm and relu, the others as they are joined) and `pooled`
      `(B, C)`, all in the compute dtype.

    Raises:
      ValueError: for a rank other than 4, other than 1 or 3 channels, short sides.
    """
    layers.check_image(image, 29)
    x = preprocessing.preprocess(image, self.preprocess)
    epsilon = 1.001e-5 if layers.is_keras(self.variant) else 1e-5
    style = layers.Style(self.norm, epsilon, dtype=self.dtype)
    growth = layers.scaled(self.growth, self.width)
    features = {}
    stem = layers.ConvNorm(
      layers.scaled(64, self.width), 7, style, strides=2, padding=3, name="stem"
    )
    x = features["stem"] = stem(x, train)
    x = pooling.max_pool(x, 3, strides=2, padding=[(1, 1)] * 2)
    for stage, count in enumerate(self.blocks, 1):
      if stage > 1:
        unit = _NormConv(x.shape[-1] // 2, 1, style, name=f"transition{stage - 1}")
        x = pooling.avg_pool(unit(x, train))
      for k in range(1, count + 1):
        x = _Layer(growth, style, name=f"stage{stage}_layer{k}")(x, train)
      features[f"stage{stage}"] = x
    x = nn.relu(layers.Norm(self.norm, self.dtype, epsilon, name="norm")(x, train))
    features[f"stage{len(self.blocks)}"] = x
    features["pooled"] = x.mean((1, 2))
    return layers.head(features["pooled"], self.num_classes), features


def densenet121(num_classes: int = 2, **options: Any) -> DenseNet:
  """`DenseNet` with 6, 12, 24 and 16 layers.

  Example:
    >>> densenet121(norm="group").blocks
    (6, 12, 24, 16)
  """
  return DenseNet(num_classes, (6, 12, 24, 16), **options)


def densenet169(num_classes: int = 2, **options: Any) -> DenseNet:
  """`DenseNet` with 6, 12, 32 and 32 layers.

  Example:
    >>> densenet169().blocks
    (6, 12, 32, 32)
  """
  return DenseNet(num_classes, (6, 12, 32, 32), **options)


class _NormConv(nn.Module):
  """Norm, relu, convolution: the other way round than `layers.ConvNorm`."""

  features: int
  window: int
  style: layers.Style

  @nn.compact
  def __call__(self, image, train):
    norm, epsilon, _, dtype = self.style
    image = nn.relu(layers.Norm(norm, dtype, epsilon, name="norm")(image, train))
    bias = norm == "none"
    conv = layers.convolve(
      self.features, self.window, bias=bias, dtype=dtype, name="conv"
    )
    return conv(image)


class _Layer(nn.Module):
  growth: int
  style: layers.Style

  @nn.compact
  def __call__(self, image, train):
    x = _NormConv(4 * self.growth, 1, self.style, name="conv1")(image, train)
    x = _NormConv(self.growth, 3, self.style, name="conv2")(x, train)
    return jnp.concatenate([image, x], -1)
