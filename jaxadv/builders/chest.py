"""Chest X-rays of the NIH: ChestX-ray14, several findings per image."""

import pathlib

from jaxadv.builders import base, files

__all__ = ["ChestXray14"]

_COLUMNS = ("image index", "finding labels", "patient id")


class ChestXray14(base.ManualBuilder):
  """ChestX-ray14, fourteen findings: 112120 images of 30805 patients.

  Layout, as downloaded:
    Data_Entry_2017.csv (or Data_Entry_2017_v2020.csv): Image Index, Finding Labels,
      ..., Patient ID; findings are joined by `|`, and `No Finding` stands for none
    images_001/images/00000001_000.png, ... images_012, or all in images/
    train_val_list.txt, test_list.txt: names of images, the published parts
  The published parts share no patient. Every image that a list names must be there. The
  lists of CheXNet (70, 10, 20 %) are others. Findings were mined from reports; about
  10 % are wrong by the provider's own account. No restriction on use; the provider, the
  NIH Clinical Center, must be named.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Download the images, Data_Entry_2017.csv and both lists from "
    "https://nihcc.app.box.com/v/ChestXray-NIHCC and unpack them here."
  )
  kind = "labels"
  channels = 1
  has_patients = True
  classes = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
  )

  def _parts(self, folder):
    table = files.first(folder, "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
    known = {row["image index"]: row for row in files.rows(table, *_COLUMNS)}
    places = sorted(folder.glob("images_[0-9]*/images")) or [folder / "images"]
    pictures = files.images(*places)
    lists = {"train": folder / "train_val_list.txt", "test": folder / "test_list.txt"}
    return {
      part: [self._record(name, known, pictures, file) for name in files.lines(file)]
      for part, file in lists.items()
    }

  def _record(self, name, known, pictures, file):
    if name not in known:
      raise ValueError(f"{file} names {name}, which the table of findings does not.")
    labels, patient = (known[name][column] for column in _COLUMNS[1:])
    findings = [] if labels == "No Finding" else labels.split("|")
    if unknown := set(findings) - set(self.classes):
      raise ValueError(
        f"{name} has the finding {min(unknown)!r}; it is none of the 14."
      )
    image = files.find(pictures, name, file)
    return base.Record(pathlib.PurePath(name).stem, image, findings, patient=patient)
