"""A small plain network for classes and label sets, in 2-D and 3-D."""

from typing import Any

import flax.linen as nn
import jax

from jaxadv import pooling
from jaxadv.models import layers

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
  """Stages of two convolutions with 2-wide max-pools between, global mean, dense layer.

  Stage `l` has `width * 2**(l - 1)` channels. Images in [0, 1] go in as they are; the
  rank of the input decides between 2-D `(B, H, W, C)` and 3-D `(B, D, H, W, C)`.

  Attributes:
    num_classes: K classes, or L findings of a label set.
    width: channels of the first stage.
    depth: number of stages; there is one max-pool less.
    norm: `"group"` (independent of the batch), `"batch"` or `"none"`.
    dtype: compute dtype, such as `jnp.bfloat16`; `None` for that of the input.
      Parameters are float32, and so are the logits (float64 for float64 images).

  Example:
    >>> import jax.numpy as jnp
    >>> model = ConvNet(num_classes=3, width=8, depth=2)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    >>> logits, features = model.apply(variables, jnp.zeros((5, 16, 16, 1)))
    >>> logits.shape, sorted(features), features["pooled"].shape
    ((5, 3), ['pooled', 'stage1', 'stage2'], (5, 16))
  """

  num_classes: int = 2
  width: int = 16
  depth: int = 4
  norm: layers.NormName = "group"
  dtype: Any = None

  @nn.compact
  def __call__(
    self, image: jax.Array, train: bool = False
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits and features.

    Args:
      image: `(B, H, W, C)` or `(B, D, H, W, C)` float.
      train: whether batch norm uses, and updates, the statistics of this batch.

    Returns:
      Logits `(B, K)` and the features `stage1 .. stage<depth>`, after their relu, and
      `pooled` `(B, width * 2**(depth - 1))`, all in the compute dtype.

    Raises:
      ValueError: for a rank other than 4 or 5, and for sides that the pools use up.
    """
    _check(image, self.depth)
    features, x = {}, image
    for stage in range(self.depth):
      x = pooling.max_pool(x) if stage else x
      name = f"stage{stage + 1}"
      block = layers.ConvBlock(
        self.width << stage, self.norm, dtype=self.dtype, name=name
      )
      x = features[name] = block(x, train)
    x = features["pooled"] = x.mean(tuple(range(1, x.ndim - 1)))
    return layers.head(x, self.num_classes), features


def _check(image, depth):
  if image.ndim not in (4, 5):
    raise ValueError(
      f"the image batch has shape {image.shape}; a ConvNet needs (B, H, W, C) or "
      "(B, D, H, W, C). Write x[None] for a single image."
    )
  if min(image.shape[1:-1]) < 2 ** (depth - 1):
    raise ValueError(
      f"the sides {image.shape[1:-1]} are too small for {depth} stages; use sides of "
      f"at least {2 ** (depth - 1)}, or a lower `depth`."
    )
