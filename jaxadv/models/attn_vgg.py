"""AttnVGG: a VGG16 that says where it looks, for the melanoma task.

`predict` for the attacks is `lambda x: model.apply(variables, x)`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxadv.models import layers, preprocessing, vgg

__all__ = ["AttnVGG"]

_COUNTS = (2, 2, 3, 3, 3)  # VGG16
_CHANNELS = 256  # of the space in which a local and the global feature meet


class AttnVGG(nn.Module):
  """VGG16 whose third and fourth pools are weighted by attention, then one dense layer.

  With a local map `l` (`pool3` or `pool4`) and the last pool `g`, brought to the sides
  of `l` by bilinear interpolation,

      a = sigmoid(phi(relu(W_l l + up(W_g g)))),    local feature = mean(a l)

  and the dense layer sees `[mean(g), mean(a1 pool3), mean(a2 pool4)]`, 512 + 256 + 512
  channels. Sides of 32 pixels or more; from sides that 32 does not divide, the last
  pool is stretched to those of the local map.

  Attributes:
    num_classes: K.
    width: factor on all channels.
    norm: `"batch"` as published, `"group"` (independent of the batch) or `"none"`.
    preprocess: see `preprocessing.preprocess`.
    dtype: compute dtype, such as `jnp.bfloat16`; `None` for that of the input.
      Parameters are float32, and so are the logits (float64 for float64 images).

  Example:
    >>> model = AttnVGG(2, width=0.125)
    >>> key, images = jax.random.key(0), jnp.zeros((2, 64, 64, 3))
    >>> outputs, _ = jax.eval_shape(model.init_with_output, key, images)
    >>> logits, features = outputs
    >>> logits.shape, features["attention1"].shape, features["pooled"].shape
    ((2, 2), (2, 8, 8, 1), (2, 160))

  Differs from the original code: a mean over the whole last map, which there is one of
  7 x 7 pixels and hence of images with sides of 224; no softmax over the pixels instead
  of the sigmoid (`normalize_attn`), no dropout, no regularization by masks of lesions.
  The mean and standard deviation of the melanoma images are not in `preprocess`.
  Reference: Yan, Kawahara, Hamarneh, IPMI 2019, "Melanoma recognition via visual
  attention".
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
      Logits `(B, K)` and the features `stage1` .. `stage5` (before the pool),
      `attention1` `(B, H/8, W/8, 1)` and `attention2` `(B, H/16, W/16, 1)` in (0, 1),
      and `pooled` `(B, C)`, what the dense layer sees; all in the compute dtype.

    Raises:
      ValueError: for a rank other than 4, other than 1 or 3 channels, short sides.
    """
    layers.check_image(image, 32)
    x = preprocessing.preprocess(image, self.preprocess)
    # the published convolutions have a bias before the norm, as torchvision's
    style = layers.Style(self.norm, bias=True, dtype=self.dtype)
    features, pools = vgg.stages(x, train, self.width, style, counts=_COUNTS)
    channels = layers.scaled(_CHANNELS, self.width)
    pooled = [pools[-1].mean((1, 2))]
    for k, local in enumerate(pools[2:4], 1):
      attention = _Gate(channels, self.dtype, name=f"gate{k}")(local, pools[-1])
      features[f"attention{k}"] = attention
      pooled.append((attention * local).mean((1, 2)))
    features["pooled"] = jnp.concatenate(pooled, -1)
    return layers.head(features["pooled"], self.num_classes), features


class _Gate(nn.Module):
  """How much every pixel of a local map agrees with the global one."""

  channels: int
  dtype: Any

  @nn.compact
  def __call__(self, local, whole):
    project = lambda n, bias, name: layers.convolve(
      n, 1, bias=bias, dtype=self.dtype, name=name
    )
    query = project(self.channels, False, "global")(whole)
    sides = (local.shape[0], *local.shape[1:3], self.channels)
    # half-pixel centres and clamped borders: `align_corners=False` of PyTorch
    query = jax.image.resize(query, sides, "bilinear")
    both = nn.relu(project(self.channels, False, "local")(local) + query)
    return nn.sigmoid(project(1, True, "phi")(both))
