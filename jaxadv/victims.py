"""The victim: a Flax model, trained plainly or defended, and resumable.

Works with any object that has Flax's `init(key, x)` and
`apply(variables, x, train=..., mutable=...)`; Flax itself is not imported.

With validation images the checkpoint carries the best variables so far beside the
current ones, and the latest score: whatever moment a run is killed at, it goes on to
the same choice, or sees that it had collapsed.
"""

import functools
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadv import (
  assessment,
  checkpoints,
  combine,
  data,
  fingerprints,
  loops,
  preemption,
  sharding,
  training,
)
from jaxadv.assessment import SCORES, predictor
from jaxadv.experiments import Recipe
from jaxadv.progress import Progress, silent
from jaxadv.types import call

__all__ = ["Trained", "describe", "flax_apply", "outputs", "train"]

Variables = dict[str, Any]
# By the kind of label: the loss a victim learns by.
_LOSSES = {
  "mask": training.dice_cross_entropy,
  "class": training.cross_entropy,
  "set": training.binary_cross_entropy,
}


class Trained(NamedTuple):
  """A victim, and the training step it is from.

  Attributes:
    variables: of the Flax module.
    step: int32, steps taken.
    score: float32, on the validation images, as the monitor shows them; `-inf` without
      any.
  """

  variables: Variables
  step: jax.Array
  score: jax.Array


class _State(NamedTuple):
  """What a checkpoint holds; without validation images the last two are `None`."""

  train: training.TrainState
  best: Trained | None
  score: jax.Array | None  # of `train`


def flax_apply(model: Any) -> training.ApplyFn:
  """A Flax module as `apply(params, extra, images, train) -> (logits, extra)`.

  `extra` holds the collections beside `params`, such as batch statistics; training
  updates them, evaluation does not. Features the module returns are dropped.
  """

  def apply(params, extra, images, train):
    variables = {"params": params, **extra}
    if not (train and extra):
      return _logits(model.apply(variables, images, train=train)), extra
    out, extra = model.apply(variables, images, train=True, mutable=list(extra))
    return _logits(out), extra

  return apply


def describe(
  recipe: Recipe, dataset: data.Dataset, validation: data.Dataset | None = None
) -> dict[str, Any]:
  """What the trained weights depend on: two equal descriptions, one victim.

  Args:
    recipe: the settings.
    dataset: what the victim is trained on.
    validation: what it is selected on.

  Returns:
    A flat dict of JSON values. Optimizer, loss and augmentation, which are closures,
    are described by a hash of the program they trace to.
  """
  return {
    "model": fingerprints.text(recipe.model),
    "start": recipe.start and fingerprints.arrays(_initial(recipe, dataset)),
    **_programs(recipe, dataset),
    "collapse": recipe.collapse if math.isfinite(recipe.collapse) else None,
    "train_steps": recipe.train_steps,
    "batch_size": recipe.batch_size,
    "microbatches": recipe.microbatches,
    "balance": recipe.balance,
    "seed": recipe.seed,
    "train_data": fingerprints.dataset(dataset),
    # Only checkpoints are candidates, so their spacing decides with the images.
    "selected_on": validation
    and f"{fingerprints.dataset(validation)} every {recipe.checkpoint_every} steps",
  }


def outputs(model: Any, dataset: data.Dataset) -> tuple[Any, dict[str, Any]]:
  """Shapes of the logits `(1, ..., K)` and features of one image; nothing is computed.

  Raises:
    ValueError: from a model that cannot take the images.
  """

  def run(key):
    image = _example(dataset)
    variables = model.init(key, image)
    return call(functools.partial(predictor(model), variables), image)

  return jax.eval_shape(run, jax.random.key(0))


