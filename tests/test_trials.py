"""One attack on batches of pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import combine, data, trials


def predict(variables, images):
  """Two classes: bright pixels are foreground."""
  del variables
  return jnp.concatenate([0.5 - images, images - 0.5], -1)


def scene(threshold):
  """One pair whose masks overlap by exactly 19 of 20 pixels."""
  images = np.zeros((2, 16, 16, 1), np.float32)
  images[0, :1, :16], images[0, 1, :3] = 1, 1
  images[1, :1, :16], images[1, 1, :4] = 1, 1
  masks = (images[..., 0] > 0.5).astype(np.int32)
  pairs = data.Pairs(np.array([0]), np.array([1]), np.array([0.95]))
  key, ids = jax.random.key(0), np.arange(2)
  return trials.Scene(predict, {}, images, masks, ids, pairs, key, threshold)


@pytest.mark.parametrize(("threshold", "won"), [(0.95, 1), (0.951, 0), (0.94, 1)])
def test_an_overlap_of_exactly_the_threshold_is_a_success(threshold, won):
  program = jax.jit(
    lambda variables, *rest: combine.identity(
      rest[0], functools.partial(predict, variables), *rest[1:]
    )
  )
  rows, _ = trials.run_batch(scene(threshold), program, [0], 1)
  assert rows[0]["iou_8bit"] == pytest.approx(0.95)
  assert rows[0]["success_8bit"] == won
