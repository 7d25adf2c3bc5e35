"""Ways to call the model: `(predict, keys, image, clean) -> (logits, features)`.

`keys` holds one key per example and step, so randomness never couples examples.
`jaxadv.types.plain` is the default.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxadv.types import ForwardFn, call

__all__ = ["expectation", "input_diversity"]

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
  *, probability: float = 0.5, shrink: float = 0.9, fill: float = 0.0
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
    A forward.

  Differs from the original code, which enlarges by up to 1.1 with nearest neighbour and
  feeds a larger image; like torchattacks, the size of the input is kept.

  Reference: Xie et al., CVPR 2019, arXiv 1803.06978.
  """

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
    return call(predict, jax.vmap(augment)(keys, image))

  return forward
