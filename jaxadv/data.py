"""Data sets in memory, and the batches made of them.

A source is a `.npz` pack, a folder of `images/` and `masks/`, a TFDS data set, or
nothing at all, which gives synthetic phantoms. Images stay as stored; `batches` scales
them to float32 in [0, 1]. Whatever is missing, torn or does not fit raises before any
work starts, `FileNotFoundError` or `ValueError`, and names the file and the remedy.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from jaxadv import synthetic
from jaxadv.pairing import Pairs, pairs
from jaxadv.sources import Dataset, load_folder, load_npz, load_tfds

__all__ = [
  "Dataset",
  "Pairs",
  "batches",
  "load",
  "load_folder",
  "load_npz",
  "load_tfds",
  "pairs",
  "phantoms",
  "resolve",
]

_PHANTOMS = {"train": range(160), "test": range(160, 208), "val": range(208, 256)}


def load(source: str | os.PathLike | None, *, split: str | None = None) -> Dataset:
  """Loads a data set from wherever `source` points.

  Args:
    source: `None` for phantoms, the path of a `.npz` pack (see `resolve`) or of a
      folder with `images/` and `masks/`, or `"tfds:NAME"`.
    split: `"train"`, `"val"` or `"test"`, or `None` for everything. A source that does
      not know splits gives every fifth image to the test split, which is then also the
      val split, and the others to the train split.

  Returns:
    A checked `Dataset`.

  Raises:
    FileNotFoundError: when there is nothing at `source`, with the places looked at.
    ValueError: for a torn file, an unknown split, sizes that do not match, labels
      outside the classes.

  Example:
    >>> load(None, split="test").images.shape
    (48, 128, 128, 3)
  """
  if source is None:
    return _phantoms(_phantom_numbers(split), size=128, seed=0, num_classes=2)
  if str(source).startswith("tfds:"):
    return load_tfds(str(source).removeprefix("tfds:"), split=split)
  path = resolve(source)
  if path.is_dir():
    return load_folder(path, split=split)
  if path.suffix != ".npz":
    raise ValueError(f"{path} is no .npz pack; write one, or a folder with images/.")
  return load_npz(path, split=split)


def resolve(
  source: str | os.PathLike, roots: Sequence[str | os.PathLike] = ()
) -> pathlib.Path:
  """Finds a pack or folder by path or by file name.

  Args:
    source: a path, or a name such as `"nuclei_dsb2018_128"` (`.npz` may be left out).
    roots: folders to look in first; then come `$JAXADV_DATA`, the working directory and
      `../shared/data`, seen from the working directory and from the repository.

  Returns:
    An existing path.

  Raises:
    FileNotFoundError: with every place looked at.

  Example:
    >>> resolve("no_such_pack")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no data at 'no_such_pack'; looked at ...
  """
  given = os.environ.get("JAXADV_DATA")
  repository = pathlib.Path(__file__).resolve().parents[1]
  places = [*roots, *([given] if given else []), ".", "../shared/data"]
  folders = [*map(pathlib.Path, places), repository / "../shared/data"]
  path = pathlib.Path(source).expanduser()
  names = [path, path.with_name(path.name + ".npz")]
  tried = [folder / name for folder in folders for name in names]
  for place in tried:
    if place.exists():
      return place
  looked = ", ".join(dict.fromkeys(str(place) for place in tried))
  raise FileNotFoundError(
    f"no data at {str(source)!r}; looked at {looked}. Write a path, or set "
    "$JAXADV_DATA to the folder of the packs."
  )


def phantoms(
  n: int, *, size: int = 128, seed: int = 0, num_classes: int = 2
) -> Dataset:
  """Synthetic lesions on synthetic skin, for running the code without data.

  Phantom `i` depends on `seed`, `size`, `num_classes` and `i` only. See
  `jaxadv.synthetic`: nothing medical can be concluded from these.

  Args:
    n: number of images.
    size: side in pixels.
    seed: of everything.
    num_classes: 2 for background and lesion; more add nested cores.

  Returns:
    A `Dataset` of uint8 `(n, size, size, 3)` and masks.

  Raises:
    ValueError: for `n` below 1, `size` below 16 and fewer than 2 classes.

  Example:
    >>> phantoms(3, size=32).labels.shape
    (3, 32, 32)
  """
  return _phantoms(range(n), size=size, seed=seed, num_classes=num_classes)


def batches(
  dataset: Dataset, batch_size: int, *, seed: int | None = None, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of one shape: one pass in order, or an endless shuffled stream.

  With a seed, batch `t` is a function of `(seed, t)` alone, so that training resumes at
  `start`. Every image comes once before any comes again.

  Args:
    dataset: images and labels.
    batch_size: B.
    seed: of the shuffling; `None` for one pass in order, whose last batch is filled up
      with its last image at weight 0.
    start: number of the first batch.

  Yields:
    `image` float32 `(B, ..., C)` in [0, 1], `label` int32 `(B, ...)`, `weight` float32
    `(B,)` and `id` int32 `(B,)`.

  Raises:
    ValueError: for `batch_size` below 1 and a negative `start`.

  Example:
    >>> [batch["weight"].tolist() for batch in batches(phantoms(3, size=16), 2)]
    [[1.0, 1.0], [1.0, 0.0]]
  """
  if batch_size < 1 or start < 0:
    raise ValueError(
      f"`batch_size` is {batch_size} and `start` {start}; write 1 and 0."
    )
  return _stream(dataset, batch_size, seed, start)


def _phantom_numbers(split):
  if split is None:
    return [n for numbers in _PHANTOMS.values() for n in numbers]
  if split not in _PHANTOMS:
    raise ValueError(f"phantoms have no split {split!r}; write train, val or test.")
  return _PHANTOMS[split]


def _phantoms(numbers, *, size, seed, num_classes):
  if len(numbers) < 1 or size < 16 or num_classes < 2:
    raise ValueError(
      f"{len(numbers)} phantoms of size {size} with {num_classes} classes; write at "
      "least 1, 16 and 2."
    )
  drawn = [
    synthetic.phantom(np.random.default_rng([seed, n]), size, num_classes)
    for n in numbers
  ]
  images, masks = (np.stack(part) for part in zip(*drawn, strict=True))
  names = [f"phantom {n}" for n in numbers]
  classes = ("skin", "lesion", *(f"core {k}" for k in range(1, num_classes - 1)))
  return Dataset(images, masks, np.array(numbers, np.int64), names, classes)


def _stream(dataset, batch_size, seed, start):
  total = len(dataset.images)
  first = start * batch_size
  while seed is not None or first < total:
    places = np.arange(first, first + batch_size)
    weight = np.ones(batch_size) if seed is not None else places < total
    if seed is None:
      places = np.minimum(places, total - 1)
    else:
      places = _shuffled(total, seed, places)
    yield _batch(dataset, places, weight)
    first += batch_size


def _shuffled(total, seed, places):
  """Where the places of an endless stream of reshuffled passes lie in the data set."""
  turns, offsets = np.divmod(places, total)
  orders = {
    turn: np.random.default_rng([seed, turn]).permutation(total)
    for turn in set(turns.tolist())
  }
  return np.array(
    [orders[turn][k] for turn, k in zip(turns.tolist(), offsets, strict=True)]
  )


def _batch(dataset, places, weight):
  images = dataset.images[places]
  scale = np.float32(255 if images.dtype == np.uint8 else 1)
  return {
    "image": images.astype(np.float32) / scale,
    "label": dataset.labels[places],
    "weight": weight.astype(np.float32),
    "id": dataset.ids[places].astype(np.int32),
  }