def train(
  recipe: Recipe,
  dataset: data.Dataset,
  folder: pathlib.Path,
  *,
  validation: data.Dataset | None = None,
  settings: Mapping[str, Any] | None = None,
  progress: Progress = silent,
) -> Trained:
  """Trains the victim, or goes on from its last checkpoint, or just reads it.

  Args:
    recipe: the settings.
    dataset: training part, images `(N, H, W, C)`.
    folder: of the checkpoints.
    validation: images on which every checkpoint is scored, under `recipe.monitor` if
      there is one, by mean IoU of masks, balanced accuracy of classes, mean AUROC of
      label sets. The victim is the checkpoint that scores best, of equal ones the last,
      and training stops where the score falls by `recipe.collapse`, or where the model
      answers NaN. Never the test part: the published code selects there, and its
      accuracies are flattered by it.
    settings: from `describe`, stored with the checkpoints; by default they are not told
      apart.
    progress: shows the steps.

  Returns:
    The best checkpoint; the last one without validation images.

  Raises:
    Preempted: when asked to stop, after a checkpoint.
    SaveError: when a checkpoint cannot be written.
    ValueError: when all checkpoints are torn, or are of another model; with
      `recipe.balance`, for labels that cannot be balanced.
  """
  start = functools.partial(_start, recipe, validation is not None)
  if checkpoints.latest(folder) is None:
    state = jax.jit(start)(_initial(recipe, dataset))
  else:
    shapes = jax.eval_shape(start, _shapes(recipe, dataset))
    state = checkpoints.restore(folder, shapes, settings=settings)
  if int(state.train.step) < recipe.train_steps and not _collapsed(recipe, state):
    with checkpoints.Saver(folder, state, settings=settings) as saver:
      state = _fit(recipe, dataset, validation, state, saver, progress)
  return sharding.local(state.best or _trained(state.train))


def _loss(recipe, dataset):
  return recipe.loss or _LOSSES[dataset.kind]


def _initial(recipe, dataset):
  """The variables that training starts from; `recipe.start` sees arrays, no tracers."""
  key = jax.random.key(recipe.seed)
  fresh = _fresh(recipe.model, key, _example(dataset))
  if recipe.start is None:
    return fresh
  return _blamed("start", recipe.start, fresh)


@functools.partial(jax.jit, static_argnums=0)
def _fresh(model, key, image):
  """Compiled once for all seeds of a study."""
  return model.init(key, image)


def _blamed(name, function, *arguments):
  """Calls a part of a config; what it raises names the part."""
  try:
    return function(*arguments)
  except Exception as error:  # a config's part may fail in any way
    raise ValueError(f"`{name}`: {type(error).__name__}: {error}") from error


def _untrained(key, optimizer, variables):
  params = variables["params"]
  extra = {name: variables[name] for name in variables if name != "params"}
  return training.init_state(key, params, extra, optimizer)


def _start(recipe, selects, variables):
  state = _untrained(jax.random.key(recipe.seed), recipe.optimizer, variables)
  if not selects:
    return _State(state, None, None)
  return _State(state, _trained(state), jnp.float32(-jnp.inf))


def _trained(state, score=-jnp.inf):
  variables = {"params": state.params, **state.extra}
  return Trained(variables, state.step, jnp.float32(score))


def _collapsed(recipe, state):
  """Whether the score fell too far below the best one to come back."""
  if state.best is None:
    return False
  fall = float(state.best.score - state.score)  # NaN while nothing was judged
  return fall > recipe.collapse or fall == math.inf


def _example(dataset):
  return jnp.zeros((1, *dataset.images.shape[1:]))


def _fit(recipe, dataset, validation, state, saver, progress):
  """From checkpoint to checkpoint, so that a choice is stored with what it is among."""
  done = int(state.train.step)
  mesh = sharding.fitting(recipe.batch_size, microbatches=recipe.microbatches)
  step = _step_of(recipe, dataset, mesh)
  judge = functools.partial(_judge, recipe, validation, mesh)
  batches: Iterable[loops.Batch] = data.batches(
    dataset,
    recipe.batch_size,
    seed=recipe.seed,
    start=done,
    balance=recipe.balance,
    shard=sharding.share(),
  )
  if mesh is not None:
    state, batches = sharding.put(mesh, state), sharding.feed(mesh, batches)
  total, every = recipe.train_steps, recipe.checkpoint_every
  with progress("training", total, done) as advance:
    while done < total and not _collapsed(recipe, state):
      count = min(every - done % every, total - done)

      def on_step(n, last, metrics, state=state, done=done, count=count):
        _show(advance, state.best, metrics)
        if n < count and preemption.requested():
          # Not judged: only what an undisturbed run judges is a candidate.
          saver.save(state._replace(train=last), step=done + n)
          raise preemption.Preempted

      last = loops.fit(step, state.train, batches, num_steps=count, on_step=on_step)
      state = judge(state.best, last)
      done += count
      saver.save(state, step=done)
      preemption.check()
  return state


