"""What several configs share: attacks that are compared, networks that are attacked."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import optax

from jaxadv import attacks, augment, data, defences, line_search, models, threats, types
from jaxadv.defences import Defence
from jaxadv.experiments import DefenceStudy, Recipe, UniversalStudy
from jaxadv.models import convert
from jaxadv.robustness import Effort
from jaxadv.step_rules import RULES
from jaxadv.types import AttackFn

__all__ = [
  "UNET_SCALES",
  "defence_study",
  "diagnostic_defences",
  "imagenet_lite0",
  "minimum_distortion",
  "seven_architectures",
  "step_rules",
  "stepped_sgd",
  "universal_grid",
  "universal_transfer",
]

# The mask and nine features of our U-Net: MSA weighs each by one gradient.
UNET_SCALES = 10


def minimum_distortion(
  gradients: int = 200,
  *,
  threshold: float = 0.95,
  scales: tuple[float, ...] = (3e-4, 1e-3, 3e-3),
) -> dict[str, AttackFn]:
  """MSA and MAFL, as reconstructed, against a sweep of calibrated ASMA.

  Every attack scores the image as stored in 8 bits and keeps the success with the
  smallest L2 distance. ASMA's is then searched back to the threshold, so that its
  overshoot counts for nobody. MSA takes the gradients of its scales before its first
  step, and so many steps less.

  Args:
    gradients: pulled back by each attack.
    threshold: target IoU that counts as success.
    scales: ASMA's first steps, RMS per value.

  Returns:
    Name to attack, ASMA's first.

  Example:
    >>> list(minimum_distortion(20, scales=(1e-3,)))
    ['asma 0.001', 'msa', 'mafl']
  """
  searched = functools.partial(
    line_search.line_search,
    threat=threats.stored(threats.box()),
    success=functools.partial(types.reached, threshold=threshold),
  )
  asma = functools.partial(
    attacks.asma_calibrated, num_steps=gradients, bits=8, threshold=threshold
  )
  baselines = {f"asma {scale:g}": searched(asma(scale=scale)) for scale in scales}
  return baselines | {
    "msa": attacks.msa(num_steps=gradients - UNET_SCALES, threshold=threshold),
    "mafl": attacks.mafl(num_steps=gradients, threshold=threshold),
  }


def stepped_sgd(
  train_steps: int, *, learning_rate: float = 1e-3
) -> optax.GradientTransformation:
  """SGD with Nesterov momentum 0.9, as victims of universal perturbations were trained.

  The rate falls to a tenth after 80 % of the steps and to a hundredth after 90 %: the
  published epochs 1 to 40, 41 to 45 and 46 to 50.

  Args:
    train_steps: steps in all.
    learning_rate: the first one. The published 1e-3 fine-tunes ImageNet weights; a
      network that starts from nothing needs more.

  Returns:
    An optax transform.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = stepped_sgd(10)
    >>> print(tx.update(jnp.ones(()), tx.init(jnp.ones(())))[0].round(6))
    -0.0019

  Differs from the released code: without its decay of 1e-6 per step, about 1 % in all.
  Reference: Hirano et al., BMC Medical Imaging 21:9 (2021).
  """
  falls = {round(0.8 * train_steps): 0.1, round(0.9 * train_steps): 0.1}
  schedule = optax.piecewise_constant_schedule(learning_rate, falls)
  return optax.sgd(schedule, momentum=0.9, nesterov=True)


def seven_architectures(num_classes: int, *, width: float = 0.25) -> dict[str, Any]:
  """The networks of the study of universal perturbations, small and with batch norm.

  Args:
    num_classes: K.
    width: factor on all channels.

  Returns:
    Name to Flax module; all take sides of 32 pixels or more.

  Example:
    >>> len(seven_architectures(3))
    7

  Differs from the study, which fine-tunes ImageNet weights at 299 pixels: VGG learns
  nothing from a few hundred images without a norm, and the Inceptions need 75 pixels
  without padding.
  Reference: Hirano et al., BMC Medical Imaging 21:9 (2021).
  """
  options: dict[str, Any] = {"num_classes": num_classes, "width": width}
  return {
    "vgg16": models.vgg16(norm="batch", **options),
    "vgg19": models.vgg19(norm="batch", **options),
    "resnet50": models.resnet50(**options),
    "inception_v3": models.InceptionV3(padding="SAME", **options),
    "densenet121": models.densenet121(**options),
    "densenet169": models.densenet169(**options),
    "inception_resnet_v2": models.InceptionResNetV2(padding="SAME", **options),
  }


def universal_grid(
  num_classes: int,
  source: str,
  *,
  quick: bool = False,
  train_steps: int = 200,
  craft_steps: int = 30,
  learning_rate: float = 0.05,
  **recipe: Any,
) -> UniversalStudy:
  """Seven architectures, perturbations of any class and towards each, three radii.

  Args:
    num_classes: K.
    source: data of all victims.
    quick: one victim, one target and one radius.
    train_steps: of each victim.
    craft_steps: batches of 32 images per perturbation.
    learning_rate: of the victims; see `stepped_sgd`.
    **recipe: other fields of each `Recipe`.

  Returns:
    The study: 2, 4 and 8 % of the mean L2 norm.

  Example:
    >>> study = universal_grid(3, "cells.npz")
    >>> len(study.victims), study.shares
    (7, (0.02, 0.04, 0.08))
  """
  networks = seven_architectures(num_classes, width=0.125 if quick else 0.25)
  train_steps = 20 if quick else train_steps
  optimizer = stepped_sgd(train_steps, learning_rate=learning_rate)
  recipe = {"optimizer": optimizer, "train_steps": train_steps, **recipe}
  victims = {name: {"model": model} for name, model in networks.items()}
  return _grid(victims, source, quick, craft_steps, recipe)


def imagenet_lite0(num_classes: int) -> dict[str, Any]:
  """EfficientNet-Lite0 that has seen ImageNet, as fields of a `Recipe`.

  Args:
    num_classes: K, of a fresh last layer.

  Returns:
    `model`, and `start`, which reads `efficientnet_lite0_imagenet_fp16.npz` of
    `$JAXADV_WEIGHTS` or `../shared/weights` once training starts.

  Example:
    >>> sorted(imagenet_lite0(3))
    ['model', 'start']
  """
  model = models.EfficientNetLite0(num_classes, preprocess="lite")
  return {"model": model, "start": functools.partial(_imagenet, model)}


def universal_transfer(
  num_classes: int,
  source: str,
  *,
  quick: bool = False,
  train_steps: int = 150,
  craft_steps: int = 30,
  **recipe: Any,
) -> UniversalStudy:
  """Does it matter that a victim has seen ImageNet? One network, two beginnings.

  Args:
    num_classes: K.
    source: data of both victims.
    quick: the fine-tuned one, one target and one radius.
    train_steps: of each victim.
    craft_steps: batches of 32 images per perturbation.
    **recipe: other fields of each `Recipe`.

  Returns:
    The study: the fine-tuned network, with a fifth of the learning rate, and the same
    from fresh weights; 2, 4 and 8 % of the mean L2 norm.

  Example:
    >>> list(universal_transfer(3, "cells.npz").victims)
    ['from ImageNet', 'from nothing']
  """
  train_steps = 2 if quick else train_steps
  sgd = functools.partial(stepped_sgd, train_steps)
  tuned = imagenet_lite0(num_classes)
  victims = {
    "from ImageNet": {**tuned, "optimizer": sgd(learning_rate=0.01)},
    "from nothing": {"model": tuned["model"], "optimizer": sgd(learning_rate=0.05)},
  }
  return _grid(
    victims, source, quick, craft_steps, {"train_steps": train_steps, **recipe}
  )


def step_rules(norm: Literal["l2", "linf"], *, quick: bool = False) -> UniversalStudy:
  """Which step rules stall: all of `jaxadv.step_rules`, two victims, three radii.

  Args:
    norm: of the ball; the radii are 2, 4 and 8 % of the mean norm.
    quick: one victim, small and hardly trained, and one radius.

  Returns:
    The study: non-targeted, against VGG16 and ResNet-50 on chest X-rays, as trained by
    `configs/uap_pneumonia.py`.

  Example:
    >>> list(step_rules("linf").victims)
    ['vgg16', 'resnet50']
  """
  study = universal_grid(
    2,
    "cxr_pneumoniamnist_28.npz",
    quick=quick,
    train_steps=400,
    craft_steps=60,
    test_split="val",
    holdout=0.05,
    side=32,
    balance=True,
  )
  names = ("vgg16",) if quick else ("vgg16", "resnet50")
  return dataclasses.replace(
    study,
    victims={name: study.victims[name] for name in names},
    perturbations=RULES,
    targeted=None,
    targets=None,
    norm=norm,
  )


def diagnostic_defences(eps: float, *, num_steps: int = 9) -> dict[str, Defence]:
  """The two defences of diagnostic models beside three known ones, at equal cost.

  All take `num_steps` gradients per image and step. MPAdvT's own attack draws 1 to
  `num_steps` of them, a radius from 1/255 to twice the given one, in steps that reach
  it, and leaves half of the images clean.

  Args:
    eps: Linf radius.
    num_steps: gradients of each attack; 9 is the most that the released MPAdvT draws.

  Returns:
    Name to defence.

  Example:
    >>> list(diagnostic_defences(2 / 255))
    ['pgd-at', 'trades', 'mart', 'maadvt', 'mpadvt']

  MAAdvT is released as MART, and its row differs from that in `beta` alone: the 8 of
  the released fundus script against 6.
  """
  return {
    "pgd-at": defences.adversarial_training(eps, num_steps=num_steps),
    "trades": defences.trades(eps, num_steps=num_steps),
    "mart": defences.mart(eps, num_steps=num_steps),
    "maadvt": defences.maadvt(eps, num_steps=num_steps, beta=8.0),
    "mpadvt": defences.mpadvt((1 / 255, 2 * eps), (1, num_steps), scaled_step=True),
  }


def defence_study(
  num_classes: int,
  source: str,
  *,
  eps: float,
  quick: bool = False,
  train_steps: int = 200,
  learning_rate: float = 0.03,
  **recipe: Any,
) -> DefenceStudy:
  """A small network, plain and with `diagnostic_defences`, for three seeds.

  The defended are selected by their accuracy under PGD on validation images.

  Args:
    num_classes: K classes, or L findings.
    source: data.
    eps: Linf radius that is trained for.
    quick: a smaller network, but not of a given `model`, one seed, two defences, few
      steps and images.
    train_steps: of each model.
    learning_rate: the first one of `stepped_sgd`.
    **recipe: other fields of the `Recipe`, such as another `model`.

  Returns:
    The study: attacked at 1/255, 2/255, 4/255 and `eps`.

  Example:
    >>> study = defence_study(3, "cells.npz", eps=4 / 255, holdout=0.1)
    >>> len(study.victims)
    18
  """
  train_steps = 20 if quick else train_steps
  compared = diagnostic_defences(eps, num_steps=2 if quick else 9)
  if quick:
    compared = {name: compared[name] for name in ("maadvt", "mpadvt")}
  network = models.ConvNet(num_classes, width=8 if quick else 16, depth=3)
  fields = {
    "model": network.clone(norm="batch"),
    "optimizer": stepped_sgd(train_steps, learning_rate=learning_rate),
    "data": (source,),
    "train_steps": train_steps,
    "batch_size": 32,
    "checkpoint_every": 20,
    "monitor": attacks.pgd(eps, num_steps=10),
  }
  return DefenceStudy(
    recipe=Recipe(**{**fields, **recipe}),
    defences=compared,
    seeds=(0,) if quick else (0, 1, 2),
    eps=eps,
    radii=(eps,) if quick else tuple(sorted({1 / 255, 2 / 255, 4 / 255, eps})),
    num_images=16 if quick else 128,
    effort=Effort(5, 2, 10, 0.5, 10, 50) if quick else Effort(apgd_steps=50),
  )


def _grid(victims: Mapping[str, Any], source, quick, craft_steps, recipe):
  """Any class and towards each, three radii; `quick` has one of everything."""
  recipe = {"batch_size": 32, "augment": augment.affine(), **recipe, "data": (source,)}
  return UniversalStudy(
    victims={
      name: Recipe(**recipe, **fields)
      for name, fields in list(victims.items())[: 1 if quick else None]
    },
    perturbations={"universal": attacks.universal},
    targeted=attacks.targeted_universal,
    targets=(0,) if quick else None,
    norm="l2",
    shares=(0.04,) if quick else (0.02, 0.04, 0.08),
    craft_steps=6 if quick else craft_steps,
  )


def _imagenet(model, variables):
  path = data.resolve(
    "efficientnet_lite0_imagenet_fp16.npz",
    variable="JAXADV_WEIGHTS",
    shared="../shared/weights",
  )
  return convert.load(path, model, variables, head=False)
