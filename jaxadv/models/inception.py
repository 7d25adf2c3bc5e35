"""Inception V3 for classification.

`predict` for the attacks is `lambda x: model.apply(variables, x)`.
"""

from collections.abc import Iterator
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxadv import pooling
from jaxadv.models import layers, preprocessing

__all__ = [
  "STEM",
  "Branches",
  "InceptionV3",
  "Mixed",
  "layer_names",
  "smallest_side",
  "stem",
  "unit_names",
]

Branches = dict[str, list[tuple]]

# A convolution is channels, window and, where it halves the map, stride 2. A branch is
# a sequence of convolutions; a tuple of two in it stands for both side by side. Names
# are those of the authors' code, which torchvision kept.
STEM: dict[str, tuple] = {
  "Conv2d_1a_3x3": (32, 3, 2),
  "Conv2d_2a_3x3": (32, 3),
  "Conv2d_2b_3x3": (64, 3),
  "Conv2d_3b_1x1": (80, 1),
  "Conv2d_4a_3x3": (192, 3),
}


def _a(pool):
  return {
    "branch1x1": [(64, 1)],
    "branch5x5": [(48, 1), (64, 5)],
    "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    "branch_pool": [(pool, 1)],
  }


def _c(n):
  wide, tall = (1, 7), (7, 1)
  return {
    "branch1x1": [(192, 1)],
    "branch7x7": [(n, 1), (n, wide), (192, tall)],
    "branch7x7dbl": [(n, 1), (n, tall), (n, wide), (n, tall), (192, wide)],
    "branch_pool": [(192, 1)],
  }


_E: Branches = {
  "branch1x1": [(320, 1)],
  "branch3x3": [(384, 1), ((384, (1, 3)), (384, (3, 1)))],
  "branch3x3dbl": [(448, 1), (384, 3), ((384, (1, 3)), (384, (3, 1)))],
  "branch_pool": [(192, 1)],
}
_BLOCKS: dict[str, Branches] = {
  "Mixed_5b": _a(32),
  "Mixed_5c": _a(64),
  "Mixed_5d": _a(64),
  "Mixed_6a": {
    "branch3x3": [(384, 3, 2)],
    "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
  },
  "Mixed_6b": _c(128),
  "Mixed_6c": _c(160),
  "Mixed_6d": _c(160),
  "Mixed_6e": _c(192),
  "Mixed_7a": {
    "branch3x3": [(192, 1), (320, 3, 2)],
    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
  },
  "Mixed_7b": _E,
  "Mixed_7c": _E,
}


