"""DeepFool: the nearest decision boundary of the linearised model, again and again."""

import jax
import jax.numpy as jnp

from jaxadv import inputs, targets, threats, transforms
from jaxadv.attacks.parts import Bounds, Scalar
from jaxadv.engine import Attack, gradient_attack
from jaxadv.types import Objective, Sample, fooled

__all__ = ["deepfool"]


def deepfool(
  *,
  num_steps: int = 50,
  num_candidates: int = 10,
  overshoot: Scalar = 0.02,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Minimum L2 distortion by steps to the nearest linearised boundary.

      f_k = z_k - z_y,  w_k = grad f_k,  k* = argmin |f_k| / ||w_k||
      x <- x + (1 + overshoot) |f_k*| w_k* / ||w_k*||^2      until the decision changes

  Args:
    num_steps: steps at most.
    num_candidates: classes in the race, those with the highest clean logits, the label
      among them. Each of the others costs one gradient per step.
    overshoot: share by which each step goes too far.
    bounds: valid range of images.

  Returns:
    An `Attack` on classes `(B,)`; examples stop at their first success.

  Raises:
    ValueError: for fewer than 2 candidates and a negative overshoot.

  Example:
    >>> weights = jnp.array([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
    >>> x, y = jnp.array([[2.0, 1.0]]), jnp.array([0])
    >>> attack = deepfool(bounds=(-10.0, 10.0))
    >>> print(attack(jax.random.key(0), lambda x: x @ weights, x, y).image.round(2))
    [[1.49 1.51]]

  Differs from the released code, which attacks the clean decision: here `y` says which
  class is to be left, and the image is kept inside the bounds.

  Reference: Moosavi-Dezfooli et al., CVPR 2016, arXiv 1511.04599.
  """
  inputs.check_positive("overshoot", overshoot)
  if num_candidates < 2:
    raise ValueError(f"`num_candidates` is {num_candidates}; write 2 or more.")
  return gradient_attack(
    Objective(_gaps, prepare=targets.rivals(num_candidates - 1)),
    threats.box(bounds=bounds),
    transforms.step_to_boundary(overshoot),
    num_steps=num_steps,
    random_start=False,
    stop=fooled,
  )


def _gaps(sample: Sample) -> jax.Array:
  """`z_k - z_y` of every rival k; by masked sums, as a gather has a slow gradient."""
  logits = sample.logits.astype(jnp.result_type(float))
  chosen = jnp.append(sample.target["rivals"], sample.target["label"])
  places = jax.nn.one_hot(chosen, logits.shape[-1], dtype=bool)
  values = jnp.where(places, logits, 0).sum(-1)
  return values[:-1] - values[-1:]
