"""VGG networks for classification.

`predict` for the attacks is `lambda x: model.apply(variables, x)`.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxadv import pooling
from jaxadv.models import layers, preprocessing

__all__ = ["VGG", "HeadName", "stages", "vgg16", "vgg19"]

HeadName = Literal["pooled", "dense"]
_CHANNELS = (64, 128, 256, 512, 512)
_GRID = 7  # pixels per side that the dense head was published for
_HIDDEN = 4096


class VGG(nn.Module):
  """Five stages of 3-wide convolutions, each ended by a max-pool; then a head.

  Sides of 32 pixels or more.

  Attributes:
    num_classes: K.
    convolutions: per stage, of 64, 128, 256, 512 and 512 channels.
    width: factor on all channels.
    norm: `"none"` as published, `"batch"` or `"group"` (independent of the batch).
    head: `"pooled"`, the mean over the map and one dense layer, as transfer learning
      uses it; `"dense"`, the published two hidden layers of 4096 over a map of 7 x 7,
      to which other maps are averaged as in torchvision.
    variant: the order in which `"dense"` flattens the map.
    preprocess: see `preprocessing.preprocess`.
    dtype: compute dtype, such as `jnp.bfloat16`; `None` for that of the input.
      Parameters are float32, and so are the logits (float64 for float64 images).

  Example:
    >>> model = vgg16(3, width=0.125)
    >>> key, images = jax.random.key(0), jnp.zeros((2, 32, 32, 1))
    >>> outputs, _ = jax.eval_shape(model.init_with_output, key, images)
    >>> logits, features = outputs
    >>> logits.shape, features["stage4"].shape
    ((2, 3), (2, 4, 4, 64))

  Differs from Simonyan and Zisserman in the default head, and has no dropout.
  Reference: Simonyan, Zisserman, ICLR 2015, arXiv 1409.1556.
  """

  num_classes: int = 2
  convolutions: Sequence[int] = (2, 2, 3, 3, 3)
  width: float = 1.0
  norm: layers.NormName = "none"
  head: HeadName = "pooled"
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
      Logits `(B, K)` and the features `stage1` .. `stage5` (before the pool) and
      `pooled` `(B, C)`, the mean over the last map, all in the compute dtype.

    Raises:
      ValueError: for a rank other than 4, other than 1 or 3 channels, short sides.
    """
    layers.check_image(image, 32)
    x = preprocessing.preprocess(image, self.preprocess)
    style = layers.Style(self.norm, dtype=self.dtype)
    features, pools = stages(x, train, self.width, style, counts=self.convolutions)
    x = pools[-1]
    features["pooled"] = x.mean((1, 2))
    last = features["pooled"] if self.head == "pooled" else self._hidden(x)
    return layers.head(last, self.num_classes), features

  def _hidden(self, x):
    if self.head != "dense":
      raise ValueError(f"`head` is {self.head!r}; write one of {get_args(HeadName)}.")
    x = _average_to(x, _GRID)
    if not layers.is_keras(self.variant):
      x = x.transpose(0, 3, 1, 2)
    x = x.reshape(x.shape[0], -1)
    for name in ("fc1", "fc2"):
      hidden = layers.scaled(_HIDDEN, self.width)
      x = nn.relu(nn.Dense(hidden, dtype=self.dtype, name=name)(x))
    return x


def stages(
  x: jax.Array,
  train: bool,
  width: float,
  style: layers.Style,
  *,
  counts: Sequence[int],
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
  """The five stages; only inside a compact `__call__`.

  Args:
    x: `(B, H, W, C)`, preprocessed.
    train: see `VGG`.
    width: factor on all channels.
    style: norm, bias and dtype.
    counts: convolutions per stage.

  Returns:
    The features `stage1` .. `stage5` before their pools, and the five maps after them.
  """
  features, pools = {}, []
  for stage, (channels, count) in enumerate(zip(_CHANNELS, counts, strict=True), 1):
    for k in range(1, count + 1):
      n, name = layers.scaled(channels, width), f"stage{stage}_conv{k}"
      x = layers.ConvNorm(n, 3, style, name=name)(x, train)
    features[f"stage{stage}"] = x
    x = pooling.max_pool(x)
    pools.append(x)
  return features, pools


def vgg16(num_classes: int = 2, **options: Any) -> VGG:
  """`VGG` with 13 convolutions.

  Example:
    >>> sum(vgg16().convolutions)
    13
  """
  return VGG(num_classes, (2, 2, 3, 3, 3), **options)


def vgg19(num_classes: int = 2, **options: Any) -> VGG:
  """`VGG` with 16 convolutions.

  Example:
    >>> sum(vgg19().convolutions)
    16
  """
  return VGG(num_classes, (2, 2, 4, 4, 4), **options)


def _average_to(x, side):
  """Means over `side` overlapping windows per axis, as PyTorch's adaptive pooling."""
  rows, columns = (_averages(n, side, x.dtype) for n in x.shape[1:3])
  return jnp.einsum("ph,qw,bhwc->bpqc", rows, columns, x)


def _averages(n, side, dtype):
  """`(side, n)`; window `i` is `floor(i n / side)` to `ceil((i + 1) n / side)`."""
  matrix = [[0.0] * n for _ in range(side)]
  for i, row in enumerate(matrix):
    first, end = math.floor(i * n / side), math.ceil((i + 1) * n / side)
    row[first:end] = [1 / (end - first)] * (end - first)
  return jnp.asarray(matrix, dtype)
