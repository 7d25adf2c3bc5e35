"""Step rules for universal perturbations: which of them stall?

Paper: Shafahi, Najibi, Xu, Dickerson, Davis, Goldstein, "Universal adversarial
training", AAAI 2020, arXiv 1811.11304, and the rules around it; the victim is the
VGG16 and the ResNet-50 of `uap_pneumonia`.
Data: PneumoniaMNIST pack, 4708 train and 524 val images of 28 pixels, grey, of which
val is attacked; resized to 32 pixels.
Expected: docs/universal.md. With a high cap the images that are fooled already lead,
and the perturbation stays at the class that they went to.
Time: about half an hour on one busy core.
"""

import dataclasses

import optax

from jaxadv import attacks, losses, studies, transforms
from jaxadv.engine import universal_attack
from jaxadv.experiments import UniversalStudy
from jaxadv.targets import predictions
from jaxadv.threats import l2, linf
from jaxadv.types import Objective


def capped(beta):
  """The cross-entropy, whose gradient ends at `beta`."""
  return losses.cap(losses.cross_entropy, beta)


def falling(share, loss=None, decay=0.0):
  """A step that falls along a cosine from a share of the radius."""

  def make(eps, *, norm, num_steps):
    step = optax.cosine_decay_schedule(share * eps, num_steps)
    return attacks.universal(eps, norm=norm, step_size=step, loss=loss, decay=decay)

  return make


def constant(share, loss=None):
  """The same step throughout."""
  return lambda eps, *, norm, num_steps: attacks.universal(
    eps, norm=norm, step_size=share * eps, loss=loss
  )


def units(eps, *, norm, num_steps):
  """Every example's gradient is scaled to length 1 before the mean."""
  step = optax.cosine_decay_schedule(eps, num_steps)
  return universal_attack(
    Objective(capped(2.0), prepare=predictions),
    {"linf": linf, "l2": l2}[norm](eps),
    optax.chain(transforms.normalize(2), optax.scale_by_learning_rate(step)),
    example=transforms.normalize(2),
  )


def adam(eps, *, norm, num_steps):
  """Adam, then the projection."""
  return attacks.universal(eps, norm=norm, transform=optax.adam(1e-3))


def sequential(attack=None):
  """The published iterative algorithm: image by image, with an acceptance test."""
  return lambda eps, *, norm, num_steps: attacks.sequential_universal(
    eps, norm=norm, attack=attack
  )


RULES = {
  "released": constant(0.8, capped(12.0)),
  "default": attacks.universal,
  "constant 0.8": constant(0.8),
  "constant 0.1": constant(0.1),
  "falling 0.3": falling(0.3),
  "falling 3": falling(3.0),
  "momentum 0.9": falling(1.0, decay=0.9),
  "cap 12": falling(1.0, capped(12.0)),
  "cap 1": falling(1.0, capped(1.0)),
  "unfooled only": falling(1.0, losses.until_fooled(losses.cross_entropy)),
  "margin": falling(1.0, losses.margin),
  "margin to 2": falling(1.0, losses.cap(losses.margin, 2.0)),
  "unit gradients": units,
  "adam 1e-3": adam,
  "sequential FGSM": sequential(),
  "sequential DeepFool": sequential(attacks.deepfool(num_steps=10)),
}


def get_config(*, quick: bool = False) -> UniversalStudy:
  """Two victims, many rules, three radii."""
  study = studies.universal_grid(
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
  )
