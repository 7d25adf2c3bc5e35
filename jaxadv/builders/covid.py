"""CT of the lungs in COVID-19: slices with or without it, and lungs in volumes."""

import functools
import zlib

import numpy as np
from PIL import Image

from jaxadv.builders import base, files

__all__ = ["Covid19CtLungs", "CovidCt"]

_WINDOW = (-1000, 400)  # Hounsfield units
_TORN = (EOFError, OSError, zlib.error)


class CovidCt(base.ManualBuilder):
  """COVID-CT, slices with or without COVID-19: 349 and 397, in published parts.

  Layout, the repository with its archives unpacked:
    Images-processed/CT_COVID/*.png and *.jpg, Images-processed/CT_NonCOVID/...
    Data-split/COVID/trainCT_COVID.txt, valCT_COVID.txt, testCT_COVID.txt
    Data-split/NonCOVID/trainCT_NonCOVID.txt, ...
  A list has a file name on each line. That the authors split by patient is doubtful,
  and not checked: the patients are in COVID-CT-MetaInfo.xlsx, which is not read. The
  licence of the images, which were cut out of preprints, was not found.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Download https://github.com/UCSD-AI4H/COVID-CT and unpack CT_COVID.zip and "
    "CT_NonCOVID.zip in its Images-processed; this is the folder of the repository."
  )
  channels = 1
  classes = ("CT_NonCOVID", "CT_COVID")

  def _parts(self, folder):
    return {
      part: [record for k in self.classes for record in _listed(folder, part, k)]
      for part in ("train", "val", "test")
    }


def _listed(folder, part, kind):
  names = folder / "Data-split" / kind.removeprefix("CT_") / f"{part}{kind}.txt"
  for name in files.lines(names):
    image = folder / "Images-processed" / kind / name
    if not image.is_file():
      raise FileNotFoundError(f"{names} names {name}, but there is no {image}.")
    yield base.Record(name, image, kind)


class Covid19CtLungs(base.ManualBuilder):
  """COVID-19-CT-Seg, left and right lung: axial slices of 20 CT volumes.

  Layout, as the archives unpack:
    COVID-19-CT-Seg_20cases/coronacases_001.nii.gz, radiopaedia_4_85506_1.nii.gz, ...
    Lung_Mask/coronacases_001.nii.gz, ...: 0, 1 left lung, 2 right lung
  Slices are turned as radiologists see them, front up, and written in order. For that
  the axes are assumed to run from right to left, from back to front and upwards; the
  affine of a volume, which could say otherwise, is not read. Volumes in
  Hounsfield units are cut to -1000..400; those of radiopaedia, published with values
  from 0 to 255, are taken as they are. Both, and that this is the set of the SMIA
  paper, were not verified on the files. There is no test part; the case is the patient.
  Licence: CC BY 4.0 by the record; that of the volumes' sources was not verified.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Download COVID-19-CT-Seg_20cases.zip and Lung_Mask.zip from "
    "https://zenodo.org/records/3757476 and unpack each into the folder of its name."
  )
  kind = "segmentation_mask"
  channels = 1
  has_patients = True
  classes = ("background", "left_lung", "right_lung")

  def _parts(self, folder):
    place = folder / "COVID-19-CT-Seg_20cases"
    volumes = sorted(place.glob("*.nii*"))
    if not volumes:
      raise FileNotFoundError(f"there is no *.nii.gz in {place}.")
    return {"train": [slice_ for file in volumes for slice_ in _slices(file, folder)]}

  def _examples(self, records):
    try:
      yield from super()._examples(records)
    finally:
      _volume.cache_clear()

  def _example(self, record):
    # The number of the slice is at the end of its name.
    n, side = int(record.id.rpartition(" ")[2]), self.builder_config.side
    image, mask = _volume(record.image)[..., n], _classes(record.masks[0], n)
    how = Image.Resampling
    return {
      "image": base.encoded(_upright(_grey(image, record), side, how.BILINEAR)),
      "segmentation_mask": base.encoded(_upright(mask, side, how.NEAREST)),
      "id": record.id,
      "patient": record.patient,
    }


def _slices(file, folder):
  mask = folder / "Lung_Mask" / file.name
  if not mask.is_file():
    raise FileNotFoundError(f"{file} has no mask; {mask} is missing.")
  shape, of_mask = _nifti(file).shape, _nifti(mask).shape
  if shape != of_mask or len(shape) != 3:
    raise ValueError(f"{file} is {shape} but its mask {of_mask}; both need one shape.")
  case = file.name.partition(".")[0]
  return [
    base.Record(f"{case} {n}", file, masks=(mask,), patient=case)
    for n in range(shape[2])
  ]


def _nifti(file):
  try:
    import nibabel  # only for this format
  except ImportError as error:
    raise ValueError(f"{file} needs: pip install 'jaxadv[build]'.") from error
  try:
    return nibabel.load(file)
  except (nibabel.filebasedimages.ImageFileError, *_TORN) as error:
    raise ValueError(f"{file} is torn or no NIfTI volume ({error}).") from error


@functools.lru_cache(maxsize=2)  # a volume and its mask: a slice is not read alone
def _volume(file):
  volume = _nifti(file)
  try:
    return np.asarray(volume.dataobj, np.float32)
  except _TORN as error:
    raise ValueError(f"{file} is torn ({error}).") from error


def _classes(file, n):
  """A slice of a mask; scaled volumes hold its classes but for the last bits."""
  mask = np.rint(_volume(file)[..., n])
  wrong = np.setdiff1d(mask, (0, 1, 2))
  if wrong.size:
    raise ValueError(f"{file} has the value {wrong[0]:g}; its classes are 0, 1 and 2.")
  return mask.astype(np.uint8)


def _grey(values, record):
  low, high = (0, 255) if record.patient.startswith("radiopaedia") else _WINDOW
  scaled = (np.clip(values, low, high) - low) / (high - low)
  return np.rint(255 * scaled).astype(np.uint8)


def _upright(pixels, side, how):
  turned = Image.fromarray(np.ascontiguousarray(pixels.T[::-1]))
  return np.asarray(turned.resize((side, side), how))
