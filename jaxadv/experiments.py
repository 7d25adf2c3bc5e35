"""What a config builds: an `Experiment`, and how a config file is read.

A config is a Python file with `get_config(*, quick=False) -> Experiment`. It builds
its parts (model, optimizer, attacks) itself: no registry, no strings that name
functions. `quick=True` asks for the same experiment in its smallest sensible form.
"""

import ast
import dataclasses
import hashlib
import pathlib
import re
import runpy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxadv import training
from jaxadv.types import AttackFn

__all__ = ["Config", "ConfigError", "Experiment", "load_config"]

_COUNTS = ("train_steps", "batch_size", "num_pairs", "attack_batch", "checkpoint_every")


class ConfigError(ValueError):
  """A config that cannot be used; the message says why in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """A victim, the data it sees and the attacks it faces.

  Attributes:
    model: Flax module, `apply(variables, x, train) -> (logits, features)`.
    optimizer: optax transform that trains it.
    attacks: name to attack, in the order of the report. Each is called with
      `y = {"label": target masks, "image": target images}`.
    data: sources for `jaxadv.data.load`; the first that is found is used, and `None`
      stands for the synthetic phantoms.
    baseline: the attack that paired ratios refer to; `None` for no ratios.
    train_split: part of the data the victim learns from.
    test_split: part that is attacked.
    loss: one example's `(logits, label) -> scalar` for training.
    augment: one example's `(key, image, label) -> (image, label)`, or `None`.
    train_steps: optimizer steps.
    batch_size: images per optimizer step.
    num_pairs: ordered pairs (attacked image, image that lends its mask).
    attack_batch: pairs attacked at once.
    max_initial_iou: pairs whose masks agree more than this are not used.
    threshold: target IoU that counts as success on the stored 8-bit image.
    seed: of the weights, the batches, the pairs and the attacks.
    checkpoint_every: training steps between checkpoints.
    gallery: pairs shown per attack.

  Raises:
    ConfigError: for counts below 1, shares outside [0, 1], no attack, a name that makes
      no folder, or a baseline that is not among the attacks.

  Example:
    >>> from jaxadv import combine
    >>> Experiment(model=None, optimizer=optax.sgd(0.1), data=(None,),
    ...            attacks={"none": combine.identity}).num_pairs
    16
  """

  model: Any
  optimizer: optax.GradientTransformation
  attacks: Mapping[str, AttackFn]
  data: tuple[str | None, ...]
  baseline: str | None = None
  train_split: str = "train"
  test_split: str = "test"
  loss: Callable[[jax.Array, jax.Array], jax.Array] = training.dice_cross_entropy
  augment: training.AugmentFn | None = training.flips
  train_steps: int = 300
  batch_size: int = 8
  num_pairs: int = 16
  attack_batch: int = 8
  max_initial_iou: float = 0.6
  threshold: float = 0.95
  seed: int = 0
  checkpoint_every: int = 50
  gallery: int = 3

  def __post_init__(self) -> None:
    """Refuses numbers that cannot work."""
    for name in _COUNTS:
      if getattr(self, name) < 1:
        raise ConfigError(f"`{name}` is {getattr(self, name)}; write 1 or more.")
    for name in ("threshold", "max_initial_iou"):
      if not 0 <= getattr(self, name) <= 1:
        raise ConfigError(
          f"`{name}` is {getattr(self, name)}; write a share in [0, 1]."
        )
    if not self.attacks or not self.data:
      raise ConfigError("`attacks` or `data` is empty; name at least one of each.")
    for name in self.attacks:
      if not re.fullmatch(r"[\w.+-][\w .+-]*", name):
        raise ConfigError(f"attack name {name!r}: write letters, digits, ' ', '.+-_'.")
    if self.baseline is not None and self.baseline not in self.attacks:
      raise ConfigError(
        f"`baseline` is {self.baseline!r}; write one of {sorted(self.attacks)}."
      )


@dataclasses.dataclass(frozen=True)
class Config:
  """A config file that was read: what it builds, and what it says.

  Attributes:
    name: the file's name without `.py`.
    text: the file.
    code: its statements without comments and docstring, by which two runs are compared.
    experiment: what `get_config` returned.
  """

  name: str
  text: str
  code: str
  experiment: Experiment

  @property
  def digest(self) -> str:
    """SHA-256 of the statements, shortened."""
    return hashlib.sha256(self.code.encode()).hexdigest()[:12]


def load_config(path: str | pathlib.Path, *, quick: bool = False) -> Config:
  """Reads a config file and builds its experiment.

  Args:
    path: a Python file with `get_config(*, quick=False) -> Experiment`.
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
  if not isinstance(experiment, Experiment):
    raise ConfigError(
      f"get_config in {path} returned {type(experiment).__name__}; "
      "return a jaxadv.experiments.Experiment."
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
