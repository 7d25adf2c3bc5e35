"""How a classifier or a model of label sets stands up to a suite of attacks.

`measure` returns the logits of the attacked images, one array per view of them, and
`rates` counts what is right in each. Whether the numbers can be trusted is another
question, which `jaxadv.trust` answers from the same logits.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import (
  attacks,
  combine,
  data,
  inputs,
  loops,
  losses,
  metrics,
  preemption,
  scores,
  summaries,
)
from jaxadv.freezing import freeze
from jaxadv.types import AttackFn, LossFn, call, example_keys

__all__ = [
  "VIEWS",
  "WHITE_BOX",
  "Effort",
  "hard_loss",
  "measure",
  "rates",
  "right",
  "worst",
]

Found = Mapping[str, np.ndarray]

VIEWS = (
  "clean",
  "again",
  "noise",
  "fgsm",
  "pgd once",
  "pgd",
  "pgd long",
  "pgd large",
  "apgd",
  "square",
  "quantised",
)
# What an attacker with the weights can do at the radius, doing nothing among it.
WHITE_BOX = ("clean", "fgsm", "pgd once", "pgd", "pgd long", "apgd")


class Effort(NamedTuple):
  """How much each attack may try; the defaults are those of the literature.

  Attributes:
    steps: of `pgd` and `pgd once`.
    restarts: runs of `pgd` from other random starts.
    long_steps: of `pgd long` and `pgd large`.
    radius: of `pgd large`, at which nothing can stand.
    apgd_steps: of each of the two runs of `apgd`.
    queries: of `square`.
  """

  steps: int = 20
  restarts: int = 5
  long_steps: int = 100
  radius: float = 0.5
  apgd_steps: int = 100
  queries: int = 500


def measure(
  predict: Callable[[Any, jax.Array], Any],
  variables: Any,
  dataset: data.Dataset,
  eps: float,
  *,
  seed: int = 0,
  batch_size: int = 64,
  names: Sequence[str] = VIEWS,
  effort: Effort | None = None,
) -> dict[str, np.ndarray]:
  """The model's logits on attacked images, for each view of them; Linf throughout.

      clean       the images as they are          again      the same, asked once more
      noise       random signs at full radius     fgsm       one step from the image
      pgd once    one run from a random start     pgd        the worst of several
      pgd long    that run with more steps        pgd large  at a huge radius, from the
                                                             image, its best point
      apgd        the worst of the task loss and of `hard_loss`
      square      random search, without gradients
      quantised   the images of `pgd` as 8-bit files store them

  The worst is taken per image: most wrong decisions, of equal ones the largest loss.
  All but `apgd` and `square`, which follows the margin, raise the task loss.

  Args:
    predict: `(variables, images) -> logits` or `(logits, features)`, in evaluation
      mode. Programs are compiled once for it, for all radii, seeds and variables of the
      same shapes: pass the same function object each time.
    variables: of the model.
    dataset: images of a class each, or of label sets.
    eps: radius in units of images in [0, 1], above 0.
    seed: with an image's id and the number of the run it makes its random stream, so
      nothing depends on batches.
    batch_size: images per call of the model, at most.
    names: some of `VIEWS`.
    effort: steps, restarts and queries; `Effort()` by default.

  Returns:
    For each name float32 logits `(N, K)`, or `(N, L)` of label sets.

  Raises:
    ValueError: for masks, no images, a radius not above 0, a batch size or an effort
      below 1, an unknown name, labels that do not fit the logits, and logits that are
      not finite.

  Example:
    >>> model = lambda scale, x: scale * jnp.hstack([x[:, 0, 0], 1 - x[:, 0, 0]])
    >>> x, y = np.array([0.4, 0.7], np.float32).reshape(2, 1, 1, 1), np.array([1, 0])
    >>> dataset = data.Dataset(x, y, np.arange(2), ["a", "b"], ("dark", "bright"))
    >>> found = measure(model, 2.0, dataset, 0.15, names=["clean", "fgsm"])
    >>> right(found["fgsm"], y)[:, 0].tolist()
    [False, True]
  """
  _check(dataset, eps, batch_size, names)
  effort = Effort() if effort is None else effort
  _check_effort(effort)

  @functools.cache
  def run(program, num_steps, number, radius):
    traced = {"variables": variables, "eps": jnp.float32(radius)}
    traced |= {"seed": jnp.int32(seed), "number": jnp.int32(number)}

    def attacked(images, label, ids):
      preemption.check()
      batch = {"image": data.as_float(images), "label": label, "id": ids}
      return _attacked(predict, program, num_steps, traced | batch)

    ids = dataset.ids.astype(np.int32)
    even = math.ceil(len(ids) / math.ceil(len(ids) / batch_size))
    logits = loops.over_batches(
      attacked, dataset.images, dataset.labels, ids, size=even
    )
    _check_logits(program, logits, dataset.labels)
    return logits

  # the last logits of `pgd` are those of its images as 8-bit files store them
  kept = {name: -1 if name == "quantised" else 0 for name in names}
  return {
    name: _worst([run(*how)[:, n] for how in _runs(name, effort, eps)], dataset.labels)
    for name, n in kept.items()
  }


def rates(found: Found, dataset: data.Dataset) -> dict[str, dict[str, Any]]:
  """What is right in each view, and in the `worst` of the white-box views per image.

  The AUROC compares images, and logits of different attacks do not compare: that of
  `worst` is the least of the white-box views'.

  Args:
    found: from `measure`.
    dataset: which was measured.

  Returns:
    For each view `accuracy`, the share of right decisions (of label sets: of labels),
    its 95 % bootstrap interval over the images `low` and `high`, and the mean `auroc`;
    for classes `balanced_accuracy` and `quadratic_kappa`, for label sets `exact_match`.
    Where the clean view was measured also `fooling`, the share of decisions that differ
    from those on the clean images, and for label sets `hidden` and `invented`, see
    `scores.flipped_labels`. A score that is not defined is `None`.

  Example:
    >>> y, x = np.array([0, 1]), np.zeros((2, 4, 4, 1))
    >>> dataset = data.Dataset(x, y, np.arange(2), ["a", "b"], ("dark", "bright"))
    >>> found = {"clean": np.eye(2), "pgd": np.eye(2)[[1, 1]]}
    >>> [(name, rate["accuracy"]) for name, rate in rates(found, dataset).items()]
    [('clean', 1.0), ('pgd', 0.5), ('worst', 0.5)]
  """
  views = dict(found) | {"worst": worst(found, dataset.labels)}
  clean = found.get("clean")
  rates = {name: _rates(logits, clean, dataset) for name, logits in views.items()}
  areas = [rates[name]["auroc"] for name in WHITE_BOX if name in found]
  known = [area for area in areas if area is not None]
  rates["worst"]["auroc"] = min(known, default=None)
  return rates


def worst(found: Found, labels: np.ndarray) -> np.ndarray:
  """Per image, the logits of the `WHITE_BOX` view that does most harm.

  Args:
    found: from `measure`, with at least one of these views.
    labels: `(N,)` or `(N, L)`.

  Returns:
    Logits like those of a view.

  Raises:
    ValueError: without any of these views.
  """
  white = [found[name] for name in WHITE_BOX if name in found]
  if not white:
    raise ValueError(f"there is no white-box view; measure one of {WHITE_BOX}.")
  return _worst(white, labels)


def right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Which decisions equal the label: `(N, 1)` of classes, `(N, L)` of label sets.

  Example:
    >>> right(np.array([[2.0, -1.0]]), np.array([0])).tolist()
    [[True]]
    >>> right(np.array([[2.0, -1.0]]), np.array([[1, 1]])).tolist()
    [[True, False]]
  """
  if labels.ndim == 1:
    return (logits.argmax(1) == labels)[:, None]
  return scores.decisions(logits) == (labels == 1)


