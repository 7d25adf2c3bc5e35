"""What an attack does inside one trained model, in numbers and pictures.

Where it looks (Grad-CAM, and the attention that it returns, if any), whether classes
stay apart in its last features, how its findings go together, the loss around an image,
and how far every layer moves.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import analysis, analysis_plots, attacks, data, loops, preemption
from jaxadv.freezing import freeze
from jaxadv.types import call

__all__ = ["Picture", "Subject", "distances", "look", "subject"]

SHOWN = 4  # images in the pictures, from all over the data set
_BATCH = 32
_STEPS = 20  # of PGD


class Picture(NamedTuple):
  """A PNG, the name of its file, and what it shows."""

  name: str
  caption: str
  png: bytes


class Subject(NamedTuple):
  """A trained model, and images as one run of PGD leaves them.

  Attributes:
    predict: `(variables, images) -> (logits, features)`.
    variables: of the model.
    clean: `(N, H, W, C)` float.
    attacked: `(N, H, W, C)` float.
    labels: `(N,)` or `(N, L)`.
    decided: `(N,)`, the class or finding that leads on the clean image.
    class_names: K classes or L findings.
    names: of the features, in the order of the network.
    map: the last feature with pixels and several channels.
    attention: those with pixels and one channel.
    pooled: the last one without pixels.
  """

  predict: Any
  variables: Any
  clean: np.ndarray
  attacked: np.ndarray
  labels: np.ndarray
  decided: np.ndarray
  class_names: tuple[str, ...]
  names: tuple[str, ...]
  map: str
  attention: tuple[str, ...]
  pooled: str


def subject(
  predict: Callable[[Any, jax.Array], Any],
  variables: Any,
  dataset: data.Dataset,
  eps: float,
) -> Subject:
  """Attacks the images of a data set, and finds the features to look at.

  Args:
    predict: `(variables, images) -> (logits, features)`, in evaluation mode. Programs
      are compiled once for it: pass the same function object each time.
    variables: of the model.
    dataset: images of a class each, or of label sets.
    eps: Linf radius of PGD: 20 steps from one random start.

  Returns:
    A `Subject`.

  Raises:
    ValueError: for a model without a map of several channels, or without a feature that
      has no pixels.
  """
  clean = np.asarray(data.as_float(dataset.images))
  features = _features(functools.partial(predict, variables), clean[:1])
  attack = functools.partial(_attacked, predict, variables, jnp.float32(eps))
  ids = dataset.ids.astype(np.int32)
  decide = lambda images: jnp.argmax(_outputs(predict, "", variables, images), -1)
  return Subject(
    predict=predict,
    variables=variables,
    clean=clean,
    attacked=loops.over_batches(attack, ids, clean, dataset.labels, size=_BATCH),
    labels=dataset.labels,
    decided=loops.over_batches(decide, clean, size=_BATCH),
    class_names=dataset.class_names,
    **features,
  )


def look(seen: Subject) -> tuple[dict[str, Any], list[Picture]]:
  """Numbers and pictures of one model.

  Args:
    seen: from `subject`.

  Returns:
    Numbers by name, and pictures. A score that the images do not define is `None`, as
    the linear probe where a class has one image.

  Raises:
    ValueError: for features that are not finite, and a map that is a copy of what the
      model goes on with.
  """
  numbers: dict[str, Any] = {}
  pictures: list[Picture] = []
  for part in (_grad_cam, _attention, _separability, _correlation, _loss_around):
    found, shown = part(seen)
    numbers |= found
    pictures += shown
  return numbers, pictures


def distances(seen: Subject) -> np.ndarray:
  """`(N, layers)`: the cosine distance of every feature, clean to attacked."""
  return _batched(_layers, seen, seen.names, seen.clean, seen.attacked)


def _features(predict, image):
  """Which features there are, and which of them are looked at."""
  _, features = jax.eval_shape(lambda x: call(predict, x), image)
  names = analysis.feature_names(predict, jnp.asarray(image))
  maps = [name for name in names if features[name].ndim > 2]
  wide = [name for name in maps if features[name].shape[-1] > 1]
  flat = [name for name in names if features[name].ndim == 2]
  if not wide or not flat:
    raise ValueError(
      f"the features of the model are {names}; an analysis needs one with pixels and "
      "several channels, and one without pixels."
    )
  attention = tuple(name for name in maps if name not in wide)
  chosen = {"map": wide[-1], "attention": attention, "pooled": flat[-1]}
  return {"names": tuple(names), **chosen}


def _grad_cam(seen):
  """Where the model looks, for the class it decides on the clean image."""
  heat = lambda images: _batched(_heat, seen, seen.map, images, seen.decided)
  caption = (
    f"Grad-CAM on {seen.map}, for the class that is decided on the clean image; IoU of "
    "the hottest fifth."
  )
  iou, picture = _overlap(seen, heat, "heat_maps", caption)
  numbers = {"iou": _mean(iou), "maps_without_evidence": int(np.isnan(iou).sum())}
  return numbers, [picture]


def _attention(seen):
  """The maps by which the model itself says where it looks, if it has any."""
  numbers, pictures = {}, []
  for name in seen.attention:
    heat = lambda images, name=name: _batched(_map, seen, name, images)
    caption = f"The map {name} of the model; IoU of its hottest fifth."
    iou, picture = _overlap(seen, heat, f"map_{name}", caption)
    numbers[f"iou of {name}"] = _mean(iou)
    pictures.append(picture)
  return numbers, pictures


def _overlap(seen, heat, name, caption):
  """IoU of every image's maps, clean and attacked, and some of them beside each other.

  NaN where both are flat.
  """
  before, after = heat(seen.clean), heat(seen.attacked)
  both = jnp.asarray(before), jnp.asarray(after)
  iou = np.asarray(jax.vmap(analysis.top_share_iou)(*both))
  places = _shown(seen)
  png = analysis_plots.heat_maps(
    *(v[places] for v in (seen.clean, seen.attacked, before, after)),
    notes=[f"{seen.class_names[seen.decided[n]]}: IoU {iou[n]:.2f}" for n in places],
  )
  return iou, Picture(name, caption, png)


def _separability(seen):
  """Whether the classes stay apart in the last features; of label sets, any finding."""
  clean, attacked = (
    _batched(_outputs, seen, seen.pooled, images)
    for images in (seen.clean, seen.attacked)
  )
  labels, names = seen.labels, seen.class_names
  if labels.ndim == 2:
    labels, names = (labels == 1).any(1).astype(int), ("no finding", "any finding")
  places = analysis.embedding(np.concatenate([clean, attacked]))
  png = analysis_plots.embeddings(
    places[: len(clean)], places[len(clean) :], labels, class_names=names
  )
  probe = functools.partial(_defined, analysis.linear_probe, clean, labels, folds=2)
  numbers = {
    "silhouette_clean": _defined(analysis.silhouette, clean, labels),
    "silhouette_attacked": _defined(analysis.silhouette, attacked, labels),
    "probe_clean": probe(),
    "probe_attacked": probe(tested=attacked),
  }
  return numbers, [Picture("embedding", f"t-SNE of {seen.pooled}.", png)]


def _correlation(seen):
  """How the findings of a label set go together."""
  if seen.labels.ndim == 1:
    return {}, []
  estimates = (
    np.asarray(jax.nn.sigmoid(_batched(_outputs, seen, "", images)))
    for images in (seen.clean, seen.attacked)
  )
  found = _defined(analysis.label_correlation, *estimates)
  names = ("correlation_distance", "correlation_clean", "correlation_attacked")
  if found is None:
    return dict.fromkeys(names), []
  measures = (found.frobenius, found.off_diagonal_clean, found.off_diagonal_attacked)
  png = analysis_plots.correlation_matrices(found, class_names=seen.class_names)
  caption = "Correlations of the estimated probabilities over the test images."
  numbers = dict(zip(names, measures, strict=True))
  return numbers, [Picture("correlations", caption, png)]


def _loss_around(seen):
  """The loss in the plane of the attack and a random direction, of some images."""
  places = _shown(seen)
  around = (v[places] for v in (seen.clean, seen.labels, seen.attacked))
  found = _landscape(seen.predict, seen.variables, *around)
  titles = [seen.class_names[seen.decided[n]] for n in places]
  png = analysis_plots.landscapes(found, titles=titles)
  caption = "Loss along the attack, and along a random direction of the same length."
  return {}, [Picture("landscape", caption, png)]


def _shown(seen):
  last = len(seen.clean) - 1
  return np.linspace(0, last, min(SHOWN, last + 1)).round().astype(int)


def _defined(score, *given, **options):
  """The score, or `None` where these images have none."""
  try:
    return score(*given, **options)
  except analysis.UndefinedError:
    return None


def _mean(values):
  known = values[~np.isnan(values)]
  return float(known.mean()) if len(known) else None


def _batched(function, seen, name, *arrays):
  """What a compiled function below makes of all images."""
  preemption.check()
  function = functools.partial(function, seen.predict, name, seen.variables)
  return loops.over_batches(function, *arrays, size=_BATCH)


# Compiled once for all models of a study: their variables are arguments.


@functools.partial(jax.jit, static_argnums=0)
def _attacked(predict, variables, eps, ids, images, labels):
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), ids)
  model = freeze(functools.partial(predict, variables), images)
  return attacks.pgd(eps, num_steps=_STEPS)(keys, model, images, labels).image


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
def _map(predict, name, variables, images):
  model = functools.partial(predict, variables)
  return analysis.feature_map(model, images, feature=name)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layers(predict, names, variables, clean, attacked):
  model = functools.partial(predict, variables)
  return analysis.layer_distances(model, clean, attacked, names=names)


@functools.partial(jax.jit, static_argnums=0)
def _landscape(predict, variables, clean, labels, attacked):
  model = functools.partial(predict, variables)
  return analysis.landscape(jax.random.key(0), model, clean, labels, attacked=attacked)
