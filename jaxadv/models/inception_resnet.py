"""Inception-ResNet V2 for classification.

`predict` for the attacks is `lambda x: model.apply(variables, x)`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxadv.models import inception, layers, preprocessing

__all__ = ["InceptionResNetV2", "layer_names"]

# Branches as in `inception`
_MIXED_5B: inception.Branches = {
  "branch_0": [(96, 1)],
  "branch_1": [(48, 1), (64, 5)],
  "branch_2": [(64, 1), (96, 3), (96, 3)],
  "branch_pool": [(64, 1)],
}
_BLOCK35: inception.Branches = {
  "branch_0": [(32, 1)],
  "branch_1": [(32, 1), (32, 3)],
  "branch_2": [(32, 1), (48, 3), (64, 3)],
}
_MIXED_6A: inception.Branches = {
  "branch_0": [(384, 3, 2)],
  "branch_1": [(256, 1), (256, 3), (384, 3, 2)],
}
_BLOCK17: inception.Branches = {
  "branch_0": [(192, 1)],
  "branch_1": [(128, 1), (160, (1, 7)), (192, (7, 1))],
}
_MIXED_7A: inception.Branches = {
  "branch_0": [(256, 1), (384, 3, 2)],
  "branch_1": [(256, 1), (288, 3, 2)],
  "branch_2": [(256, 1), (288, 3), (320, 3, 2)],
}
_BLOCK8: inception.Branches = {
  "branch_0": [(192, 1)],
  "branch_1": [(192, 1), (224, (1, 3)), (256, (3, 1))],
}
# per stage: its first block, then its residual block and the factor on what that adds
_STAGES: Sequence[tuple[str, inception.Branches, str, inception.Branches, float]] = (
  ("mixed_5b", _MIXED_5B, "block35", _BLOCK35, 0.17),
  ("mixed_6a", _MIXED_6A, "block17", _BLOCK17, 0.1),
  ("mixed_7a", _MIXED_7A, "block8", _BLOCK8, 0.2),
)


class InceptionResNetV2(nn.Module):
  """The stem of Inception V3, then three stages of residual blocks with branches.

  Attributes:
    num_classes: K.
    repeats: residual blocks per stage.
    width: factor on all channels.
    norm: `"batch"` as published, `"group"` (independent of the batch) or `"none"`.
    padding: `"VALID"` as published, where the stem and the strided layers have none:
      sides of 75 pixels or more; `"SAME"` pads everywhere, for any side.
    preprocess: see `preprocessing.preprocess`.
    dtype: compute dtype, such as `jnp.bfloat16`; `None` for that of the input.
      Parameters are float32, and so are the logits (float64 for float64 images).

  Example:
    >>> import jax.numpy as jnp
    >>> model = InceptionResNetV2(3, width=0.25)
    >>> key, images = jax.random.key(0), jnp.zeros((2, 75, 75, 1))
    >>> outputs, _ = jax.eval_shape(model.init_with_output, key, images)
    >>> logits, features = outputs
    >>> logits.shape, features["stage1"].shape
    ((2, 3), (2, 7, 7, 80))

  Differs from Szegedy et al. where the code of the authors does, which Keras follows:
  the stem is that of Inception V3; and has no dropout.
  Reference: Szegedy, Ioffe, Vanhoucke, Alemi, AAAI 2017, arXiv 1602.07261.
  """

  num_classes: int = 2
  repeats: Sequence[int] = (10, 20, 10)
  width: float = 1.0
  norm: layers.NormName = "batch"
  padding: layers.PaddingName = "VALID"
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
      Logits `(B, K)` and the features `stem`, `stage1` .. `stage3` (the last map before
      the sides are halved, and the one before the last convolution) and `pooled`
      `(B, C)`, all in the compute dtype.

    Raises:
      ValueError: for a rank other than 4, other than 1 or 3 channels, short sides.
    """
    layers.check_image(image, inception.smallest_side(self.padding))
    x = preprocessing.preprocess(image, self.preprocess)
    style = layers.Style(self.norm, 1e-3, dtype=self.dtype)
    features = {}
    x = inception.stem(x, train, self.width, style, padding=self.padding)
    features["stem"] = x
    plan = zip(_STAGES, self.repeats, strict=True)
    for stage, ((first, branches, *residual), count) in enumerate(plan, 1):
      block = inception.Mixed(branches, self.width, style, self.padding, name=first)
      x = self._residuals(block(x, train), train, style, residual, count)
      features[f"stage{stage}"] = x
    n = layers.scaled(1536, self.width)
    x = layers.ConvNorm(n, 1, style, name="conv_7b")(x, train)
    features["pooled"] = x.mean((1, 2))
    return layers.head(features["pooled"], self.num_classes), features

  def _residuals(self, x, train, style, residual, count):
    name, branches, scale = residual
    for k in range(1, count + 1):
      last = name == "block8" and k == count  # neither scaled nor followed by a relu
      x = _Residual(
        branches,
        self.width,
        style,
        1.0 if last else scale,
        None if last else nn.relu,
        name=f"{name}_{k}",
      )(x, train)
    return x


class _Residual(nn.Module):
  """What the branches of `mixed`, mapped back by `up`, add to their input."""

  branches: inception.Branches
  width: float
  style: layers.Style
  scale: float
  activation: Callable | None

  @nn.compact
  def __call__(self, image, train):
    x = inception.Mixed(self.branches, self.width, self.style, name="mixed")(
      image, train
    )
    up = layers.convolve(
      image.shape[-1], 1, bias=True, dtype=self.style.dtype, name="up"
    )
    x = image + self.scale * up(x)
    return self.activation(x) if self.activation else x


def layer_names(repeats: Sequence[int] = (10, 20, 10)) -> list[str]:
  """Paths of the convolutions that Keras leaves without a name, in its order.

  Example:
    >>> len(layer_names()), layer_names()[12]
    (203, 'block35_1/mixed/branch_0')
  """
  paths = list(inception.STEM)
  for (first, branches, name, inner, _), count in zip(_STAGES, repeats, strict=True):
    paths += [f"{first}/{unit}" for unit in inception.unit_names(branches)]
    for k in range(1, count + 1):
      paths += [f"{name}_{k}/mixed/{unit}" for unit in inception.unit_names(inner)]
  return paths
