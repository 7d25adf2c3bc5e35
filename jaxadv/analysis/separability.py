"""Whether the classes lie apart in a feature space: two numbers and a picture of it.

Of NumPy arrays `(N, D)`, by scikit-learn (`pip install jaxadv[report]`). Use the
penultimate features, `"pooled"` in our classifiers, of clean and of attacked images. A
t-SNE embedding is only to look at; the silhouette and the probe are measures.
"""

import numpy as np

from jaxadv.analysis.errors import UndefinedError

__all__ = ["embedding", "linear_probe", "silhouette"]


def silhouette(features: np.ndarray, labels: np.ndarray) -> float:
  """Mean over the images of `(b - a) / max(a, b)`, in [-1, 1]: high where classes part.

  `a` is the mean distance to the images of the same class, `b` that to those of the
  nearest other one.

  Args:
    features: `(N, D)`.
    labels: `(N,)` int; of a label set, one column at a time.

  Raises:
    UndefinedError: for fewer than 2 classes or as many as images.
    ValueError: for features that are not finite.

  Example:
    >>> features = np.array([[0.0], [0.0], [1.0], [1.0]])
    >>> silhouette(features, np.array([0, 0, 1, 1]))
    1.0

  Reference: Rousseeuw, J. Comput. Appl. Math. 20, 1987.
  """
  from sklearn import metrics

  features, labels = _checked(features, labels)
  return float(metrics.silhouette_score(features, labels))


def linear_probe(
  features: np.ndarray,
  labels: np.ndarray,
  *,
  tested: np.ndarray | None = None,
  folds: int = 5,
  seed: int = 0,
) -> float:
  """Accuracy of a linear classifier of the features, on images it was not fitted to.

  Logistic regression on standardized features, cross-validated in stratified folds.

  Args:
    features: `(N, D)`, to fit.
    labels: `(N,)` int.
    tested: `(N, D)` features of the same images, to measure on; `features` by default.
      With clean `features` and attacked `tested`, no image is on both sides.
    folds: how often it is fitted; each class needs as many images.
    seed: of the folds.

  Returns:
    The share of right decisions over all N, each by the fit that left its image out.

  Raises:
    UndefinedError: for fewer than 2 classes or as many as images, and for a class with
      fewer images than `folds`.
    ValueError: for features that are not finite or of another shape, and fewer than 2
      folds.

  Example:
    >>> features = np.repeat([[0.0], [1.0]], 5, 0)
    >>> linear_probe(features, np.repeat([0, 1], 5))
    1.0
  """
  from sklearn import linear_model, model_selection, pipeline, preprocessing

  features, labels = _checked(features, labels)
  tested, _ = (features, labels) if tested is None else _checked(tested, labels)
  if tested.shape != features.shape:
    raise ValueError(
      f"`tested` has shape {tested.shape}, and the features {features.shape}."
    )
  fewest = np.unique(labels, return_counts=True)[1].min()
  if folds < 2:
    raise ValueError(f"`folds` is {folds}; write 2 or more.")
  if folds > fewest:
    raise UndefinedError(
      f"`folds` is {folds}, and the smallest class has {fewest} images; write a number "
      "between 2 and that."
    )
  split = model_selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
  right = 0
  for fitted, left_out in split.split(features, labels):
    probe = pipeline.make_pipeline(
      preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=1000)
    )
    probe.fit(features[fitted], labels[fitted])
    right += (probe.predict(tested[left_out]) == labels[left_out]).sum()
  return float(right / len(labels))


def embedding(
  features: np.ndarray, *, perplexity: float | None = None, seed: int = 0
) -> np.ndarray:
  """A t-SNE embedding in the plane; only to look at.

  Embed what is to be compared in one call, as in `np.concatenate([clean, attacked])`:
  two embeddings have nothing to do with each other.

  Args:
    features: `(N, D)`, 3 or more.
    perplexity: about how many neighbours count; below N. 30 by default, or a third of
      N - 1 where that is less.
    seed: of the optimization.

  Returns:
    `(N, 2)`.

  Raises:
    ValueError: for fewer than 3 images, features that are not finite, and a perplexity
      outside (0, N).

  Example:
    >>> embedding(np.eye(6)).shape
    (6, 2)

  Reference: van der Maaten, Hinton, JMLR 9, 2008.
  """
  import threadpoolctl
  from sklearn import manifold

  features = _matrix(features)
  n = len(features)
  if n < 3:
    raise ValueError(f"t-SNE of {n} images; give 3 or more.")
  perplexity = min(30.0, (n - 1) / 3) if perplexity is None else perplexity
  if not 0 < perplexity < n:
    raise ValueError(f"`perplexity` is {perplexity}; write a number in (0, {n}).")
  # a random start: that by principal components needs as many channels as axes
  start = "pca" if features.shape[1] > 1 else "random"
  model = manifold.TSNE(2, perplexity=perplexity, init=start, random_state=seed)
  # its threads wait for each other in every one of 1,000 short steps: on a busy machine
  # that takes a hundred times as long as to do without
  with threadpoolctl.threadpool_limits(1):
    return model.fit_transform(features)


def _checked(features, labels):
  features, labels = _matrix(features), np.asarray(labels)
  if labels.shape != (len(features),):
    raise ValueError(
      f"the labels have shape {labels.shape}; there must be one for each of "
      f"{len(features)} images."
    )
  classes = len(np.unique(labels))
  if not 2 <= classes < len(labels):
    raise UndefinedError(
      f"{len(labels)} images have {classes} classes; there must be 2 or more, and "
      "fewer than images."
    )
  return features, labels


def _matrix(features):
  features = np.asarray(features, np.float64)
  if features.ndim != 2:
    raise ValueError(
      f"the features have shape {features.shape}; write (N, D), the mean over the "
      "pixels of a map."
    )
  if not np.isfinite(features).all():
    raise ValueError("the features are not all finite.")
  return features