class InceptionV3(nn.Module):
  """A stem of convolutions, eleven blocks of parallel branches, mean, a dense layer.

  Attributes:
    num_classes: K.
    width: factor on all channels.
    norm: `"batch"` as published, `"group"` (independent of the batch) or `"none"`.
    padding: `"VALID"` as published, where the stem and the strided layers have none:
      sides of 75 pixels or more; `"SAME"` pads everywhere, for any side.
    variant: whether a mean over 3 x 3 pixels counts those outside the map, as zeros
      (`"torch"`), or not (`"keras"`).
    preprocess: see `preprocessing.preprocess`.
    dtype: compute dtype, such as `jnp.bfloat16`; `None` for that of the input.
      Parameters are float32, and so are the logits (float64 for float64 images).

  Example:
    >>> model = InceptionV3(3, width=0.25)
    >>> key, images = jax.random.key(0), jnp.zeros((2, 75, 75, 1))
    >>> outputs, _ = jax.eval_shape(model.init_with_output, key, images)
    >>> logits, features = outputs
    >>> logits.shape, features["stage1"].shape
    ((2, 3), (2, 7, 7, 72))

  Differs from Szegedy et al.: no auxiliary head, no dropout.
  Reference: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, CVPR 2016, arXiv 1512.00567.
  """

  num_classes: int = 2
  width: float = 1.0
  norm: layers.NormName = "batch"
  padding: layers.PaddingName = "VALID"
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
      Logits `(B, K)` and the features `stem`, `stage1` .. `stage3` (the last map before
      the sides are halved) and `pooled` `(B, C)`, all in the compute dtype.

    Raises:
      ValueError: for a rank other than 4, other than 1 or 3 channels, short sides.
    """
    layers.check_image(image, smallest_side(self.padding))
    x = preprocessing.preprocess(image, self.preprocess)
    style = layers.Style(self.norm, 1e-3, dtype=self.dtype)
    count = not layers.is_keras(self.variant)
    features = {}
    x = stem(x, train, self.width, style, padding=self.padding)
    features["stem"] = x
    for name, branches in _BLOCKS.items():
      block = Mixed(branches, self.width, style, self.padding, count, name=name)
      stage = int(name[6]) - 4
      x = features[f"stage{stage}"] = block(x, train)
    features["pooled"] = x.mean((1, 2))
    return layers.head(features["pooled"], self.num_classes), features


def smallest_side(padding: layers.PaddingName) -> int:
  """Below it, a convolution or a pool without padding has nothing left.

  Raises:
    ValueError: for another name.

  Example:
    >>> smallest_side("VALID"), smallest_side("SAME")
    (75, 1)
  """
  if padding not in get_args(layers.PaddingName):
    raise ValueError(f'`padding` is {padding!r}; write "SAME" or "VALID".')
  return 75 if padding == "VALID" else 1


def stem(
  image: jax.Array,
  train: bool,
  width: float,
  style: layers.Style,
  *,
  padding: layers.PaddingName,
) -> jax.Array:
  """The convolutions `STEM` with two max-pools; only inside a compact `__call__`."""
  for name, plan in STEM.items():
    # the third keeps its sides in every version of the network
    pad = "SAME" if name == "Conv2d_2b_3x3" else padding
    image = _unit(plan, width, style, pad, name)(image, train)
    if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
      image = pooling.max_pool(image, 3, strides=2, padding=padding)
  return image


class Mixed(nn.Module):
  """Branches of convolutions beside each other, joined along the channels.

  Where they halve the map, a max-pool of the input is joined as well; a branch called
  `branch_pool` starts with a mean over 3 x 3 pixels.

  Attributes:
    branches: see `unit_names`.
    width: factor on all channels.
    style: norm, bias and dtype.
    padding: of the layers with stride 2.
    count_padding: see `pooling.avg_pool`.
  """

  branches: Branches
  width: float
  style: layers.Style
  padding: layers.PaddingName = "VALID"
  count_padding: bool = False

  @nn.compact
  def __call__(self, image: jax.Array, train: bool) -> jax.Array:
    """`(B, H, W, C)` to `(B, H', W', C')`."""
    outputs = [self._branch(image, train, name) for name in self.branches]
    if any(len(step) == 3 for steps in self.branches.values() for step in steps):
      outputs.append(pooling.max_pool(image, 3, strides=2, padding=self.padding))
    return jnp.concatenate(outputs, -1)

  def _branch(self, x, train, branch):
    if branch == "branch_pool":
      count = self.count_padding
      x = pooling.avg_pool(x, 3, strides=1, padding="SAME", count_padding=count)
    names = unit_names({branch: self.branches[branch]})
    for step in self.branches[branch]:
      sides = step if isinstance(step[0], tuple) else (step,)
      units = [self._unit(plan, next(names)) for plan in sides]
      x = jnp.concatenate([unit(x, train) for unit in units], -1)
    return x

  def _unit(self, plan, name):
    padding = self.padding if len(plan) == 3 else "SAME"
    return _unit(plan, self.width, self.style, padding, name)


def _unit(plan, width, style, padding, name):
  channels, window, strides = (*plan, 1)[:3]
  n = layers.scaled(channels, width)
  return layers.ConvNorm(n, window, style, strides, padding=padding, name=name)


def unit_names(branches: Branches) -> Iterator[str]:
  """Names of the convolutions of a block, in the order in which they are made.

  Example:
    >>> list(unit_names({"a": [(64, 1)], "b": [(8, 1), ((8, 3), (8, 5))]}))
    ['a', 'b_1', 'b_2a', 'b_2b']
  """
  for branch, steps in branches.items():
    for k, step in enumerate(steps, 1):
      if len(steps) == 1:
        yield branch
      elif isinstance(step[0], tuple):
        yield from (f"{branch}_{k}{letter}" for letter in "ab")
      else:
        yield f"{branch}_{k}"


def layer_names() -> list[str]:
  """Paths of all convolutions of `InceptionV3`, in the order in which they are made.

  Example:
    >>> len(layer_names()), layer_names()[5]
    (94, 'Mixed_5b/branch1x1')
  """
  mixed = [
    f"{block}/{name}"
    for block, branches in _BLOCKS.items()
    for name in unit_names(branches)
  ]
  return [*STEM, *mixed]
