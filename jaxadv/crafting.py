"""One universal perturbation against one victim, crafted batch by batch.

The radius is an argument of the compiled step, so all radii share one compilation. The
state is the checkpoint and a batch is a function of its position, so a run that was
killed goes on to the same bits.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import (
  checkpoints,
  data,
  fingerprints,
  loops,
  preemption,
  sharding,
)
from jaxadv.engine import Universal
from jaxadv.freezing import freeze
from jaxadv.subjects import Norm, Part, Subject
from jaxadv.types import Perturbation

__all__ = ["Plan", "build", "craft", "program", "stream"]


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
    on_step: called as `on_step(n, state, metrics)` after step n, counted from 1; the
      next step takes the memory of the state, so copy what is to be kept.

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
  if folder is not None and done < plan.steps:
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
  return sharding.local(state)


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


def stream(
  part: Part, plan: Plan, *, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
  """The stream of training batches, with the clean decisions beside the truth."""
  ids = part.dataset.ids
  places = np.argsort(ids)
  batches = data.batches(
    part.dataset, plan.batch, seed=plan.seed, start=start, shard=sharding.share()
  )
  for batch in batches:
    seen = places[np.searchsorted(ids, batch["id"], sorter=places)]
    yield batch | {"decision": part.before[seen]}


def _describe(plan, eps):
  """What a checkpoint is of; the program is described by the caller's settings."""
  fields = {"eps": float(eps), **plan._asdict()}
  return {k: v for k, v in fields.items() if k not in ("make", "checkpoint_every")}


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


# The state's memory is the next one's.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _step(rule, predict, mesh, aim, variables, state, batch):
  dtype = jnp.result_type(batch["image"], state.delta)
  like = _seen(batch["image"], dict(rule[-1]).get("microbatches", 1), dtype)

  def on_each(given, batch):
    aim, variables, state = given
    model = freeze(functools.partial(predict, variables), like, once=True)
    return _build(rule, aim).step(model, state, batch)

  mapped = "axis_name" in dict(rule[-1])
  step = sharding.data_parallel(on_each, mesh) if mapped else on_each
  return step((aim, variables, state), batch)


def _seen(images, microbatches, dtype):
  """What the model gets in one call."""
  shape = (len(images) // microbatches, *images.shape[1:])
  return jax.ShapeDtypeStruct(shape, dtype)
