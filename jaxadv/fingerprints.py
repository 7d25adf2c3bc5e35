"""Short hashes by which two runs are told apart: of data, arrays and programs."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.data import Dataset
from jaxadv.lazy import Rows

__all__ = ["arrays", "dataset", "program", "text"]


def arrays(tree: Any) -> str:
  """Hash of the leaves of a tree: shapes, types and values.

  Example:
    >>> arrays({"a": np.zeros(2)}) == arrays({"a": np.ones(2)})
    False
  """
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    array = np.ascontiguousarray(_plain(leaf))
    digest.update(f"{array.shape} {array.dtype}".encode())
    digest.update(array.tobytes())
  return digest.hexdigest()[:12]


def dataset(data: Dataset) -> str:
  """Hash of images, labels and ids; of lazy rows, of their origin and 32 of them."""
  return arrays([_witness(part) for part in (data.images, data.labels, data.ids)])


def program(function: Callable, *arguments: Any) -> str:
  """Hash of what a function computes: its program, and the arrays it brings along.

  Example:
    >>> double = program(lambda x: 2 * x, 1.0)
    >>> double == program(lambda y: 2 * y, 3.0), double == program(lambda x: 3 * x, 1.0)
    (True, False)
  """
  closed = jax.make_jaxpr(function)(*arguments)
  written = hashlib.sha256(text(closed).encode()).hexdigest()
  return hashlib.sha256((written + arrays(closed.consts)).encode()).hexdigest()[:12]


def text(value: Any) -> str:
  """A value as text, without the addresses of its parts in memory.

  Example:
    >>> text(object())
    '<object object>'
  """
  return re.sub(r" at 0x\w+", "", str(value))


def _witness(part):
  """Enough of an array to tell it from others; all of it if it is in memory."""
  if not isinstance(part, Rows):
    return part
  spread = np.linspace(0, len(part) - 1, 32).astype(int)
  return part.shape, part.origin, part[spread]


def _plain(leaf):
  is_key = jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(leaf) if is_key else leaf)
