"""What people look at after `jaxadv uap`: the table, the patterns, the report page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxadv import outcomes, report

__all__ = ["Exhibit", "page", "pattern", "rates", "row", "table"]

_RATES = ("fooling", "error", "clean_error", "targeted", "moved", "one_class")


class Exhibit(NamedTuple):
  """One crafted perturbation and what it did.

  Attributes:
    title: victim, name and share.
    delta: `(H, W, C)` float.
    clean: `(H, W, C)` uint8, a test image.
    attacked: `(H, W, C)` uint8, the same image with the perturbation, as stored.
    outcome: `(K, K, K)` counts on the test images as stored.
  """

  title: str
  delta: np.ndarray
  clean: np.ndarray
  attacked: np.ndarray
  outcome: np.ndarray


def pattern(delta: np.ndarray) -> tuple[np.ndarray, float]:
  """A perturbation around mid grey, enlarged until its largest hundredth saturates.

  Args:
    delta: `(H, W, C)` float, for images in [0, 1].

  Returns:
    `(H, W, C)` uint8, and the factor.

  Example:
    >>> picture, factor = pattern(np.full((2, 2, 1), 0.1))
    >>> picture.ravel().tolist(), round(factor, 1)
    ([255, 255, 255, 255], 5.0)
  """
  largest = np.percentile(np.abs(delta), 99)
  factor = 127 / 255 / largest if largest else 1.0
  shifted = np.clip(np.rint(128 + 255 * factor * delta), 0, 255)
  return shifted.astype(np.uint8), float(factor)


def rates(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
  """Heads and lines, one line per victim and share; rates on test images as stored.

  Of the perturbations with a target it gives how many images they fool at best, and the
  share that reaches the target: the mean over the targets and the worst, and the best
  of the random signs. The mean of any perturbation that has nothing to do with the
  targets is 1 / K.

  Returns:
    Heads, and lines of the victim, its accuracy, the share, and rates or `None`.
  """
  names = list(dict.fromkeys(row["perturbation"] for row in results["rows"]))
  cells = {(r["victim"], r["share"], r["perturbation"]): r for r in results["rows"]}
  aimed = {row["perturbation"] for row in results["rows"] if row["target"] is not None}
  free = [name for name in names if name not in aimed]
  heads = ["victim", "accuracy", "share", *free, "per image", "one class"]
  if aimed:
    heads += ["best target fools", "targeted, mean", "worst", "random sign, best"]
  lines = []
  for victim, share in dict.fromkeys((v, s) for v, s, _ in cells):
    found = [cells[victim, share, name]["fooling_test_stored"] for name in free]
    same = cells[victim, share, free[0]]  # as in every row of this victim and share
    found += [same["fooling_per_image"], same["one_class_test_stored"]]
    if aimed:
      found += _targeted([cells[victim, share, name] for name in aimed])
    lines.append([victim, results["victims"][victim]["accuracy"], share, *found])
  return heads, lines


def row(
  record: Mapping[str, Any],
  controls: Mapping[str, Mapping[str, Any]],
  class_names: Sequence[str],
) -> dict[str, Any]:
  """What `outcome.json` holds, flat: counts become rates, the controls' beside them.

  Args:
    record: of a perturbation.
    controls: name to record, of random perturbations of that size.
    class_names: K names.

  Returns:
    JSON values; a rate that is not defined is `None`.
  """
  flat = {name: value for name, value in record.items() if name != "counts"}

  def rates_of(table):
    return outcomes.rates(table, target=record["target"])

  for split, views in record["counts"].items():
    for view, table in views.items():
      found = rates_of(table)
      flat |= {f"{name}_{split}_{view}": found.get(name) for name in _RATES}
  fooled = rates_of(record["counts"]["test"]["stored"])["per_class"]
  for name, rate in zip(class_names, fooled, strict=True):
    flat[f"fooling_test_stored of {name}"] = rate
  for control, other in controls.items():
    found = rates_of(other["counts"]["test"]["stored"])
    for name in ("fooling", "targeted"):
      flat[f"{name}_{control.replace(' ', '_')}"] = found.get(name)
  return {name: None if value != value else value for name, value in flat.items()}


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """The `rates`, written out."""
  heads, lines = rates(results)
  return heads, [
    [victim, _percent(accuracy), f"{share:.1%}", *map(_percent, found)]
    for victim, accuracy, share, *found in lines
  ]


def page(results: Mapping[str, Any], exhibits: Sequence[Exhibit]) -> str:
  """The report as one HTML file without any external resource.

  Args:
    results: what `results.json` holds.
    exhibits: perturbations to show.
  """
  heads, lines = table(results)
  return report.render(
    "universal.html.jinja",
    results=results,
    heads=heads,
    lines=lines,
    shown=[_shown(exhibit, results["classes"]) for exhibit in exhibits],
    rows=results["rows"],
  )


def _targeted(rows):
  reached = [row["targeted_test_stored"] for row in rows]
  chance = max(row["targeted_random_sign"] for row in rows)
  most = max(row["fooling_test_stored"] for row in rows)
  return [most, sum(reached) / len(reached), min(reached), chance]


def _shown(exhibit, classes):
  picture, factor = pattern(exhibit.delta)
  by_class = outcomes.rates(exhibit.outcome)["per_class"]
  return {
    "title": exhibit.title,
    "pictures": [
      ("image", report.data_uri(exhibit.clean), ""),
      ("with the perturbation", report.data_uri(exhibit.attacked), ""),
      ("perturbation", report.data_uri(picture), f"x {factor:.0f}"),
    ],
    "classes": classes,
    "confusion": outcomes.confusion(exhibit.outcome).tolist(),
    "per_class": [_percent(rate) for rate in by_class],
  }


def _percent(rate):
  return "-" if rate is None or math.isnan(rate) else f"{100 * rate:.1f} %"
