"""Few rows times a large known matrix: `x W = (W' x')'`.

A matrix product on CPU is fast where its left factor has many rows, and a small image,
or a small batch, has few. With `W'` laid out beforehand it becomes the left factor, and
the product takes half to nine tenths of the time. The gradient is the same product with
`W'` and `W` in each other's place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["pays", "times"]

_LANES = 16  # of float32 in the widest registers; rows are filled up to whole ones
_MOST = 64  # rows
_LEAST = 2**16  # elements of a matrix


def pays(rows: int, size: int) -> bool:
  """Whether `times` is faster than a plain product.

  Args:
    rows: of the left factor.
    size: elements of the matrix.

  Example:
    >>> [pays(rows, 2**20) for rows in (8, 17, 32, 49, 64, 65)]
    [False, False, True, True, True, False]
  """
  added = -rows % _LANES
  return rows <= _MOST and 3 * added <= rows and size >= _LEAST


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def times(
  rows: jax.Array, matrices: tuple[jax.Array, jax.Array], precision: Any
) -> jax.Array:
  """The product of rows and a matrix.

  Args:
    rows: `(M, K)`.
    matrices: `W`, `(K, N)`, and its transpose, which is what is multiplied; `W` is for
      the gradient of the rows, and neither gets one.
    precision: as in `lax`.

  Returns:
    `(M, N)`.

  Example:
    >>> matrix = jnp.arange(6.0).reshape(2, 3)
    >>> times(jnp.eye(2), (matrix, matrix.T), None).tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
  """
  full = jnp.pad(rows, ((0, -len(rows) % _LANES), (0, 0)))
  right = lax.optimization_barrier(full.T)  # or XLA turns the product round again
  found = jnp.dot(matrices[1], right, precision=precision)
  return lax.optimization_barrier(found).T[: len(rows)]


def _forward(rows, matrices, precision):
  return times(rows, matrices, precision), matrices


def _backward(precision, matrices, cotangent):
  return times(cotangent, matrices[::-1], precision), None


times.defvjp(_forward, _backward)
