"""What a classifier decided before and after: counts that add up, and their rates.

`count` sorts examples into a table `n[truth, before, after]`. Tables of batches and of
devices add up; every rate is read from the sum, never averaged over parts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = ["confusion", "count", "rates"]


def count(
  truth: ArrayLike,
  before: ArrayLike,
  after: ArrayLike,
  *,
  num_classes: int,
  weight: ArrayLike | None = None,
) -> jax.Array:
  """The table of `(truth, decision before, decision after)`.

  Args:
    truth: `(N,)` int, true classes.
    before: `(N,)` int, decisions on the clean images.
    after: `(N,)` int, decisions on the attacked images.
    num_classes: K.
    weight: `(N,)`, 0 for padding.

  Returns:
    `(K, K, K)` int32; an example with a class outside 0..K-1 is in no cell.

  Example:
    >>> truth, before, after = jnp.array([[0, 1], [0, 0], [1, 0]])
    >>> count(truth, before, after, num_classes=2).tolist()
    [[[0, 1], [0, 0]], [[1, 0], [0, 0]]]
  """
  found = jnp.stack([jnp.asarray(v, jnp.int32) for v in (truth, before, after)])
  place = jnp.ravel_multi_index(tuple(found), (num_classes,) * 3, mode="clip")
  weight = jnp.ones(len(place)) if weight is None else jnp.asarray(weight)
  counted = ((found >= 0) & (found < num_classes)).all(0) & (weight > 0)
  table = jax.ops.segment_sum(counted.astype(jnp.int32), place, num_classes**3)
  return table.reshape((num_classes,) * 3)


def rates(table: np.ndarray, *, target: int | None = None) -> dict[str, Any]:
  """Rates of a table; NaN where nothing was counted.

      fooling    after != before          (Rf of the studies: needs no truth)
      one_class  the fooling of sending every image to the one best class for that
      error      after != truth           clean_error   before != truth
      targeted   after == target          (Rs: counts images already there before)
      moved      after == target, of those that were not there before

  Args:
    table: from `count`, or a sum of such tables.
    target: class the attack aimed at.

  Raises:
    ValueError: for a target outside the classes.

  Returns:
    `fooling`, `error`, `clean_error`, `one_class`, `per_class` (fooling of each class
    decided before), and with a target `targeted` and `moved`.

  Example:
    >>> table = np.zeros((2, 2, 2), int)
    >>> table[0, 0, 1], table[1, 1, 1] = 3, 1
    >>> result = rates(table, target=1)
    >>> result["fooling"], result["error"], result["targeted"], result["moved"]
    (0.75, 0.75, 1.0, 1.0)
  """
  table = np.asarray(table, float)
  flow = table.sum(0)  # before, after
  found = {
    "fooling": 1 - _share(np.trace(flow), flow.sum()),
    "error": 1 - _share(np.trace(table.sum(1)), table.sum()),
    "clean_error": 1 - _share(np.trace(table.sum(2)), table.sum()),
    "one_class": 1 - _share(flow.sum(1).min(), flow.sum()),
    "per_class": [1 - _share(flow[k, k], flow[k].sum()) for k in range(len(flow))],
  }
  if target is not None:
    if not 0 <= target < len(flow):
      raise ValueError(f"`target` is {target}; the classes are 0..{len(flow) - 1}.")
    away = np.delete(flow, target, 0)
    found["targeted"] = _share(flow[:, target].sum(), flow.sum())
    found["moved"] = _share(away[:, target].sum(), away.sum())
  return found


def confusion(table: np.ndarray) -> np.ndarray:
  """`(K, K)`: decisions before (rows) against decisions after (columns)."""
  return np.asarray(table).sum(0)


def _share(part, whole):
  return float(part / whole) if whole else float("nan")
