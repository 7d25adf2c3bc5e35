"""One universal perturbation against one victim: crafted batch by batch, then measured.

The radius is an argument of the compiled step, so all radii share one compilation. The
state is the checkpoint and a batch is a function of its position, so a run that was
killed goes on to the same bits.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import attacks, checkpoints, data, fingerprints, loops, outcomes, threats
from jaxadv.engine import Universal
from jaxadv.lazy import Rows
from jaxadv.types import Array, Perturbation, call

__all__ = [
  "VIEWS",
  "Part",
  "Plan",
  "Subject",
  "build",
  "craft",
  "decisions",
  "measure",
  "per_image",
  "program",
  "radius",
  "stream",
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


class Plan(NamedTuple):
  """How one perturbation is crafted.

  Attributes:
    make: `(eps, *, norm, num_steps) -> Universal`, with `target` where there is one;
      radius and target are traced, so that all of them share one compiled step.
    norm: of the ball.
    target: class it aims at, or `None`.
    steps: batches; 0 for a control, `(eps, *, norm) -> Universal`, that is only drawn.
    batch: images per batch.
    seed: of the key and of the order of the images.
    checkpoint_every: steps between checkpoints.
  """

  make: Callable[..., Universal]
  norm: Norm
  target: int | None
  steps: int
  batch: int
  seed: int
  checkpoint_every: int


def subject(
  predict: Predict, variables: Any, train: data.Dataset, test: data.Dataset
) -> Subject:
  """A victim with its decisions on the clean images."""
  nothing = jnp.zeros(train.images.shape[1:])

  def part(dataset):
    return Part(dataset, decisions(predict, variables, dataset.images, nothing))

  seen = _share(train, len(test.images))
  return Subject(predict, variables, part(train), part(seen), part(test))


def craft(
  plan: Plan,
  subject: Subject,
  eps: float,
  *,
  folder: pathlib.Path | None = None,
  on_step: Callable[[int, Perturbation, loops.Metrics], None] | None = None,
) -> Perturbation:
  """Crafts a perturbation, or goes on from its last checkpoint.

  Args:
    plan: what to do.
    subject: against whom.
    eps: radius.
    folder: of the checkpoints; `None` for none.
    on_step: called as `on_step(n, state, metrics)` after step n, counted from 1.

  Returns:
    The state after the last step.
  """
  image = jnp.zeros(subject.train.dataset.images.shape[1:])
  rule, aim = (plan.make, plan.norm, plan.steps), (eps, plan.target)
  start = functools.partial(_start, rule, jax.random.key(plan.seed), image)
  done = 0 if folder is None else checkpoints.latest(folder) or 0
  if folder is None or not done:
    state = start(aim)
  else:
    state = checkpoints.restore(folder, jax.eval_shape(start, aim))
  step = functools.partial(_step, rule, subject.predict, aim, subject.variables)

  def after(n, state, metrics):
    n += done
    if on_step is not None:
      on_step(n, state, metrics)
    if folder is not None and (n % plan.checkpoint_every == 0 or n == plan.steps):
      checkpoints.save(folder, state, step=n)

  batches = stream(subject.train, plan, start=done)
  return loops.fit(step, state, batches, num_steps=plan.steps - done, on_step=after)


def program(plan: Plan, dataset: data.Dataset, outputs: Any) -> str:
  """A crafting step as a hash, in which steps and schedules are literals.

  Args:
    plan: what to do.
    dataset: images that it is going to take.
    outputs: shapes of the victim's outputs; it is traced with a linear model instead.
  """
  batch = next(data.batches(dataset, 2))
  batch["decision"] = batch["label"]
  image = jnp.asarray(batch["image"])

  def linear(x):
    total = x.reshape(len(x), -1).sum(1)
    ones = lambda out: jnp.ones(out.shape[1:], out.dtype)
    each = lambda value: jax.tree.map(lambda out: value * ones(out), outputs)
    return jax.vmap(each)(total)

  def step(eps):
    uap = build(plan, eps)
    state = uap.init(jax.random.key(0), image[0])
    return uap.step(linear, state, batch)[0].delta

  return f"{plan.steps} steps of {fingerprints.program(step, 0.1)}"


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
  """
  fool = functools.partial(_fool, subject.predict, norm, subject.variables, eps)
  call = lambda batch, before: fool(data.as_float(batch), before)
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

  Those on disk are gone through once per process; the mean of the parts differs by
  rounding from that of the whole.

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


def stream(
  part: Part, plan: Plan, *, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
  """The stream of training batches, with the clean decisions beside the truth."""
  place = {int(number): n for n, number in enumerate(part.dataset.ids)}
  for batch in data.batches(part.dataset, plan.batch, seed=plan.seed, start=start):
    seen = [place[int(number)] for number in batch["id"]]
    yield batch | {"decision": part.before[seen]}


@functools.lru_cache(maxsize=1)
def _mean_norm(images, *norm):
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


def build(plan: Plan, eps: Any) -> Universal:
  """The perturbation of a plan, in the making."""
  return _build((plan.make, plan.norm, plan.steps), (eps, plan.target))


def _build(rule, aim):
  (make, norm, steps), (eps, target) = rule, aim
  options = {"num_steps": steps} if steps else {}
  if target is not None:
    options["target"] = target
  return make(eps, norm=norm, **options)


@functools.partial(jax.jit, static_argnums=0)
def _start(rule, key, image, aim):
  return _build(rule, aim).init(key, image)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(rule, predict, aim, variables, state, batch):
  return _build(rule, aim).step(functools.partial(predict, variables), state, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decide(predict, view, variables, delta, images):
  image = jax.vmap(view.apply, (0, None))(images, delta)
  return _decision(call(functools.partial(predict, variables), image)[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fool(predict, norm, variables, eps, images, before):
  own = functools.partial(predict, variables)
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
