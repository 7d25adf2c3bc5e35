"""Retinal OCT and paediatric chest X-rays of Kermany et al., Cell 172(5), 2018."""

import re

from jaxadv.builders import base, files

__all__ = ["KermanyChestXray", "KermanyOct"]

_SITE = (
  "Download {} of 'Labeled Optical Coherence Tomography (OCT) and Chest X-Ray Images' "
  "from https://data.mendeley.com/datasets/rscbjbr9sj and unpack it here."
)


class _Kermany:
  """Folders of parts, in them folders of classes, in them files named by patient."""

  classes: tuple[str, ...]
  channels = 1
  has_patients = True
  roots: tuple[str, ...]
  patterns: tuple[str, ...]

  def _parts(self, folder):
    root = files.first(folder, *self.roots).parent
    found = {"train": root / "train", "val": root / "val", "test": root / "test"}
    return {
      part: self._records(place)
      for part, place in found.items()
      if part != "val" or place.is_dir()  # some copies have no val
    }

  def _records(self, folder):
    return [
      base.Record(name, file, label, patient=self._patient(file))
      for label in self.classes
      for name, file in files.images(folder / label).items()
    ]

  def _patient(self, file):
    for pattern in self.patterns:
      if match := re.match(pattern, file.stem, re.IGNORECASE):
        return match[1]
    raise ValueError(f"{file} does not say whose it is; such names are not known.")


class KermanyOct(_Kermany, base.ManualBuilder):
  """Kermany OCT, four classes.

  Layout, as the archives unpack (OCT2017.tar.gz, and ZhangLabData.zip):
    OCT2017/train/CNV/CNV-1016042-1.jpeg, or CellData/OCT/train/...
    OCT2017/test/..., and OCT2017/val/... where the copy has one
  and DME, DRUSEN, NORMAL for CNV. The middle of a name is the patient, who may have
  images in several classes. Where a patient has images in several parts, those of the
  earlier part are left out: published copies differ in how much their parts share.
  Licence: CC BY 4.0.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = _SITE.format("the OCT part (OCT2017)")
  classes = ("CNV", "DME", "DRUSEN", "NORMAL")
  roots = ("OCT2017/train", "OCT2017 /train", "CellData/OCT/train", "train")
  patterns = (r"[A-Z]+-(\d+)-\d+$",)


class KermanyChestXray(_Kermany, base.ManualBuilder):
  """Kermany chest X-rays of children, normal or pneumonia.

  Layout, as the archives unpack (ChestXRay2017.zip, and ZhangLabData.zip):
    chest_xray/train/NORMAL/*.jpeg, or CellData/chest_xray/train/...
    chest_xray/test/..., and chest_xray/val/... where the copy has one
  and PNEUMONIA for NORMAL. There are two ways of naming: NORMAL-1557045-0001,
  BACTERIA-338181-0004 and VIRUS-7251175-0001 have the patient in the middle;
  person1_bacteria_1, IM-0115-0001 and NORMAL2-IM-0383-0001 begin with the patient. That
  person1_bacteria and person1_virus are two patients is taken from the numbers, which
  run apart; the source does not say. Where a patient has images in several parts, those
  of the earlier part are left out. Licence: CC BY 4.0.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = _SITE.format("the chest X-rays (ChestXRay2017)")
  classes = ("NORMAL", "PNEUMONIA")
  roots = ("chest_xray/train", "CellData/chest_xray/train", "train")
  patterns = (
    r"((?:NORMAL2-)?IM-\d+)-",
    r"(person\d+_(?:bacteria|virus))_",
    r"(?:NORMAL|BACTERIA|VIRUS)-(\d+)-\d+$",
  )
