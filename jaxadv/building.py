"""Writes TFDS data sets: of a published download, a folder or a `.npz` pack.

What is written is read by `jaxadv.data.load("tfds:NAME")`, and by TFDS without this
library. TensorFlow is not needed. A build that is cut off leaves a folder whose name
begins with `incomplete`, and nothing that looks prepared.
"""

import contextlib
import io
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxadv import builders, pictures, sources
from jaxadv import progress as progress_lib
from jaxadv.builders import base

__all__ = ["BuildError", "Built", "build", "convert"]

_PARTS = ("train", "val", "test")


class BuildError(Exception):
  """What stands in the way of a build, in one line."""


class Built(NamedTuple):
  """A data set that was written.

  Attributes:
    name: as `jaxadv.data.load` takes it after `tfds:`.
    path: its folder.
    counts: images by part.
    left_out: images by part that were not written, as a later part has their patients.
  """

  name: str
  path: pathlib.Path
  counts: dict[str, int]
  left_out: dict[str, int]


def build(
  name: str,
  manual_dir: str | os.PathLike,
  *,
  side: int | None = None,
  out: str | os.PathLike | None = None,
  progress: progress_lib.Progress = progress_lib.silent,
) -> Built:
  """Builds a published data set from its unpacked download.

  Args:
    name: one of `jaxadv.builders.BUILDERS`.
    manual_dir: folder of the download.
    side: every image is stretched to it, 224 by default; data sets of other sides live
      beside.
    out: folder of all data sets; `$TFDS_DATA_DIR`, or as TFDS has it.
    progress: shows the images that are written.

  Raises:
    BuildError: for an unknown name, a missing or defective file, with what was looked
      for and where to get it, and for a data set that is there already.
  """
  if name not in builders.BUILDERS:
    raise BuildError(f"no builder {name!r}; there are {', '.join(builders.BUILDERS)}.")
  side = 224 if side is None else side
  _check_side(side)
  cls, folder = builders.BUILDERS[name], pathlib.Path(manual_dir).expanduser()
  known = {config.side: config for config in cls.BUILDER_CONFIGS}
  config = known.get(side) or builders.SideConfig.of(side)
  with _refusals():
    builder = cls(data_dir=out, config=config)
    _refuse_prepared(builder)
    builder.plan = builder.checked(folder)
    counts = {part: len(records) for part, records in builder.plan.items()}
    _write(builder, counts, progress)
  called = name if side == 224 else f"{name}/{side}"
  return Built(called, pathlib.Path(builder.data_path), counts, builder.left_out)


def convert(
  source: str | os.PathLike,
  name: str,
  *,
  side: int | None = None,
  out: str | os.PathLike | None = None,
  progress: progress_lib.Progress = progress_lib.silent,
) -> Built:
  """Turns a folder or a pack into a TFDS data set of the same images and labels.

  Images of a folder are read one at a time; a pack is held in memory. Parts are those
  that `data.load` has: the words of a pack, subfolders of a folder, or else every fifth
  image for `test` and the others for `train`.

  Args:
    source: folder with `images/` and `masks/`, or with a folder of such for each part;
      or `.npz` pack.
    name: of the data set: small letters, digits and `_`.
    side: to stretch the pictures of a folder to, as in `sources.load_folder`.
    out: folder of all data sets; `$TFDS_DATA_DIR`, or as TFDS has it.
    progress: shows the images that are written.

  Raises:
    BuildError: for a name that is taken or not allowed, a source that is missing or
      does not fit, and for a data set that is there already.
  """
  path = pathlib.Path(source).expanduser()
  if not path.exists():
    raise BuildError(
      f"{source} is no builder, folder or pack; the builders are "
      f"{', '.join(builders.BUILDERS)}."
    )
  if path.is_file() and side is not None:
    raise BuildError(f"a side is for folders; the images of {path} stay as they are.")
  _check_name(name)
  _check_side(side)
  with _refusals():
    plan = _of_folder(path, side) if path.is_dir() else _of_pack(path)
    builder = _Converted(plan, name=name, data_dir=out)
    _refuse_prepared(builder)
    counts = {part: len(records) for part, records in plan.parts.items()}
    _write(builder, counts, progress)
  return Built(name, pathlib.Path(builder.data_path), counts, {})


class _Plan(NamedTuple):
  """What a source becomes: features, records by part, and the example of a record."""

  features: dict[str, Any]
  parts: Mapping[str, Any]
  example: Callable[[Any], dict[str, Any]]


class _Converted(base.StreamedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """A data set of one user, not registered: TFDS finds it by its files."""

  def __init__(self, plan, *, name, data_dir):
    self.name, self._plan = name, plan
    super().__init__(data_dir=data_dir)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(self._plan.features),
      disable_shuffling=True,
    )

  def _planned(self, manager):
    return self._plan.parts

  def _example(self, record):
    return self._plan.example(record)


def _of_pack(path):
  dataset = sources.load_npz(path)
  with np.load(path, allow_pickle=False) as pack:
    words = pack.get("split")
  if words is None:
    parts = _every_fifth(range(len(dataset.images)))
  else:
    parts = {part: np.flatnonzero(words == part) for part in np.unique(words).tolist()}
  _, *shape = dataset.images.shape
  image, keep = _image(tuple(shape), dataset.images.dtype)
  key, label, keep_label = _label(dataset)

  def example(n):
    stored = keep_label(dataset.labels[n])
    return {"image": keep(dataset.images[n]), key: stored, "id": dataset.names[n]}

  features = {"image": image, key: label, "id": tfds.features.Text()}
  return _Plan(features, _in_order(parts), example)


