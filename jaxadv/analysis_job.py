"""The job of `jaxadv analyse`: what an attack does inside each model of a study.

The models and their accuracies are those of `jaxadv defend`, in the same folder, and
are made where they are missing. Of every kind the first seed is looked into:

    analysis/KIND/*.png         pictures of one model
    analysis/*.png              pictures that compare the models
    analysis/results.json, analysis/report.html
"""

import functools
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import (
  analysis,
  analysis_plots,
  attacks,
  data,
  defence_job,
  defence_report,
  loops,
  records,
  report,
  victim_job,
)
from jaxadv.types import call

__all__ = ["analyse", "table"]

SHOWN = 4  # images in the pictures of one model, from all over the test part
_BATCH = 32


class _Picture(NamedTuple):
  """A PNG, the name of its file, and what it shows."""

  name: str
  caption: str
  png: bytes


class _Subject(NamedTuple):
  """A trained model, and the test images as PGD at the study's radius leaves them.

  Attributes:
    predict: `(variables, images) -> (logits, features)`.
    variables: of the model.
    clean: `(N, H, W, C)` float.
    attacked: `(N, H, W, C)` float.
    labels: `(N,)` or `(N, L)`.
    decided: `(N,)`, the class or finding that leads on the clean image.
    names: of the features, in the order of the network.
    map: the last feature with pixels.
    pooled: the last one without.
  """

  predict: Any
  variables: Any
  clean: np.ndarray
  attacked: np.ndarray
  labels: np.ndarray
  decided: np.ndarray
  names: list[str]
  map: str
  pooled: str


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
        subject = _subject(run, kind)
        distances[kind] = _distances(subject)
        numbers[kind], pictures[kind] = _look(subject, run.test.class_names)
        numbers[kind]["distances"] = _medians(subject, distances[kind])
        advance(1, kind)
    shared = _compared(results, subject.names, distances)
    found = results | {
      "analysis": numbers,
      "wall_seconds": time.perf_counter() - started,
    }
    _write(folder, found, {"": shared, **pictures})
  return found


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Heads and lines of the numbers, one line per kind of model.

  Args:
    found: from `analyse`.
  """
  heads = [name for name in next(iter(found["analysis"].values())) if name in _HEADS]
  lines = [
    [kind, *("-" if n[name] is None else f"{n[name]:.2f}" for name in heads)]
    for kind, n in found["analysis"].items()
  ]
  return ["model", *(_HEADS[name] for name in heads)], lines


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


def _subject(run, kind):
  """The model of the first seed, and its attacked images."""
  task = run.victims.tasks[f"{kind} {run.study.seeds[0]}"]
  victim = victim_job.train(task)
  clean = np.asarray(data.as_float(run.test.images))
  attack = functools.partial(_attacked, victim.predict, victim.variables)
  attack = functools.partial(attack, jnp.float32(run.study.eps))
  ids = np.arange(len(clean), dtype=np.int32)
  attacked = loops.over_batches(attack, ids, clean, run.test.labels, size=_BATCH)
  predict = functools.partial(victim.predict, victim.variables)
  _, features = jax.eval_shape(lambda x: call(predict, x), clean[:1])
  names = analysis.feature_names(predict, jnp.asarray(clean[:1]))
  maps = [name for name in names if features[name].ndim > 2]
  flat = [name for name in names if features[name].ndim == 2]
  if not maps or not flat:
    raise victim_job.JobError(
      f"the features of the model are {names}; an analysis needs one with pixels and "
      "one without."
    )
  decide = lambda x: jnp.argmax(_outputs(victim.predict, "", victim.variables, x), -1)
  decided = loops.over_batches(decide, clean, size=_BATCH)
  return _Subject(
    victim.predict,
    victim.variables,
    clean,
    attacked,
    run.test.labels,
    decided,
    names,
    maps[-1],
    flat[-1],
  )


def _look(subject, class_names):
  """Numbers and pictures of one model."""
  numbers: dict[str, Any] = {}
  pictures: list[_Picture] = []
  for part in (_attention, _separability, _correlation, _loss_around):
    found, shown = part(subject, class_names)
    numbers |= found
    pictures += shown
  return numbers, pictures


def _attention(subject, class_names):
  """Where the model looks, for the class it decides on the clean image."""
  heat = functools.partial(_heat, subject.predict, subject.map, subject.variables)
  before, after = (
    loops.over_batches(heat, images, subject.decided, size=_BATCH)
    for images in (subject.clean, subject.attacked)
  )
  both = jnp.asarray(before), jnp.asarray(after)
  iou = np.asarray(jax.vmap(analysis.top_share_iou)(*both))
  places = _shown(subject)
  png = analysis_plots.heat_maps(
    *(v[places] for v in (subject.clean, subject.attacked, before, after)),
    notes=[f"{class_names[subject.decided[n]]}: IoU {iou[n]:.2f}" for n in places],
  )
  caption = (
    f"Grad-CAM on {subject.map}, for the class that is decided on the clean image; IoU "
    "of the hottest fifth."
  )
  known = np.isfinite(iou)
  mean = float(iou[known].mean()) if known.any() else None
  numbers = {"iou": mean, "maps_without_evidence": int((~known).sum())}
  return numbers, [_Picture("heat_maps", caption, png)]


def _separability(subject, class_names):
  """Whether the classes stay apart in the last features; of label sets, any finding."""
  features = functools.partial(
    _outputs, subject.predict, subject.pooled, subject.variables
  )
  clean, attacked = (
    loops.over_batches(features, images, size=_BATCH)
    for images in (subject.clean, subject.attacked)
  )
  labels, names = subject.labels, class_names
  if labels.ndim == 2:
    labels, names = (labels == 1).any(1).astype(int), ("no finding", "any finding")
  places = analysis.embedding(np.concatenate([clean, attacked]))
  png = analysis_plots.embeddings(
    places[: len(clean)], places[len(clean) :], labels, class_names=names
  )
  numbers = {
    "silhouette_clean": analysis.silhouette(clean, labels),
    "silhouette_attacked": analysis.silhouette(attacked, labels),
    "probe_clean": analysis.linear_probe(clean, labels, folds=2),
    "probe_attacked": analysis.linear_probe(clean, labels, tested=attacked, folds=2),
  }
  return numbers, [_Picture("embedding", f"t-SNE of {subject.pooled}.", png)]


def _correlation(subject, class_names):
  """How the findings of a label set go together."""
  if subject.labels.ndim == 1:
    return {}, []
  logits = functools.partial(_outputs, subject.predict, "", subject.variables)
  estimates = (
    np.asarray(jax.nn.sigmoid(loops.over_batches(logits, images, size=_BATCH)))
    for images in (subject.clean, subject.attacked)
  )
  found = analysis.label_correlation(*estimates)
  png = analysis_plots.correlation_matrices(found, class_names=class_names)
  numbers = {
    "correlation_distance": found.frobenius,
    "correlation_clean": found.off_diagonal_clean,
    "correlation_attacked": found.off_diagonal_attacked,
  }
  caption = "Correlations of the estimated probabilities over the test images."
  return numbers, [_Picture("correlations", caption, png)]


def _loss_around(subject, class_names):
  """The loss in the plane of the attack and a random direction, of some images."""
  places = _shown(subject)
  around = (v[places] for v in (subject.clean, subject.labels, subject.attacked))
  found = _landscape(subject.predict, subject.variables, *around)
  titles = [class_names[subject.decided[n]] for n in places]
  png = analysis_plots.landscapes(found, titles=titles)
  caption = "Loss along the attack, and along a random direction of the same length."
  return {}, [_Picture("landscape", caption, png)]


def _shown(subject):
  last = len(subject.clean) - 1
  return np.linspace(0, last, min(SHOWN, last + 1)).round().astype(int)


def _distances(subject):
  """`(N, layers)`: the cosine distance of every feature, clean to attacked."""
  measure = functools.partial(
    _layers, subject.predict, tuple(subject.names), subject.variables
  )
  return loops.over_batches(measure, subject.clean, subject.attacked, size=_BATCH)


def _medians(subject, distances):
  middle = np.median(distances, 0).tolist()
  return dict(zip(subject.names, middle, strict=True))


def _compared(results, names, distances):
  """Pictures of all models beside each other."""
  radii = sorted(results["radii"])
  curves = defence_report.curves(results)
  accuracy = analysis_plots.accuracy_curves([0, *radii], curves)
  layers = analysis_plots.distances_by_layer(names, distances)
  return [
    _Picture("accuracy", "Worst white-box attack, mean over the seeds.", accuracy),
    _Picture("layers", "How far features move: median and quartiles.", layers),
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


# Compiled once for all models of the study: their variables are arguments.


@functools.partial(jax.jit, static_argnums=0)
def _attacked(predict, variables, eps, ids, images, labels):
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), ids)
  model = functools.partial(predict, variables)
  return attacks.pgd(eps, num_steps=20)(keys, model, images, labels).image


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs(predict, name, variables, images):
  """A feature, or with an empty name the logits."""
  logits, features = call(functools.partial(predict, variables), images)
  return features[name] if name else logits


@functools.partial(jax.jit, static_argnums=(0, 1))
def _heat(predict, name, variables, images, classes):
  model = functools.partial(predict, variables)
  return analysis.grad_cam(model, images, classes, feature=name)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layers(predict, names, variables, clean, attacked):
  model = functools.partial(predict, variables)
  return analysis.layer_distances(model, clean, attacked, names=names)


@functools.partial(jax.jit, static_argnums=0)
def _landscape(predict, variables, clean, labels, attacked):
  model = functools.partial(predict, variables)
  return analysis.landscape(jax.random.key(0), model, clean, labels, attacked=attacked)
