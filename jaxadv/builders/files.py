"""Files of a download: pictures by name, tables, lists, whatever their spelling."""

import csv
import pathlib
from collections.abc import Mapping, Sequence

__all__ = ["by_column", "find", "first", "images", "lines", "one_of", "rows"]

_ENDINGS = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}


def images(*folders: pathlib.Path) -> dict[str, pathlib.Path]:
  """Pictures in some folders by their name without ending, in order.

  Hidden files and the superpixels that came with ISIC images are passed over.

  Raises:
    FileNotFoundError: when a folder is missing or has no picture.
    ValueError: for two pictures of one name.
  """
  found: dict[str, pathlib.Path] = {}
  for folder in folders:
    if not folder.is_dir():
      raise FileNotFoundError(f"there is no folder {folder}.")
    for file in sorted(folder.iterdir()):
      if file.suffix.lower() not in _ENDINGS or file.name.startswith("."):
        continue
      if file.stem.endswith("_superpixels"):
        continue
      if file.stem in found:
        raise ValueError(f"{found[file.stem]} and {file} have one name; keep one.")
      found[file.stem] = file
  if not found:
    raise FileNotFoundError(f"there is no picture in {', '.join(map(str, folders))}.")
  return found


def find(
  pictures: Mapping[str, pathlib.Path], name: str, source: pathlib.Path
) -> pathlib.Path:
  """The picture called `name`, with or without ending, in capitals or not.

  Args:
    pictures: see `images`.
    name: as a table or list has it.
    source: which names it, for the error.

  Raises:
    FileNotFoundError: when there is none.
  """
  path = pathlib.PurePath(name)
  stem = path.stem if path.suffix.lower() in _ENDINGS else name
  for key in (stem, stem.lower(), stem.upper()):
    if key in pictures:
      return pictures[key]
  folders = {str(file.parent) for file in pictures.values()}
  raise FileNotFoundError(
    f"{source} names {name}, which is not in {', '.join(sorted(folders))}."
  )


def first(folder: pathlib.Path, *names: str) -> pathlib.Path:
  """The first of `names` that exists in `folder`.

  A `*` stands for anything; of several files the last in order is taken, which has the
  latest date.

  Raises:
    FileNotFoundError: when none does, with all of them.
  """
  for name in names:
    for file in sorted(folder.glob(name), reverse=True):
      return file
  raise FileNotFoundError(f"{folder} has none of {', '.join(names)}.")


def rows(
  file: pathlib.Path, *needed: str, head: Sequence[str] = ()
) -> list[dict[str, str]]:
  """Rows of a table by column, names in small letters and without blanks around.

  Args:
    file: CSV, quoted or not, with or without a byte order mark.
    *needed: columns that must be there.
    head: names of the columns where the file has none.

  Raises:
    FileNotFoundError: when the file is missing.
    ValueError: when columns are missing, for a row that is too short, and for a file
      that is no CSV in UTF-8.
  """
  if not file.is_file():
    raise FileNotFoundError(f"there is no file {file}.")
  try:
    with open(file, newline="", encoding="utf-8-sig") as opened:
      table = [row for row in csv.reader(opened) if any(cell.strip() for cell in row)]
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{file} is no CSV in UTF-8 ({error}); save it so.") from error
  return by_column(file, [list(head)] + table if head else table, *needed)


def by_column(
  file: pathlib.Path, table: Sequence[Sequence[object]], *needed: str
) -> list[dict[str, str]]:
  """The same of a table that was read already, its first row the names."""
  names = [str(cell).strip().lower() for cell in table[0]] if table else []
  while names and not names[-1]:
    names.pop()
  if not set(needed) <= set(names):
    raise ValueError(
      f"{file} has the columns {', '.join(names)}; it needs {', '.join(needed)}."
    )
  found = []
  for row in table[1:]:
    if len(row) < len(names):
      raise ValueError(f"{file} has the row {list(row)}; it needs {', '.join(names)}.")
    found.append({k: str(cell).strip() for k, cell in zip(names, row, strict=False)})
  return found


def lines(file: pathlib.Path) -> list[str]:
  """Lines of a list, without blanks around and without empty ones.

  Raises:
    FileNotFoundError: when the file is missing.
    ValueError: when it is not in UTF-8.
  """
  if not file.is_file():
    raise FileNotFoundError(f"there is no file {file}.")
  try:
    text = file.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{file} is no list in UTF-8 ({error}); save it so.") from error
  return [line.strip() for line in text.splitlines() if line.strip()]


def one_of(classes: Sequence[str], number: str, file: pathlib.Path, name: str) -> str:
  """The class of a whole number in a table, which may be written 2 or 2.0.

  Raises:
    ValueError: when it is none of them.
  """
  for k, kind in enumerate(classes):
    if number in (str(k), f"{k}.0"):
      return kind
  raise ValueError(
    f"{file} gives {name} the label {number!r}; it needs 0 to {len(classes) - 1}."
  )
