"""What published ImageNet weights expect of an image, as the first layer of a model."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

__all__ = ["PreprocessName", "preprocess"]

PreprocessName = Literal["none", "tf", "caffe", "torch", "lite"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CAFFE_MEAN = (103.939, 116.779, 123.68)  # blue, green, red


def preprocess(image: jax.Array, name: PreprocessName) -> jax.Array:
  """An image in [0, 1] as the weights were trained to see it.

  | name | result | weights |
  |---|---|---|
  | `"none"` | `x` | trained here |
  | `"tf"` | `2 x - 1` | Keras Inception V3, Inception-ResNet V2 |
  | `"caffe"` | `255 x - mean`, blue first | Keras ResNet, VGG |
  | `"torch"` | `(x - mean) / std` | torchvision; Keras DenseNet |
  | `"lite"` | `(255 x - 127) / 128` | EfficientNet-Lite |

  All but `"none"` are for weights of three channels, and copy a grey one thrice.

  Args:
    image: `(B, H, W, 1)` or `(B, H, W, 3)` in [0, 1].
    name: a row of the table.

  Returns:
    `(B, H, W, 3)`; with `"none"` the image.

  Raises:
    ValueError: for another name.

  Example:
    >>> preprocess(jnp.full((1, 1, 1, 1), 0.5), "tf").tolist()
    [[[[0.0, 0.0, 0.0]]]]

  Differs from torchvision in its Inception V3, which maps the `"torch"` form back to
  `"tf"` inside the network (`transform_input`); write `"tf"` for its published weights.
  """
  if name not in get_args(PreprocessName):
    raise ValueError(
      f"`preprocess` is {name!r}; write one of {get_args(PreprocessName)}."
    )
  if name == "none":
    return image
  if image.shape[-1] == 1:
    image = jnp.repeat(image, 3, -1)
  row = lambda values: jnp.asarray(values, image.dtype).reshape(1, 1, 1, 3)
  if name == "tf":
    return 2 * image - 1
  if name == "caffe":
    return 255 * image[..., ::-1] - row(_CAFFE_MEAN)
  if name == "torch":
    return (image - row(_MEAN)) / row(_STD)
  return (255 * image - 127) / 128