def hard_loss(label_set: bool, num_logits: int) -> LossFn:
  """The second loss of `apgd`, for models that hide the gradient of the first.

  Of label sets `losses.label_margin`, of two classes `losses.margin`, of more
  `losses.dlr`, as rescaling the logits cannot change it.
  """
  if label_set:
    return losses.label_margin
  return losses.margin if num_logits == 2 else losses.dlr


# name -> (eps, num_steps, hard loss) -> attack
_PROGRAMS: dict[str, Callable[[Any, int, LossFn], AttackFn]] = {
  "identity": lambda eps, num_steps, hard: combine.identity,
  "signs": lambda eps, num_steps, hard: _signs(eps),
  "fgsm": lambda eps, num_steps, hard: attacks.fgsm(eps),
  "pgd": lambda eps, num_steps, hard: attacks.pgd(eps, num_steps=num_steps),
  # a random start is noise there, of which a sound model may be too sure to come back
  "far pgd": lambda eps, num_steps, hard: attacks.pgd(
    eps, num_steps=num_steps, random_start=False, keep="best"
  ),
  "apgd": lambda eps, num_steps, hard: attacks.apgd(eps, num_steps=num_steps),
  "hard apgd": lambda eps, num_steps, hard: attacks.apgd(
    eps, num_steps=num_steps, loss=hard
  ),
  "square": lambda eps, num_steps, hard: attacks.square(eps, num_steps=num_steps),
}


