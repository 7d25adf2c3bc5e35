"""How good a classifier is, read from its logits: classes, grades and label sets.

NumPy on the host, over a whole data set. A score that is not defined (a class without
images, a finding that every image has) is `None`, and means leave it out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["auroc", "classification", "label_sets", "quadratic_kappa"]


def classification(
  logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
  """Scores of decisions for one class per image.

  Balanced accuracy is the mean recall of the classes that occur, AUROC the mean of
  theirs, one against the rest.

  Args:
    logits: `(N, K)` float.
    labels: `(N,)` int in [0, K).
    class_names: K names.

  Returns:
    `accuracy`, `balanced_accuracy`, `quadratic_kappa` (for grades in order), `auroc`,
    `images`, `confusion` (rows are the truth), and for each name in `classes` its
    `recall`, `auroc` and `images`.

  Example:
    >>> report = classification(np.eye(3)[[0, 1, 1]], np.array([0, 1, 2]), "abc")
    >>> report["confusion"], report["classes"]["c"]["recall"]
    ([[1, 0, 0], [0, 1, 0], [0, 1, 0]], 0.0)
  """
  logits = np.asarray(logits, float)
  kinds = range(len(class_names))
  table = np.zeros((len(kinds), len(kinds)), int)
  np.add.at(table, (labels, logits.argmax(1)), 1)
  counts = table.sum(1)
  recalls = [_known(table[k, k] / counts[k]) if counts[k] else None for k in kinds]
  areas = [_known(auroc(_odds(logits, k), labels == k)) for k in kinds]
  return {
    "accuracy": float(np.trace(table) / len(labels)),
    "balanced_accuracy": _mean(recalls),
    "quadratic_kappa": _known(quadratic_kappa(table)),
    "auroc": _mean(areas),
    "images": len(labels),
    "confusion": table.tolist(),
    "classes": {
      name: {"recall": recalls[k], "auroc": areas[k], "images": int(counts[k])}
      for k, name in enumerate(class_names)
    },
  }


def label_sets(
  logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
  """Scores of any number of findings per image, each decided by the sign of its logit.

  Args:
    logits: `(N, L)` float.
    labels: `(N, L)` of 0 and 1.
    class_names: L names.

  Returns:
    `auroc` and `accuracy`, means over the findings, `images`, and for each name in
    `classes` its `auroc`, `accuracy` and `positives`.

  Example:
    >>> report = label_sets(np.array([[1.0], [-1.0]]), np.array([[1], [0]]), ["mass"])
    >>> report["auroc"], report["classes"]["mass"]["positives"]
    (1.0, 1)
  """
  right = ((logits > 0) == labels).mean(0)
  areas = [_known(auroc(z, y)) for z, y in zip(logits.T, labels.T == 1, strict=True)]
  return {
    "auroc": _mean(areas),
    "accuracy": float(right.mean()),
    "images": len(labels),
    "classes": {
      name: {
        "auroc": areas[k],
        "accuracy": float(right[k]),
        "positives": int(labels[:, k].sum()),
      }
      for k, name in enumerate(class_names)
    },
  }


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
  """Chance that a positive image scores above a negative one; ties count half.

  Args:
    scores: `(N,)` float.
    positive: `(N,)` bool.

  Returns:
    A float in [0, 1]; NaN without a positive or without a negative.

  Example:
    >>> auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
    0.875

  Reference: Mann and Whitney, Ann. Math. Statist. 18(1), 1947.
  """
  _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
  ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # of equal scores, their mean
  hits, misses = int(positive.sum()), int((~positive).sum())
  if not hits or not misses:
    return float("nan")
  wins = ranks[positive].sum() - hits * (hits + 1) / 2
  return float(wins / (hits * misses))


def quadratic_kappa(table: np.ndarray) -> float:
  """Agreement beyond chance that counts a miss by its squared distance in grades.

      1 - sum_ij (i - j)^2 n_ij / sum_ij (i - j)^2 n_i. n_.j / n

  Args:
    table: `(K, K)` counts, rows the truth, columns the decisions.

  Returns:
    At most 1; NaN when truth and decisions are all of one class.

  Example:
    >>> quadratic_kappa(np.array([[2, 0], [1, 1]]))
    0.5

  Reference: Cohen, Psychological Bulletin 70(4), 1968.
  """
  grades = np.arange(len(table))
  distance = np.square(grades[:, None] - grades)
  chance = np.outer(table.sum(1), table.sum(0)) / table.sum()
  expected = (distance * chance).sum()
  return float(1 - (distance * table).sum() / expected) if expected else float("nan")


def _odds(logits, k):
  """Log-odds of class `k`: in the order of its probability, but never saturated."""
  return logits[:, k] - np.logaddexp.reduce(np.delete(logits, k, 1), axis=1)


def _known(value):
  return float(value) if np.isfinite(value) else None


def _mean(values):
  known = [value for value in values if value is not None]
  return float(np.mean(known)) if known else None
