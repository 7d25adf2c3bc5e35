"""Ways to call the model: `(predict, keys, image, clean) -> (logits, features)`.

`keys` holds one key per example and step, so randomness never couples examples.
`jaxadv.types.plain` is the default.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxadv import filters, inputs
from jaxadv.types import ForwardFn, call

__all__ = ["expectation", "input_diversity", "smoothed_twin"]

# (key, image) -> image, for one example
Augment = Callable[[jax.Array, jax.Array], jax.Array]


def expectation(augment: Augment, n: int) -> ForwardFn:
  """Expectation over transformation: mean logits and features of `n` random views.

  Args:
    augment: `(key, image) -> image` of one example, differentiable.
    n: views per step; the model sees `n * B` images.

  Returns:
    A forward.

  Reference: Athalye et al., ICML 2018, arXiv 1707.07397.
  """

  def forward(predict, keys, image, clean):
    del clean
    views = jax.vmap(lambda key, x: _views(augment, n, key, x))(keys, image)
    flat = views.reshape(-1, *views.shape[2:])
    out = call(predict, flat)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, n, *leaf.shape[1:]).mean(1), out)

  return forward


def _views(augment, n, key, image):
  return jax.vmap(augment, (0, None))(jax.random.split(key, n), image)


def input_diversity(
  *,
  probability: float | jax.Array = 0.5,
  shrink: float | jax.Array = 0.9,
  fill: float | jax.Array = 0.0,
) -> ForwardFn:
  """Input diversity: with some probability a shrunk copy at a random place.

  The image is resized bilinearly to a random scale in `[shrink, 1]` and laid at a
  random place on a canvas of `fill`. Shapes stay static: the resize is a
  `scale_and_translate`.

  Args:
    probability: of changing an example in a step.
    shrink: smallest scale.
    fill: value of the border; for fundus images use that of the background.

  Returns:
    A forward, for classes and label sets.

  Raises:
    ValueError: for logits of masks.

  Example:
    >>> forward = input_diversity(probability=1.0, shrink=0.5)
    >>> keys, image = jax.random.split(jax.random.key(0), 2), jnp.ones((2, 8, 8, 1))
    >>> logits, _ = forward(lambda x: x.mean((1, 2)), keys, image, image)
    >>> bool((logits < 1).all())  # a dark border has come in
    True

  Differs from the original code, which enlarges by up to 1.1 with nearest neighbour and
  feeds a larger image; like torchattacks, the size of the input is kept.

  Reference: Xie et al., CVPR 2019, arXiv 1803.06978.
  """
  inputs.check_share("probability", probability)
  inputs.check_share("shrink", shrink)
  inputs.check_positive("shrink", shrink, zero=False)

  def augment(key, image):
    scale_key, place_key, choice_key = jax.random.split(key, 3)
    sides = jnp.array(image.shape[:-1])
    scale = jax.random.uniform(scale_key, (), minval=shrink)
    place = jax.random.uniform(place_key, sides.shape) * (1 - scale) * sides
    axes = tuple(range(image.ndim - 1))

    def move(x):
      return jax.image.scale_and_translate(
        x, x.shape, axes, jnp.full(len(axes), scale), place, "linear"
      )

    moved = move(image - fill) + fill
    return jnp.where(jax.random.bernoulli(choice_key, probability), moved, image)

  def forward(predict, keys, image, clean):
    del clean
    logits, features = call(predict, jax.vmap(augment)(keys, image))
    if logits.ndim > 2:
      raise ValueError(
        f"logits {logits.shape} are those of masks, and diverse inputs move the image "
        "and not its mask; write another forward, such as `types.plain`."
      )
    return logits, features

  return forward


def smoothed_twin(
  sigma: float | jax.Array = 1.0,
  *,
  size: int = 3,
  smooth: Literal["perturbation", "image"] = "perturbation",
  bounds: tuple[Any, Any] = (0.0, 1.0),
) -> ForwardFn:
  """Calls the model on the attacked images, and on their smoothed twins.

  With `x` the clean and `x'` the attacked image, and `G` a Gaussian filter, the twin is

      clip(x + G (x' - x), bounds)    for `smooth="perturbation"`: the anatomy is kept
      G x' / G 1                      for `smooth="image"`

  The twin's logits are added to the features as `"smoothed_logits"`; no gradient flows
  through the twin, so a step costs two forward passes and one backward pass.

  The model is called twice, not once on the doubled batch: there the backward pass
  would run over the twins too, only to add zeros, and a step took 1.31 times as long
  (docs/performance.md).

  Args:
    sigma: of the Gaussian in pixels, > 0; may be traced.
    size: odd number of its taps.
    smooth: what is smoothed. Outside of the image a perturbation is 0; the mean of an
      image is over the pixels there are.
    bounds: valid range of images.

  Returns:
    A forward.

  Raises:
    ValueError: for another `smooth`, `sigma` not above 0, and an even size.

  Example:
    >>> clean, key = jnp.zeros((1, 3, 1)), jax.random.key(0)
    >>> image = clean.at[0, 1, 0].set(1.0)
    >>> _, features = smoothed_twin()(lambda x: x[..., 0], key, image, clean)
    >>> print(features["smoothed_logits"].round(2))
    [[0.26999998 0.45       0.26999998]]

  Differs from the released code, whose kernel is one-sided and mixes the channels.

  Reference: Qi et al., ICLR 2021, arXiv 2103.05232; see `jaxadv.attacks.smia`.
  """
  inputs.check_choice("smooth", smooth, ("perturbation", "image"))
  kernel = filters.gaussian_kernel(sigma, size)

  def blurred(image):
    return filters.blur(image, kernel.astype(image.dtype))

  def twin(image, clean):
    if smooth == "image":
      return blurred(image) / blurred(jnp.ones_like(image))
    return jnp.clip(clean + blurred(image - clean), *bounds)

  def forward(predict, keys, image, clean):
    del keys
    logits, features = call(predict, image)
    twins = jax.vmap(twin)(jax.lax.stop_gradient(image), clean)
    return logits, {**features, "smoothed_logits": call(predict, twins)[0]}

  return forward
