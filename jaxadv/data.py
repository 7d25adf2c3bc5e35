"""Data sets, in memory or on disk, and the batches made of them.

A source is a `.npz` pack, a folder of `images/` and `masks/`, a TFDS data set, or
nothing at all, which gives synthetic phantoms. Images stay as stored; `batches` scales
them to float32 in [0, 1]. Whatever is missing, torn or does not fit raises before any
work starts, `FileNotFoundError` or `ValueError`, and names the file and the remedy; a
single image of a TFDS set that is too large for memory does so when it is read.
"""

import functools
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from jaxadv import synthetic
from jaxadv.lazy import Rows
from jaxadv.pairing import Pairs, pairs
from jaxadv.sources import Dataset, load_folder, load_npz, take
from jaxadv.streams import as_float, batches, members
from jaxadv.tfds_source import load_tfds

__all__ = [
  "Dataset",
  "Pairs",
  "as_float",
  "batches",
  "hold_out",
  "load",
  "load_folder",
  "load_npz",
  "load_tfds",
  "members",
  "pairs",
  "phantoms",
  "resize",
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
  source: str | os.PathLike,
  roots: Sequence[str | os.PathLike] = (),
  *,
  variable: str = "JAXADV_DATA",
  shared: str = "../shared/data",
) -> pathlib.Path:
  """Finds a pack or folder by path or by file name.

  Args:
    source: a path, or a name such as `"nuclei_dsb2018_128"` (`.npz` may be left out).
    roots: folders to look in first; then come that of `variable`, the working directory
      and `shared`, seen from the working directory and from the repository.
    variable: of the environment.
    shared: folder.

  Returns:
    An existing path.

  Raises:
    FileNotFoundError: with every place looked at.

  Example:
    >>> resolve("no_such_pack")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no file at 'no_such_pack'; looked at ...
  """
  given = os.environ.get(variable)
  repository = pathlib.Path(__file__).resolve().parents[1]
  places = [*roots, *([given] if given else []), ".", shared]
  folders = [*map(pathlib.Path, places), repository / shared]
  path = pathlib.Path(source).expanduser()
  names = [path, path.with_name(path.name + ".npz")]
  tried = [folder / name for folder in folders for name in names]
  for place in tried:
    if place.exists():
      return place
  looked = ", ".join(dict.fromkeys(str(place) for place in tried))
  raise FileNotFoundError(
    f"no file at {str(source)!r}; looked at {looked}. Write a path, or set "
    f"${variable} to its folder."
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


def resize(dataset: Dataset, side: int) -> Dataset:
  """Stretches every image to `side` pixels in each direction (Lanczos).

  Args:
    dataset: of any kind; masks follow, each pixel with the class of the nearest one.
    side: in pixels.

  Returns:
    Images of the same dtype and range, rounded where they are uint8, and their labels;
    lazy ones are resized when they are read.

  Raises:
    ValueError: for a side below 1.

  Example:
    >>> images = np.full((2, 28, 30, 1), 255, np.uint8)
    >>> flat = Dataset(images, np.arange(2), np.arange(2), ["x"] * 2, ("a", "b"))
    >>> resize(flat, 32).images.shape
    (2, 32, 32, 1)
  """
  if side < 1:
    raise ValueError(f"`side` is {side}; write 1 pixel or more.")
  pixels = functools.partial(_resized, side=side)
  images, labels = _through(dataset.images, pixels), dataset.labels
  if dataset.kind == "mask":
    labels = _through(labels, functools.partial(_resized_masks, side=side))
  return dataset._replace(images=images, labels=labels)


def hold_out(dataset: Dataset, share: float) -> tuple[Dataset, Dataset]:
  """Sets images aside, the same ones in every run: a share of every class.

  One class per image is what this goes by; of label sets and masks it takes the share
  as a whole. It knows no patients: where a patient has several images, write a `split`
  into the pack instead.

  Args:
    dataset: usually the training part.
    share: in (0, 1); rounded, but at least one image of every class stays.

  Returns:
    What stays and what is held out, both in the order of `dataset`.

  Raises:
    ValueError: for a share outside (0, 1) or so small that nothing is held out.

  Example:
    >>> kept, held = hold_out(phantoms(10, size=16), 0.2)
    >>> len(kept.images), len(held.images)
    (8, 2)
  """
  if not 0 < share < 1:
    raise ValueError(f"the share to hold out is {share}; write one in (0, 1).")
  groups = dataset.labels if dataset.kind == "class" else np.zeros(len(dataset.images))
  held = np.zeros(len(groups), bool)
  for n, group in enumerate(np.unique(groups)):
    places = np.random.default_rng([n]).permutation(np.flatnonzero(groups == group))
    held[places[: min(max(1, round(share * len(places))), len(places) - 1)]] = True
  if not held.any():
    raise ValueError(f"{share} of {len(held)} images is none; hold out a larger share.")
  return take(dataset, np.flatnonzero(~held)), take(dataset, np.flatnonzero(held))


def _through(array, function):
  return array.map(function) if isinstance(array, Rows) else function(array)


def _resized(images, side):
  """One by one, so that an image does not depend on those it is read with."""
  shape = (*[side] * (images.ndim - 2), images.shape[-1])
  whole = images.dtype == np.uint8
  resized = np.empty((len(images), *shape), images.dtype)
  for n, image in enumerate(as_float(images)):
    pixels = np.asarray(_lanczos(image, shape))
    resized[n] = np.rint(255 * pixels) if whole else pixels
  return resized


@functools.partial(jax.jit, static_argnums=1)
def _lanczos(image, shape):
  return jax.image.resize(image, shape, "lanczos3").clip(0, 1)


def _resized_masks(masks, side):
  shape = (len(masks), *[side] * (masks.ndim - 1))
  return np.asarray(jax.image.resize(masks, shape, "nearest"))


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
