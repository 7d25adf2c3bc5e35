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


def test_zeros_and_ones_are_as_good_as_false_and_true():
  truth, found = np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.4, 0.5, 0.5, 0.9])
  wanted = reference.roc_auc_score(truth, found)
  assert scores.auroc(found, truth) == scores.auroc(found, truth > 0) == wanted


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


def logits_of(*probabilities):
  return special.logit(np.array(probabilities))


TRUTH = np.array([[1, 0, 0], [0, 1, 0]])
CLEAN = logits_of((0.8, 0.2, 0.6), (0.4, 0.9, 0.1))
ATTACKED = logits_of((0.3, 0.2, 0.9), (0.6, 0.4, 0.1))


@pytest.mark.parametrize(
  ("threshold", "accuracies", "matches"),
  [(0.5, (5 / 6, 1 / 3), (0.5, 0.0)), (0.7, (1.0, 0.5), (1.0, 0.0))],
)
def test_the_vector_of_label_sets(threshold, accuracies, matches):
  for logits, accuracy, match in zip(
    (CLEAN, ATTACKED), accuracies, matches, strict=True
  ):
    report = scores.label_sets(logits, TRUTH, NAMES[:3], threshold=threshold)
    assert report["accuracy"] == pytest.approx(accuracy)
    assert report["exact_match"] == match
  args = CLEAN, ATTACKED, TRUTH, NAMES[:3]
  assert scores.flipped_labels(*args, threshold=threshold)["fooling"] == 0.5


def test_missed_findings_and_false_alarms_are_counted_apart():
  report = scores.flipped_labels(CLEAN, ATTACKED, TRUTH, NAMES[:3])
  assert report["hidden"] == 1.0  # both that were found
  assert report["invented"] == pytest.approx(1 / 3)  # of none, none and severe, one
  assert report["any_flipped"] == 1.0
  none, mild, severe = report["classes"].values()
  assert (none["hidden"], none["invented"]) == (1.0, 1.0)
  assert (mild["hidden"], mild["invented"]) == (1.0, 0.0)
  assert severe == {"fooling": 0.0, "hidden": None, "invented": 0.0}


def test_labels_that_are_not_known_do_not_count():
  valid = np.array([[True, True, False], [True, True, True]])
  whole = scores.label_sets(CLEAN, TRUTH, NAMES[:3], valid=valid)
  assert whole["exact_match"] == 1.0  # the only wrong one is not known
  assert whole["classes"]["severe"]["auroc"] is None
  other = np.where(valid, TRUTH, 1)
  assert scores.label_sets(CLEAN, other, NAMES[:3], valid=valid) == whole
  flips = scores.flipped_labels(CLEAN, ATTACKED, other, NAMES[:3], valid=valid)
  assert flips["fooling"] == pytest.approx(3 / 5)


def test_exact_match_and_accuracy_are_those_of_scikit_learn():
  rng = np.random.default_rng(1)
  logits, labels = rng.normal(size=(60, 3)), rng.integers(0, 2, (60, 3))
  report = scores.label_sets(logits, labels, NAMES[:3], threshold=0.6)
  decided = special.expit(logits) > 0.6
  assert report["exact_match"] == reference.accuracy_score(labels, decided)
  want = 1 - reference.hamming_loss(labels, decided)
  assert report["accuracy"] == pytest.approx(want)


@pytest.mark.parametrize("threshold", [0.0, 1.0, np.nan])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
  with pytest.raises(ValueError, match=r"`threshold` is .*write a probability"):
    scores.label_sets(CLEAN, TRUTH, NAMES[:3], threshold=threshold)


def test_images_without_a_known_label_are_no_match_and_no_flip():
  valid = np.array([[False] * 3, [True] * 3])
  args = TRUTH, NAMES[:3]
  assert scores.label_sets(ATTACKED, *args, valid=valid)["exact_match"] == 0.0
  assert scores.flipped_labels(CLEAN, CLEAN, *args, valid=valid)["any_flipped"] == 0.0
  none = np.zeros((2, 3), bool)
  assert scores.label_sets(CLEAN, *args, valid=none)["exact_match"] is None


@pytest.mark.parametrize(
  ("labels", "names", "message"),
  [
    (TRUTH - 1, NAMES[:3], "a label is -1; write 0 and 1"),
    (TRUTH, NAMES[:2], r"labels have shape \(2, 3\), and there are 2 names"),
  ],
)
def test_labels_that_are_none_are_refused(labels, names, message):
  with pytest.raises(ValueError, match=message):
    scores.label_sets(CLEAN, labels, names)
