"""Whether the robustness that was measured is there: signs of masked gradients.

A model whose gradients mislead looks robust until a better attack comes. Every check
compares counts of views made by `jaxadv.robustness.measure`; nothing is computed anew.
Passing them is no proof: they notice the known ways to be fooled.
"""

from typing import NamedTuple

import numpy as np

from jaxadv import data, inputs, robustness

__all__ = ["Check", "Verdict", "judge"]

# The stored images tell nothing of gradients.
_NEEDED = tuple(name for name in robustness.VIEWS if name != "quantised")


class Check(NamedTuple):
  """One check.

  Attributes:
    name: of the check, see `judge`.
    passed: whether nothing speaks against the numbers.
    evidence: a sentence with the counts.
  """

  name: str
  passed: bool
  evidence: str


class Verdict(NamedTuple):
  """All checks of a model at a radius.

  Attributes:
    checks: in the order of `judge`.
  """

  checks: tuple[Check, ...]

  @property
  def reliable(self) -> bool:
    """Whether every check passed."""
    return not self.failed

  @property
  def failed(self) -> tuple[str, ...]:
    """Names of the checks that did not pass."""
    return tuple(check.name for check in self.checks if not check.passed)


def judge(
  found: robustness.Found, dataset: data.Dataset, *, slack: float = 0.02
) -> Verdict:
  """Looks for signs that the attacks failed, and not the robustness won.

      repeat    two calls on the clean images give the same logits, to 1e-5 of them
      gradient  FGSM changes the logits of an image, by more than that
      fgsm      FGSM does not beat PGD
      steps     more steps of PGD do not hurt
      radius    at the large radius no image is right, and no label on most images
      noise     random signs do not beat PGD
      square    Square does not beat the worst white-box view of each image

  One attack beats another where it leaves fewer decisions right, by more than the
  slack. An image of a class is one decision, of a label set one for each label.
  `gradient` counts images; `square` and `radius` those with every decision right, as
  Square stops at the first wrong one of an image, where the others raise the loss of
  all. Of label sets that hide nothing PGD leaves some labels right too, so a label
  speaks against the model when it is right on more than half of the images.

  Args:
    found: from `robustness.measure`, with all its views but perhaps `quantised`.
    dataset: which was measured.
    slack: share of the decisions or images that may speak against the model, in [0, 1];
      one of them always may.

  Returns:
    A `Verdict`; `reliable` is false if one check failed.

  Raises:
    ValueError: for a view that is missing, and a slack outside [0, 1].

  Example:
    >>> y = np.array([0, 1, 0, 1])
    >>> dataset = data.Dataset(np.zeros((4, 2, 2, 1)), y, y, ["x"] * 4, ("a", "b"))
    >>> found = dict.fromkeys(robustness.VIEWS, np.eye(2)[y])
    >>> found["fgsm"] = np.eye(2)[1 - y]
    >>> verdict = judge(found, dataset)
    >>> verdict.reliable, verdict.failed
    (False, ('fgsm', 'radius'))
    >>> verdict.checks[2].evidence
    'FGSM leaves 0 of 4 decisions right, PGD 4.'

  Reference: Athalye et al., ICML 2018, arXiv 1802.00420; Carlini et al. 2019, arXiv
  1902.06705.
  """
  inputs.check_share("slack", slack)
  missing = [name for name in _NEEDED if name not in found]
  if missing:
    raise ValueError(f"views are missing: {', '.join(missing)}; measure all of them.")
  worst = robustness.worst(found, dataset.labels)
  right = {
    name: robustness.right(logits, dataset.labels)
    for name, logits in {**found, "worst": worst}.items()
  }
  return Verdict(
    (
      _repeat(found["clean"], found["again"]),
      _gradient(found["clean"], found["fgsm"], slack),
      _compare("fgsm", right["fgsm"], right["pgd"], slack, "FGSM leaves", "PGD"),
      _compare(
        "steps",
        right["pgd once"],
        right["pgd long"],
        slack,
        "A run of PGD leaves",
        "with more steps",
      ),
      _radius(right["pgd large"], dataset, slack),
      _compare(
        "noise", right["noise"], right["pgd"], slack, "Random signs leave", "PGD"
      ),
      _square(right["square"].all(1), right["worst"].all(1), slack),
    )
  )


def _compare(name, weak, strong, slack, weak_leaves, strong_one):
  """The attack that should be weaker leaves at least as many decisions right."""
  passed = weak.sum() >= strong.sum() - _allowed(weak.size, slack)
  evidence = (
    f"{weak_leaves} {weak.sum()} of {weak.size} decisions right, "
    f"{strong_one} {strong.sum()}."
  )
  return Check(name, bool(passed), evidence)


def _square(square, worst, slack):
  """By images: Square leaves an image alone once one of its decisions is wrong."""
  passed = square.sum() >= worst.sum() - _allowed(len(square), slack)
  evidence = (
    f"Square leaves {square.sum()} of {len(square)} images without a wrong decision, "
    f"the worst white-box attack of each image {worst.sum()}."
  )
  return Check("square", bool(passed), evidence)


def _repeat(clean, again):
  gap, size = _gaps(clean, again).max(), np.abs(clean).max()
  evidence = f"Two calls differ by up to {gap:.3g} in logits of up to {size:.3g}."
  return Check("repeat", bool(gap <= _rounding(clean)), evidence)


def _gradient(clean, fgsm, slack):
  same = _gaps(clean, fgsm) <= _rounding(clean)
  evidence = f"On {same.sum()} of {len(same)} images FGSM changes no logit."
  return Check("gradient", bool(same.sum() <= _allowed(len(same), slack)), evidence)


def _radius(right, dataset, slack):
  left, count = right.all(1).sum(), len(right)
  passed = left <= _allowed(count, slack)
  evidence = f"At the large radius {left} of {count} images are still right."
  if dataset.kind == "set":
    held = right.sum(0)
    passed &= held.max() <= max(1, count / 2)
    name = dataset.class_names[held.argmax()]
    evidence += f" The label {name} is right on {held.max()}."
  return Check("radius", bool(passed), evidence)


def _gaps(a, b):
  return np.abs(a - b).max(1)


def _rounding(logits):
  """What two compiled programs may differ by, and two calls of one on some devices."""
  return 1e-5 * (1 + np.abs(logits).max())


def _allowed(count, slack):
  return max(1, int(slack * count))
