"""Streams of batches: in order or shuffled, for several processes, read ahead.

Batch `t` is a pure function of the data set, the seed and `t`, so `t` is all there is
to store: a stream goes on anywhere, for any number of processes and of threads.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.lazy import Rows
from jaxadv.sources import Dataset

__all__ = ["as_float", "batches", "members", "prefetch"]

Item = TypeVar("Item")

# XLA makes a product of a division by 255, which is off in the last bit.
_LEVELS = np.arange(256, dtype=np.float32) / np.float32(255)


def as_float(images: np.ndarray | jax.Array | Rows) -> Any:
  """Images in [0, 1]: uint8 divided by 255, float as it is; float32. Lazy ones stay so.

  On a device, inside `jit` or not, the bits are those of the host.

  Example:
    >>> as_float(np.array([0, 51, 255], np.uint8)).tolist()
    [0.0, 0.20000000298023224, 1.0]
  """
  if isinstance(images, Rows):
    return images.map(as_float)
  if images.dtype == np.uint8 and isinstance(images, jax.Array):
    return jnp.asarray(_LEVELS)[images]
  scale = np.float32(255 if images.dtype == np.uint8 else 1)
  return images.astype(np.float32) / scale


def batches(
  dataset: Dataset,
  batch_size: int,
  *,
  seed: int | None = None,
  start: int = 0,
  balance: bool = False,
  shard: tuple[int, int] = (0, 1),
  threads: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of one shape: one pass in order, or an endless shuffled stream.

  With a seed, batch `t` is a function of `(seed, t)` alone, so that training resumes at
  `start`. Every image comes once before any comes again. With `balance` the stream
  holds every class once in each run of K places, and every image of a class once before
  any of that class again: rare classes are oversampled, none is thinned out.

  Of several processes each takes its rows of every batch, and reads no others. Their
  parts, one after the other, are the batch of a single process, so an epoch is the same
  for any number of them.

  Args:
    dataset: images and labels, in memory or lazy.
    batch_size: B, of all processes together.
    seed: of the shuffling; `None` for one pass in order, whose last batch is filled up
      with its last image at weight 0.
    start: number of the first batch.
    balance: give every class the same share; needs a seed and one class per image.
    shard: `(index, count)`: this process and how many there are, such as
      `(jax.process_index(), jax.process_count())`.
    threads: that read lazy images ahead, see `prefetch`; in memory there are none.

  Yields:
    `image` float32 `(B / count, ..., C)` in [0, 1], `label` int32 `(B / count, ...)`,
    `weight` float32 `(B / count,)` and `id` int32 `(B / count,)`.

  Raises:
    ValueError: for `batch_size` below 1 and a negative `start`; for a shard that is not
      one of `count` equal parts of a batch; with `balance`, without a seed, for masks
      and label sets, and for a class without images; on the way, for a lazy image that
      is torn or does not fit the others, by its name.

  Example:
    >>> from jaxadv import data
    >>> [batch["weight"].tolist() for batch in batches(data.phantoms(3, size=16), 2)]
    [[1.0, 1.0], [1.0, 0.0]]
  """
  _check(batch_size, start, shard)
  if balance and seed is None:
    raise ValueError("`balance` needs an endless stream; write a `seed` too.")
  order, total = _order(dataset, seed, balance), len(dataset.images)
  index, size = shard[0], batch_size // shard[1]

  def read(t):
    first = t * batch_size + index * size
    places = np.arange(first, first + size)
    weight = np.ones(size) if seed is not None else places < total
    return _batch(dataset, order(places), weight)

  stop = math.ceil(total / batch_size) if seed is None else None
  if isinstance(dataset.images, Rows) or isinstance(dataset.labels, Rows):
    return prefetch(read, start, stop, threads=threads)
  return map(read, itertools.count(start) if stop is None else range(start, stop))


