"""Reader of prepared TFDS data sets: random access to ArrayRecord, no TensorFlow.

A set that fits in memory is read at once. Of a larger one the labels are, and images
and masks stay on disk as `Rows`.
"""

import os
import zlib

import numpy as np

from jaxadv import sources
from jaxadv.lazy import Rows

__all__ = ["load_tfds"]

_LABELS = ("segmentation_mask", "mask", "label", "labels")
# What the readers and decoders raise, each for another kind of damage.
_TORN = (RuntimeError, OSError, ValueError, IndexError, SyntaxError, zlib.error)


def load_tfds(
  name: str,
  *,
  split: str | None = None,
  data_dir: str | os.PathLike | None = None,
  memory: int = 2**30,
) -> sources.Dataset:
  """Loads a prepared TFDS data set; needs no TensorFlow.

  Reads the feature `image`, and `segmentation_mask`, `mask`, `label` or `labels`; the
  last is a sequence of the classes an image has, and becomes a label set. `id` gives
  the names, where there is one. Without TensorFlow TFDS reads the array_record format
  only, so nothing is prepared here.

  Args:
    name: TFDS name, such as `"oxford_iiit_pet"` or `"mnist:3.0.1"`.
    split: TFDS split, such as `"train[:80%]"`; `None` for all.
    data_dir: where the data sets live; default as TFDS has it (`$TFDS_DATA_DIR`).
    memory: most bytes that images and masks may take to be held in memory, as decoded;
      more stay on disk, and are read and decoded each time they are asked for. Lazy
      masks, and lazy images if they are float, are read once here for their range.

  Returns:
    A checked `Dataset`. Of lazy images only the first is decoded here: one that is torn
    or of another size raises `ValueError` with its name when it is read.

  Raises:
    FileNotFoundError: for an unknown name or configuration, and for one that is not
      prepared on this machine, with the command that prepares it.
    ValueError: for an unknown split, features that do not fit, and as for `load`.
  """
  builder, split = _builder(name, data_dir), split or "all"
  features = builder.info.features
  key = next((key for key in _LABELS if key in features), None)
  class_names = getattr(features[key], "names", None) if key else None
  if key is None or (key == "labels" and not class_names) or "image" not in features:
    raise ValueError(
      f"TFDS data set {name!r} has the features {', '.join(features)}; this needs "
      f"`image` and one of {', '.join(_LABELS)}, the last with class names."
    )
  images = _rows(name, builder, split, "image")
  labels = _rows(name, builder, split, key)
  arrays, names = [images, labels], _names(name, builder, split, len(images))
  if labels.ndim < 3:  # classes and label sets are small
    arrays = [images, np.asarray(labels)]
  if images.nbytes + labels.nbytes <= memory:
    arrays, names = [*map(np.asarray, arrays)], names[:].tolist()
  return sources.checked(name, *arrays, names=names, class_names=class_names)


def _builder(name, data_dir):
  import tensorflow_datasets as tfds  # slow to import, and only wanted here

  from jaxadv import builders  # registers ours

  ours = name.partition("/")[0].partition(":")[0] in builders.BUILDERS
  try:
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
  except tfds.core.registered.DatasetNotFoundError as error:
    raise FileNotFoundError(f"TFDS has no data set {name!r}.") from error
  except ValueError as error:  # of an unknown configuration
    how = _command(name) if ours else str(error)
    raise FileNotFoundError(f"TFDS has no data set {name!r}. {how}") from error
  if ours and not builder.is_prepared():
    raise FileNotFoundError(
      f"TFDS data set {name!r} is not prepared in {builder.data_path}. {_command(name)}"
    )
  if not builder.is_prepared():
    raise FileNotFoundError(
      f"TFDS data set {name!r} is not prepared in {builder.data_path}. With "
      "pip install 'jaxadv[data]', run once: tensorflow_datasets.builder("
      f"{name!r}, file_format='array_record').download_and_prepare()"
    )
  return builder


def _command(name):
  """What prepares one of ours, such as `isic2017_task3/128` or `aptos2019:1.0.0`."""
  called, _, side = name.partition(":")[0].partition("/")
  sized = f" --side {side}" if side.isdigit() and side != "224" else ""
  return (
    f"Run once: jaxadv build {called} --manual-dir DIR{sized}; docs/data.md says what "
    "is in DIR."
  )


def _rows(name, builder, split, key):
  """A feature of every record, as `Rows`; the first record says shape and type."""
  records = _records(name, builder, split, key)

  def row(place):
    try:
      found = np.asarray(records[int(place)][key])
    except _TORN as error:
      raise ValueError(
        f"TFDS data set {name!r} is torn at record {place} of split {split!r} "
        f"({error}); prepare it again."
      ) from error
    if key == "image":
      return found[..., None] if found.ndim == 2 else found
    if key == "labels":
      return np.isin(np.arange(builder.info.features[key].num_classes), found)
    return found[..., 0] if found.ndim > 2 and found.shape[-1] == 1 else found

  first = row(0)

  def read(places):
    found = np.empty((len(places), *first.shape), first.dtype)
    for n, place in enumerate(places):
      one = row(place)
      if one.shape != first.shape or one.dtype != first.dtype:
        raise ValueError(
          f"the {key} of {name} {place} is {one.dtype} {one.shape} but that of {name} "
          f"0 is {first.dtype} {first.shape}; bring all to one size and kind."
        )
      found[n] = one
    return found

  origin = _origin(builder.info, split, key)
  return Rows(read, (len(records), *first.shape), first.dtype, origin)


def _records(name, builder, split, key):
  """The records with `key` decoded, and no other image."""
  import tensorflow_datasets as tfds

  skip = {
    other: tfds.decode.SkipDecoding()
    for other, feature in builder.info.features.items()
    if other != key and isinstance(feature, tfds.features.Image)
  }
  if not builder.info.splits[split].num_examples:
    raise ValueError(f"TFDS data set {name!r} has no record in split {split!r}.")
  try:
    return builder.as_data_source(split=split, decoders=skip)
  except NotImplementedError as error:
    raise ValueError(f"TFDS data set {name!r}: {error}") from error


def _origin(info, split, key):
  """What TFDS knows of the files, without reading them."""
  files = {
    part: (int(found.num_bytes), list(found.shard_lengths))
    for part, found in sorted(info.splits.items())
  }
  return f"{info.full_name} {split} {key} {files}"


def _names(name, builder, split, total):
  """What the records are called, or else their numbers."""
  import tensorflow_datasets as tfds

  features = builder.info.features
  if "id" in features and isinstance(features["id"], tfds.features.Text):
    records = _records(name, builder, split, "id")
    called = lambda place: records[int(place)]["id"].decode()
    dtype = np.dtype(object)
  else:
    called = lambda place: f"{name} {place}"
    dtype = np.array(f"{name} {total}").dtype
  read = lambda places: np.array([called(place) for place in places], dtype)
  return Rows(read, (total,), dtype, name)
