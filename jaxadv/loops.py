"""Loops on the host: over steps, of training and crafting alike, and over images.

Anything with the signature `step(state, batch) -> (state, metrics)` runs in `fit`. It
keeps nothing: the state is the checkpoint, and a batch is a pure function of its
position, so a run that stopped after `n` steps continues with `batches(..., start=n)`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from jaxadv import sharding

__all__ = ["fit", "over_batches"]

State = TypeVar("State")
Batch = Mapping[str, Any]
Metrics = Mapping[str, Any]


def fit(
  step: Callable[[State, Batch], tuple[State, Metrics]],
  state: State,
  batches: Iterable[Batch],
  *,
  num_steps: int,
  on_step: Callable[[int, State, Metrics], None] | None = None,
) -> State:
  """Takes `num_steps` steps and returns the last state.

  Prints nothing; progress, logs and checkpoints belong to `on_step`.

  Args:
    step: `(state, batch) -> (state, metrics)`, usually jitted.
    state: any pytree.
    batches: one batch per step; at least `num_steps` of them. No more are drawn.
    num_steps: steps to take now, 0 or more.
    on_step: called as `on_step(n, state, metrics)` after the n-th step of this call,
      counted from 1. Reading `metrics` waits for the step to finish.

  Returns:
    The state after the last step.

  Raises:
    ValueError: for a negative `num_steps`, and when the batches run out.

  Example:
    >>> def add(total, batch):
    ...   return total + batch["image"], {"total": total}
    >>> fit(add, 0, [{"image": 1}, {"image": 2}, {"image": 3}], num_steps=2)
    3
  """
  if num_steps < 0:
    raise ValueError(f"`num_steps` is {num_steps}; write 0 or more.")
  stream = iter(batches)
  for n in range(1, num_steps + 1):
    batch = next(stream, None)
    if batch is None:
      raise ValueError(
        f"the batches ran out after {n - 1} of {num_steps} steps; pass an endless "
        "stream, such as data.batches(dataset, size, seed=0)."
      )
    state, metrics = step(state, batch)
    if on_step is not None:
      on_step(n, state, metrics)
  return state


def over_batches(function: Callable[..., Any], *arrays: Any, size: int) -> np.ndarray:
  """`function` of batches of one shape, so that it compiles once.

  With a mesh in use (`jaxadv.sharding.use`) every device works on a batch of its own,
  of the same shape, as JAX arrays, which have 32 bits; every process gets the whole.

  Args:
    function: `(B, ...)` arrays to an array `(B, ...)`, each example by itself.
    *arrays: `(N, ...)`, N the same; of lazy ones a batch is read at a time.
    size: B; the last batch is filled up with zeros, and what came of them is cut.

  Returns:
    `(N, ...)`.

  Example:
    >>> over_batches(lambda x: x + 1, np.arange(5), size=2)
    array([1, 2, 3, 4, 5])
  """
  mesh, total = sharding.current(), len(arrays[0])
  own = None if mesh is None else sharding.mesh(mesh.local_devices)
  process, processes = sharding.share()
  rows = size * (1 if own is None else own.size)
  rounds = -(-total // (rows * processes))
  found = []
  for start in range(process * rows, rounds * rows * processes, rows * processes):
    parts = [array[start : start + rows] for array in arrays]
    filled = [np.pad(p, [(0, rows - len(p))] + [(0, 0)] * (p.ndim - 1)) for p in parts]
    placed = filled if own is None else sharding.put(own, filled, axis=sharding.AXIS)
    found.append(np.asarray(function(*placed)))
  whole = sharding.collect(np.stack(found))
  return whole.reshape(-1, *whole.shape[3:])[:total]
