"""Skin lesions of the ISIC challenges: segmentation 2016 to 2018, and diagnoses."""

from typing import ClassVar

from jaxadv import pictures
from jaxadv.builders import base, files

__all__ = [
  "Isic2016Segmentation",
  "Isic2016Task3",
  "Isic2017Segmentation",
  "Isic2017Task3",
  "Isic2018Segmentation",
  "Isic2018Task3",
]

_SITE = (
  "Download the archives of {} from https://challenge.isic-archive.com/data/ and "
  "unpack each into the folder of its name, all beside one another."
)


class _Segmentation:
  """The lesion in each image; the mask of `a.jpg` is `a_segmentation.png`."""

  kind = "segmentation_mask"
  classes: tuple[str, ...] = ("skin", "lesion")
  folders: ClassVar[dict[str, tuple[str, str]]]

  def _parts(self, folder):
    return {
      part: _masked(folder / images, folder / masks)
      for part, (images, masks) in self.folders.items()
      if part == "train" or (folder / images).is_dir()
    }


def _masked(folder, mask_folder):
  found, masks = files.images(folder), files.images(mask_folder)
  records = [
    base.Record(name, file, masks=(pictures.partner(file, masks),))
    for name, file in found.items()
  ]
  if len(found) != len(masks):
    raise ValueError(
      f"{folder} has {len(found)} images but {mask_folder} {len(masks)} masks; unpack "
      "both archives whole."
    )
  return records


class Isic2016Segmentation(_Segmentation, base.ManualBuilder):
  """ISIC 2016 Part 1, lesion segmentation: 900 train and 379 test images.

  Layout, as the archives unpack:
    ISBI2016_ISIC_Part1_Training_Data/ISIC_0000000.jpg
    ISBI2016_ISIC_Part1_Training_GroundTruth/ISIC_0000000_Segmentation.png
    ISBI2016_ISIC_Part1_Test_Data, ISBI2016_ISIC_Part1_Test_GroundTruth
  Masks are 0 and 255. Licence: CC-0.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = _SITE.format("2016, task 1")
  folders: ClassVar = {
    part: (
      f"ISBI2016_ISIC_Part1_{word}_Data",
      f"ISBI2016_ISIC_Part1_{word}_GroundTruth",
    )
    for part, word in (("train", "Training"), ("test", "Test"))
  }


class Isic2017Segmentation(_Segmentation, base.ManualBuilder):
  """ISIC 2017 Part 1, lesion segmentation: 2000 train, 150 val, 600 test images.

  Layout, as the archives unpack:
    ISIC-2017_Training_Data/ISIC_0000000.jpg, and _superpixels.png, passed over
    ISIC-2017_Training_Part1_GroundTruth/ISIC_0000000_segmentation.png
    ISIC-2017_Validation_Data, ISIC-2017_Validation_Part1_GroundTruth
    ISIC-2017_Test_v2_Data, ISIC-2017_Test_v2_Part1_GroundTruth
  Masks are 0 and 255. Licence: CC-0.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = _SITE.format("2017, task 1")
  folders: ClassVar = {
    part: (f"ISIC-2017_{word}_Data", f"ISIC-2017_{word}_Part1_GroundTruth")
    for part, word in (
      ("train", "Training"),
      ("val", "Validation"),
      ("test", "Test_v2"),
    )
  }


