"""How estimated labels go together, and what an attack does to that.

Findings of one patient are related, and so are the probabilities that a model estimates
for them. An attack that raises one and lowers another tears them apart.
"""

from typing import NamedTuple

import numpy as np

from jaxadv.analysis.errors import UndefinedError

__all__ = ["LabelCorrelation", "label_correlation", "off_diagonal", "pearson"]


class LabelCorrelation(NamedTuple):
  """Correlations of labels on clean and on attacked images.

  Attributes:
    clean: `(L, L)`.
    attacked: `(L, L)`.
    known: `(L,)` bool, the labels whose estimate varies among both; the others have NaN
      in at least one of the matrices and do not count below.
    frobenius: Frobenius norm of `attacked - clean`.
    off_diagonal_clean: mean absolute value off the diagonal.
    off_diagonal_attacked: the same of the attacked images.
  """

  clean: np.ndarray
  attacked: np.ndarray
  known: np.ndarray
  frobenius: float
  off_diagonal_clean: float
  off_diagonal_attacked: float


def pearson(probabilities: np.ndarray) -> np.ndarray:
  """Pearson correlations of the columns over the images.

  Args:
    probabilities: `(N, L)`, N at least 2.

  Returns:
    `(L, L)` float64 in [-1, 1], exactly 1 on the diagonal. A column that is constant
    has no correlation: NaN in its row and column, and on the diagonal, by which it can
    be told.

  Raises:
    ValueError: for another rank, fewer than 2 images, and values that are not finite.

  Example:
    >>> pearson(np.array([[0.0, 1.0, 0.5], [0.5, 0.5, 0.5], [1.0, 0.0, 0.5]])).round(6)
    array([[ 1., -1., nan],
           [-1.,  1., nan],
           [nan, nan, nan]])
  """
  p = np.asarray(probabilities, np.float64)
  if p.ndim != 2 or len(p) < 2:
    raise ValueError(f"probabilities have shape {p.shape}; write (N, L), N at least 2.")
  if not np.isfinite(p).all():
    raise ValueError("the probabilities are not all finite.")
  varies = p.max(0) > p.min(0)
  centred = p - p.mean(0)
  # by the largest first: the squares of small deviations would vanish
  centred /= np.where(varies, np.abs(centred).max(0), 1)
  unit = centred / np.where(varies, np.sqrt(np.square(centred).sum(0)), 1)
  matrix = np.clip(unit.T @ unit, -1, 1)
  np.fill_diagonal(matrix, 1)
  return np.where(varies[:, None] & varies[None], matrix, np.nan)


def off_diagonal(matrix: np.ndarray) -> float:
  """Mean absolute value off the diagonal.

  Args:
    matrix: `(L, L)`, L at least 2.

  Raises:
    UndefinedError: for a single label.

  Example:
    >>> off_diagonal(np.array([[1.0, -0.5], [-0.5, 1.0]]))
    0.5
  """
  if len(matrix) < 2:
    raise UndefinedError("one label has no correlation with another; give 2 or more.")
  return float(np.abs(matrix[~np.eye(len(matrix), dtype=bool)]).mean())


def label_correlation(clean: np.ndarray, attacked: np.ndarray) -> LabelCorrelation:
  """Correlations of the estimates on clean and on attacked images, and their distance.

  Args:
    clean: `(N, L)` estimated probabilities of the clean images.
    attacked: `(M, L)` of the attacked ones.

  Raises:
    ValueError: as `pearson`, and for another number of labels.
    UndefinedError: where fewer than 2 of them vary among both.

  Example:
    >>> clean = np.array([[0.1, 0.2], [0.5, 0.6], [0.9, 0.8]])
    >>> found = label_correlation(clean, 1 - clean)
    >>> round(found.frobenius, 6), found.known.tolist()
    (0.0, [True, True])
  """
  before, after = pearson(clean), pearson(attacked)
  if before.shape != after.shape:
    raise ValueError(
      f"there are {len(before)} labels of clean and {len(after)} of attacked images."
    )
  known = ~np.isnan(np.diag(before)) & ~np.isnan(np.diag(after))
  if known.sum() < 2:
    raise UndefinedError(
      f"the estimates of labels {np.flatnonzero(~known).tolist()} are the same for all "
      "images; fewer than 2 are left to correlate."
    )
  a, b = (matrix[np.ix_(known, known)] for matrix in (before, after))
  distance = float(np.linalg.norm(b - a))
  return LabelCorrelation(
    before, after, known, distance, off_diagonal(a), off_diagonal(b)
  )
