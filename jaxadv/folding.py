"""Scales and shifts of channels, such as frozen norms, move into the step before them.

    (x * K + b - mean) * scale + shift  =  x * (K scale) + (b - mean) scale + shift

where `*` is a convolution, or a product with a matrix, whose kernel `K` is known.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

__all__ = ["Step", "Unknown", "fold"]


class Unknown:
  """A value that depends on the image; `aval` is its abstract value."""

  def __init__(self, aval: Any) -> None:
    self.aval = aval


class Step(NamedTuple):
  """One instruction of a program.

  Attributes:
    name: of the primitive.
    params: of the primitive.
    inputs: arrays and unknown values.
    outputs: unknown values.
    call: all inputs to the list of outputs.
  """

  name: str
  params: dict[str, Any]
  inputs: list[Any]
  outputs: list[Unknown]
  call: Callable[..., list[Any]]

  @property
  def unknown(self) -> list[Unknown]:
    """The inputs that depend on the image."""
    return [value for value in self.inputs if isinstance(value, Unknown)]


class _Chain(NamedTuple):
  """A linear step, and what its channels go through before they are used."""

  step: Step
  output: Unknown
  scale: Any = 1.0
  shift: Any = 0.0


# How `channels op v`, and `v op channels`, change their scale `s` and shift `t`.
_RIGHT = {
  "add": lambda s, t, v: (s, t + v),
  "sub": lambda s, t, v: (s, t - v),
  "mul": lambda s, t, v: (s * v, t * v),
  "div": lambda s, t, v: (s / v, t / v),
}
_LEFT = {
  "add": _RIGHT["add"],
  "sub": lambda s, t, v: (-s, v - t),
  "mul": _RIGHT["mul"],
}


def fold(steps: Sequence[Step], outputs: Sequence[Any]) -> list[Step]:
  """The program with chains of scales and shifts moved into the linear step before.

  Args:
    steps: in order.
    outputs: of the program.

  Returns:
    Steps with the same outputs up to rounding.
  """
  uses = collections.Counter(value for step in steps for value in step.unknown)
  uses.update(value for value in outputs if isinstance(value, Unknown))
  found: list[Step | _Chain] = []
  places: dict[Unknown, int] = {}  # where the chain is that ends in a value
  for step in steps:
    before = [v for v in step.unknown if v in places and uses[v] == 1]
    chain = _longer(found[places[before[0]]], step) if before else None
    if chain is not None:
      place = places.pop(before[0])
      found[place], places[chain.output] = chain, place
    elif _axes(step) is not None:
      places[step.outputs[0]] = len(found)
      found.append(_Chain(step, step.outputs[0]))
    else:
      found.append(step)
  return [step for item in found for step in _steps(item)]


def _axes(step):
  """Of a linear step the axis of the channels in its output, and in its kernel."""
  if (
    step.name not in _AXES
    or len(step.unknown) != 1
    or step.unknown[0] is step.inputs[1]
  ):
    return None
  kernel, wanted = step.inputs[1], step.outputs[0].aval.dtype
  wide = jnp.issubdtype(wanted, jnp.floating) and wanted.itemsize >= 4
  return (
    _AXES[step.name](step.params, kernel) if wide and kernel.dtype == wanted else None
  )


def _of_convolution(params, kernel):
  numbers = params["dimension_numbers"]
  plain = params["batch_group_count"] == 1
  return (numbers.out_spec[1], numbers.rhs_spec[0]) if plain else None


def _of_product(params, kernel):
  (_, contracted), (_, batch) = params["dimension_numbers"]
  free = set(range(kernel.ndim)) - set(contracted)
  return (-1, *free) if len(free) == 1 and not batch else None


_AXES = {"conv_general_dilated": _of_convolution, "dot_general": _of_product}


def _longer(chain, step):
  """The chain with one more link, `None` where the step is none."""
  left = step.inputs[0] is chain.output
  operations = _RIGHT if left else _LEFT
  if step.name not in operations or len(step.unknown) != 1:
    return None
  vector, shape = step.inputs[left], chain.output.aval.shape
  axis = range(len(shape))[_axes(chain.step)[0]]
  sides = [n for k, n in enumerate(jnp.shape(vector)) if k != axis]
  if step.outputs[0].aval.shape != shape or set(sides) > {1}:
    return None
  moved = operations[step.name](chain.scale, chain.shift, jnp.ravel(vector))
  return _Chain(chain.step, step.outputs[0], *moved)


def _steps(item):
  """What a chain becomes: the step with a scaled kernel, and one shift."""
  if isinstance(item, Step):
    return [item]
  step, output, scale, shift = item
  if output is step.outputs[0]:
    return [step]
  channels, kept = _axes(step)
  image, kernel = step.inputs
  along = lambda vector, axis, rank: jnp.reshape(
    vector, [-1 if k == axis % rank else 1 for k in range(rank)]
  )
  scaled = kernel * along(scale, kept, kernel.ndim)
  inner, rank = step.outputs[0], len(output.aval.shape)
  add = lambda value, vector: [value + vector]
  return [
    step._replace(inputs=[image, scaled.astype(kernel.dtype)]),
    Step("add", {}, [inner, along(shift, channels, rank)], [output], add),
  ]
