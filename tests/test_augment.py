"""Augmentations move masks with images, follow the key, and map over examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxadv import augment, training

KEYS = jax.random.split(jax.random.key(0), 5)


def disc(size=48):
  """A disc off the centre; its blurred image is above 1/2 where the mask is 1."""
  y, x = np.mgrid[:size, :size]
  mask = ((y - 18) ** 2 + (x - 27) ** 2 < 90).astype(np.int32)
  return jnp.asarray(ndimage.gaussian_filter(mask.astype(float), 1.0))[..., None], mask


def test_image_and_mask_move_together():
  image, mask = disc()
  move = jax.jit(augment.affine(degrees=20, shift=0.1))
  for key in KEYS:
    moved, label = move(key, image, jnp.asarray(mask))
    assert label.dtype == jnp.int32
    assert set(np.unique(label)) == {0, 1}
    assert (label != mask).sum() > 20
    assert ((moved[..., 0] > 0.5) != label).mean() < 0.01
    assert 0 <= moved.min() <= moved.max() <= 1


def test_the_centre_stays_and_the_shift_is_a_share_of_the_side():
  y, x = np.mgrid[:41, :21]
  ramp = jnp.stack([jnp.asarray(y), jnp.asarray(x)], -1) / 100.0
  turn = jax.jit(jax.vmap(augment.affine(degrees=30, shift=0.0), (0, None, None)))
  np.testing.assert_allclose(
    turn(KEYS, ramp, jnp.int32(0))[0][:, 20, 10], np.tile([0.2, 0.1], (5, 1)), atol=1e-6
  )
  slide = jax.jit(jax.vmap(augment.affine(degrees=0, shift=0.1), (0, None, None)))
  moved, label = slide(jax.random.split(KEYS[0], 200), ramp, jnp.int32(7))
  distance = 100 * np.abs(np.asarray(moved)[:, 20, 10] - np.asarray(ramp)[20, 10])
  assert (distance.max(0) <= [4.1 + 1e-4, 2.1 + 1e-4]).all()
  assert (distance.max(0) > [3.7, 1.9]).all()
  assert (label == 7).all()


def test_slices_of_a_volume_move_alike():
  image, mask = disc()
  volume, labels = jnp.stack([image] * 3), jnp.stack([jnp.asarray(mask)] * 3)
  moved, label = augment.affine()(KEYS[1], volume, labels)
  flat, wanted = augment.affine()(KEYS[1], image, jnp.asarray(mask))
  np.testing.assert_allclose(moved, np.stack([flat] * 3), atol=1e-6)
  np.testing.assert_array_equal(label, np.stack([wanted] * 3))


@pytest.mark.parametrize("label", [jnp.int32(2), jnp.array([0, 1, 1])])
def test_classes_and_label_sets_stay(label):
  image, _ = disc()
  both = augment.chain(training.flips, augment.affine())
  moved, kept = both(KEYS[0], image, label)
  assert moved.shape == image.shape
  np.testing.assert_array_equal(kept, label)


def test_a_chain_draws_a_key_for_each_link():
  def noise(key, image, label):
    return image + jax.random.normal(key), label

  twice = augment.chain(noise, noise)
  total = twice(KEYS[0], jnp.zeros((2, 2, 1)), 0)[0][0, 0, 0]
  drawn = [jax.random.normal(jax.random.fold_in(KEYS[0], n)) for n in range(2)]
  assert total == pytest.approx(float(sum(drawn)), abs=1e-6)
  assert drawn[0] != drawn[1]


def test_an_example_does_not_depend_on_its_batch():
  image, mask = disc()
  images = jnp.stack([image, 1 - image, image**2])
  masks = jnp.stack([jnp.asarray(mask)] * 3)
  both = jax.jit(jax.vmap(augment.chain(training.flips, augment.affine())))
  whole = both(KEYS[:3], images, masks)
  alone = both(KEYS[1:2], images[1:2], masks[1:2])
  np.testing.assert_array_equal(whole[0][1], alone[0][0])
  np.testing.assert_array_equal(whole[1][1], alone[1][0])
