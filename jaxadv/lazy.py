"""Arrays that stay where they are stored, of which rows are read when asked for.

A `Rows` stands where an array of images or masks stands: it has a shape, a type and a
length, and gives NumPy arrays when it is indexed. So what goes through a data set batch
by batch works on both, and needs the memory of a batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

__all__ = ["Rows", "select"]

_CHUNK = 64  # rows that are read at once where all of them are gone through


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """An array on disk: its rows are read each time they are asked for.

  Index it by a number, a slice or an array of numbers; `np.asarray` reads all of it.

  Attributes:
    read: numbers `(n,)` int64 in 0..N-1 to the rows of these numbers, `(n, ...)` of
      `dtype`. It may be called from several threads at once.
    shape: `(N, ...)`.
    dtype: NumPy's.
    origin: text that names what is stored, and which version of it: two arrays whose
      pixels nobody has compared are told apart by it.

  Example:
    >>> stored = np.arange(6).reshape(3, 2)  # in place of a file
    >>> rows = Rows(lambda n: stored[n], stored.shape, stored.dtype, "numbers v1")
    >>> len(rows), rows[1].tolist(), rows[[2, 0]].tolist()
    (3, [2, 3], [[4, 5], [0, 1]])
  """

  read: Callable[[np.ndarray], np.ndarray]
  shape: tuple[int, ...]
  dtype: np.dtype
  origin: str

  @property
  def ndim(self) -> int:
    """Number of axes, that of the rows included."""
    return len(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes that it would take in memory."""
    return int(np.prod(self.shape)) * self.dtype.itemsize

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, index: Any) -> np.ndarray:
    if isinstance(index, slice):
      return self.read(np.arange(*index.indices(len(self))))
    empty = isinstance(index, list) and not index  # NumPy would take it for floats
    places = np.asarray(index, int if empty else None)
    whole = np.issubdtype(places.dtype, np.integer) and not isinstance(index, tuple)
    if places.ndim > 1 or not whole:
      raise TypeError(
        f"rows on disk are indexed by {type(index).__name__}; write a number, a slice "
        "or an array of numbers. np.asarray(rows) reads all of them."
      )
    total = len(self)
    if places.size and not -total <= places.min() <= places.max() < total:
      raise IndexError(f"index {index} of {total} rows; write 0 to {total - 1}.")
    found = self.read(np.atleast_1d(places).astype(np.int64) % total)
    return found if places.ndim else found[0]

  def __eq__(self, other: object) -> NoReturn:
    raise TypeError(
      "rows on disk are not compared; np.asarray(rows) reads all of them."
    )

  __hash__ = object.__hash__

  def __iter__(self) -> Iterator[np.ndarray]:
    for start in range(0, len(self), _CHUNK):
      yield from self[start : start + _CHUNK]

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    if copy is False:
      raise ValueError("rows on disk cannot be had without a copy.")
    return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

  def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Rows":
    """Rows that go through a function as they are read.

    Args:
      function: `(n, ...)` to `(n, ...)`, for any n, each row by itself. One row goes
        through it now, to know what comes out.
    """
    first = function(self[:1])
    return dataclasses.replace(
      self,
      read=lambda places: function(self.read(places)),
      shape=(len(self), *first.shape[1:]),
      dtype=first.dtype,
    )

  def astype(self, dtype: Any) -> "Rows":
    """Rows of another type, as they are read."""
    return self.map(lambda rows: rows.astype(dtype))

  def view(self, places: np.ndarray) -> "Rows":
    """The rows at some places; none is read."""
    shape = (len(places), *self.shape[1:])
    read = lambda rows: self.read(places[rows])
    return dataclasses.replace(self, read=read, shape=shape)

  def min(self) -> Any:
    """The smallest value; all rows are read, once for both ends of the range."""
    return self._range[0]

  def max(self) -> Any:
    """The largest value, see `min`."""
    return self._range[1]

  @functools.cached_property
  def _range(self):
    ends = [(row.min(), row.max()) for row in self]
    return np.min(ends), np.max(ends)


def select(array: Any, places: np.ndarray) -> Any:
  """Rows at some places: of an array, of a list, or of `Rows`, which stay unread.

  Example:
    >>> select(["a", "b", "c"], np.array([2, 0]))
    ['c', 'a']
  """
  if isinstance(array, Rows):
    return array.view(places)
  if isinstance(array, Sequence):
    return [array[place] for place in places]
  return array[places]