def _label(dataset):
  """Feature and way of storing of a label."""
  names = list(dataset.class_names)
  if any(name != name.strip() or not name for name in names) or len(names) > 256:
    raise ValueError(
      f"the class names are {names[:5]}...; TFDS stores up to 256 that are not empty "
      "and have no blanks around."
    )
  one = tfds.features.ClassLabel(names=names)
  if dataset.kind == "class":
    return "label", one, int
  if dataset.kind == "set":
    found = lambda label: np.flatnonzero(label).tolist()
    return "labels", tfds.features.Sequence(one), found
  _, *depth, height, width = dataset.labels.shape
  mask = tfds.features.LabeledImage(labels=names, shape=(height, width, 1))
  flat = lambda mask: base.encoded(mask.astype(np.uint8))
  if depth:
    stack = tfds.features.Sequence(mask, length=depth[0])
    return "segmentation_mask", stack, lambda label: [flat(plane) for plane in label]
  return "segmentation_mask", mask, flat


def _image(shape, dtype):
  """Feature and way of storing of an image: a PNG where that keeps every bit."""
  if dtype == np.uint8 and len(shape) == 3 and shape[-1] <= 4:
    return tfds.features.Image(shape=shape), base.encoded
  raw = tfds.features.Tensor(shape=shape, dtype=dtype, encoding="zlib")
  return raw, np.ascontiguousarray


def _of_folder(path, side):
  folders = (
    {path: ""}
    if (path / "images").is_dir()
    else {
      place: place.name
      for place in sorted(path.iterdir())
      if (place / "images").is_dir()
    }
  )
  if not folders:
    pictures.listed(path / "images")  # which says what is missing
  pairs = {place: _pairs(place) for place in folders}
  values = {place: _mask_values(place, pairs[place], side) for place in folders}
  first = _pixels(next(iter(pairs.values()))[0][0], side)
  image, keep = _image(first.shape, first.dtype)
  highest = max(1 if set(v) <= {0, 255} else int(v[-1]) for v in values.values())
  names = [f"class {k}" for k in range(max(highest, 1) + 1)]

  def example(record):
    file, partner, place = record
    pixels = _pixels(file, side)
    mask = pictures.as_classes(place, _mask(partner, side)[None], values[place])[0]
    if (pixels.shape, pixels.dtype) != (first.shape, first.dtype):
      raise ValueError(
        f"{file} is {pixels.dtype} {pixels.shape} but the first picture {first.dtype} "
        f"{first.shape}; bring all to one size and kind, or write --side 128."
      )
    if pixels.dtype != np.uint8 and not (pixels.min() >= 0 and pixels.max() <= 1):
      raise ValueError(
        f"{file} has values in [{pixels.min():g}, {pixels.max():g}]; scale to [0, 1]."
      )
    if mask.shape != pixels.shape[:2]:
      raise ValueError(f"{file} is {pixels.shape} but its mask {mask.shape}.")
    stored = base.encoded(mask.astype(np.uint8))
    return {"image": keep(pixels), "segmentation_mask": stored, "id": file.stem}

  parts = {
    folders[place]: [(*pair, place) for pair in pairs[place]] for place in folders
  }
  if "" in parts:
    parts = _every_fifth(parts[""])
  mask = tfds.features.LabeledImage(labels=names, shape=(*first.shape[:2], 1))
  features = {"image": image, "segmentation_mask": mask, "id": tfds.features.Text()}
  return _Plan(features, _in_order(parts), example)


def _pairs(folder):
  masks = pictures.listed(folder / "masks")
  files = pictures.listed(folder / "images").values()
  return [(file, pictures.partner(file, masks)) for file in files]


def _pixels(file, side):
  pixels = pictures.read(file, side, Image.Resampling.BILINEAR)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def _mask(file, side):
  return pictures.read(file, side, Image.Resampling.NEAREST)


def _mask_values(folder, pairs, side):
  """Values in all masks of a folder, ascending, one mask in memory at a time."""
  found = {
    value
    for _, partner in pairs
    for value in np.unique(
      pictures.one_channel(folder, _mask(partner, side)[None])
    ).tolist()
  }
  values = np.array(sorted(found))
  pictures.as_classes(folder, values[None, None], values)  # refuses grey values
  return values


def _every_fifth(records):
  """Parts of a source that has none, as `data.load` takes them."""
  test = records[4::5]
  train = [record for n, record in enumerate(records) if n % 5 != 4]
  return {"train": train, "test": test} if len(test) else {"train": train}


def _in_order(parts):
  """`train` first, then `val` and `test`, then what else there is."""
  for part in parts:
    if not re.fullmatch(r"[A-Za-z]\w*", part) or part == "all":
      raise ValueError(f"{part!r} cannot be the name of a part; write train or test.")
  order = [*_PARTS, *sorted(set(parts) - set(_PARTS))]
  return {part: parts[part] for part in order if part in parts}


def _check_side(side):
  if side is not None and side < 1:
    raise BuildError(f"the side is {side}; write 1 pixel or more.")


def _check_name(name):
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise BuildError(
      f"{name!r} cannot be the name of a data set; write small letters, digits and _."
    )
  if name in tfds.list_builders(with_community_datasets=False):
    raise BuildError(f"TFDS or jaxadv has a data set {name!r}; write another --name.")


def _refuse_prepared(builder):
  if builder.data_path.exists():
    raise BuildError(f"{builder.data_path} is there already; delete it to build anew.")


@contextlib.contextmanager
def _refusals():
  try:
    yield
  except (OSError, ValueError) as error:
    raise BuildError(str(error)) from error


def _write(builder, counts, progress):
  with progress(f"building {builder.name}", sum(counts.values()), 0) as advance:
    builder.advance = advance
    # TFDS reports on standard output, which is left to results.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
