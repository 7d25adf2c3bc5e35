"""What a data set is, and readers of `.npz` packs and of folders of pictures.

Everything read is checked before it is returned. Whatever is missing, torn or does not
fit raises `FileNotFoundError` or `ValueError`, with the file and the remedy.
"""

import os
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from jaxadv import pictures
from jaxadv.lazy import Rows, select

__all__ = ["Dataset", "checked", "load_folder", "load_npz", "take"]


class Dataset(NamedTuple):
  """Images, their labels, and where they came from.

  Attributes:
    images: `(N, H, W, C)` or `(N, D, H, W, C)`, uint8 in 0..255 or float32 in [0, 1];
      in memory, or `Rows` that are read when asked for.
    labels: int32 `(N,)` classes, `(N, L)` label sets, or `(N, H, W)` masks, which may
      be `Rows` too.
    ids: `(N,)` int64, positions in the source, whatever the split.
    names: N names at the source.
    class_names: K names in index order.
  """

  images: np.ndarray | Rows
  labels: Any
  ids: np.ndarray
  names: list[str] | Rows
  class_names: tuple[str, ...]

  @property
  def kind(self) -> Literal["class", "set", "mask"]:
    """What a label is: one class, 0 or 1 for each of L findings, or a mask."""
    if self.labels.ndim == 1:
      return "class"
    return "set" if self.labels.ndim == 2 else "mask"


