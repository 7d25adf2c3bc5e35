"""Augmentations for training, beside `training.flips`, through dm-pix.

Each is an `AugmentFn` of ONE example, `(key, image, label) -> (image, label)`. A mask
moves along with its image; a class or a label set stays as it is.
"""

import dm_pix
import jax
import jax.numpy as jnp

from jaxadv.training import AugmentFn

__all__ = ["affine", "chain"]


def affine(*, degrees: float = 5.0, shift: float = 0.05) -> AugmentFn:
  """Turns an image about its centre by a random angle, and shifts it.

      out(p) = image(R(a) (p - c) + c + t)
      a ~ U(-degrees, degrees),  t_i ~ U(-shift, shift) * side_i

  Both in one interpolation: linear for the image, nearest for a mask. What comes in
  from outside repeats the border. The slices of a volume move alike, in their plane.

  Args:
    degrees: largest angle.
    shift: largest shift, as a share of the side.

  Returns:
    `(key, image (H, W, C) or (D, H, W, C), label) -> (image, label)`.

  Example:
    >>> image = jnp.arange(16.0).reshape(4, 4, 1)
    >>> still, _ = affine(degrees=0, shift=0)(jax.random.key(0), image, jnp.int32(1))
    >>> bool((still == image).all())
    True

  Reference: the angle and the shift of Hirano et al., BMC Medical Imaging 21:9 (2021).
  """

  def move(key, image, label):
    motion = _motion(key, image.shape[-3:-1], degrees, shift)
    is_mask = label.shape == image.shape[:-1]
    moved = _warp(image, motion, order=1)
    if is_mask:
      label = _warp(label[..., None], motion, order=0)[..., 0]
    return moved, label

  return move


def chain(*steps: AugmentFn) -> AugmentFn:
  """Augmentations one after another, each with a key of its own.

  Example:
    >>> from jaxadv import training
    >>> image = jnp.arange(16.0).reshape(4, 4, 1)
    >>> both = chain(training.flips, affine(degrees=5, shift=0.05))
    >>> both(jax.random.key(0), image, jnp.int32(1))[0].shape
    (4, 4, 1)
  """

  def apply(key, image, label):
    for n, step in enumerate(steps):
      image, label = step(jax.random.fold_in(key, n), image, label)
    return image, label

  return apply


def _motion(key, sides, degrees, shift):
  """Matrix and offset in rows, columns and channels: where a pixel comes from."""
  angle, *shifts = jax.random.uniform(key, (3,), minval=-1.0, maxval=1.0)
  angle = jnp.deg2rad(degrees * angle)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  matrix = jnp.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
  lengths = jnp.array([*sides, 1.0])
  centre = (lengths - 1) / 2
  return matrix, centre - matrix @ centre + shift * lengths * jnp.array([*shifts, 0])


def _warp(image, motion, order):
  if image.ndim == 4:
    return jax.vmap(lambda plane: _warp(plane, motion, order))(image)
  matrix, offset = motion
  return dm_pix.affine_transform(image, matrix, offset=offset, order=order)
