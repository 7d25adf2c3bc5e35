"""The table every attack must join: one row, and `test_conformance.py` does the rest.

A row says how to make the attack from ONE number (its radius, or its step when there is
no ball) and which task it attacks. Models and images are tiny; the numbers of a row are
chosen so that the attack gets somewhere on them in a few steps. Universal ones, which
are one state for all examples, are in `test_universal.py`, of label sets too.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import attacks
from jaxadv.engine import Attack
from jaxadv.types import AttackResult, example_keys

__all__ = ["BATCH", "ROWS", "Row", "assert_allowed", "assert_same", "base", "problem"]

BATCH = 64
STEPS = 6


class Row(NamedTuple):
  """One attack under test.

  Attributes:
    name: public name in `jaxadv.attacks`.
    make: `size -> Attack`; `size` may be a tracer.
    task: `"class"`; `"set"` of labels; `"mask"`; `"image"` for a mask with its target
      image.
    size: the number given to `make`.
    norm: of the ball of radius `size`; `None` when only the range limits it.
    bits: grid the returned image must lie on.
  """

  name: str
  make: Callable[[Any], Attack]
  task: Literal["class", "set", "mask", "image"]
  size: float
  norm: Literal["linf", "l2", "l1"] | None = None
  bits: int | None = None

  def __str__(self) -> str:
    norm = f"-{self.norm}" if self.norm not in (None, "linf") else ""
    return self.name + norm + ("-labels" if self.task == "set" else "")

  @property
  def dense(self) -> bool:
    """Whether the model decides pixel by pixel."""
    return self.task in ("mask", "image")


def _of(name: str, parameter: str | None = None, **options: Any) -> Callable:
  make = functools.partial(getattr(attacks, name), **options)
  return make if parameter is None else lambda size: make(**{parameter: size})


_SLOW = {"threshold": 0.8, "num_steps": 150}  # their first steps are small
_SHORTER = _SLOW | {"num_steps": 100}  # longer runs blow up the last bits of a norm
_EASY = {"threshold": 0.8, "num_steps": STEPS}
_MARGIN = _EASY | {"margin": True}  # the raw logit may raise both classes at once
ROWS = (
  Row("fgsm", _of("fgsm"), "class", 0.05, "linf"),
  Row("pgd", _of("pgd", num_steps=STEPS), "class", 0.05, "linf"),
  Row("pgd", _of("pgd", num_steps=STEPS, norm="l2"), "class", 0.4, "l2"),
  Row("pgd", _of("pgd", num_steps=STEPS, norm="l1"), "class", 3.0, "l1"),
  Row("mi_fgsm", _of("mi_fgsm", num_steps=STEPS), "class", 0.05, "linf"),
  Row(
    "deepfool",
    lambda size: attacks.deepfool(overshoot=size, num_steps=STEPS),
    "class",
    0.05,
  ),
  # hardly shrunk: a broken image of the checks has to stay as dark or as bright
  Row("di_fgsm", _of("di_fgsm", num_steps=STEPS, shrink=0.98), "class", 0.05, "linf"),
  Row("ti_fgsm", _of("ti_fgsm", num_steps=STEPS, size=5), "class", 0.05, "linf"),
  Row("apgd", _of("apgd", num_steps=STEPS), "class", 0.05, "linf"),
  # at 0.4 a last bit decides whether the loss of one example has risen
  Row("apgd", _of("apgd", num_steps=STEPS, norm="l2"), "class", 0.3, "l2"),
  Row("seg_pgd", _of("seg_pgd", num_steps=STEPS), "mask", 0.05, "linf"),
  Row("cos_pgd", _of("cos_pgd", num_steps=STEPS, targeted=True), "mask", 0.05, "linf"),
  Row("smia", _of("smia", num_steps=STEPS), "class", 0.05, "linf"),
  Row("smia", _of("smia", num_steps=STEPS, targeted=True), "mask", 0.05, "linf"),
  Row("square", _of("square", num_steps=60), "class", 0.05, "linf"),
  Row("fgsm", _of("fgsm"), "set", 0.05, "linf"),
  Row("pgd", _of("pgd", num_steps=STEPS), "set", 0.05, "linf"),
  Row("mi_fgsm", _of("mi_fgsm", num_steps=STEPS), "set", 0.05, "linf"),
  Row("apgd", _of("apgd", num_steps=STEPS), "set", 0.05, "linf"),
  Row("smia", _of("smia", num_steps=STEPS), "set", 0.05, "linf"),
  Row("square", _of("square", num_steps=60), "set", 0.05, "linf"),
  Row("asma", _of("asma", "tau", beta=0.1, **_EASY), "mask", 0.02),
  Row(
    "asma_calibrated",
    _of("asma_calibrated", "scale", bits=8, **_MARGIN),
    "mask",
    0.01,
    bits=8,
  ),
  Row("msa", _of("msa", "omega", bits=None, **_SLOW), "image", 0.1),
  Row("msa_literal", _of("msa_literal", "far", **_EASY), "image", 0.02),
  Row("mafl", _of("mafl", "similarity_weight", bits=None, **_SHORTER), "image", 0.1),
  Row("mafl_literal", _of("mafl_literal", "scale", **_MARGIN), "image", 0.02),
  Row("mafl_linf", _of("mafl_linf", **_EASY), "image", 0.15, "linf"),
)


class Problem(NamedTuple):
  """A model, images, labels and one key per image."""

  predict: Callable
  x: jax.Array
  y: Any
  keys: jax.Array

  def take(self, index: Any) -> "Problem":
    x, y, keys = jax.tree.map(lambda leaf: leaf[index], self[1:])
    return Problem(self.predict, x, y, keys)


@functools.cache
def problem(row: Row, shape: tuple[int, ...] = (8, 8), n: int = BATCH) -> Problem:
  """The fixed small problem of a row."""
  predict = helpers.convnet(classes=2 if row.dense else 3, dense=row.dense)
  x = helpers.stripes(n, shape)
  logits = predict(x)[0]
  y = jnp.argmax(logits, -1)
  if row.task == "set":
    y = (logits > 0).astype(jnp.int32)
  if row.dense and row.name != "seg_pgd":
    # wanted: the model's own mask with a fifth of the pixels turned over
    y = jnp.where(jnp.asarray(np.random.default_rng(3).random(y.shape) < 0.2), 1 - y, y)
  if row.task == "image":
    y = {"label": y, "image": jnp.roll(x, 1, 0)}
  return Problem(predict, x, y, example_keys(jax.random.key(11), n))


class Base(NamedTuple):
  """The run all others are compared with: `jit`, whole batch, one device.

  Attributes:
    problem: what was attacked.
    result: what came of it.
    traces: how often the model was traced.
    run: the compiled attack, `(keys, x, y) -> result`.
  """

  problem: Problem
  result: AttackResult
  traces: int
  run: Callable


@functools.cache
def base(row: Row) -> Base:
  """Runs a row once per session."""
  task = problem(row)
  counter = helpers.Counter(task.predict)
  run = jax.jit(lambda keys, x, y: row.make(row.size)(keys, counter, x, y))
  result = run(task.keys, task.x, task.y)
  return Base(task, result, counter.traces, run)


def assert_allowed(row: Row, x: jax.Array, image: jax.Array) -> None:
  """The image is finite, inside [0, 1], inside the ball and on the grid of the row."""
  x, image = np.asarray(x, np.float64), np.asarray(image, np.float64)
  assert np.isfinite(image).all()
  assert image.min() >= 0, "below the range"
  assert image.max() <= 1, "above the range"
  if row.bits is not None:
    levels = image * (2**row.bits - 1)
    assert np.abs(levels - np.round(levels)).max() < 1e-3, "not on the grid"
  if row.norm is not None:
    delta = (image - x).reshape(len(x), -1)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[row.norm]
    # a float32 rounding of image - x per value, nothing else
    slack = 1e-7 * np.linalg.norm(np.ones(delta.shape[1]), order)
    assert np.linalg.norm(delta, order, axis=1).max() <= row.size + slack, "ball left"


def assert_same(got: AttackResult, want: AttackResult) -> None:
  """Two runs of the same attack agree in every leaf of their results.

  Not in every bit: XLA adds up in another order for another batch or program. So some
  last bits may differ, and an 8-bit level here and there that sat between two.
  """
  assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)
  for name, a, b in zip(AttackResult._fields, got, want, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    gap, size = np.abs(a - b), 1 + np.abs(b).max()
    assert gap.mean() <= 5e-6 * size, f"{name}: {gap.mean()}"
    assert gap.max() <= 0.005 * size, f"{name}: {gap.max()}"
