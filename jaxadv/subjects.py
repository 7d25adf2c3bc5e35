"""A victim under a universal perturbation: what it decides before and after.

Everything goes through the images in batches of one shape.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import attacks, data, loops, outcomes, preemption, threats
from jaxadv.freezing import freeze
from jaxadv.lazy import Rows
from jaxadv.types import Array, call

__all__ = [
  "VIEWS",
  "Norm",
  "Part",
  "Subject",
  "decisions",
  "measure",
  "per_image",
  "radius",
  "subject",
]

# (variables, images) -> (logits, features)
Predict = Callable[[Any, Array], Any]
Norm = Literal["linf", "l2"]
# How the perturbed image is shown to the victim.
VIEWS = {
  "clipped": threats.box(),
  "stored": threats.stored(threats.box()),
  "unclipped": threats.box(bounds=(-jnp.inf, jnp.inf)),
}


class Part(NamedTuple):
  """Images of one split, and what the victim says of them.

  Attributes:
    dataset: images and true classes.
    before: `(N,)` int32, decisions on the clean images.
  """

  dataset: data.Dataset
  before: np.ndarray


class Subject(NamedTuple):
  """A trained victim.

  Attributes:
    predict: `(variables, images) -> (logits, features)`.
    variables: of the Flax module.
    train: what perturbations are crafted on.
    seen: of those, about as many as `test` has, of every class its share: judging all
      of them can take longer than crafting.
    test: what perturbations have not seen.
  """

  predict: Predict
  variables: Any
  train: Part
  seen: Part
  test: Part


def subject(
  predict: Predict, variables: Any, train: data.Dataset, test: data.Dataset
) -> Subject:
  """A victim with its decisions on the clean images."""
  nothing = jnp.zeros(train.images.shape[1:])

  def part(dataset):
    return Part(dataset, decisions(predict, variables, dataset.images, nothing))

  seen = _share(train, len(test.images))
  return Subject(predict, variables, part(train), part(seen), part(test))


def decisions(
  predict: Predict,
  variables: Any,
  images: np.ndarray,
  delta: Array,
  *,
  view: str = "clipped",
  batch_size: int = 64,
) -> np.ndarray:
  """`(N,)` int32: what the victim decides on `images + delta`, in batches.

  Args:
    predict: of the victim.
    variables: of the victim.
    images: `(N, ..., C)` uint8 or float32 in [0, 1].
    delta: `(..., C)`.
    view: one of `VIEWS`.
    batch_size: images per model call; the last batch is filled up.

  Raises:
    ValueError: where logits are not finite.
  """
  decide = functools.partial(_decide, predict, VIEWS[view], variables, delta)
  call = lambda batch: decide(data.as_float(batch))
  return _checked(loops.over_batches(call, images, size=batch_size))


def measure(subject: Subject, delta: Array) -> dict[str, dict[str, np.ndarray]]:
  """Split -> view -> table of `jaxadv.outcomes.count`."""
  return {
    name: {view: _table(subject, part, delta, view) for view in VIEWS}
    for name, part in (("train", subject.seen), ("test", subject.test))
  }


def per_image(subject: Subject, eps: float, *, norm: Norm) -> float:
  """Share of test images that PGD fools, each with a perturbation of its own.

  What a universal perturbation of that radius can hope for, and seldom reaches. 20
  steps of a quarter of the radius, from the clean image; the best of them counts, on
  images as stored in 8 bits.

  Args:
    subject: the victim.
    eps: radius.
    norm: of the ball.

  Returns:
    A fooling rate.

  Raises:
    Preempted: when asked to stop.
  """
  fool = functools.partial(_fool, subject.predict, norm, subject.variables, eps)

  def call(batch, before):
    preemption.check()
    return fool(data.as_float(batch), before)

  images, before = subject.test.dataset.images, subject.test.before
  after = _checked(loops.over_batches(call, images, before, size=64))
  return float(np.mean(after != before))


def radius(
  images: np.ndarray | Rows,
  share: float,
  norm: Norm,
  norm_channels: Literal["all", "first"] = "all",
) -> float:
  """`threats.share_of_norm` of images in memory, or on disk.

  Those on disk are gone through once, and the norm is kept; the mean of the parts
  differs by rounding from that of the whole.

  Args:
    images: `(N, ..., C)` uint8, or float32 in [0, 1].
    share: of their mean norm, above 0.
    norm: of the ball.
    norm_channels: see `threats.share_of_norm`.

  Example:
    >>> round(radius(np.full((2, 8, 8, 1), 255, np.uint8), 0.04, "l2"), 3)
    0.32
  """
  if isinstance(images, Rows):
    return share * _mean_norm(images, norm, norm_channels)
  return _share_of_norm(images, share, norm, norm_channels)


@functools.lru_cache(maxsize=1)
def _mean_norm(images, *norm):
  """The mean norm of images on disk, which are gone through once."""
  parts = (images[n : n + 256] for n in range(0, len(images), 256))
  return sum(len(part) * _share_of_norm(part, 1, *norm) for part in parts) / len(images)


def _share_of_norm(images, share, norm, channels):
  pixels = jnp.asarray(data.as_float(images))
  return threats.share_of_norm(pixels, share, norm=norm, norm_channels=channels)


def _share(dataset, size):
  """A share of every class, about `size` images in all; all of them if not more."""
  total = len(dataset.images)
  return dataset if total <= size else data.hold_out(dataset, size / total)[1]


def _table(subject, part, delta, view):
  images, classes = part.dataset.images, len(part.dataset.class_names)
  after = decisions(subject.predict, subject.variables, images, delta, view=view)
  truth = part.dataset.labels
  return np.asarray(outcomes.count(truth, part.before, after, num_classes=classes))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decide(predict, view, variables, delta, images):
  image = jax.vmap(view.apply, (0, None))(images, delta)
  return _decision(call(functools.partial(predict, variables), image)[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fool(predict, norm, variables, eps, images, before):
  own = freeze(functools.partial(predict, variables), images)
  steps = {"step_size": eps / 4, "num_steps": 20, "random_start": False}
  pgd = attacks.pgd(eps, norm=norm, keep="best", **steps)
  moved = pgd(jax.random.key(0), own, images, before).delta
  return _decision(call(own, jax.vmap(VIEWS["stored"].apply)(images, moved))[0])


def _decision(logits):
  """The class, or -1 where a logit is not finite and there is no decision."""
  return jnp.where(jnp.isfinite(logits).all(-1), jnp.argmax(logits, -1), -1)


def _checked(decided):
  undecided = int((decided < 0).sum())
  if undecided:
    raise ValueError(
      f"on {undecided} of {len(decided)} images the victim's logits are not finite; "
      "there is nothing to fool. Train it anew, with a smaller learning rate."
    )
  return decided