class Isic2018Segmentation(_Segmentation, base.ManualBuilder):
  """ISIC 2018 Task 1, lesion segmentation: 2594 train, 100 val, 1000 test images.

  Layout, as the archives unpack:
    ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg
    ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png
    and both with Validation and with Test for Training
  Masks are 0 and 255. Licence: CC-0.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = _SITE.format("2018, task 1")
  folders: ClassVar = {
    part: (f"ISIC2018_Task1-2_{word}_Input", f"ISIC2018_Task1_{word}_GroundTruth")
    for part, word in (("train", "Training"), ("val", "Validation"), ("test", "Test"))
  }


class _Diagnosis:
  """One class per image, from a table."""

  classes: tuple[str, ...]
  tables: ClassVar[dict[str, tuple[str, str]]]
  column = "image"
  needed: tuple[str, ...]  # columns beside it, in small letters
  head: tuple[str, ...] = ()

  def _parts(self, folder):
    return {
      part: self._records(folder / images, folder / table)
      for part, (images, table) in self.tables.items()
      if part == "train" or (folder / images).is_dir()
    }

  def _records(self, folder, table):
    found = files.images(folder)
    return [
      base.Record(
        row[self.column],
        files.find(found, row[self.column], table),
        self._diagnosis(row, table),
      )
      for row in files.rows(table, self.column, *self.needed, head=self.head)
    ]

  def _diagnosis(self, row, table):
    """The class in one row: the column that holds 1, or the first class."""
    name = row[self.column]
    held = {k: row[k.lower()] for k in self.classes if k.lower() in row}
    ones = [k for k, v in held.items() if files.one_of("01", v, table, name) == "1"]
    if len(ones) == 1:
      return ones[0]
    if ones or self.classes[0] in held:
      raise ValueError(f"{table} gives {name} {len(ones)} classes; it needs one.")
    return self.classes[0]


class Isic2016Task3(_Diagnosis, base.ManualBuilder):
  """ISIC 2016 Part 3, benign or malignant: 900 train and 379 test images.

  Layout, as downloaded:
    ISBI2016_ISIC_Part3_Training_Data/ISIC_0000000.jpg
    ISBI2016_ISIC_Part3_Training_GroundTruth.csv: `ISIC_0000000,benign`, no head
    ISBI2016_ISIC_Part3_Test_Data
    ISBI2016_ISIC_Part3_Test_GroundTruth.csv: `ISIC_0000003,0.0`, 1.0 for malignant
  Licence: CC-0. That the test table has numbers was not verified; words are read too.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = _SITE.format("2016, task 3")
  classes = ("benign", "malignant")
  needed = ("label",)
  head = ("image", "label")
  tables: ClassVar = {
    part: (
      f"ISBI2016_ISIC_Part3_{word}_Data",
      f"ISBI2016_ISIC_Part3_{word}_GroundTruth.csv",
    )
    for part, word in (("train", "Training"), ("test", "Test"))
  }

  def _diagnosis(self, row, table):
    if row["label"] in self.classes:
      return row["label"]
    return files.one_of(self.classes, row["label"], table, row["image"])


class Isic2017Task3(_Diagnosis, base.ManualBuilder):
  """ISIC 2017 Part 3, three diagnoses: 2000 train, 150 val, 600 test images.

  Layout, as downloaded:
    ISIC-2017_Training_Data/ISIC_0000000.jpg
    ISIC-2017_Training_Part3_GroundTruth.csv: image_id,melanoma,seborrheic_keratosis
    and both with Validation and with Test_v2 for Training
  Where neither column holds 1.0 the lesion is a nevus. Licence: CC-0.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = _SITE.format("2017, task 3")
  classes = ("nevus", "melanoma", "seborrheic_keratosis")
  column = "image_id"
  needed = ("melanoma", "seborrheic_keratosis")
  tables: ClassVar = {
    part: (f"ISIC-2017_{word}_Data", f"ISIC-2017_{word}_Part3_GroundTruth.csv")
    for part, word in (
      ("train", "Training"),
      ("val", "Validation"),
      ("test", "Test_v2"),
    )
  }


class Isic2018Task3(_Diagnosis, base.ManualBuilder):
  """ISIC 2018 Task 3 (HAM10000), seven diagnoses: 10015 train images.

  Layout, as the archives unpack:
    ISIC2018_Task3_Training_Input/ISIC_0024306.jpg
    ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv:
      image,MEL,NV,BCC,AKIEC,BKL,DF,VASC with one 1.0 a row
    and both with Validation (193 images) and with Test (1512) for Training
  Several images may show one lesion; which ones, the data do not say without
  ISIC2018_Task3_Training_LesionGroupings.csv, which is not read. Licence: CC BY-NC 4.0.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = _SITE.format("2018, task 3")
  classes = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
  needed = ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")
  tables: ClassVar = {
    part: (
      f"ISIC2018_Task3_{word}_Input",
      f"ISIC2018_Task3_{word}_GroundTruth/ISIC2018_Task3_{word}_GroundTruth.csv",
    )
    for part, word in (("train", "Training"), ("val", "Validation"), ("test", "Test"))
  }