def load_npz(path: str | os.PathLike, *, split: str | None = None) -> Dataset:
  """Loads a pack: `images` with `masks` or `labels`, or one volume `image` with a mask.

  Optional arrays: `split` (a word per image), `ids` (names at the source) and
  `class_names`.

  Args:
    path: `.npz` file; no pickled objects are read.
    split: see `load`.

  Returns:
    A checked `Dataset`.

  Raises:
    FileNotFoundError, ValueError: see `load`.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"there is no pack {path}.")
  try:
    with zipfile.ZipFile(path):  # np.load takes other kinds of file too
      pass
    with np.load(path, allow_pickle=False) as pack:
      arrays = {name: pack[name] for name in pack.files}
  except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
    raise ValueError(
      f"{path} is torn or no .npz pack ({error}); copy or download it again."
    ) from error
  images, labels = _pack_arrays(path, arrays)
  names = arrays.get("ids", np.arange(len(images))).astype(str).tolist()
  class_names = arrays.get("class_names")
  dataset = checked(path, images, labels, names=names, class_names=class_names)
  _check_words(path, arrays, len(images))
  return take(dataset, _select(path, len(images), split, arrays.get("split")))


def load_folder(
  path: str | os.PathLike, *, split: str | None = None, size: int | None = None
) -> Dataset:
  """Loads `path/images/*` and `path/masks/*`, matched by file name without ending.

  The mask of `a.jpg` is `a.png`, `a_mask.png` or `a_segmentation.png`. Masks hold class
  indices, or 0 and 255 for two classes; colour palettes give their index.

  Args:
    path: the folder.
    split: a subfolder `path/split/images` where there is one, else see `load`.
    size: side to resize everything to (images bilinear, masks nearest); needed when the
      sizes differ.

  Returns:
    A checked `Dataset`.

  Raises:
    FileNotFoundError, ValueError: see `load`.
  """
  path = pathlib.Path(path)
  if split is not None and (path / split / "images").is_dir():
    path, split = path / split, None
  files = pictures.listed(path / "images")
  masks = pictures.listed(path / "masks")
  partners = [pictures.partner(file, masks) for file in files.values()]
  bilinear, nearest = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
  images = [pictures.read(file, size, bilinear) for file in files.values()]
  labels = [pictures.read(file, size, nearest) for file in partners]
  names = list(files)
  mask_array = pictures.as_classes(path, _stack(partners, labels))
  stacked = _stack(list(files.values()), images)
  dataset = checked(path, stacked, mask_array, names=names)
  return take(dataset, _select(path, len(names), split, None))


def take(dataset: Dataset, places: np.ndarray) -> Dataset:
  """The images at some places, with all that belongs to them; lazy ones stay unread."""
  fields = "images", "labels", "ids", "names"
  return dataset._replace(**{f: select(getattr(dataset, f), places) for f in fields})


def _pack_arrays(path, arrays):
  """Images and labels of a pack; a volume becomes a batch of one."""
  many, one = ("masks", "labels"), ("mask", "labels")
  if "images" in arrays:
    label = next((arrays[name] for name in many if name in arrays), None)
    images = arrays["images"]
  else:
    label = next((arrays[name][None] for name in one if name in arrays), None)
    images = arrays["image"][None] if "image" in arrays else None
  if images is None or label is None:
    raise ValueError(
      f"{path} holds {', '.join(arrays) or 'nothing'}; a pack needs `images` with "
      "`masks` or `labels`, or a volume `image` with `mask` or `labels`."
    )
  return images, label


def _check_words(path, arrays, total):
  """Refuses `split` and `ids` that are not one for each image."""
  for name in ("split", "ids"):
    if name in arrays and arrays[name].shape != (total,):
      raise ValueError(
        f"{path} has {total} images but `{name}` {arrays[name].shape}; write one each."
      )
  if "split" in arrays and arrays["split"].dtype.kind != "U":
    raise ValueError(
      f"{path} has `split` of {arrays['split'].dtype}; write words, such as train."
    )


def _stack(places, arrays):
  for place, array in zip(places, arrays, strict=True):
    if array.shape != arrays[0].shape or array.dtype != arrays[0].dtype:
      raise ValueError(
        f"{place} is {array.dtype} {array.shape} but {places[0]} is {arrays[0].dtype} "
        f"{arrays[0].shape}; bring all to one size and kind, or write "
        "load_folder(path, size=128)."
      )
  return np.stack(arrays)


def checked(
  place: Any,
  images: np.ndarray | Rows,
  labels: np.ndarray | Rows,
  *,
  names: list[str] | Rows,
  class_names: Sequence[str] | np.ndarray | None = None,
) -> Dataset:
  """The data set of a whole source, once its parts are seen to fit.

  Lazy masks, and lazy images if they are float, are read once for their range.

  Args:
    place: the source, for messages.
    images: as in `Dataset`; of grey ones the last axis may be missing.
    labels: of any integer type, or bool.
    names: N of them.
    class_names: `None` to number the classes that there are.

  Returns:
    A `Dataset`.

  Raises:
    ValueError: for what does not fit, with the remedy.
  """
  if images.ndim == 3:
    grey = lambda images: images[..., None]
    images = images.map(grey) if isinstance(images, Rows) else grey(images)
  _check_images(place, images, labels)
  is_set = labels.ndim == 2
  known = None if class_names is None else len(class_names)
  highest = int(labels.max())
  if is_set and known not in (None, labels.shape[1]):
    raise ValueError(
      f"{place} has {labels.shape[1]} labels per image and {known} class names; give "
      "each label its name."
    )
  classes = 2 if is_set else known or max(highest + 1, 2)
  if labels.min() < 0 or highest >= classes:
    wrong = highest if highest >= classes else labels.min()
    raise ValueError(
      f"{place} has label {wrong}, outside its {classes} classes 0..{classes - 1}; "
      "mend the labels or `class_names`."
    )
  if class_names is None:
    count = labels.shape[1] if is_set else classes
    class_names = [f"class {k}" for k in range(count)]
  ids = np.arange(len(images), dtype=np.int64)
  return Dataset(
    images, labels.astype(np.int32), ids, names, tuple(map(str, class_names))
  )


def _check_images(place, images, labels):
  if images.ndim not in (4, 5) or len(images) == 0:
    raise ValueError(f"{place} has images {images.shape}; write (N, H, W, C), N >= 1.")
  if images.dtype not in (np.uint8, np.float32):
    raise ValueError(f"{place} has {images.dtype} images; write uint8, or float32.")
  if images.dtype == np.float32 and not (images.min() >= 0 and images.max() <= 1):
    raise ValueError(
      f"{place} has float32 images in [{images.min():g}, {images.max():g}]; scale them "
      "to [0, 1]."
    )
  if not (labels.dtype == bool or np.issubdtype(labels.dtype, np.integer)):
    raise ValueError(f"{place} has {labels.dtype} labels; write integer classes.")
  if labels.ndim <= 2 and len(labels) == len(images):
    return
  if labels.shape != images.shape[:-1]:
    raise ValueError(
      f"{place} has images {images.shape} but labels {labels.shape}; every image needs "
      "a class or a mask of its own size."
    )


def _select(place, total, split, words):
  """Positions of a split; a source without split words gives every fifth to test."""
  if split is None:
    return np.arange(total)
  if words is None:
    if split not in ("train", "val", "test"):
      raise ValueError(f'{place} has no split {split!r}; write "train" or "test".')
    is_test = np.arange(total) % 5 == 4
    chosen = np.flatnonzero(~is_test if split == "train" else is_test)
  else:
    chosen = np.flatnonzero(words == split)
  if not len(chosen):
    known = "too few images to split" if words is None else ", ".join(np.unique(words))
    raise ValueError(f"{place} has no image in split {split!r}; it has {known}.")
  return chosen
