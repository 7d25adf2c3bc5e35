"""One universal perturbation against one victim: crafted batch by batch, then measured.

The radius is an argument of the compiled step, so all radii share one compilation. The
state is the checkpoint and a batch is a function of its position, so a run that was
killed goes on to the same bits.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import checkpoints, data, loops, outcomes, threats
from jaxadv.engine import Universal
from jaxadv.types import Array, Perturbation, call

__all__ = [
  "VIEWS",
  "Part",
  "Plan",
  "Subject",
  "craft",
  "decisions",
  "measure",
  "stream",
  "subject",
]

# (variables, images) -> (logits, features)
Predict = Callable[[Any, Array], Any]
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
    test: what they are judged on.
  """

  predict: Predict
  variables: Any
  train: Part
  test: Part


class Plan(NamedTuple):
  """How one perturbation is crafted.

  Attributes:
    make: `eps -> Universal`, or `(eps, *, target) -> Universal`; both are traced, so
      that all radii and targets share one compiled step.
    target: class it aims at, or `None`.
    steps: batches; 0 for a control that is only drawn.
    batch: images per batch.
    seed: of the key and of the order of the images.
    checkpoint_every: steps between checkpoints.
  """

  make: Callable[..., Universal]
  target: int | None
  steps: int
  batch: int
  seed: int
  checkpoint_every: int


def subject(
  predict: Predict, variables: Any, train: data.Dataset, test: data.Dataset
) -> Subject:
  """A victim with its decisions on the clean images of both parts."""
  nothing = jnp.zeros(train.images.shape[1:])

  def part(dataset):
    return Part(dataset, decisions(predict, variables, dataset.images, nothing))

  return Subject(predict, variables, part(train), part(test))


def craft(
  plan: Plan,
  subject: Subject,
  eps: float,
  *,
  folder: pathlib.Path | None = None,
  advance: Callable[[int, str], None] = lambda steps, note: None,
) -> Perturbation:
  """Crafts a perturbation, or goes on from its last checkpoint.

  Args:
    plan: what to do.
    subject: against whom.
    eps: radius.
    folder: of the checkpoints; `None` for none.
    advance: told `(1, note)` after every step.

  Returns:
    The state after the last step.
  """
  image = jnp.zeros(subject.train.dataset.images.shape[1:])
  aim = (eps, plan.target)
  start = functools.partial(_start, plan.make, jax.random.key(plan.seed), image)
  done = 0 if folder is None else checkpoints.latest(folder) or 0
  if folder is None or not done:
    state = jax.jit(start)(aim)
  else:
    state = checkpoints.restore(folder, jax.eval_shape(start, aim))
  step = functools.partial(_step, plan.make, subject.predict, aim, subject.variables)

  def on_step(n, state, metrics):
    advance(1, f"fooled {float(metrics['success']):.2f}")
    if folder is None:
      return
    if (done + n) % plan.checkpoint_every == 0 or done + n == plan.steps:
      checkpoints.save(folder, state, step=done + n)

  batches = stream(subject.train, plan, start=done)
  return loops.fit(step, state, batches, num_steps=plan.steps - done, on_step=on_step)


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
  """
  found = []
  for start in range(0, len(images), batch_size):
    part = images[start : start + batch_size]
    pads = [(0, batch_size - len(part))] + [(0, 0)] * (part.ndim - 1)
    batch = np.pad(part, pads).astype(np.float32)
    batch /= np.float32(255 if images.dtype == np.uint8 else 1)
    decided = _decide(predict, VIEWS[view], variables, batch, delta)
    found.append(np.asarray(decided)[: len(part)])
  return np.concatenate(found)


def measure(subject: Subject, delta: Array) -> dict[str, dict[str, np.ndarray]]:
  """Split -> view -> table of `jaxadv.outcomes.count`."""
  return {
    name: {view: _table(subject, part, delta, view) for view in VIEWS}
    for name, part in (("train", subject.train), ("test", subject.test))
  }


def stream(
  part: Part, plan: Plan, *, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
  """The stream of training batches, with the clean decisions beside the truth."""
  place = {int(number): n for n, number in enumerate(part.dataset.ids)}
  for batch in data.batches(part.dataset, plan.batch, seed=plan.seed, start=start):
    seen = [place[int(number)] for number in batch["id"]]
    yield batch | {"decision": part.before[seen]}


def _table(subject, part, delta, view):
  images, classes = part.dataset.images, len(part.dataset.class_names)
  after = decisions(subject.predict, subject.variables, images, delta, view=view)
  truth = part.dataset.labels
  return np.asarray(outcomes.count(truth, part.before, after, num_classes=classes))


def _build(make, aim):
  eps, target = aim
  return make(eps) if target is None else make(eps, target=target)


def _start(make, key, image, aim):
  return _build(make, aim).init(key, image)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(make, predict, aim, variables, state, batch):
  return _build(make, aim).step(functools.partial(predict, variables), state, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decide(predict, view, variables, images, delta):
  image = jax.vmap(view.apply, (0, None))(images, delta)
  return jnp.argmax(call(functools.partial(predict, variables), image)[0], -1)
