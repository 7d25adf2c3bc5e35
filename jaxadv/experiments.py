"""What a config builds.

A config is a Python file with `get_config(*, quick=False)` that returns a `Recipe` (a
victim to train), an `Experiment` (a victim and attacks), a `UniversalStudy` or a
`DefenceStudy`. It builds its parts (model, optimizer, attacks) itself: no registry, no
strings that name functions. `quick=True` asks for the same experiment in its smallest
sensible form.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax

from jaxadv import training
from jaxadv.defences import Defence
from jaxadv.engine import Universal
from jaxadv.robustness import Effort
from jaxadv.types import AttackFn

__all__ = [
  "PLAIN",
  "ConfigError",
  "DefenceStudy",
  "Experiment",
  "Recipe",
  "UniversalStudy",
]


PLAIN = "standard"  # the model without a defence


class ConfigError(ValueError):
  """A config that cannot be used; the message says why in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """A victim: a model, the data it learns from, and how.

  Attributes:
    model: Flax module, `apply(variables, x, train) -> (logits, features)`, whose
      attributes can be hashed.
    optimizer: optax transform that trains it.
    start: fresh variables to those that training starts from, such as converted weights
      (`functools.partial(convert.load, path, model, head=False)`, whose third argument
      they are); `None` starts from the fresh ones.
    data: sources for `jaxadv.data.load`; the first that is found is used, and `None`
      stands for the synthetic phantoms.
    train_split: part of the data the victim learns from.
    test_split: part that is attacked.
    val_split: part that the victim is selected on, for data that has one.
    holdout: else the share of the training part that is set aside for that, the same
      images in every run (`data.hold_out`).
    side: images, masks with them, are resized to so many pixels a side; `None` leaves
      them as they are.
    loss: one example's `(logits, label) -> scalar` for training; `None` for the usual
      one of masks, classes or label sets.
    augment: one example's `(key, image, label) -> (image, label)`, or `None`.
    defence: of `jaxadv.defences`: the views it learns from, and the loss on them in
      place of `loss`; `None` for plain training.
    weights: with a defence, where the gradient of its steps is taken, such as
      `training.adversarial_weights()`.
    monitor: attack on the validation images at every checkpoint, so that the victim is
      the checkpoint that scores best under it.
    collapse: training stops where a checkpoint's score is by more than this below the
      best one, as one-step adversarial training at times does, and always where the
      model answers NaN.
    train_steps: optimizer steps.
    batch_size: images per optimizer step, on all devices together.
    microbatches: parts that a batch is cut into, see `jaxadv.reduction`: the same bits
      on any number of devices that divides them; `None` for the fast sum.
    balance: oversample rare classes until all come equally often.
    seed: of the weights, the batches, the pairs and the attacks.
    checkpoint_every: training steps between checkpoints. With validation images, each
      checkpoint is scored on them, and the victim is the best one, not the last.

  Raises:
    ConfigError: for counts below 1, without data, for a share outside [0, 1), two kinds
      of validation images, and a selection on images that are trained on or attacked.
  """

  model: Any
  optimizer: optax.GradientTransformation
  data: tuple[str | None, ...]
  start: Callable[[Any], Any] | None = None
  train_split: str = "train"
  test_split: str = "test"
  val_split: str | None = None
  holdout: float = 0.0
  side: int | None = None
  loss: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  augment: training.AugmentFn | None = training.flips
  defence: Defence | None = None
  weights: training.WeightAttack | None = None
  monitor: AttackFn | None = None
  collapse: float = math.inf
  train_steps: int = 300
  batch_size: int = 8
  microbatches: int | None = None
  balance: bool = False
  seed: int = 0
  checkpoint_every: int = 50

  def __post_init__(self) -> None:
    """Refuses numbers that cannot work."""
    _check_counts(self, "train_steps", "batch_size", "checkpoint_every")
    _check_cut(self.batch_size, self.microbatches)
    _check_seed(self)
    if not self.data:
      raise ConfigError("`data` is empty; name at least one source.")
    if not 0 <= self.holdout < 1:
      raise ConfigError(f"`holdout` is {self.holdout}; write a share in [0, 1).")
    if self.val_split is not None and self.holdout:
      raise ConfigError("`val_split` and `holdout` are both set; choose one.")
    if self.val_split in (self.train_split, self.test_split):
      raise ConfigError(
        f"`val_split` is {self.val_split!r}, which is trained on or attacked; write "
        "another part, or a `holdout`."
      )
    if self.defence is not None and self.loss is not None:
      raise ConfigError("`loss` and `defence` are both set; the defence has its loss.")
    if self.weights is not None and self.defence is None:
      raise ConfigError("`weights` is set without a `defence`; write both.")
    if not self.collapse > 0:
      raise ConfigError(f"`collapse` is {self.collapse}; write a fall above 0, as 0.2.")
    watched = self.monitor is not None or self.collapse < math.inf
    if watched and self.val_split is None and not self.holdout:
      raise ConfigError(
        "`monitor` and `collapse` need validation images; write a `holdout`, as 0.1."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Recipe):
  """A victim that segments, and the attacks it faces on pairs of images.

  Attributes:
    attacks: name to attack, in the order of the report. Each is called with
      `y = {"label": target masks, "image": target images}`.
    baseline: the attack that paired ratios refer to; `None` for no ratios.
    num_pairs: ordered pairs (attacked image, image that lends its mask).
    attack_batch: pairs attacked at once.
    max_initial_iou: pairs whose masks agree more than this are not used.
    threshold: target IoU that counts as success on the stored 8-bit image.
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

  attacks: Mapping[str, AttackFn]
  baseline: str | None = None
  num_pairs: int = 16
  attack_batch: int = 8
  max_initial_iou: float = 0.6
  threshold: float = 0.95
  gallery: int = 3

  def __post_init__(self) -> None:
    """Refuses numbers that cannot work."""
    super().__post_init__()
    _check_counts(self, "num_pairs", "attack_batch")
    for name in ("threshold", "max_initial_iou"):
      if not 0 <= getattr(self, name) <= 1:
        raise ConfigError(
          f"`{name}` is {getattr(self, name)}; write a share in [0, 1]."
        )
    _check_names("attacks", self.attacks)
    if self.baseline is not None and self.baseline not in self.attacks:
      raise ConfigError(
        f"`baseline` is {self.baseline!r}; write one of {sorted(self.attacks)}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniversalStudy:
  """Victims that classify, and the universal perturbations crafted against each.

  Attributes:
    victims: name to recipe; all learn from the same data.
    perturbations: name to `(eps, *, norm, num_steps) -> Universal`, such as
      `attacks.universal`.
    targeted: `(eps, *, target, norm, num_steps) -> Universal`, such as
      `attacks.targeted_universal`, or `None`. One compiled step serves all targets.
    targets: classes it is aimed at, one after another; `None` for every class.
    norm: of the ball.
    shares: radii, as shares of the mean norm of the training images.
    norm_channels: `"first"` takes that norm over the first channel, see
      `threats.share_of_norm`.
    craft_steps: batches seen by each perturbation.
    craft_batch: images per batch, on all devices together.
    microbatches: as of a recipe, for the crafting.
    seed: of the batches and keys of the crafting.
    checkpoint_every: crafting steps between checkpoints.

  Raises:
    ConfigError: for counts below 1, shares that are not positive, an unknown norm, an
      empty mapping, a name that makes no folder, targets without an attack that takes
      them, or victims of different data.
  """

  victims: Mapping[str, Recipe]
  perturbations: Mapping[str, Callable[..., Universal]]
  targeted: Callable[..., Universal] | None = None
  targets: tuple[int, ...] | None = None
  norm: Literal["linf", "l2"] = "l2"
  shares: tuple[float, ...] = (0.04,)
  norm_channels: Literal["all", "first"] = "all"
  craft_steps: int = 200
  craft_batch: int = 32
  microbatches: int | None = None
  seed: int = 0
  checkpoint_every: int = 50

  def __post_init__(self) -> None:
    """Refuses numbers that cannot work."""
    _check_counts(self, "craft_steps", "craft_batch", "checkpoint_every")
    _check_cut(self.craft_batch, self.microbatches)
    _check_seed(self)
    _check_names("victims", self.victims)
    if self.perturbations or self.targeted is None:
      _check_names("perturbations", self.perturbations)
    if not self.shares or not all(share > 0 for share in self.shares):
      raise ConfigError(f"`shares` is {self.shares}; write shares above 0, as (0.04,).")
    if self.targets is not None and self.targeted is None:
      raise ConfigError(f"`targets` is {self.targets} without `targeted`; write both.")
    for name, known in (("norm", ("linf", "l2")), ("norm_channels", ("all", "first"))):
      if getattr(self, name) not in known:
        raise ConfigError(f"`{name}` is {getattr(self, name)!r}; write one of {known}.")
    shared = ("data", "train_split", "val_split", "test_split", "holdout", "side")
    if len({tuple(getattr(v, f) for f in shared) for v in self.victims.values()}) > 1:
      raise ConfigError("`victims` learn from different data; give them one source.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DefenceStudy:
  """One network, trained plainly and with each defence, for several seeds.

  Attributes:
    recipe: of all of them; its monitor, with which only the defended are selected.
    defences: name to defence.
    seeds: of weights and batches; each gives one model of every kind.
    eps: Linf radius at which all attacks are run and the numbers are put to the test.
    radii: Linf radii, `eps` among them; at the others APGD is the only attack.
    num_images: test images that are attacked, of every class its share; `None` for all.
    effort: steps, restarts and queries of the attacks; see `robustness.Effort`.

  Raises:
    ConfigError: without defences or seeds, for a name that makes no folder or is ours,
      a negative or double seed, radii that are double, not positive or without `eps`,
      and a count below 1.
  """

  recipe: Recipe
  defences: Mapping[str, Defence]
  seeds: tuple[int, ...] = (0, 1, 2)
  eps: float = 2 / 255
  radii: tuple[float, ...] = (1 / 255, 2 / 255, 4 / 255)
  num_images: int | None = None
  effort: Effort | None = None

  def __post_init__(self) -> None:
    """Refuses numbers that cannot work."""
    _check_names("defences", self.defences)
    if PLAIN in self.defences:
      raise ConfigError(f"`defences` has {PLAIN!r}, which is the plain model; rename.")
    if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
      raise ConfigError(f"`seeds` is {self.seeds}; write different ones, as (0, 1, 2).")
    once = len(set(self.radii)) == len(self.radii)
    if not once or min(self.radii, default=0) <= 0 or self.eps not in self.radii:
      raise ConfigError(
        f"`radii` is {self.radii} and `eps` {self.eps}; write different radii above 0, "
        "`eps` too."
      )
    if self.num_images is not None:
      _check_counts(self, "num_images")

  @property
  def victims(self) -> dict[str, Recipe]:
    """Name and seed to recipe: the plain model, then the defended ones."""
    plain = dataclasses.replace(
      self.recipe, defence=None, weights=None, monitor=None, collapse=math.inf
    )
    kinds = {PLAIN: plain}
    for name, defence in self.defences.items():
      kinds[name] = dataclasses.replace(self.recipe, defence=defence)
    return {
      f"{name} {seed}": dataclasses.replace(recipe, seed=seed)
      for name, recipe in kinds.items()
      for seed in self.seeds
    }


def _check_counts(config, *names):
  for name in names:
    if getattr(config, name) < 1:
      raise ConfigError(f"`{name}` is {getattr(config, name)}; write 1 or more.")


def _check_cut(rows, microbatches):
  if microbatches is not None and (microbatches < 1 or rows % microbatches):
    raise ConfigError(
      f"`microbatches` is {microbatches}; write a divisor of the batch, {rows}."
    )


def _check_seed(config):
  if config.seed < 0:
    raise ConfigError(f"`seed` is {config.seed}; write 0 or more.")


def _check_names(field, mapping):
  if not mapping:
    raise ConfigError(f"`{field}` is empty; name at least one.")
  for name in mapping:
    if not re.fullmatch(r"[\w+-][\w .+-]*", name):
      raise ConfigError(f"{field} has {name!r}; write letters, digits, ' ', '.+-_'.")
