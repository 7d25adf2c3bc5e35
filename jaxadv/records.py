"""Files that survive a kill: atomic writes, rows appended for good, runs compared.

A run is described by a flat dict of its settings, stored in its folder at the start. A
later run in the same folder must describe itself the same way, or is refused with the
difference shown: results of two settings never mix.
"""

import contextlib
import csv
import difflib
import fcntl
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxadv import distributed

__all__ = [
  "RecordError",
  "append_rows",
  "check_same_run",
  "lock",
  "read_rows",
  "write_atomically",
  "write_json",
]

Row = Mapping[str, Any]


class RecordError(ValueError):
  """Files of a run that cannot be continued; the message says why in one line."""


def write_atomically(
  path: pathlib.Path, content: bytes | str, *, own: bool = False
) -> None:
  """Writes a whole file or nothing: into a neighbour first, then renamed over `path`.

  Args:
    path: of the file.
    content: of all processes the same, and the first one writes it.
    own: of this process only, which writes it.

  Raises:
    RecordError: when the disk is full or cannot be written.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a" / "b.txt"
    >>> write_atomically(path, "whole")
    >>> path.read_text()
    'whole'
  """
  if not (own or distributed.is_first()):
    return
  aside = path.with_name(f".{path.name}.tmp")
  with _written(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside.open("wb") as file:
      file.write(content.encode() if isinstance(content, str) else content)
      file.flush()
      os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """`write_atomically` of indented JSON; NaN is refused, as JSON has none."""
  write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def lock(folder: pathlib.Path) -> Iterator[None]:
  """Keeps other runs out of `folder` until the block, or the process, ends.

  Raises:
    RecordError: when another run holds it, or the folder cannot be written.
  """
  with contextlib.ExitStack() as held:
    distributed.by_first(lambda: _hold(folder, held))
    yield


def check_same_run(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """Stores the settings of a run, or compares them with those stored.

  Args:
    path: JSON file of the settings.
    settings: flat, of JSON values; long texts are compared line by line.

  Raises:
    RecordError: when the settings differ (saying where), or the file is torn.
  """
  distributed.by_first(_compare, path, settings)


def _hold(folder, held):
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = held.enter_context((folder / ".lock").open("w"))
  except OSError as error:
    raise RecordError(f"cannot write to {folder}: {error.strerror}") from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise RecordError(f"another run is writing to {folder}") from error


def _compare(path, settings):
  if not path.exists():
    write_json(path, dict(settings))
    return
  try:
    stored = json.loads(path.read_text())
  except ValueError as error:
    raise RecordError(
      f"{path} is torn; delete {path.parent} or choose --out"
    ) from error
  names = sorted(stored.keys() | settings.keys())
  differing = [n for n in names if stored.get(n) != settings.get(n)]
  if differing:
    changes = "; ".join(_change(n, stored.get(n), settings.get(n)) for n in differing)
    raise RecordError(
      f"{path.parent} holds another run ({changes}); choose another --out or delete it."
    )


def _change(name, before, now):
  if not (isinstance(before, str) and isinstance(now, str) and "\n" in before + now):
    return f"{name} was {before}, is {now}"
  lines = difflib.unified_diff(before.splitlines(), now.splitlines(), n=0, lineterm="")
  changed = [
    line.replace("  ", "") for line in lines if line[:2] not in ("--", "++", "@@")
  ]
  more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
  return f"{name}: " + " | ".join(changed[:4]) + more


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
  """The finished rows of a CSV file; a torn last line is cut off the file.

  Args:
    path: the file; no rows when it does not exist.

  Returns:
    One dict per row, values as text.

  Raises:
    RecordError: when a row inside the file is damaged.
  """
  if not path.exists():
    return []
  content = path.read_bytes()
  whole = content[: content.rfind(b"\n") + 1]
  if whole != content:
    write_atomically(path, whole)
  rows = list(csv.DictReader(io.StringIO(whole.decode()), strict=True))
  for number, row in enumerate(rows, start=2):
    if None in row or None in row.values():
      raise RecordError(f"{path} line {number} is damaged; delete the line.")
  return rows


def append_rows(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Adds rows, of this process only, in one write that is on disk when this returns.

  Floats keep the nine digits that identify a float32.

  Raises:
    RecordError: when the file has other columns, or cannot be written.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.csv"
    >>> append_rows(path, [{"pair": 0, "l2": 0.1}])
    >>> append_rows(path, [{"pair": 1, "l2": 1 / 3}])
    >>> read_rows(path)
    [{'pair': '0', 'l2': '0.1'}, {'pair': '1', 'l2': '0.333333333'}]
  """
  if not rows:
    return
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
  header = _header(path)
  if not header:
    writer.writeheader()
  elif header != list(rows[0]):
    raise RecordError(f"{path} has other columns ({', '.join(header)}); delete it.")
  for row in rows:
    writer.writerow({name: _text(value) for name, value in row.items()})
  with _written(path), path.open("ab") as file:
    file.write(text.getvalue().encode())
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _written(path):
  """A full disk in one line; half a row is cut off when the rows are read again."""
  try:
    yield
  except OSError as error:
    raise RecordError(
      f"cannot write {path}: {error.strerror}; what is finished is kept."
    ) from error


def _header(path):
  if not path.exists():
    return []
  with path.open(newline="") as file:
    return next(csv.reader(file), [])


def _text(value):
  return f"{value:.9g}" if isinstance(value, float) else value
