"""How good a classifier is, read from its logits: classes, grades and label sets.

NumPy on the host, over a whole data set. A score that is not defined (a class without
images, a finding that every image has) is `None`, and means leave it out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = [
  "auroc",
  "classification",
  "decisions",
  "flipped_labels",
  "label_sets",
  "quadratic_kappa",
]


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
  logits: np.ndarray,
  labels: np.ndarray,
  class_names: Sequence[str],
  *,
  threshold: float = 0.5,
  valid: np.ndarray | None = None,
) -> dict[str, Any]:
  """Scores of any number of findings per image, each decided by its probability.

  Args:
    logits: `(N, L)` float.
    labels: `(N, L)` of 0 and 1.
    class_names: L names.
    threshold: probability above which a finding is reported, in (0, 1).
    valid: `(N, L)` bool, labels that are known; all by default.

  Returns:
    `auroc` and `accuracy`, means over the findings; `exact_match`, the share of images
    whose known labels, if any, are all right; `images`, `threshold`, and for each name
    in `classes` its `auroc`, `accuracy` and `positives`.

  Raises:
    ValueError: for a threshold outside (0, 1), known labels other than 0 and 1, and
      another number of names.

  Example:
    >>> report = label_sets(np.array([[1.0], [-1.0]]), np.array([[1], [0]]), ["mass"])
    >>> report["auroc"], report["classes"]["mass"]["positives"]
    (1.0, 1)
  """
  labels, valid = _known_labels(labels, valid, class_names)
  right = (decisions(logits, threshold) == labels) | ~valid
  classes = {}
  for k, name in enumerate(class_names):
    known = valid[:, k]
    classes[name] = {
      "auroc": _known(auroc(np.asarray(logits)[known, k], labels[known, k])),
      "accuracy": _share(right[known, k]),
      "positives": int(labels[known, k].sum()),
    }
  return {
    "auroc": _mean([found["auroc"] for found in classes.values()]),
    "accuracy": _mean([found["accuracy"] for found in classes.values()]),
    "exact_match": _share(right.all(1)[valid.any(1)]),
    "images": len(labels),
    "threshold": threshold,
    "classes": classes,
  }


def flipped_labels(
  clean: np.ndarray,
  attacked: np.ndarray,
  labels: np.ndarray,
  class_names: Sequence[str],
  *,
  threshold: float = 0.5,
  valid: np.ndarray | None = None,
) -> dict[str, Any]:
  """What an attack does to the findings: those that change, vanish and appear.

  Missed findings and false alarms differ for a patient, so they are counted apart.

  Args:
    clean: `(N, L)` logits of the clean images.
    attacked: `(N, L)` logits of the attacked ones.
    labels: `(N, L)` of 0 and 1.
    class_names: L names.
    threshold: as for `label_sets`.
    valid: as for `label_sets`.

  Returns:
    `fooling`, the share of known labels decided otherwise than on the clean image;
    `any_flipped`, the share of images with one of these; `hidden`, of the present
    findings that were reported those that no longer are; `invented`, of the absent
    ones that were not reported those that now are; and for each name in `classes` its
    `fooling`, `hidden` and `invented`. `None` where there is nothing to count.

  Raises:
    ValueError: as `label_sets`.

  Example:
    >>> clean, attacked = np.array([[2.0, -1.0]]), np.array([[-1.0, -2.0]])
    >>> report = flipped_labels(clean, attacked, np.array([[1, 0]]), ["mass", "node"])
    >>> report["fooling"], report["hidden"], report["invented"]
    (0.5, 1.0, 0.0)
  """
  before, after = (decisions(logits, threshold) for logits in (clean, attacked))
  truth, valid = _known_labels(labels, valid, class_names)

  def rates(columns):
    took, gave, known = (v[:, columns] for v in (before, after, valid))
    present = truth[:, columns]
    return {
      "fooling": _share((took != gave)[known]),
      "hidden": _share(~gave[known & present & took]),
      "invented": _share(gave[known & ~present & ~took]),
    }

  found = rates(slice(None))
  flipped = ((before != after) & valid).any(1)
  found["any_flipped"] = _share(flipped[valid.any(1)])
  found["classes"] = {name: rates([k]) for k, name in enumerate(class_names)}
  return found


def decisions(logits: np.ndarray, threshold: float = 0.5) -> np.ndarray:
  """Which findings are reported: `sigmoid(z) > threshold`.

  Raises:
    ValueError: for a threshold outside (0, 1).

  Example:
    >>> decisions(np.array([0.5, 2.0]), 0.7).tolist()
    [False, True]
  """
  if not 0 < threshold < 1:
    raise ValueError(f"`threshold` is {threshold}; write a probability, such as 0.5.")
  return np.asarray(logits) > np.log(threshold / (1 - threshold))


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
  """Chance that a positive image scores above a negative one; ties count half.

  Args:
    scores: `(N,)` float.
    positive: `(N,)` bool, or 0 and 1.

  Returns:
    A float in [0, 1]; NaN without a positive or without a negative.

  Example:
    >>> auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
    0.875

  Reference: Mann and Whitney, Ann. Math. Statist. 18(1), 1947.
  """
  positive = np.asarray(positive, bool)
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


def _known_labels(labels, valid, class_names):
  """Which labels are present, and which count."""
  labels = np.asarray(labels)
  valid = np.ones(labels.shape, bool) if valid is None else np.asarray(valid, bool)
  if labels.shape[1] != len(class_names):
    raise ValueError(
      f"labels have shape {labels.shape}, and there are {len(class_names)} names; "
      "write one name for each label."
    )
  odd = labels[valid & (labels != 0) & (labels != 1)]
  if odd.size:
    raise ValueError(
      f"a label is {odd[0]}; write 0 and 1, and `valid` for unknown ones."
    )
  return labels == 1, valid


def _share(hits):
  return float(np.mean(hits)) if np.size(hits) else None


def _known(value):
  return float(value) if np.isfinite(value) else None


def _mean(values):
  known = [value for value in values if value is not None]
  return float(np.mean(known)) if known else None
