"""Optic discs of RIM-ONE DL: glaucoma or normal, and disc and cup."""

from jaxadv.builders import base, files

__all__ = [
  "RimOneDl",
  "RimOneDlByHospital",
  "RimOneDlSegmentation",
  "RimOneDlSegmentationByHospital",
]

_SITE = (
  "Download RIM-ONE_DL_images.zip{} by the links of "
  "https://github.com/miag-ull/rim-one-dl and unpack here."
)
_PARTS = {"train": "training_set", "test": "test_set"}


class RimOneDl(base.ManualBuilder):
  """RIM-ONE DL, normal or glaucoma: 313 and 172 images, the random partition.

  Layout, as the archive unpacks:
    RIM-ONE_DL_images/partitioned_randomly/training_set/glaucoma/r1_Im001.png
    and test_set for training_set, normal for glaucoma
  Which images are of one patient is not published; the partition by hospital shares
  none. Licence: research and education only, no redistribution.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = _SITE.format("")
  classes: tuple[str, ...] = ("normal", "glaucoma")
  partition = "partitioned_randomly"

  def _parts(self, folder):
    root = folder / "RIM-ONE_DL_images" / self.partition
    return {
      part: [
        self._record(name, file, label, folder)
        for label in ("normal", "glaucoma")
        for name, file in files.images(root / place / label).items()
      ]
      for part, place in _PARTS.items()
    }

  def _record(self, name, file, label, folder):
    return base.Record(name, file, label)


class RimOneDlByHospital(RimOneDl):
  """RIM-ONE DL, normal or glaucoma, tested on images of other hospitals.

  As `rim_one_dl`, in partitioned_by_hospital: the images of one hospital are the train
  part, those of two others the test part.
  """

  partition = "partitioned_by_hospital"


class RimOneDlSegmentation(RimOneDl):
  """RIM-ONE DL, optic disc and cup: 485 images, the random partition.

  Layout, as the archives unpack: that of `rim_one_dl`, and
    RIM-ONE_DL_reference_segmentations/glaucoma/r1_Im001-1-Disc-T.png and -1-Cup-T.png
    and normal for glaucoma
  Masks are 0 and 255; disc holds what is not cup. Licence: as `rim_one_dl`.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = _SITE.format(
    " and RIM-ONE_DL_reference_segmentations.zip"
  )
  kind = "segmentation_mask"
  classes = ("background", "disc", "cup")

  def _record(self, name, file, label, folder):
    place = folder / "RIM-ONE_DL_reference_segmentations" / label
    masks = tuple(place / f"{name}-1-{which}-T.png" for which in ("Disc", "Cup"))
    for mask in masks:
      if not mask.is_file():
        raise FileNotFoundError(f"{file} has no mask; {mask} is missing.")
    return base.Record(name, file, masks=masks)


class RimOneDlSegmentationByHospital(RimOneDlSegmentation):
  """RIM-ONE DL, optic disc and cup, tested on images of other hospitals.

  As `rim_one_dl_segmentation`, in partitioned_by_hospital.
  """

  partition = "partitioned_by_hospital"
