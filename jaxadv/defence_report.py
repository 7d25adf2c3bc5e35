"""What people look at after `jaxadv defend`: the table, the curves, the report page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxadv import analysis_plots, report, summaries

__all__ = [
  "SCORES",
  "caption",
  "curves",
  "gains",
  "page",
  "picture",
  "table",
  "verdicts",
]

# Attacks that are shown, as the tables name them.
_SHOWN = {
  "pgd": "PGD",
  "quantised": "stored PGD",
  "apgd": "APGD",
  "square": "Square",
  "worst": "worst",
}
_WHITE = ("clean", "pgd", "apgd", "worst")
# By the kind of label, the scores that tables are made of, and in words; one leads.
SCORES = {
  "class": {"accuracy": "Right decisions"},
  "set": {"auroc": "AUROC, mean over the findings", "accuracy": "Right labels"},
}


def table(
  results: Mapping[str, Any], score: str | None = None
) -> tuple[list[str], list[list[str]]]:
  """Heads and lines, one line per kind of model: means over its seeds, in percent.

  Behind the mean stands half of its 95 % interval over the seeds, if there are several.

  Args:
    results: what `results.json` holds.
    score: one of `SCORES`; the leading one by default.

  Returns:
    Heads and lines.
  """
  kinds = list(dict.fromkeys(row["kind"] for row in results["rows"]))
  score = _leading(results) if score is None else score
  columns = _columns(results)
  heads = ["model", "gradients", *(head for head, _, _ in columns), "checks passed"]
  lines = []
  for kind in kinds:
    cells = [
      _percent(_values(results, kind, eps, f"{score} {view}"))
      for _, eps, view in columns
    ]
    passed = [all(c["passed"] for c in checks) for checks in _judged(results, kind)]
    gradients = str(results["gradients"].get(kind, 0))
    lines.append([kind, gradients, *cells, f"{sum(passed)}/{len(passed)}"])
  return heads, lines


def gains(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Heads and lines: points won under attack and lost without, against the plain model.

  Differences of models of one seed, so that what the seeds share does not count; behind
  the mean half of its 95 % interval.

  Args:
    results: what `results.json` holds.

  Returns:
    Heads and lines, one line per defence; at the radius of the study.
  """
  eps, score = results["eps"], _leading(results)
  kinds = list(dict.fromkeys(row["kind"] for row in results["rows"]))
  plain, *defended = (
    {view: _values(results, kind, eps, f"{score} {view}") for view in _WHITE}
    for kind in kinds
  )
  lines = [
    [kind, *(_percent(np.subtract(found[view], plain[view])) for view in _WHITE)]
    for kind, found in zip(kinds[1:], defended, strict=True)
  ]
  heads = (_SHOWN.get(view, view) for view in _WHITE)
  return ["points against the plain model", *heads], lines


def curves(results: Mapping[str, Any]) -> dict[str, list[float]]:
  """Kind of model -> clean score, and the one under the worst attack at rising radii.

  Args:
    results: what `results.json` holds.

  Returns:
    Means over the seeds, of the leading score; NaN where it is not defined.
  """
  score, eps = _leading(results), results["eps"]
  points = [(eps, "clean"), *((radius, "worst") for radius in sorted(results["radii"]))]
  return {
    kind: [
      _mean(_values(results, kind, radius, f"{score} {view}"))
      for radius, view in points
    ]
    for kind in dict.fromkeys(row["kind"] for row in results["rows"])
  }


def picture(results: Mapping[str, Any]) -> bytes:
  """The `curves` as a PNG file."""
  radii, score = [0, *sorted(results["radii"])], SCORES[results["labels"]]
  return analysis_plots.accuracy_curves(
    radii, curves(results), score=score[_leading(results)]
  )


def caption(results: Mapping[str, Any]) -> str:
  """What the `curves` are."""
  score, eps = SCORES[results["labels"]][_leading(results)], 255 * results["eps"]
  return (
    f"{score}, mean over the seeds: per image the worst of the attacks that see the "
    f"weights at {eps:g}/255, at other radii of APGD and the clean image."
  )


def verdicts(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """Model, check and evidence of every check that failed."""
  return [
    (model, check["name"], check["evidence"])
    for model, checks in results["checks"].items()
    for check in checks
    if not check["passed"]
  ]


def page(results: Mapping[str, Any]) -> str:
  """The report as one HTML file without any external resource."""
  heads, lines = table(results)
  return report.render(
    "defences.html.jinja",
    results=results,
    heads=heads,
    lines=lines,
    failed=verdicts(results),
    gains=gains(results),
    curves=report.embedded(picture(results)),
    caption=caption(results),
    score=SCORES[results["labels"]][_leading(results)],
    rows=results["rows"],
    names=max(results["rows"], key=len),
  )


def _leading(results):
  return next(iter(SCORES[results["labels"]]))


def _columns(results):
  """Head, radius and view of every column of rates."""
  columns = [("clean", results["eps"], "clean")]
  for radius in results["radii"]:
    views = _SHOWN if radius == results["eps"] else ("apgd",)
    columns += [(f"{_SHOWN[v]} {255 * radius:g}", radius, v) for v in views]
  return columns


def _values(results, kind, eps, column) -> Sequence[float]:
  return [
    row[column]
    for row in results["rows"]
    if row["kind"] == kind and row["eps"] == eps and row[column] is not None
  ]


def _mean(values):
  return float(np.mean(values)) if len(values) else math.nan


def _percent(values):
  if not len(values):
    return "-"
  mean, margin = float(np.mean(values)), summaries.margin(values)
  half = "" if margin is None else f" ± {100 * margin:.0f}"
  return f"{round(100 * mean)}{half}"


def _judged(results, kind):
  models = dict.fromkeys(row["model"] for row in results["rows"] if row["kind"] == kind)
  return [results["checks"][model] for model in models]
