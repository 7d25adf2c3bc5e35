"""How a config file is read: what it builds, and what two runs are compared by."""

import ast
import dataclasses
import hashlib
import pathlib
import runpy
from typing import Any

from jaxadv.experiments import ConfigError, DefenceStudy, Recipe, UniversalStudy

__all__ = ["Config", "load_config"]


@dataclasses.dataclass(frozen=True)
class Config:
  """A config file that was read: what it builds, and what it says.

  Attributes:
    name: the file's name without `.py`.
    text: the file.
    code: its statements without comments and docstring, by which two runs are compared.
    experiment: a `Recipe`, an `Experiment`, a `UniversalStudy` or a `DefenceStudy`.
  """

  name: str
  text: str
  code: str
  experiment: Any

  @property
  def digest(self) -> str:
    """SHA-256 of the statements, shortened."""
    return hashlib.sha256(self.code.encode()).hexdigest()[:12]


def load_config(path: str | pathlib.Path, *, quick: bool = False) -> Config:
  """Reads a config file and builds its experiment.

  Args:
    path: a Python file with `get_config(*, quick=False)`, see `jaxadv.experiments`.
    quick: passed on.

  Returns:
    The file and its experiment.

  Raises:
    ConfigError: when the file is missing or torn, has no `get_config`, fails, or
      returns something else; one line that names the file.
  """
  path = pathlib.Path(path)
  try:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(path))
  except (OSError, SyntaxError, ValueError) as error:
    raise ConfigError(f"cannot read config {path}: {_brief(error)}") from error
  return Config(path.stem, text, _code(tree), _build(path, quick))


def _build(path, quick):
  try:
    names = runpy.run_path(str(path), run_name=f"config:{path.stem}")
    if "get_config" not in names:
      raise ConfigError("has no get_config(*, quick=False); write one.")
    experiment = names["get_config"](quick=quick)
  except Exception as error:  # a config may fail in any way
    raise ConfigError(f"config {path} failed: {_brief(error)}") from error
  if not isinstance(experiment, Recipe | UniversalStudy | DefenceStudy):
    raise ConfigError(
      f"get_config in {path} returned {type(experiment).__name__}; return a "
      "jaxadv.experiments.Recipe, Experiment, UniversalStudy or DefenceStudy."
    )
  return experiment


def _brief(error):
  where = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
  lines = str(error).strip().splitlines() or [""]
  return f"{where}{type(error).__name__}: {lines[0]}"


def _code(tree):
  if ast.get_docstring(tree) is not None:
    tree.body = tree.body[1:]
  return ast.unparse(tree)
