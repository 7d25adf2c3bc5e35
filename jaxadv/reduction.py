"""Sums over the examples of a batch, wherever its parts lie.

    fast    one sum on every device, then one all-reduce, in the order that XLA likes
    fixed   one sum per microbatch, then those in the order of the batch

A float32 sum depends on its order, so the fast one gives other last bits on another
number of devices. The fixed one does not: a microbatch passes the model alone, in the
same shape on any number of devices that divides it, and the sums are added in one order
everywhere. On one device it is gradient accumulation: the memory of one microbatch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Sums", "count", "each", "means", "places", "total", "weighted"]


class Sums(NamedTuple):
  """Weighted sums over the examples of a batch whose terms are all finite.

  Attributes:
    terms: tree of sums of `weight_i * term_i`.
    weight: sum of the weights.
    nonfinite: how many examples were left out; a float, so that one collective adds up
      everything.
  """

  terms: Any
  weight: jax.Array
  nonfinite: jax.Array


def total(
  function: Callable[[Any], Any],
  rows: Any,
  *,
  microbatches: int | None = None,
  axis_name: str | None = None,
) -> Any:
  """The sum of `function` over the parts of a batch.

  Args:
    function: rows to a tree of sums over these rows.
    rows: tree of `(B, ...)`; under `axis_name` the rows of this device.
    microbatches: parts of the whole batch, over all devices; `None` for the fast sum.
    axis_name: of the mapped axis of devices, if there is one.

  Returns:
    What `function` returns, summed; the same on every device.

  Raises:
    ValueError: for a batch that cannot be cut into that many parts on these devices.

  Example:
    >>> print(total(lambda x: x.sum(0), jnp.arange(8.0), microbatches=4))
    28.0
  """
  if microbatches is None:
    sums = function(rows)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)
  sums = _in_turn(function, rows, microbatches, axis_name)
  if axis_name is not None:
    sums = jax.lax.all_gather(sums, axis_name, tiled=True)
  return jax.tree.map(lambda values: values.sum(0), sums)


def each(
  function: Callable[[Any], Any],
  rows: Any,
  *,
  microbatches: int | None = None,
  axis_name: str | None = None,
) -> Any:
  """`function` of the rows of a batch, the parts of `total` one after another.

  Args:
    function: rows `(b, ...)` to a tree of `(b, ...)`.
    rows: as for `total`.
    microbatches: as for `total`.
    axis_name: as for `total`.

  Returns:
    What `function` returns, for all rows.

  Example:
    >>> print(each(lambda x: 2 * x, jnp.arange(4), microbatches=2))
    [0 2 4 6]
  """
  if microbatches is None:
    return function(rows)
  found = _in_turn(function, rows, microbatches, axis_name)
  return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), found)


def count(microbatches: int | None, axis_name: str | None) -> int:
  """How many parts `total` adds up."""
  return microbatches or (1 if axis_name is None else jax.lax.axis_size(axis_name))


def places(rows: int, axis_name: str | None = None) -> jax.Array:
  """Where the rows of this device are in the whole batch.

  Example:
    >>> print(places(3))
    [0 1 2]
  """
  place = jnp.arange(rows)
  return place if axis_name is None else place + rows * jax.lax.axis_index(axis_name)


def weighted(terms: Any, weight: jax.Array) -> Sums:
  """Sums of terms `(B, ...)` with weights `(B,)`.

  Example:
    >>> weighted(jnp.array([1.0, jnp.nan, 2.0]), jnp.array([1.0, 1.0, 0.5]))[0].item()
    2.0
  """
  leaves = [jnp.isfinite(v).reshape(len(weight), -1) for v in jax.tree.leaves(terms)]
  finite = jnp.concatenate(leaves, 1).all(1)
  bad = (~finite & (weight > 0)).sum(dtype=weight.dtype)
  weight = jnp.where(finite, weight, 0)

  def add(values):
    shape = (-1,) + (1,) * (values.ndim - 1)
    kept = jnp.where(finite.reshape(shape), values, 0)
    return (weight.reshape(shape) * kept).sum(0)

  return Sums(jax.tree.map(add, terms), weight.sum(), bad)


def means(sums: Sums) -> tuple[Any, jax.Array]:
  """Means, 0 where nothing weighs anything, and int32, how many were left out."""
  bad = sums.nonfinite.astype(jnp.int32)
  share = 1 / jnp.maximum(sums.weight, jnp.finfo(sums.weight.dtype).tiny)
  return jax.tree.map(lambda value: value * share, sums.terms), bad


def _in_turn(function, rows, microbatches, axis_name):
  """`function` of each microbatch of this device, `(own, ...)`.

  XLA unrolls a loop of one turn and joins its body with what is around it, which rounds
  otherwise than the loop on fewer devices. So a lone microbatch gets an idle neighbour,
  and the number of turns is nothing that the compiler can see.
  """
  own = _own(len(jax.tree.leaves(rows)[0]), microbatches, axis_name)
  cut = jax.tree.map(lambda v: jnp.asarray(v).reshape(own, -1, *v.shape[1:]), rows)
  turns = own
  if axis_name is not None:
    turns += jnp.minimum(jax.lax.axis_index(axis_name), 0)
    if own == 1:
      cut = jax.tree.map(lambda v: jnp.concatenate([v, v]), cut)
  part = lambda n: jax.tree.map(lambda v: v[n], cut)
  shapes = jax.eval_shape(function, part(0))
  found = jax.tree.map(lambda s: jnp.zeros((own, *s.shape), s.dtype), shapes)

  def turn(n, found):
    return jax.tree.map(lambda v, new: v.at[n].set(new), found, function(part(n)))

  return jax.lax.fori_loop(0, turns, turn, found)


def _own(size, microbatches, axis_name):
  """How many microbatches are this device's, of its `size` rows."""
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  own, left = divmod(microbatches, devices)
  if left or own < 1 or size % own:
    raise ValueError(
      f"{size * devices} rows on {devices} devices cannot be {microbatches} equal "
      "microbatches; write a multiple of the devices that divides the batch."
    )
  return own