def _runs(view, effort, eps):
  """What a view is made of: program, its steps, number of the run, radius."""
  apgd, pgd = effort.apgd_steps, effort.steps
  restarts = [("pgd", pgd, number, eps) for number in range(effort.restarts)]
  return {
    "clean": [("identity", 0, 0, eps)],
    "again": [("identity", 0, 1, eps)],
    "noise": [("signs", 0, 0, eps)],
    "fgsm": [("fgsm", 1, 0, eps)],
    "pgd once": [("pgd", pgd, 0, eps)],
    "pgd": restarts,
    "pgd long": [("pgd", effort.long_steps, 0, eps)],
    "pgd large": [("far pgd", effort.long_steps, 0, max(eps, effort.radius))],
    "apgd": [("apgd", apgd, 0, eps), ("hard apgd", apgd, 1, eps)],
    "square": [("square", effort.queries, 0, eps)],
    "quantised": restarts,
  }[view]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attacked(predict, program, num_steps, given):
  """Logits `(B, 1, K)` under one attack, of `pgd` `(B, 2, K)`: as found, and stored.

  What may change between calls is traced.
  """
  image, label = given["image"], given["label"]
  model = freeze(functools.partial(predict, given["variables"]), image)
  logits = jax.eval_shape(lambda image: call(model, image)[0], image)
  inputs.check_shapes({"label": label}, logits)
  key = jax.random.fold_in(jax.random.key(given["seed"]), given["number"])
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, given["id"])
  hard = hard_loss(label.ndim == 2, logits.shape[-1])
  attack = _PROGRAMS[program](given["eps"], num_steps, hard)
  result = attack(keys, model, image, label)
  found = [result.logits]
  if program == "pgd":
    found.append(call(model, metrics.round8(result.image))[0])
  return jnp.stack(found, 1).astype(jnp.float32)


def _signs(eps):
  """Noise that moves every value by the whole radius, up or down."""

  def attack(key, predict, x, y):
    keys = example_keys(key, len(x))
    signs = jax.vmap(lambda k, image: jax.random.rademacher(k, image.shape, x.dtype))
    image = jnp.clip(x + eps * signs(keys, x), 0, 1)
    return combine.identity(keys, predict, image, y)

  return attack


def _worst(views, labels):
  return functools.reduce(functools.partial(_worse, labels), views)


def _worse(labels, a, b):
  """Per image, what has more wrong decisions; of equal ones, the larger loss."""
  (wrong_a, loss_a), (wrong_b, loss_b) = (_harm(labels, logits) for logits in (a, b))
  take = (wrong_b > wrong_a) | ((wrong_b == wrong_a) & (loss_b > loss_a))
  return np.where(take[:, None], b, a)


def _harm(labels, logits):
  wrong = (~right(logits, labels)).sum(1)
  if labels.ndim == 2:
    return wrong, np.logaddexp(0, np.where(labels == 1, -logits, logits)).mean(1)
  own = labels[:, None] == np.arange(logits.shape[1])
  rival = np.where(own, -np.inf, logits).max(1)
  return wrong, rival - np.where(own, logits, 0).sum(1)


def _rates(logits, clean, dataset):
  labels, names = dataset.labels, dataset.class_names
  share = summaries.interval(right(logits, labels).mean(1))
  found = {"accuracy": share["mean"], "low": share["low"], "high": share["high"]}
  if dataset.kind == "set":
    report = scores.label_sets(logits, labels, names)
    found |= {name: report[name] for name in ("exact_match", "auroc")}
  else:
    report = scores.classification(logits, labels, names)
    kept = ("balanced_accuracy", "quadratic_kappa", "auroc")
    found |= {name: report[name] for name in kept}
  return found if clean is None else found | _changes(clean, logits, dataset)


def _changes(clean, logits, dataset):
  """What differs from the decisions on the clean images."""
  if dataset.kind == "class":
    return {"fooling": float((clean.argmax(1) != logits.argmax(1)).mean())}
  report = scores.flipped_labels(clean, logits, dataset.labels, dataset.class_names)
  return {name: report[name] for name in ("fooling", "hidden", "invented")}


def _check(dataset, eps, batch_size, names):
  if dataset.kind == "mask":
    raise ValueError(
      f"labels are masks {dataset.labels.shape}; robustness is measured of classes "
      "(N,) and label sets (N, L); masks are attacked by `jaxadv attack`."
    )
  if not len(dataset.images):
    raise ValueError("there are no images; write a data set with at least one.")
  if batch_size < 1:
    raise ValueError(f"`batch_size` is {batch_size}; write 1 or more.")
  inputs.check_positive("eps", eps, zero=False)
  for name in names:
    inputs.check_choice("names", name, VIEWS)


def _check_effort(effort):
  inputs.check_positive("radius", effort.radius, zero=False)
  for name, count in effort._asdict().items():
    whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if name != "radius" and not (whole and count >= 1):
      raise ValueError(
        f"`{name}` of the effort is {count!r}; write a whole number, 1 or more."
      )


def _check_logits(program, logits, labels):
  inputs.check_classes({"label": labels}, logits[:, 0])
  broken = int((~np.isfinite(logits)).any((1, 2)).sum())
  if broken:
    raise ValueError(
      f"on {broken} of {len(logits)} images the logits are not finite (program "
      f"{program}); train the model anew, with a smaller learning rate."
    )
