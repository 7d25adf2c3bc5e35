"""Decisions and overlaps against scikit-learn and the published conventions."""

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from jaxadv import masks


def random_masks(classes, seed, shape=(6, 7)):
  rng = np.random.default_rng(seed)
  return rng.integers(0, classes, shape), rng.integers(0, classes, shape)


def test_decisions():
  tied = jnp.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
  assert masks.decision(tied, jnp.zeros(2, int)).tolist() == [0, 1]
  signs = masks.decision(jnp.array([0.1, 0.0, -3.0]), jnp.ones(3, int))
  assert signs.tolist() == [1, 0, 0]
  assert masks.decision(jnp.ones((2, 3, 4, 2)), jnp.ones((2, 3, 4))).shape == (2, 3, 4)


@pytest.mark.parametrize("shape", [(6, 7), (3, 4, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_iou_and_accuracy_against_scikit_learn(shape, seed):
  a, b = random_masks(2, seed, shape)
  want = sklearn.metrics.jaccard_score(b.ravel(), a.ravel())
  assert masks.iou(jnp.asarray(a), jnp.asarray(b), 2) == pytest.approx(want, abs=1e-6)
  assert masks.pixel_accuracy(jnp.asarray(a), jnp.asarray(b)) == pytest.approx(
    sklearn.metrics.accuracy_score(b.ravel(), a.ravel()), abs=1e-6
  )
  a, b = random_masks(3, seed, shape)
  want = sklearn.metrics.jaccard_score(b.ravel(), a.ravel(), average="macro")
  # a fourth class that neither mask holds does not count
  assert masks.iou(jnp.asarray(a), jnp.asarray(b), 4) == pytest.approx(want, abs=1e-6)


def test_iou_symmetric_bounded_and_one_only_for_equal_masks():
  a, b = (jnp.asarray(m) for m in random_masks(2, 9))
  assert masks.iou(a, b, 2) == masks.iou(b, a, 2)
  assert 0 < masks.iou(a, b, 2) < 1
  assert masks.iou(a, a, 2) == 1
  assert masks.iou(a, 1 - a, 2) == 0


def test_empty_masks():
  empty, full = jnp.zeros((3, 3), int), jnp.ones((3, 3), int)
  assert masks.iou(empty, empty, 2) == 1
  assert masks.iou(full, empty, 2) == 0
  assert masks.iou(empty, empty, 3) == 1


def test_ignored_pixels_do_not_count():
  prediction, label = jnp.array([0, 1, 1, 0]), jnp.array([255, 1, 0, 0])
  valid = label != 255
  assert masks.iou(prediction, label, 2, valid) == pytest.approx(0.5)
  assert masks.pixel_accuracy(prediction, label, valid) == pytest.approx(2 / 3)
  assert masks.pixel_accuracy(prediction, label, valid & False) == 1
