"""Scores of classifiers against scikit-learn, and what is not defined."""

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as reference

from jaxadv import scores

NAMES = ("none", "mild", "severe", "worst")


def guesses(classes, n=200):
  rng = np.random.default_rng(classes)
  labels = rng.integers(0, classes, n)
  logits = rng.normal(0, 1, (n, classes)) + 1.2 * np.eye(classes)[labels]
  return logits.astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_of_classes_are_those_of_scikit_learn(classes):
  logits, labels = guesses(classes)
  report = scores.classification(logits, labels, NAMES[:classes])
  decided = logits.argmax(1)
  chance = special.softmax(logits.astype(float), 1)
  want = {
    "accuracy": reference.accuracy_score(labels, decided),
    "balanced_accuracy": reference.balanced_accuracy_score(labels, decided),
    "quadratic_kappa": reference.cohen_kappa_score(
      labels, decided, weights="quadratic"
    ),
    "auroc": reference.roc_auc_score(
      labels, chance[:, 1] if classes == 2 else chance, multi_class="ovr"
    ),
  }
  assert {name: report[name] for name in want} == pytest.approx(want, abs=1e-12)
  recalls = reference.recall_score(labels, decided, average=None)
  found = [report["classes"][name]["recall"] for name in NAMES[:classes]]
  np.testing.assert_allclose(found, recalls, atol=1e-12)
  table = reference.confusion_matrix(labels, decided)
  np.testing.assert_array_equal(report["confusion"], table)


def test_scores_of_label_sets_are_those_of_scikit_learn():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 2, (100, 3))
  # Rounded, so that many scores are equal.
  logits = np.round(rng.normal(0, 1, (100, 3)) + labels, 1)
  report = scores.label_sets(logits, labels, NAMES[:3])
  assert report["auroc"] == pytest.approx(reference.roc_auc_score(labels, logits))
  assert report["accuracy"] == pytest.approx(((logits > 0) == labels).mean())
  each = reference.roc_auc_score(labels, logits, average=None)
  found = [entry["auroc"] for entry in report["classes"].values()]
  np.testing.assert_allclose(found, each, atol=1e-12)


def test_a_class_without_images_has_no_score_and_spoils_none():
  logits, labels = guesses(2)
  wider = np.concatenate([logits, np.full((200, 1), -9.0)], 1)
  with_it = scores.classification(wider, labels, NAMES[:3])
  without = scores.classification(logits, labels, NAMES[:2])
  assert with_it["balanced_accuracy"] == without["balanced_accuracy"]
  assert with_it["classes"]["severe"] == {"recall": None, "auroc": None, "images": 0}
  assert with_it["auroc"] == pytest.approx(without["auroc"], abs=1e-3)


def test_one_class_alone_has_no_auroc_and_no_kappa():
  report = scores.classification(np.array([[3.0, 1.0]]), np.array([0]), NAMES[:2])
  assert report["accuracy"] == 1
  assert report["auroc"] is report["quadratic_kappa"] is None


def test_sure_logits_keep_their_order():
  """Probabilities of these are all exactly 1 in floating point."""
  logits = np.array([[60.0, 0.0], [70.0, 0.0], [80.0, 0.0], [90.0, 0.0]])
  report = scores.classification(logits, np.array([1, 1, 0, 0]), NAMES[:2])
  assert report["auroc"] == 1
