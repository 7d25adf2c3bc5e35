"""Where a model looks, on a clean and on an attacked image, and how much that moved.

`grad_cam` for any network with maps, `feature_map` for one that returns its attention,
such as `models.AttnVGG`; `top_share_iou` compares two maps.
"""

import jax
import jax.numpy as jnp

from jaxadv import inputs
from jaxadv.analysis import splitting
from jaxadv.types import Array, Images, Predict, call

__all__ = ["feature_map", "grad_cam", "top_share", "top_share_iou"]


def grad_cam(predict: Predict, x: Images, y: Array, *, feature: str) -> Array:
  """Pixels of a feature that speak for a class: Grad-CAM.

  With the maps `A_k` of the feature and the logit `z_y`,

      relu(sum_k w_k A_k),   w_k = mean over the pixels of d z_y / d A_k

  where the derivative is with respect to this activation (`splitting`). On the last map
  before a global mean and a dense layer it is the class activation map over the number
  of pixels.

  Args:
    predict: images to `(logits (B, K), features)`.
    x: `(B, ..., C)` images.
    y: `(B,)` int, the class or the finding to explain. To compare a clean image with an
      attacked one, ask both about the same.
    feature: name of an activation `(B, ..., C)`: the last one with pixels, as a rule.

  Returns:
    `(B, ...)` float >= 0, in pixels of the feature; all zero where none speaks for `y`.

  Raises:
    ValueError: as `splitting.after_feature`; for a feature without pixels, and for
      logits other than `(B, K)`.

  Example:
    >>> def predict(x):
    ...   pooled = x.mean((1, 2))
    ...   return pooled @ jnp.array([[1.0, -1.0]]), {"map": x}
    >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    >>> grad_cam(predict, x, jnp.array([0]), feature="map").tolist()
    [[[0.0, 0.25], [0.5, 0.75]]]

  Reference: Selvaraju et al., ICCV 2017, arXiv 1610.02391.
  """
  value, rest = splitting.after_feature(predict, x, feature)
  if value.ndim < 3:
    raise ValueError(
      f"the feature {feature!r} has shape {value.shape}, without pixels; name a map "
      "(B, ..., C), such as the last stage."
    )

  def explained(value):
    logits = rest(value)
    if logits.ndim != 2:
      raise ValueError(f"Grad-CAM explains logits (B, K); got shape {logits.shape}.")
    return jnp.take_along_axis(logits, jnp.asarray(y)[:, None], 1).sum()

  gradient = jax.grad(explained)(value)
  pixels = tuple(range(1, value.ndim - 1))
  weights = gradient.mean(pixels, keepdims=True)
  return jax.nn.relu((weights * value).sum(-1))


def feature_map(predict: Predict, x: Images, *, feature: str) -> Array:
  """A feature that is a map of its own, averaged over its channels, as attention is.

  Args:
    predict: images to `(logits, features)`.
    x: `(B, ..., C)` images.
    feature: name of an activation `(B, ..., C)`.

  Returns:
    `(B, ...)`.

  Raises:
    ValueError: for a name that the model does not have.

  Example:
    >>> predict = lambda x: (x.mean((1, 2)), {"attention": jax.nn.sigmoid(x)})
    >>> feature_map(predict, jnp.zeros((1, 2, 2, 1)), feature="attention").tolist()
    [[[0.5, 0.5], [0.5, 0.5]]]
  """
  _, features = call(predict, x)
  inputs.check_choice("feature", feature, sorted(features))
  return features[feature].mean(-1)


def top_share(heat: Array, *, share: float = 0.2) -> Array:
  """The hottest pixels of ONE map, `share` of all, to whole pixels and at least one.

  Pixels as hot as the last one are in as well. Those at the minimum of the map never
  are, so that zeros of Grad-CAM do not fill up the share, and a flat map has none.

  Args:
    heat: `(...)` float.
    share: static, in (0, 1].

  Returns:
    `(...)` bool.

  Raises:
    ValueError: for a share outside (0, 1].

  Example:
    >>> top_share(jnp.array([0.0, 3.0, 1.0, 2.0, 0.0]), share=0.4).tolist()
    [False, True, False, True, False]
  """
  if not 0 < share <= 1:
    raise ValueError(f"`share` is {share}; write a number in (0, 1], such as 0.2.")
  count = max(1, round(share * heat.size))
  last = jax.lax.top_k(heat.ravel(), count)[0][-1]
  return (heat >= last) & (heat > heat.min())


def top_share_iou(heat: Array, other: Array, *, share: float = 0.2) -> Array:
  """IoU of the hottest pixels of two maps of ONE example.

  Args:
    heat: `(...)` float, for instance of the clean image.
    other: `(...)` float, of the attacked one.
    share: see `top_share`.

  Returns:
    A scalar in [0, 1]; 0 when only one of the maps is flat, NaN when both are: count
    those, and take the mean over the others.

  Example:
    >>> clean, attacked = jnp.array([1.0, 2, 3, 4]), jnp.array([1.0, 4, 2, 3])
    >>> print(top_share_iou(clean, attacked, share=0.5).round(3))
    0.333
  """
  a, b = top_share(heat, share=share), top_share(other, share=share)
  return (a & b).sum() / (a | b).sum()
