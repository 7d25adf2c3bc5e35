"""One universal perturbation against one victim: crafted batch by batch, then measured.

The radius is an argument of the compiled step, so all radii share one compilation. The
state is the checkpoint and a batch is a function of its position, so a run that was
killed goes on to the same bits.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import (
  attacks,
  checkpoints,
  data,
  fingerprints,
  loops,
  outcomes,
  preemption,
  sharding,
  threats,
)
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
    microbatches: parts that a batch is cut into, see `jaxadv.reduction`; `make` takes
      them and the `axis_name` of the devices. `None` for the fast sum.
  """

  make: Callable[..., Universal]
  norm: Norm
  target: int | None
  steps: int
  batch: int
  seed: int
  checkpoint_every: int
  microbatches: int | None = None


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
  settings: Mapping[str, Any] | None = None,
  on_step: Callable[[int, Perturbation, loops.Metrics], None] | None = None,
) -> Perturbation:
  """Crafts a perturbation, or goes on from its last checkpoint.

  Args:
    plan: what to do.
    subject: against whom.
    eps: radius.
    folder: of the checkpoints; `None` for none.
    settings: flat, of JSON values: what the state depends on beside radius and plan.
    on_step: called as `on_step(n, state, metrics)` after step n, counted from 1.

  Returns:
    The state after the last step.

  Raises:
    Preempted: when asked to stop, after a checkpoint.
    SaveError: when a checkpoint cannot be written.
    ValueError: when all checkpoints are torn, or are of other settings.
  """
  image = jnp.zeros(subject.train.dataset.images.shape[1:])
  mesh = sharding.fitting(plan.batch, microbatches=plan.microbatches)
  axis_name = sharding.AXIS if mesh and plan.microbatches else None
  rule, aim = _rule(plan, axis_name), (eps, plan.target)
  start = functools.partial(_start, rule, jax.random.key(plan.seed), image)
  settings = {**_describe(plan, eps), **(settings or {})}
  if folder is None or checkpoints.latest(folder) is None:
    state = start(aim)
  else:
    shapes = jax.eval_shape(start, aim)
    state = checkpoints.restore(folder, shapes, settings=settings)
  done = int(state.step)
  variables = subject.variables
  batches: Iterable[loops.Batch] = stream(subject.train, plan, start=done)
  if mesh is not None:
    variables, state = sharding.put(mesh, (variables, state))
    batches = sharding.feed(mesh, batches)
  step = functools.partial(_step, rule, subject.predict, mesh, aim, variables)
  saving: contextlib.AbstractContextManager = contextlib.nullcontext()
  if folder is not None and plan.steps:
    saving = checkpoints.Saver(folder, state, settings=settings)

  def after(n, state, metrics):
    n += done
    if on_step is not None:
      on_step(n, state, metrics)
    stop = preemption.requested()
    if saver and (stop or n % plan.checkpoint_every == 0 or n == plan.steps):
      saver.save(state, step=n)
    if stop:
      raise preemption.Preempted

  with saving as saver:
    state = loops.fit(step, state, batches, num_steps=plan.steps - done, on_step=after)
  return state if mesh is None else sharding.local(state)


def program(plan: Plan, dataset: data.Dataset, outputs: Any) -> str:
  """A crafting step as a hash, in which steps and schedules are literals.

  Args:
    plan: what to do.
    dataset: images that it is going to take.
    outputs: shapes of the victim's outputs; it is traced with a linear model instead.
  """
  batch = next(data.batches(dataset, plan.microbatches or 2))
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


def radius(images: Any, share: float, norm: Norm, channels: str = "all") -> float:
  """The radius of a share of the mean norm of images, in memory or lazy.

  Args:
    images: `(N, ..., C)` uint8 or float32 in [0, 1].
    share: of that norm, above 0.
    norm: of the ball.
    channels: as `norm_channels` of `threats.share_of_norm`.
  """
  if isinstance(images, Rows):
    return share * _mean_norm(images, norm, channels)
  return _share_of_norm(images, share, norm, channels)


def stream(
  part: Part, plan: Plan, *, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
  """The stream of training batches, with the clean decisions beside the truth."""
  place = {int(number): n for n, number in enumerate(part.dataset.ids)}
  batches = data.batches(
    part.dataset, plan.batch, seed=plan.seed, start=start, shard=sharding.share()
  )
  for batch in batches:
    seen = [place[int(number)] for number in batch["id"]]
    yield batch | {"decision": part.before[seen]}


def _describe(plan, eps):
  """What a checkpoint is of; the program is described by the caller's settings."""
  fields = {"eps": float(eps), **plan._asdict()}
  return {k: v for k, v in fields.items() if k not in ("make", "checkpoint_every")}


@functools.lru_cache(maxsize=1)
def _mean_norm(images, *norm):
  """The mean norm of images on disk, which are gone through once per process."""
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
  return _build(_rule(plan), (eps, plan.target))


def _rule(plan, axis_name=None):
  """What a crafting step is compiled for."""
  if not plan.steps:
    return plan.make, plan.norm, ()
  options = {"num_steps": plan.steps, "microbatches": plan.microbatches}
  options["axis_name"] = axis_name
  given = tuple((name, value) for name, value in options.items() if value is not None)
  return plan.make, plan.norm, given


def _build(rule, aim):
  (make, norm, given), (eps, target) = rule, aim
  options = dict(given)
  if target is not None:
    options["target"] = target
  return make(eps, norm=norm, **options)


@functools.partial(jax.jit, static_argnums=0)
def _start(rule, key, image, aim):
  return _build(rule, aim).init(key, image)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(rule, predict, mesh, aim, variables, state, batch):
  step = _build(rule, aim).step
  if "axis_name" not in dict(rule[-1]):
    return step(functools.partial(predict, variables), state, batch)

  def on_each(given, batch):
    aim, variables, state = given
    own = functools.partial(predict, variables)
    return _build(rule, aim).step(own, state, batch)

  return sharding.data_parallel(on_each, mesh)((aim, variables, state), batch)


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
