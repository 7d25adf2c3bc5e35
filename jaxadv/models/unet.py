"""U-Net for 2-D and 3-D segmentation: logits and the activations of every block.

`predict` for the attacks is `lambda x: model.apply(variables, x)`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxadv import pooling
from jaxadv.models import layers

__all__ = ["UNet", "asma_unet"]


class UNet(nn.Module):
  """Encoder of double convolutions and 2-wide max-pools, mirrored decoder with skips.

  Level `l` has `width * 2**(l - 1)` channels. The decoder upsamples by 2-wide
  transposed convolutions and joins the skip before its double convolution. Images in
  [0, 1] go in as they are: there is no input normalisation. The rank of the input
  decides between 2-D `(B, H, W, C)` and 3-D `(B, D, H, W, C)`.

  Attributes:
    num_classes: K.
    width: channels of the first level.
    depth: number of max-pools.
    norm: `"group"` (independent of the batch), `"batch"` or `"none"`.
    padding: `"SAME"` keeps the sides, which must be multiples of `2**depth`; `"VALID"`
      shortens them as in the original U-Net and crops the skips to their centre.
    dtype: compute dtype, such as `jnp.bfloat16`; `None` for that of the input.
      Parameters are float32, and so are the logits (float64 for float64 images).

  Example:
    >>> model = UNet(width=8, depth=2)
    >>> key, images = jax.random.key(0), jnp.zeros((3, 16, 16, 1))
    >>> outputs, _ = jax.eval_shape(model.init_with_output, key, images)
    >>> logits, features = outputs
    >>> logits.shape, sorted(features)
    ((3, 16, 16, 2), ['bottleneck', 'dec1', 'dec2', 'enc1', 'enc2'])

  Differs from Ronneberger et al. in the defaults: same padding, group norm, width 16.
  Reference: Ronneberger, Fischer, Brox, MICCAI 2015, arXiv 1505.04597.
  """

  num_classes: int = 2
  width: int = 16
  depth: int = 4
  norm: layers.NormName = "group"
  padding: layers.PaddingName = "SAME"
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
      Logits `(B, ..., K)` and the features `enc1 .. enc<depth>` (before each pool),
      `bottleneck`, `dec1 .. dec<depth>` (deepest first), all after their relu and in
      the compute dtype.

    Raises:
      ValueError: for a rank other than 4 or 5, and for sides that do not fit the depth.
    """
    _check(image, self.depth, self.padding)
    features = {}
    x = image
    for level in range(self.depth):
      x = features[f"enc{level + 1}"] = self._block(level, f"enc{level + 1}")(x, train)
      x = pooling.max_pool(x)
    x = features["bottleneck"] = self._block(self.depth, "bottleneck")(x, train)
    for step, level in enumerate(reversed(range(self.depth)), 1):
      x = layers.Upsample(self.width << level, self.dtype, name=f"up{step}")(x)
      skip = layers.center_crop(features[f"enc{level + 1}"], x.shape[1:-1])
      x = self._block(level, f"dec{step}")(jnp.concatenate([skip, x], -1), train)
      features[f"dec{step}"] = x
    return self._head(x), features

  def _block(self, level, name):
    return layers.ConvBlock(
      self.width << level, self.norm, self.padding, self.dtype, name=name
    )

  def _head(self, x):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return nn.Dense(self.num_classes, dtype=dtype, name="head")(x)


def asma_unet() -> UNet:
  """The network of the ASMA paper: 572 x 572 RGB to 388 x 388 x 2 logits.

  Valid padding, no norm, widths 32-64-128-256-512, four max-pools; 7,760,130
  parameters.

  Example:
    >>> asma_unet().width, asma_unet().padding
    (32, 'VALID')

  Reference: Ozbulak, Van Messem, De Neve, MICCAI 2019, arXiv 1907.13124.
  """
  return UNet(num_classes=2, width=32, depth=4, norm="none", padding="VALID")


def _check(image, depth, padding):
  if image.ndim not in (4, 5):
    raise ValueError(
      f"the image batch has shape {image.shape}; a U-Net needs (B, H, W, C) or "
      "(B, D, H, W, C). Write x[None] for a single image."
    )
  sides = image.shape[1:-1]
  if padding == "SAME":
    if any(n % 2**depth for n in sides):
      raise ValueError(
        f"the sides {sides} are not multiples of {2**depth}, which {depth} max-pools "
        f'need. Pad or resize the images, lower `depth`, or use padding="VALID".'
      )
    return
  if padding != "VALID":
    raise ValueError(f'`padding` is {padding!r}; write "SAME" or "VALID".')
  _check_valid(sides, depth)


def _check_valid(sides, depth):
  """Every level loses 4 rows going down and coming up; something must be left."""
  for n in sides:
    size = n
    for _ in range(depth):
      size = (size - 4) // 2
    size -= 4
    for _ in range(depth):
      size = size * 2 - 4 if size > 0 else 0
    if size < 1:
      raise ValueError(
        f'the sides {sides} are too small for a depth of {depth} with padding="VALID"; '
        'use larger images, a lower `depth` or padding="SAME".'
      )
