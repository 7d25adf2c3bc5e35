"""A generator of perturbations: the U-Net with a tanh at its end, for any sides."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxadv.models import layers, unet

__all__ = ["Generator"]


class Generator(nn.Module):
  """Images to perturbations of their shape, in [-1, 1]: `tanh(UNet(x))`.

  Sides that the U-Net's max-pools do not divide are mirrored at their far ends, and the
  output is cut. Images in [0, 1] go in as they are.

  Attributes:
    width: channels of the first level.
    depth: number of max-pools.
    norm: `"batch"`, `"group"` (no statistics to keep) or `"none"`.
    dtype: compute dtype; `None` for that of the input. The output is float32 (float64
      for float64 images).

  Example:
    >>> model = Generator(width=8, depth=2)
    >>> images = jnp.zeros((5, 21, 16, 3))
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
    (5, 21, 16, 3)

  Differs from the generator of the released code, a pix2pix U-Net of 4-wide strided
  convolutions down to one pixel, which takes one size of images only: ours has double
  convolutions, max-pools and a fixed depth.

  Reference: Poursaeed et al., CVPR 2018, arXiv 1712.02328.
  """

  width: int = 64
  depth: int = 4
  norm: layers.NormName = "batch"
  dtype: Any = None

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
    """Perturbations in [-1, 1].

    Args:
      image: `(B, H, W, C)` or `(B, D, H, W, C)` float.
      train: whether batch norm uses, and updates, the statistics of this batch.

    Returns:
      The shape of `image`.

    Raises:
      ValueError: for another rank.
    """
    sides = image.shape[1:-1]
    spare = [-side % 2**self.depth for side in sides]
    padded = jnp.pad(image, [(0, 0), *((0, n) for n in spare), (0, 0)], "symmetric")
    net = unet.UNet(
      image.shape[-1], self.width, self.depth, self.norm, dtype=self.dtype, name="unet"
    )
    logits, _ = net(padded, train)
    return jnp.tanh(logits[(slice(None), *map(slice, sides))])
