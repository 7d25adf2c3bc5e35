"""Counts of decisions against scikit-learn and against counting by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as reference

from jaxadv import outcomes

rng = np.random.default_rng(0)
truth, before, after = (rng.integers(0, 4, 200) for _ in range(3))
table = np.asarray(outcomes.count(truth, before, after, num_classes=4))


def test_rates_are_counts_by_hand():
  found = outcomes.rates(table, target=2)
  assert found["fooling"] == np.mean(after != before)
  assert math.isclose(found["error"], np.mean(after != truth))
  assert math.isclose(found["clean_error"], np.mean(before != truth))
  assert math.isclose(found["targeted"], np.mean(after == 2))
  assert math.isclose(found["moved"], np.mean(after[before != 2] == 2))
  want = [np.mean(after[before == k] != k) for k in range(4)]
  np.testing.assert_allclose(found["per_class"], want)


def test_confusion_is_that_of_scikit_learn():
  np.testing.assert_array_equal(
    outcomes.confusion(table), reference.confusion_matrix(before, after)
  )


def test_tables_of_parts_add_up_and_padding_does_not_count():
  parts = [slice(0, 60), slice(60, 200)]
  tables = [outcomes.count(truth[s], before[s], after[s], num_classes=4) for s in parts]
  np.testing.assert_array_equal(sum(tables), table)
  weight = jnp.arange(200) < 60
  padded = outcomes.count(truth, before, after, num_classes=4, weight=weight)
  np.testing.assert_array_equal(padded, tables[0])


def test_an_absent_class_has_no_rate():
  table = outcomes.count(
    np.zeros(3, int), np.zeros(3, int), np.ones(3, int), num_classes=3
  )
  found = outcomes.rates(table, target=0)
  assert found["per_class"][0] == 1
  assert all(math.isnan(v) for v in found["per_class"][1:])
  assert math.isnan(found["moved"])


def test_small_integers_do_not_overflow_and_strays_are_in_no_cell():
  for dtype in (np.uint8, np.int8):
    found = outcomes.count(*np.array([[6, 6, 5]] * 3, dtype), num_classes=7)
    assert np.argwhere(found).tolist() == [[5] * 3, [6] * 3]
    assert found[6, 6, 6] == 2
  for stray in (2, -1):
    assert outcomes.count([0], [stray], [0], num_classes=2).sum() == 0


def test_a_target_outside_the_classes_is_refused():
  for target in (-1, 4):
    with pytest.raises(ValueError, match=r"the classes are 0..3"):
      outcomes.rates(table, target=target)
