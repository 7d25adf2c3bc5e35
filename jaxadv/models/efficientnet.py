"""EfficientNet-Lite0 for classification.

`predict` for the attacks is `lambda x: model.apply(variables, x)`.
"""

from typing import Any

import flax.linen as nn
import jax

from jaxadv.models import layers, preprocessing

__all__ = ["EfficientNetLite0"]

# per stage: blocks, expansion, window, stride of the first block, channels
_STAGES = (
  (1, 1, 3, 1, 16),
  (2, 6, 3, 2, 24),
  (2, 6, 5, 2, 40),
  (3, 6, 3, 2, 80),
  (3, 6, 5, 1, 112),
  (4, 6, 5, 2, 192),
  (1, 6, 3, 1, 320),
)


class EfficientNetLite0(nn.Module):
  """Inverted residual blocks: expand, convolve every channel by itself, project.

  The Lite form of EfficientNet-B0 has relu6 and no squeeze and excitation. Any
  side will do.

  Attributes:
    num_classes: K.
    width: factor on all channels.
    norm: `"batch"` as published, `"group"` (independent of the batch) or `"none"`.
    preprocess: see `preprocessing.preprocess`; the published weights need `"lite"`.
    dtype: compute dtype, such as `jnp.bfloat16`; `None` for that of the input.
      Parameters are float32, and so are the logits (float64 for float64 images).

  Example:
    >>> import jax.numpy as jnp
    >>> model = EfficientNetLite0(3, width=0.5)
    >>> key, images = jax.random.key(0), jnp.zeros((2, 32, 32, 1))
    >>> outputs, _ = jax.eval_shape(model.init_with_output, key, images)
    >>> logits, features = outputs
    >>> logits.shape, features["stage7"].shape
    ((2, 3), (2, 1, 1, 160))

  Differs from the published training in having no dropout and no stochastic depth.
  Reference: Tan, Le, ICML 2019, arXiv 1905.11946; the Lite form is in its code only.
  """

  num_classes: int = 2
  width: float = 1.0
  norm: layers.NormName = "batch"
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
      Logits `(B, K)` and the features `stem`, `stage1` .. `stage7` (without activation,
      as projected) and `pooled` `(B, C)`, all in the compute dtype.

    Raises:
      ValueError: for a rank other than 4 and for other than 1 or 3 channels.
    """
    layers.check_image(image, 1)
    x = preprocessing.preprocess(image, self.preprocess)
    style = layers.Style(self.norm, 1e-3, dtype=self.dtype)
    features = {}
    unit = self._unit(32, 3, style, "stem", 2)
    x = features["stem"] = unit(x, train)
    number = 0
    for stage, (count, expansion, window, strides, channels) in enumerate(_STAGES, 1):
      n = layers.scaled(channels, self.width)
      for k in range(count):
        step = strides if k == 0 else 1
        block = _Block(n, expansion, window, step, style, name=f"block{number:02}")
        x = block(x, train)
        number += 1
      features[f"stage{stage}"] = x
    x = self._unit(1280, 1, style, "last", 1)(x, train)
    features["pooled"] = x.mean((1, 2))
    return layers.head(features["pooled"], self.num_classes), features

  def _unit(self, channels, window, style, name, strides):
    n = layers.scaled(channels, self.width)
    return layers.ConvNorm(n, window, style, strides, activation=nn.relu6, name=name)


class _Block(nn.Module):
  channels: int
  expansion: int
  window: int
  strides: int
  style: layers.Style

  @nn.compact
  def __call__(self, image, train):
    x = image
    if self.expansion > 1:
      n = self.expansion * image.shape[-1]
      x = layers.ConvNorm(n, 1, self.style, activation=nn.relu6, name="expand")(
        x, train
      )
    x = layers.ConvNorm(
      x.shape[-1],
      self.window,
      self.style,
      self.strides,
      depthwise=True,
      activation=nn.relu6,
      name="depthwise",
    )(x, train)
    project = layers.ConvNorm(
      self.channels, 1, self.style, activation=None, name="project"
    )
    x = project(x, train)
    same = self.strides == 1 and image.shape[-1] == self.channels
    return image + x if same else x
