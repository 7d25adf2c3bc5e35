"""What every builder shares: records of a source, resized and streamed into TFDS.

TFDS's `ShardBasedBuilder` writes examples in the order of their source, one shard in
memory at a time. Its `GeneratorBasedBuilder` would hold up to 1 GB and then ask for
TensorFlow, in order to shuffle what `data.batches` shuffles anyway.
"""

import abc
import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxadv import pictures

__all__ = [
  "ManualBuilder",
  "Parts",
  "Record",
  "SideConfig",
  "StreamedBuilder",
  "encoded",
]

Parts = Mapping[str, Sequence[Any]]  # records of train, val and test

_SHARD_IMAGES = 256
_SHARD_BYTES = 2**26


class Record(NamedTuple):
  """One image of a download.

  Attributes:
    id: its name there, unique in the data set.
    image: its file.
    label: name of its class, or names of its findings.
    masks: files of 0 and 255; a pixel has the class of the last mask that covers it.
    patient: whose it is, where the source says so.
  """

  id: str
  image: pathlib.Path
  label: str | Sequence[str] = ""
  masks: Sequence[pathlib.Path] = ()
  patient: str = ""


@dataclasses.dataclass(eq=False)
class SideConfig(tfds.core.BuilderConfig):
  """The side in pixels that every image is stretched to, which is also its name."""

  side: int = 224

  @classmethod
  def of(cls, side: int) -> "SideConfig":
    """The configuration of one side."""
    text = f"Stretched to {side} x {side} pixels, images bilinear, masks nearest."
    return cls(name=str(side), side=side, description=text)


class StreamedBuilder(tfds.core.dataset_builder.ShardBasedBuilder):
  """Writes examples in the order of their source, and needs no TensorFlow.

  Attributes:
    advance: called with 1 and the id of every example that was written.
  """

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, **arguments: Any) -> None:
    self.advance: Callable[[int, str], None] = lambda count, note: None
    # The one format that TFDS reads and writes without TensorFlow.
    super().__init__(**({"file_format": "array_record"} | arguments))

  @abc.abstractmethod
  def _planned(self, manager: Any) -> Parts:
    """The records of every part."""

  @abc.abstractmethod
  def _example(self, record: Any) -> dict[str, Any]:
    """The features of one record, `id` among them."""

  def _shard_iterators_per_split(self, dl_manager):
    size = _shard_size(self.info.features)
    return {
      part: [
        lambda records=records, n=n: self._examples(records[n : n + size])
        for n in range(0, len(records), size)
      ]
      for part, records in self._planned(dl_manager).items()
    }

  def _examples(self, records) -> Iterator[tuple[int, dict[str, Any]]]:
    for n, record in enumerate(records):
      example = self._example(record)
      yield n, example
      self.advance(1, example["id"])


class ManualBuilder(StreamedBuilder):
  """A published data set that its user has downloaded and unpacked.

  Attributes:
    kind: `label` for one class per image, `labels` for findings, `segmentation_mask`.
    classes: names in index order.
    channels: 1 or 3.
    has_patients: whether the source says whose an image is.
    plan: the records, where they are known before TFDS asks for them.
    left_out: by part, how many images were, as their patients are in a later part.
  """

  BUILDER_CONFIGS: ClassVar = [SideConfig.of(n) for n in (224, 128, 256, 299, 512)]

  kind: str = "label"
  classes: tuple[str, ...]
  channels: int = 3
  has_patients: bool = False

  def __init__(self, **arguments: Any) -> None:
    self.plan: Parts | None = None
    self.left_out: dict[str, int] = {}
    super().__init__(**arguments)

  @abc.abstractmethod
  def _parts(self, folder: pathlib.Path) -> Parts:
    """The records of every part that is there, `train` first and `test` last."""

  def checked(self, folder: pathlib.Path) -> Parts:
    """The parts, none of which shares an image or a patient with another.

    An image whose patient is in a later part too is left out of the earlier one.

    Raises:
      FileNotFoundError: when something is missing, with where to get it.
      ValueError: for an image that is in the source twice, and for other defects.
    """
    try:
      parts = self._parts(folder)
    except FileNotFoundError as error:
      where = " ".join(str(self.MANUAL_DOWNLOAD_INSTRUCTIONS).split())
      raise FileNotFoundError(f"{error} {where}") from error
    if self.has_patients:
      kept = _without_later_patients(parts)
      lost = {part: len(parts[part]) - len(kept[part]) for part in parts}
      self.left_out = {part: count for part, count in lost.items() if count}
      parts = kept
    _check(self.name, parts)
    return parts

  def _planned(self, manager):
    return self.plan or self.checked(pathlib.Path(manager.manual_dir))

  def _example(self, record):
    side = self.builder_config.side
    image = pictures.square(record.image, side, self.channels)
    features: dict[str, Any] = {"image": encoded(image), "id": record.id}
    if self.has_patients:
      features["patient"] = record.patient
    if self.kind == "segmentation_mask":
      return features | {self.kind: encoded(self._mask(record, side))}
    return features | {self.kind: record.label}

  def _mask(self, record, side):
    mask = np.zeros((side, side), np.uint8)
    for number, file in enumerate(record.masks, 1):
      mask[pictures.binary(file, side)] = number
    return mask

  def _info(self):
    side, names = self.builder_config.side, list(self.classes)
    features = {
      "image": tfds.features.Image(shape=(side, side, self.channels)),
      self.kind: _label(self.kind, names, side),
      "id": tfds.features.Text(),
    }
    if self.has_patients:
      features["patient"] = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )


def encoded(pixels: np.ndarray) -> io.BytesIO:
  r"""A PNG of `(H, W)` or `(H, W, C)` uint8, C from 1 to 4, as TFDS takes it.

  Example:
    >>> encoded(np.zeros((4, 4), np.uint8)).read(4)
    b'\x89PNG'
  """
  file = io.BytesIO()
  flat = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
  Image.fromarray(flat).save(file, "PNG")
  file.seek(0)
  return file


def _label(kind, names, side):
  if kind == "segmentation_mask":
    return tfds.features.LabeledImage(labels=names, shape=(side, side, 1))
  one = tfds.features.ClassLabel(names=names)
  return one if kind == "label" else tfds.features.Sequence(one)


def _shard_size(features):
  """How many examples a shard holds: few enough to be in memory at once."""
  shapes = features.get_tensor_info()
  image = shapes["image"]
  size = int(np.prod(image.shape)) * np.dtype(image.np_dtype).itemsize
  return max(1, min(_SHARD_IMAGES, _SHARD_BYTES // size))


def _without_later_patients(parts):
  later, kept = set(), {}
  for part, records in reversed(parts.items()):
    kept[part] = [record for record in records if record.patient not in later]
    later |= {record.patient for record in records if record.patient}
  return dict(reversed(kept.items()))


def _check(name, parts):
  seen: dict[str, str] = {}
  for part, records in parts.items():
    if not records:
      raise ValueError(f"no image is left in part {part!r} of {name}.")
    for record in records:
      if record.id in seen:
        raise ValueError(
          f"image {record.id} of {name} is in {seen[record.id]} and in {part}; keep it "
          "in one place."
        )
      seen[record.id] = part
