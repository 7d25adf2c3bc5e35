"""Threats: which perturbations of ONE image are allowed, and how they are applied.

Every threat here adds its perturbation and keeps the image in `bounds`. Clipping and
rounding are passed straight through by the gradient, so a pixel that sits at a bound
still tells the attack where to go. Radii and bounds may be traced; nothing recompiles
for a new radius.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxadv import inputs
from jaxadv.types import Threat

__all__ = ["additive", "box", "l1", "l2", "linf", "share_of_norm", "stored"]

Bounds = tuple[Any, Any]


def straight_through(function: Callable) -> Callable:
  """`function` with the gradient of the identity in its first argument."""
  wrapped = jax.custom_jvp(function)
  wrapped.defjvp(lambda primals, tangents: (function(*primals), tangents[0]))
  return wrapped


_clip = straight_through(lambda image, low, high: jnp.clip(image, low, high))
_round = straight_through(lambda image, levels: jnp.round(image * levels) / levels)


def additive(
  project_ball: Callable[[jax.Array], jax.Array],
  sample_ball: Callable[[jax.Array, jax.Array], jax.Array],
  *,
  bounds: Bounds = (0.0, 1.0),
) -> Threat:
  """A threat that adds a perturbation from a ball and stays inside the bounds.

  `project(d, x) = clip(x + project_ball(d), bounds) - x`. For balls that contain every
  vector with smaller entries (all p-norm balls) the result lies in both sets.

  Args:
    project_ball: `delta -> delta`, the projection on the ball.
    sample_ball: `(key, like) -> delta`, a random point of the ball.
    bounds: valid range of images.

  Returns:
    A `Threat`.

  Example:
    >>> cube = additive(lambda d: jnp.clip(d, -0.1, 0.1), lambda key, like: 0 * like)
    >>> print(cube.project(jnp.array([1.0, 1.0]), jnp.array([0.5, 0.95])).round(3))
    [0.1  0.05]
  """
  low, high = bounds

  def project(delta, image):
    delta = project_ball(delta)
    return delta if image is None else jnp.clip(image + delta, low, high) - image

  def apply(image, delta):
    return _clip(image + delta, low, high)

  def init(key, image):
    return sample_ball(key, image)

  return Threat(init, project, apply, bounds)


def linf(eps: float | jax.Array, *, bounds: Bounds = (0.0, 1.0)) -> Threat:
  """Every value moves by at most `eps`; random starts are uniform in the cube.

  Args:
    eps: radius >= 0 in the units of the image (4/255 for four grey levels).
    bounds: valid range of images.

  Returns:
    A `Threat`.

  Raises:
    ValueError: for a negative radius.

  Example:
    >>> print(linf(0.1).project(jnp.array([0.3, -0.05]), None).round(3))
    [ 0.1  -0.05]
  """
  inputs.check_positive("eps", eps)

  def sample(key, like):
    return eps * jax.random.uniform(key, like.shape, like.dtype, -1, 1)

  return additive(lambda delta: jnp.clip(delta, -eps, eps), sample, bounds=bounds)


def l2(eps: float | jax.Array, *, bounds: Bounds = (0.0, 1.0)) -> Threat:
  """`||delta||_2 <= eps` over the whole image; random starts are uniform in the ball.

  Args:
    eps: radius >= 0 in the units of the image.
    bounds: valid range of images.

  Returns:
    A `Threat`.

  Raises:
    ValueError: for a negative radius.

  Example:
    >>> print(l2(0.25).project(jnp.array([0.3, 0.4]), jnp.array([0.5, 0.5])).round(4))
    [0.14999999 0.19999999]

  Differs from torchattacks and the AWP code, whose starts have a uniform radius and are
  therefore crowded at the centre.
  """
  inputs.check_positive("eps", eps)

  def project(delta):
    return delta * jnp.minimum(1, eps / jnp.maximum(_norm(delta), _tiny(delta)))

  def sample(key, like):
    direction_key, radius_key = jax.random.split(key)
    direction = jax.random.normal(direction_key, like.shape, like.dtype)
    radius = jax.random.uniform(radius_key, (), like.dtype) ** (1 / like.size)
    return eps * radius * direction / _norm(direction)

  return additive(project, sample, bounds=bounds)


def l1(eps: float | jax.Array, *, bounds: Bounds = (0.0, 1.0)) -> Threat:
  """`sum |delta| <= eps`; random starts are uniform in the ball.

  The projection is the exact Euclidean one on the ball (soft threshold found by
  sorting), followed by the clip to the bounds, which can only shorten it.

  Args:
    eps: radius >= 0 in the units of the image.
    bounds: valid range of images.

  Returns:
    A `Threat`.

  Raises:
    ValueError: for a negative radius.

  Example:
    >>> l1(1.0).project(jnp.array([1.0, -0.5]), None).tolist()
    [0.75, -0.25]

  Differs from the L1-APGD projection on ball and box at once: the box clip comes after.

  Reference: Duchi et al., ICML 2008 (projection); Barthe et al. 2005 (sampling).
  """
  inputs.check_positive("eps", eps)

  def project(delta):
    size = jnp.abs(delta)
    ordered = jnp.sort(size.ravel())[::-1]
    excess = (jnp.cumsum(ordered) - eps) / jnp.arange(1, delta.size + 1)
    threshold = jnp.maximum(jnp.max(jnp.where(ordered > excess, excess, 0)), 0)
    shrunk = jnp.sign(delta) * jnp.maximum(size - threshold, 0)
    # the sum of the soft threshold may miss eps by a rounding: rescale, never above it
    total = jnp.abs(shrunk).sum()
    return shrunk * jnp.minimum(1, eps / jnp.maximum(total, _tiny(delta)))

  def sample(key, like):
    direction_key, radius_key = jax.random.split(key)
    direction = jax.random.laplace(direction_key, like.shape, like.dtype)
    slack = jax.random.exponential(radius_key, (), like.dtype)
    return eps * direction / (jnp.abs(direction).sum() + slack)

  return additive(project, sample, bounds=bounds)


def box(*, bounds: Bounds = (0.0, 1.0)) -> Threat:
  """Only the valid range: for attacks that look for the smallest perturbation.

  There is no ball to draw from, so a random start is the clean image.

  Args:
    bounds: valid range of images.

  Returns:
    A `Threat`.

  Example:
    >>> print(box().project(jnp.array([0.9, -0.2]), jnp.array([0.5, 0.5])).round(2))
    [ 0.5        -0.19999999]
  """
  return additive(lambda delta: delta, lambda key, like: 0 * like, bounds=bounds)


def stored(threat: Threat, *, bits: int = 8) -> Threat:
  """The same threat, seen through storage: images are applied rounded to `bits`.

  `apply = round(L * threat.apply(x, d)) / L` with `L = 2^bits - 1` levels over the
  bounds, gradient straight through, so loss, success and result all belong to an image
  that can be saved. For a ball of whole grey levels around an image already on the grid
  the rounded image stays in the ball; otherwise it may leave it by half a level.

  Args:
    threat: a threat with bounds.
    bits: bits per value.

  Returns:
    A `Threat`.

  Raises:
    ValueError: for a threat without bounds.

  Example:
    >>> apply = stored(box()).apply
    >>> (apply(jnp.array([0.5]), jnp.array([0.001])) * 255).tolist()
    [128.0]
  """
  if threat.bounds is None:
    raise ValueError("storage needs a range; write threat._replace(bounds=(0.0, 1.0)).")
  low, high = threat.bounds
  levels = (2**bits - 1) / (high - low)

  def apply(image, delta):
    return low + _round(threat.apply(image, delta) - low, levels)

  return threat._replace(apply=apply)


def share_of_norm(
  images: jax.Array,
  share: float,
  *,
  norm: Literal["linf", "l2"],
  norm_channels: Literal["all", "first"] = "all",
) -> float:
  """A radius as a share of the mean image norm: `share * mean_i ||x_i||`.

  How the studies of universal perturbations on medical images give their budgets
  (`zeta`, 2 % to 8 %).

  Args:
    images: `(N, ..., C)` in [0, 1].
    share: above 0, for instance 0.04.
    norm: `||x||_2`, or the largest value.
    norm_channels: `"first"` counts the first channel only, as the code of 2021 does;
      for colour images its L2 radius is smaller by about `sqrt(3)`.

  Returns:
    The radius for images in [0, 1].

  Raises:
    TypeError: for images that are not float, such as uint8.
    ValueError: for a share that is not positive, no image, values outside [0, 1], an
      unknown norm or choice of channels.

  Example:
    >>> round(share_of_norm(jnp.full((2, 10, 10, 3), 0.5), 0.04, norm="linf"), 3)
    0.02

  Differs from the released code, whose images are `(x - 128) / 128`: there the radius
  of the same change is twice the number, to 0.4 %.

  Reference: Hirano et al., BMC Medical Imaging 21:9 (2021).
  """
  if not share > 0:
    raise ValueError(f"`share` is {share}; write a number above 0, such as 0.04.")
  inputs.check_choice("norm", norm, ("linf", "l2"))
  inputs.check_choice("norm_channels", norm_channels, ("all", "first"))
  if not len(images):
    raise ValueError("there are no images; their mean norm needs at least one.")
  if jnp.result_type(images) not in (jnp.float32, jnp.float64):
    raise TypeError(
      f"`images` have dtype {images.dtype}; write images.astype(jnp.float32) / 255."
    )
  inputs.check_range(images, 0.0, 1.0)
  images = images if norm_channels == "all" else images[..., :1]
  order = 2 if norm == "l2" else jnp.inf
  flat = images.reshape(len(images), -1)
  return float(share * jnp.linalg.norm(flat, order, axis=1).mean())


def _norm(delta):
  return jnp.sqrt(jnp.square(delta).sum())


def _tiny(delta):
  return jnp.finfo(delta.dtype).tiny