def prefetch(
  read: Callable[[int], Item],
  start: int = 0,
  stop: int | None = None,
  *,
  threads: int = 4,
) -> Iterator[Item]:
  """`read(start)`, `read(start + 1)` and so on, in this order, read ahead by threads.

  As many items as threads are in the making or wait to be taken. The threads end with
  the iterator: when it is done, closed or dropped, or when an item cannot be read.

  Args:
    read: a pure function of its number.
    start: first number.
    stop: number after the last; `None` for no end.
    threads: 0 to read in this thread, each item when it is asked for.

  Yields:
    The items.

  Raises:
    Exception: what `read` raised, when the turn of that item comes.

  Example:
    >>> list(prefetch(lambda n: n * n, 2, 5))
    [4, 9, 16]
  """
  import grain  # slow to import, and only wanted here

  last = np.iinfo(np.int64).max if stop is None else max(start, stop)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  numbers = grain.MapDataset.range(start, last)
  # Left to itself, Grain's iterator ends its threads only when garbage is collected.
  with contextlib.closing(iter(numbers.map(read).to_iter_dataset(options))) as items:
    yield from items


def members(dataset: Dataset) -> list[np.ndarray]:
  """Where the images of each class are.

  Args:
    dataset: one class per image.

  Returns:
    Positions, for each class in order.

  Raises:
    ValueError: for masks, label sets, and a class without images, by its name.

  Example:
    >>> images, labels = np.zeros((3, 8, 8, 1)), np.array([1, 0, 1])
    >>> dataset = Dataset(images, labels, np.arange(3), ["x"] * 3, ("a", "b"))
    >>> [places.tolist() for places in members(dataset)]
    [[1], [0, 2]]
  """
  if dataset.kind != "class":
    raise ValueError(
      f"labels are {dataset.labels.shape}; balance needs one class per image, (N,)."
    )
  names = dataset.class_names
  places = [np.flatnonzero(dataset.labels == k) for k in range(len(names))]
  missing = [name for name, found in zip(names, places, strict=True) if not len(found)]
  if missing:
    raise ValueError(
      f"no image of class {', '.join(missing)}; leave the class out of `class_names`, "
      "or add images of it to this split."
    )
  return places


def _check(batch_size, start, shard):
  if batch_size < 1 or start < 0:
    raise ValueError(
      f"`batch_size` is {batch_size} and `start` {start}; write 1 and 0."
    )
  index, count = shard
  if not 0 <= index < count:
    raise ValueError(f"`shard` is {shard}; write (index, count), index in 0..count-1.")
  if batch_size % count:
    raise ValueError(
      f"a batch of {batch_size} cannot be shared by {count} processes; write a "
      f"multiple of {count}."
    )


def _order(dataset, seed, balance):
  """Places in the stream to places in the data set."""
  total = len(dataset.images)
  if seed is None:
    return lambda places: np.minimum(places, total - 1)
  return _balanced(members(dataset), seed) if balance else _shuffled(total, (seed,))


def _shuffled(total, seed):
  """The order of an endless stream of reshuffled passes."""

  @functools.lru_cache(maxsize=2)  # the pass and the next one; 8 bytes per image each
  def permutation(turn):
    return np.random.default_rng([*seed, turn]).permutation(total)

  def order(places):
    turns, offsets = np.divmod(places, total)
    found = np.empty(len(places), int)
    for turn in np.unique(turns).tolist():
      mine = turns == turn
      found[mine] = permutation(turn)[offsets[mine]]
    return found

  return order


def _balanced(classes, seed):
  """As `_shuffled`, with one image of every class in each run of `len(classes)`."""
  choice = _shuffled(len(classes), (seed, len(classes)))
  orders = [_shuffled(len(images), (seed, k)) for k, images in enumerate(classes)]

  def order(places):
    chosen, turns = choice(places), places // len(classes)
    found = np.empty(len(places), int)
    for k, images in enumerate(classes):
      mine = chosen == k
      found[mine] = images[orders[k](turns[mine])]
    return found

  return order


def _batch(dataset, places, weight):
  return {
    "image": as_float(dataset.images[places]),
    "label": dataset.labels[places],
    "weight": weight.astype(np.float32),
    "id": dataset.ids[places].astype(np.int32),
  }
