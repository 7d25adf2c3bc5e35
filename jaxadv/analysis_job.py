"""The job of `jaxadv analyse`: what an attack does inside each model of a study.

The models and their scores are those of `jaxadv defend`, in the same folder, and are
made where they are missing. Of every kind the first seed is looked into, as one run of
PGD changes it (`inspection`):

    analysis/KIND/*.png         pictures of one model
    analysis/*.png              pictures that compare the models
    analysis/results.json, analysis/report.html
"""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxadv import (
  analysis_plots,
  defence_job,
  defence_report,
  inspection,
  records,
  report,
  victim_job,
)
from jaxadv.inspection import Picture

__all__ = ["analyse", "table"]


def analyse(run: defence_job.Run) -> dict[str, Any]:
  """Trains and attacks what is missing, then looks inside; returns what it found.

  Args:
    run: from `defence_job.prepare`.

  Returns:
    What `analysis/results.json` holds: that of `jaxadv defend`, and `analysis`.

  Raises:
    RecordError: when the folder holds another run, or another run is using it.
    JobError: for a model whose logits are not finite or whose features are none that
      can be looked into, and for a torn checkpoint.
  """
  started = time.perf_counter()
  results = defence_job.defend(run)
  folder = run.folder / "analysis"
  numbers, pictures, distances = {}, {}, {}
  with records.lock(run.folder):
    kinds = list(dict.fromkeys(row["kind"] for row in results["rows"]))
    with run.victims.progress("analysing", len(kinds), 0) as advance:
      for kind in kinds:
        names, distances[kind], numbers[kind], pictures[kind] = _inside(run, kind)
        advance(1, kind)
    shared = _compared(results, names, distances)
    found = results | {
      "analysis": numbers,
      "wall_seconds": time.perf_counter() - started,
    }
    _write(folder, found, {"": shared, **pictures})
  return found


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Heads and lines of the numbers, one line per kind of model; a dash for `None`.

  Args:
    found: from `analyse`.
  """
  heads = {name: _head(name) for name in next(iter(found["analysis"].values()))}
  heads = {name: head for name, head in heads.items() if head is not None}
  lines = [
    [kind, *("-" if n[name] is None else f"{n[name]:.2f}" for name in heads)]
    for kind, n in found["analysis"].items()
  ]
  return ["model", *heads.values()], lines


_HEADS = {
  "iou": "IoU of Grad-CAM",
  "silhouette_clean": "silhouette, clean",
  "silhouette_attacked": "attacked",
  "probe_clean": "linear probe, clean",
  "probe_attacked": "attacked",
  "correlation_distance": "correlations, distance",
  "correlation_clean": "mean |r|, clean",
  "correlation_attacked": "attacked",
}


def _head(name):
  """Of a column, `None` where the table has none; models name their own attention."""
  return f"IoU{name[3:]}" if name.startswith("iou of ") else _HEADS.get(name)


def _inside(run, kind):
  """Of the first seed's model: features, their distances, numbers and pictures."""
  victim = victim_job.train(run.victims.tasks[f"{kind} {run.study.seeds[0]}"])
  model = victim.predict, victim.variables
  try:
    subject = inspection.subject(*model, run.test, run.study.eps)
    numbers, pictures = inspection.look(subject)
    distances = inspection.distances(subject)
  except ValueError as error:
    raise victim_job.JobError(f"{kind}: {error}") from error
  middle = np.median(distances, 0).tolist()
  numbers["distances"] = dict(zip(subject.names, middle, strict=True))
  return subject.names, distances, numbers, pictures


def _compared(results, names, distances):
  """Pictures of all models beside each other."""
  accuracy = defence_report.picture(results)
  layers = analysis_plots.distances_by_layer(names, distances)
  return [
    Picture("accuracy", defence_report.caption(results), accuracy),
    Picture("layers", "How far features move: median and quartiles.", layers),
  ]


def _write(folder: pathlib.Path, found, pictures):
  for kind, shown in pictures.items():
    for picture in shown:
      records.write_atomically(folder / kind / f"{picture.name}.png", picture.png)
  records.write_json(folder / "results.json", found)
  heads, lines = table(found)
  page = report.render(
    "analysis.html.jinja",
    results=found,
    heads=heads,
    lines=lines,
    pictures={
      kind: [(p.name, p.caption, report.embedded(p.png)) for p in shown]
      for kind, shown in pictures.items()
    },
  )
  records.write_atomically(folder / "report.html", page)
