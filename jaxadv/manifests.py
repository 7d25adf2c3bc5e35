"""What a checkpoint is of, and whether it is whole: the file `about.json` beside it."""

import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jaxadv

__all__ = ["check", "damage", "leaves", "write"]

_log = logging.getLogger(__name__)


def write(
  folder: pathlib.Path, shapes: Mapping[str, str], settings: Mapping[str, Any]
) -> None:
  """Describes what lies under `folder / "state"`, with a checksum of every file.

  Args:
    folder: of the checkpoint.
    shapes: from `leaves`.
    settings: flat, of JSON values: what the state depends on.
  """
  about: dict[str, Any] = {"leaves": dict(shapes), "settings": dict(settings)}
  about |= {"jaxadv": jaxadv.__version__, "files": _checksums(folder / "state")}
  about["checksum"] = _own_checksum(about)
  (folder / "about.json").write_text(json.dumps(about, indent=1))


def damage(folder: pathlib.Path) -> str | None:
  """What is not as it was written, or `None`."""
  try:
    about = json.loads((folder / "about.json").read_text())
    found = _checksums(folder / "state")
    # Older checkpoints have no checksum of this file itself.
    if about.get("checksum") not in (None, _own_checksum(about)):
      return "about.json is not as it was written"
    names = sorted(found.keys() | about["files"].keys())
    changed = [name for name in names if found.get(name) != about["files"].get(name)]
  except OSError as error:
    return f"{pathlib.Path(error.filename).name}: {error.strerror}"
  except (ValueError, KeyError) as error:
    return f"about.json: {error}"
  return f"{changed[0]} is not as it was written" if changed else None


def check(
  folder: pathlib.Path,
  shapes: Mapping[str, str],
  settings: Mapping[str, Any] | None = None,
) -> None:
  """Refuses the checkpoint of another run; one of another version is only told of.

  Args:
    folder: of a whole checkpoint.
    shapes: `leaves` of the state that is needed.
    settings: what it must depend on; by default anything.

  Raises:
    ValueError: with the difference.
  """
  about = json.loads((folder / "about.json").read_text())
  if settings is not None and "settings" in about:  # older ones have none
    wanted = json.loads(json.dumps(dict(settings)))
    _refuse(folder, "run", about["settings"], wanted)
  _refuse(folder, "state", about["leaves"], shapes)
  here, there = jaxadv.__version__, about.get("jaxadv", jaxadv.__version__)
  if there != here:
    line = "checkpoint %s was written by jaxadv %s, this is %s: bits may differ"
    _log.warning(line, folder, there, here)


def leaves(state: Any) -> dict[str, str]:
  """Path, shape and dtype of every leaf, as JSON keeps them.

  Example:
    >>> leaves({"w": jnp.ones(3)})
    {"['w']": '(3,) float32'}
  """
  paths, _ = jax.tree.flatten_with_path(state)
  name, kind = jax.tree_util.keystr, jax.dtypes.result_type
  return {name(path): f"{jnp.shape(leaf)} {kind(leaf)}" for path, leaf in paths}


def _checksums(folder):
  files = [path for path in folder.rglob("*") if path.is_file()]
  return {str(path.relative_to(folder)): _checksum(path) for path in files}


def _checksum(path):
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _own_checksum(about):
  rest = {name: value for name, value in about.items() if name != "checksum"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _refuse(folder, what, found, wanted):
  differing = [
    f"{name}: checkpoint has {found.get(name, 'nothing')}, "
    f"this run needs {wanted.get(name, 'nothing')}"
    for name in sorted(found.keys() | wanted.keys())
    if found.get(name) != wanted.get(name)
  ]
  if differing:
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise ValueError(
      f"checkpoint {folder} is of another {what}: {'; '.join(differing[:3])}{more}."
    )
