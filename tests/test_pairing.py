import itertools

import numpy as np
import pytest

from jaxadv import masks, pairing


def _predictions(classes, n=8):
  """Predicted masks with a block of every class but background."""
  rng = np.random.default_rng(0)
  drawn = np.zeros((n, 12, 12), int)
  for mask, k in itertools.product(drawn, range(1, classes)):
    row, col = rng.integers(0, 8, 2)
    mask[row : row + 5, col : col + 4] = k
  return drawn


@pytest.mark.parametrize("classes", [2, 3])
def test_pairs_hold_what_they_promise(classes):
  predictions = _predictions(classes)
  predictions[0] = 0  # nothing to aim at
  images = np.random.default_rng(1).random((8, 12, 12, 1))
  images[7] = images[6]
  chosen = pairing.pairs(
    images, predictions, num=99, seed=0, num_classes=classes, max_iou=0.3
  )
  assert 0 not in chosen.target
  assert 0 in chosen.source
  assert not {(6, 7), (7, 6)} & set(zip(chosen.source, chosen.target, strict=True))
  for source, target, iou in zip(*chosen, strict=True):
    want = masks.iou(predictions[source], predictions[target], classes).item()
    assert iou == pytest.approx(want, abs=1e-6)
    assert iou < 0.3


def test_fewer_pairs_are_a_prefix_and_the_seed_decides():
  predictions = _predictions(2)
  images = np.arange(8)[:, None]
  draw = lambda num, seed: pairing.pairs(
    images, predictions, num=num, seed=seed, num_classes=2
  )
  many, few = draw(20, 0), draw(5, 0)
  for a, b in zip(many, few, strict=True):
    np.testing.assert_array_equal(a[:5], b)
  assert (draw(20, 1).source != many.source).any()
  seen = list(zip(many.source, many.target, strict=True))
  assert len(set(seen)) == 20
  rest = pairing.pairs(
    images, predictions, num=99, seed=0, num_classes=2, exclude=seen, max_iou=1.1
  )
  assert not set(seen) & set(zip(rest.source, rest.target, strict=True))


def test_no_pair_is_an_error():
  images = np.arange(4)[:, None]
  with pytest.raises(ValueError, match="no pair of 4 images is admitted: 0 predicted"):
    pairing.pairs(images, np.zeros((4, 8, 8), int), num=1, seed=0, num_classes=2)
  with pytest.raises(ValueError, match="4 images but 3"):
    pairing.pairs(images, np.zeros((3, 8, 8), int), num=1, seed=0, num_classes=2)
