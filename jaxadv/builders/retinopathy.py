"""Grades of diabetic retinopathy: APTOS 2019, Messidor, Messidor-2."""

import pathlib

from jaxadv.builders import base, files

__all__ = ["Aptos2019", "Messidor", "Messidor2"]

_GRADES = ("no_DR", "mild", "moderate", "severe", "proliferative_DR")


class Aptos2019(base.ManualBuilder):
  """APTOS 2019 Blindness Detection, five grades: 3662 train images.

  Layout, as the archive unpacks:
    train.csv: id_code,diagnosis with grades 0 to 4
    train_images/000c1434d8d7.png
  The grades of `test_images` were never published, and the patients are not known, so
  there is one part, `train`. Rules of the competition: no redistribution.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Accept the rules of https://www.kaggle.com/c/aptos2019-blindness-detection, "
    "download all its data and unpack them here."
  )
  classes = _GRADES

  def _parts(self, folder):
    table = folder / "train.csv"
    graded = files.rows(table, "id_code", "diagnosis")
    pictures = files.images(folder / "train_images")
    return {"train": _graded(graded, pictures, table, self.classes)}


class Messidor(base.ManualBuilder):
  """Messidor, four grades of its own scale: 1200 images in twelve bases.

  Layout, as the archives unpack, in one folder or with the tables inside the bases:
    Base11/20051019_38557_0100_PP.tif, ... Base14, Base21 to Base24, Base31 to Base34
    Annotation_Base11.xls, and the like for every base: columns Image name,
      Ophthalmologic department, Retinopathy grade, Risk of macular edema
  A table may also be saved as Annotation_Base11.csv, which is then taken. A corrected
  table has a date behind the name, and goes before the other, the latest before all.
  Only bases that are there are read. R0 is without lesions, R3 the worst. There is no
  test part, and the patients are not named; doubled images, some of which the source
  lists, are not removed.
  Licence: research and education only, no redistribution.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Register at https://www.adcis.net/en/third-party/messidor/, download the bases "
    "and their tables, and unpack them here."
  )
  classes = ("R0", "R1", "R2", "R3")

  def _parts(self, folder):
    found = [place for place in sorted(folder.glob("Base[1-3][1-4]")) if place.is_dir()]
    if not found:
      raise FileNotFoundError(f"{folder} has none of Base11, Base12, ..., Base34.")
    return {"train": [record for place in found for record in self._base(place)]}

  def _base(self, folder):
    start = f"Annotation_{folder.name}"
    ends = ("_*.csv", "_*.xls", ".csv", ".xls")
    names = [f"{at}{start}{end}" for end in ends for at in ("", f"{folder.name}/")]
    table = files.first(folder.parent, *names)
    columns = "image name", "retinopathy grade"
    graded = _sheet(table, *columns)
    return _graded(graded, files.images(folder), table, self.classes, *columns)


class Messidor2(base.ManualBuilder):
  """Messidor-2 with the grades of Google, five of them: 1744 gradable images.

  Layout, two downloads in one folder:
    IMAGES/20051020_43808_0100_PP.png and .JPG, as ADCIS sends them (also `images`)
    messidor_data.csv: image_id,adjudicated_dr_grade,adjudicated_dme,...
    messidor-2.csv, optional: the two eyes of each examination, as `left;right`
  Images without a grade are left out. An examination is taken for the patient. There is
  one part, `train`. The form of `messidor-2.csv` was seen in code that reads it only.
  Licence: research and education only, no redistribution; that of the grades was not
  verified.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Register at https://www.adcis.net/en/third-party/messidor2/ for the images, and "
    "download https://www.kaggle.com/datasets/google-brain/messidor2-dr-grades for the "
    "grades; unpack both here."
  )
  classes = _GRADES
  has_patients = True

  def _parts(self, folder):
    table = folder / "messidor_data.csv"
    columns = "image_id", "adjudicated_dr_grade"
    graded = [row for row in files.rows(table, *columns) if row[columns[1]]]
    pictures = files.images(files.first(folder, "IMAGES", "images"))
    records = _graded(graded, pictures, table, self.classes, *columns)
    pairs = folder / "messidor-2.csv"
    patients = _examinations(pairs)
    named = [r._replace(patient=patients.get(r.id.lower(), "")) for r in records]
    if pairs.is_file() and not any(record.patient for record in named):
      raise ValueError(f"{pairs} names none of the images; write left;right a line.")
    return {"train": named}


def _graded(table_rows, pictures, table, classes, name="id_code", grade="diagnosis"):
  return [
    base.Record(
      pathlib.PurePath(row[name]).stem,
      files.find(pictures, row[name], table),
      files.one_of(classes, row[grade], table, row[name]),
    )
    for row in table_rows
  ]


def _sheet(table, *columns):
  if table.suffix == ".csv":
    return files.rows(table, *columns)
  try:
    import xlrd  # only for this format of 1997
  except ImportError as error:
    raise ValueError(
      f"{table} needs: pip install 'jaxadv[build]'; or save it as .csv beside."
    ) from error
  try:
    sheet = xlrd.open_workbook(table).sheet_by_index(0)
  except xlrd.XLRDError as error:
    raise ValueError(f"{table} is torn or no .xls table ({error}).") from error
  cells = [sheet.row_values(n) for n in range(sheet.nrows)]
  return files.by_column(table, cells, *columns)


def _examinations(file):
  """The number of the examination by name of the image."""
  if not file.is_file():
    return {}
  pairs = [line.replace('"', "").split(";")[:2] for line in files.lines(file)]
  return {
    pathlib.PurePath(name.strip()).stem.lower(): f"examination {n}"
    for n, pair in enumerate(pairs)
    for name in pair
  }
