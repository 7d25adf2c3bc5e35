"""Residual networks for classification.

`predict` for the attacks is `lambda x: model.apply(variables, x)`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxadv import pooling
from jaxadv.models import layers, preprocessing

__all__ = ["ResNet", "resnet18", "resnet50"]


class ResNet(nn.Module):
  """A 7-wide stem, four stages of residual blocks, mean over the map, a dense layer.

  Stage `s` has `64 * 2**(s - 1)` channels, four times as many with bottlenecks, and
  halves the sides from the second on. Any side will do.

  Attributes:
    num_classes: K.
    blocks: residual blocks per stage.
    bottleneck: 1-3-1 wide blocks instead of 3-3.
    width: factor on all channels.
    norm: `"batch"` as published, `"group"` (independent of the batch) or `"none"`.
    variant: `"torch"` strides in the 3-wide convolution of a bottleneck; `"keras"`
      in the first, as published, and has a bias before every norm.
    preprocess: see `preprocessing.preprocess`.
    dtype: compute dtype, such as `jnp.bfloat16`; `None` for that of the input.
      Parameters are float32, and so are the logits (float64 for float64 images).

  Example:
    >>> import jax.numpy as jnp
    >>> model = resnet18(3, width=0.125)
    >>> key, images = jax.random.key(0), jnp.zeros((2, 32, 32, 1))
    >>> outputs, _ = jax.eval_shape(model.init_with_output, key, images)
    >>> logits, features = outputs
    >>> logits.shape, features["stage4"].shape
    ((2, 3), (2, 1, 1, 64))

  Differs from He et al. in the stride of a bottleneck, unless `variant="keras"`.
  Reference: He, Zhang, Ren, Sun, CVPR 2016, arXiv 1512.03385.
  """

  num_classes: int = 2
  blocks: Sequence[int] = (3, 4, 6, 3)
  bottleneck: bool = True
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
      and `pooled` `(B, C)`, all after their relu and in the compute dtype.

    Raises:
      ValueError: for a rank other than 4 and for other than 1 or 3 channels.
    """
    layers.check_image(image, 1)
    x = preprocessing.preprocess(image, self.preprocess)
    keras = layers.is_keras(self.variant)
    style = layers.Style(self.norm, 1.001e-5 if keras else 1e-5, keras, self.dtype)
    features = {}
    stem = layers.ConvNorm(
      layers.scaled(64, self.width), 7, style, strides=2, padding=3, name="stem"
    )
    x = features["stem"] = stem(x, train)
    x = pooling.max_pool(x, 3, strides=2, padding=[(1, 1)] * 2)
    for stage, count in enumerate(self.blocks, 1):
      channels = layers.scaled(64 * 2 ** (stage - 1), self.width)
      for k in range(1, count + 1):
        strides = 2 if k == 1 and stage > 1 else 1
        x = _Block(
          channels,
          strides,
          self.bottleneck,
          self.variant,
          style,
          name=f"stage{stage}_block{k}",
        )(x, train)
      features[f"stage{stage}"] = x
    features["pooled"] = x.mean((1, 2))
    return layers.head(features["pooled"], self.num_classes), features


def resnet18(num_classes: int = 2, **options: Any) -> ResNet:
  """`ResNet` with two blocks of two 3-wide convolutions per stage.

  Example:
    >>> resnet18(5, norm="group").blocks
    (2, 2, 2, 2)
  """
  return ResNet(num_classes, (2, 2, 2, 2), bottleneck=False, **options)


def resnet50(num_classes: int = 2, **options: Any) -> ResNet:
  """`ResNet` with 3, 4, 6 and 3 bottlenecks.

  Example:
    >>> resnet50(5).bottleneck
    True
  """
  return ResNet(num_classes, **options)


class _Block(nn.Module):
  """Two or three convolutions, and their input, projected where shapes differ."""

  channels: int
  strides: int
  bottleneck: bool
  variant: layers.VariantName
  style: layers.Style

  @nn.compact
  def __call__(self, image, train):
    plan = self._plan()
    grown = plan[-1][0]
    x = image
    for k, (channels, window, strides) in enumerate(plan, 1):
      last = k == len(plan)
      x = self._unit(channels, window, strides, f"conv{k}", not last)(x, train)
    if self.strides > 1 or image.shape[-1] != grown:
      image = self._unit(grown, 1, self.strides, "shortcut", False)(image, train)
    return nn.relu(image + x)

  def _plan(self):
    """Channels, window and stride of every convolution."""
    n, strides = self.channels, self.strides
    if not self.bottleneck:
      return [(n, 3, strides), (n, 3, 1)]
    first, second = (strides, 1) if self.variant == "keras" else (1, strides)
    return [(n, 1, first), (n, 3, second), (4 * n, 1, 1)]

  def _unit(self, channels, window, strides, name, active):
    return layers.ConvNorm(
      channels,
      window,
      self.style,
      strides,
      padding=window // 2,
      activation=nn.relu if active else None,
      name=name,
    )