def _step_of(recipe, dataset, mesh=None):
  """The jitted step of a recipe, one program for all seeds."""
  plain = _loss(recipe, dataset) if recipe.defence is None else None
  defended = recipe.defence, recipe.weights
  parts = recipe.model, recipe.optimizer, recipe.augment, plain, *defended
  return _step(*parts, recipe.microbatches, mesh)


@functools.lru_cache(maxsize=2)
def _step(model, optimizer, augment, loss, defence, weights, microbatches, mesh):
  """It donates its state, whose memory the next one takes over."""
  cut = {"augment": augment, "microbatches": microbatches}
  if mesh is not None and microbatches:
    cut["axis_name"] = sharding.AXIS
  apply = flax_apply(model)
  if defence is None:
    step = training.train_step(apply, optimizer, loss, **cut)
  else:
    step = training.adversarial_step(apply, optimizer, *defence, weights=weights, **cut)
  if "axis_name" in cut:
    step = sharding.data_parallel(step, mesh)
  return jax.jit(step, donate_argnums=0)


def _show(advance, best, metrics):
  note = f"loss {float(metrics['loss']):.3f}"
  if best is not None and best.step:
    note += f", best {float(best.score):.3f} at {int(best.step)}"
  advance(1, note)


def _judge(recipe, validation, mesh, best, state):
  """The state with its score, and the best: that state where it scores as well."""
  if best is None:
    return _State(state, None, None)
  try:
    found = assessment.assess(
      predictor(recipe.model),
      sharding.local(_trained(state).variables),
      validation,
      attack=recipe.monitor or combine.identity,
      seed=recipe.seed,
    )
    score = found[SCORES[validation.kind]]
  except assessment.NotFinite:  # diverged: what was best before is still there
    score = None
  now = _trained(state, -jnp.inf if score is None else score)
  now = now if mesh is None else sharding.put(mesh, now)
  if now.score >= best.score:  # of equal ones the later: it has learned longer
    best = jax.tree.map(jnp.copy, now)  # the step gives the memory of its state away
  return _State(state, best, now.score)


def _programs(recipe, dataset):
  """Hashes of the closures in a recipe, which do not depend on the seed."""
  names = "optimizer", "augment", "defence", "weights", "monitor"
  parts = {name: getattr(recipe, name) for name in names}
  parts["loss"] = _loss(recipe, dataset)
  for name, part in parts.items():
    _blamed(name, hash, part)
  label = jax.ShapeDtypeStruct(dataset.labels.shape[1:], dataset.labels.dtype)
  return _hashes(recipe.model, dataset.images.shape[1:], label, **parts)


@functools.lru_cache(maxsize=2)  # the seeds of a study come in a row
def _hashes(
  model, shape, label, *, optimizer, loss, augment, defence, weights, monitor
):
  image, labels = jnp.zeros((1, *shape)), label.update(shape=(1, *label.shape))
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  predict = predictor(model)

  def trained():
    """A whole training step: views and loss are closures in it."""
    start = functools.partial(_untrained, jax.random.key(0), optimizer)
    state, batch = jax.eval_shape(start, variables), {"image": image, "label": labels}
    step = _step(model, optimizer, augment, None, defence, weights, None, None)
    return fingerprints.program(step, state, batch)

  def show(variables, image, label):
    attacked = functools.partial(predict, variables)
    return monitor(jax.random.key(0), attacked, image, label).image

  # Learning rates and schedules are literals in an update.
  params = variables["params"]
  state = jax.eval_shape(optimizer.init, params)
  logits = jnp.zeros(_logits(jax.eval_shape(predict, variables, image)).shape[1:])
  shown = variables, image, labels
  return {
    "optimizer": fingerprints.program(optimizer.update, params, state, params),
    "loss": _named("loss", loss, logits, label),
    "augment": augment
    and _named("augment", augment, jax.random.key(0), image[0], label),
    "defence": defence and _blamed("defence", trained),
    "monitor": monitor and _blamed("monitor", fingerprints.program, show, *shown),
  }


def _named(part, function, *arguments):
  name = getattr(function, "__qualname__", type(function).__name__)
  return f"{name} {_blamed(part, fingerprints.program, function, *arguments)}"


def _logits(out):
  return out[0] if isinstance(out, tuple) else out


def _shapes(recipe, dataset):
  return jax.eval_shape(recipe.model.init, jax.random.key(0), _example(dataset))
