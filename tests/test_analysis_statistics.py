"""Separability and correlations of labels, against closed forms and NumPy."""

import numpy as np
import pytest

from jaxadv import analysis

RNG = np.random.default_rng(0)


def blobs(gap, n=30):
  labels = np.repeat([0, 1, 2], n)
  return gap * np.eye(3)[labels] + RNG.normal(size=(3 * n, 3)), labels


def test_the_silhouette_is_its_formula():
  features, labels = blobs(2.0, 5)
  far = np.linalg.norm(features[:, None] - features[None], axis=-1)
  values = []
  for i, k in enumerate(labels):
    own = labels == k
    a = far[i, own].sum() / (own.sum() - 1)
    b = min(far[i, labels == other].mean() for other in {0, 1, 2} - {k})
    values.append((b - a) / max(a, b))
  got = analysis.silhouette(features, labels)
  assert got == pytest.approx(np.mean(values), rel=1e-9)


def test_separated_blobs_and_one_blob():
  apart, labels = blobs(100.0)
  mixed, _ = blobs(0.0)
  assert analysis.silhouette(apart, labels) > 0.95
  assert abs(analysis.silhouette(mixed, labels)) < 0.1
  assert analysis.linear_probe(apart, labels) == 1
  assert analysis.linear_probe(mixed, labels) < 0.6


def test_the_probe_is_measured_on_images_it_was_not_fitted_to():
  """Of noise with more channels than images, any fit is perfect where it was made."""
  features, labels = RNG.normal(size=(60, 200)), np.repeat([0, 1], 30)
  assert analysis.linear_probe(features, labels) < 0.75
  apart, labels = blobs(100.0)
  swapped = 100 * np.eye(3)[(labels + 1) % 3]
  assert analysis.linear_probe(apart, labels, tested=swapped) == 0
  assert analysis.linear_probe(apart, labels, tested=apart) == 1


def test_the_probe_and_the_embedding_repeat():
  features, labels = blobs(1.0, 10)
  probes = {analysis.linear_probe(features, labels, seed=3) for _ in range(2)}
  assert len(probes) == 1
  maps = [analysis.embedding(features, seed=1) for _ in range(2)]
  np.testing.assert_array_equal(*maps)


def test_the_embedding_keeps_blobs_apart():
  features, labels = blobs(50.0, 15)
  places = analysis.embedding(features)
  assert places.shape == (45, 2)
  assert analysis.silhouette(places, labels) > 0.5
  assert analysis.embedding(features[:, :1]).shape == (45, 2)


@pytest.mark.parametrize(
  ("features", "labels", "message"),
  [
    (np.ones((4, 2)), [0, 0, 0, 0], "4 images have 1 classes"),
    (np.ones((2, 2)), [0, 1], "2 images have 2 classes"),
    (np.ones((4, 2, 2)), [0, 1, 0, 1], r"write \(N, D\)"),
    (np.ones((4, 2)), [0, 1], "one for each of 4 images"),
    (np.full((4, 2), np.nan), [0, 1, 0, 1], "not all finite"),
  ],
)
@pytest.mark.parametrize("measure", [analysis.silhouette, analysis.linear_probe])
def test_what_cannot_be_measured_is_refused(measure, features, labels, message):
  with pytest.raises(ValueError, match=message):
    measure(features, np.array(labels))


def test_a_probe_needs_images_for_its_folds():
  features, labels = blobs(1.0, 3)
  with pytest.raises(ValueError, match="the smallest class has 3 images"):
    analysis.linear_probe(features, labels)
  with pytest.raises(ValueError, match=r"`tested` has shape \(9, 2\)"):
    analysis.linear_probe(features, labels, tested=features[:, :2], folds=3)


def test_an_embedding_needs_neighbours():
  with pytest.raises(ValueError, match="t-SNE of 2 images"):
    analysis.embedding(np.eye(2))
  with pytest.raises(ValueError, match=r"write a number in \(0, 5\)"):
    analysis.embedding(np.eye(5), perplexity=5.0)


@pytest.mark.parametrize("scale", [1.0, 1e-200])
def test_correlations_are_those_of_numpy(scale):
  p = RNG.uniform(size=(50, 14)) @ RNG.uniform(size=(14, 14))
  got = analysis.pearson(scale * p)
  np.testing.assert_allclose(got, np.corrcoef(p.T), rtol=1e-9, atol=1e-12)
  assert (np.diag(got) == 1).all()


def test_the_distance_of_two_correlations():
  clean, attacked = RNG.uniform(size=(2, 40, 5))
  clean[:, 1] += clean[:, 0]
  found = analysis.label_correlation(clean, attacked)
  a, b = np.corrcoef(clean.T), np.corrcoef(attacked.T)
  off = ~np.eye(5, dtype=bool)
  assert found.frobenius == pytest.approx(np.sqrt(((a - b) ** 2).sum()), rel=1e-9)
  assert found.off_diagonal_clean == pytest.approx(np.abs(a[off]).mean(), rel=1e-9)
  assert found.off_diagonal_attacked == pytest.approx(np.abs(b[off]).mean(), rel=1e-9)
  assert found.known.all()


def test_a_constant_estimate_is_named_and_left_out():
  clean, attacked = RNG.uniform(size=(2, 40, 4))
  attacked[:, 2] = 1.0  # a saturated finding
  found = analysis.label_correlation(clean, attacked)
  assert found.known.tolist() == [True, True, False, True]
  assert np.isnan(found.attacked[2]).all()
  assert not np.isnan(found.clean).any()
  rest = [0, 1, 3]
  without = analysis.label_correlation(clean[:, rest], attacked[:, rest])
  assert found.frobenius == pytest.approx(without.frobenius, rel=1e-12)
  assert np.isfinite([found.off_diagonal_clean, found.off_diagonal_attacked]).all()


@pytest.mark.parametrize(
  ("clean", "attacked", "message"),
  [
    (np.ones((4, 3)), np.eye(4)[:, :3], r"labels \[0, 1, 2\] are the same for all"),
    (np.eye(4)[:, :2], np.eye(4)[:, :3], "2 labels of clean and 3 of attacked"),
    (np.eye(4)[:1], np.eye(4), "N at least 2"),
    (np.full((3, 3), np.inf), np.eye(3), "not all finite"),
  ],
)
def test_correlations_that_do_not_exist_are_refused(clean, attacked, message):
  with pytest.raises(ValueError, match=message):
    analysis.label_correlation(clean, attacked)


def test_one_label_has_no_other():
  with pytest.raises(ValueError, match="give 2 or more"):
    analysis.off_diagonal(np.ones((1, 1)))
