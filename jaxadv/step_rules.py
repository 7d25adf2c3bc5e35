"""Rules for the step of a universal perturbation, to be compared.

Each is `make(eps, *, norm, num_steps) -> Universal`. `RULES["default"]` is
`attacks.universal`, `RULES["released"]` the code of Shafahi et al. (AAAI 2020, arXiv
1811.11304) with the clean decision as label, and the last two are the iterative
algorithm of Hirano et al. (BMC Medical Imaging 21:9, 2021) with the attack of each.
"""

import optax

from jaxadv import attacks, losses, transforms
from jaxadv.engine import universal_attack
from jaxadv.targets import predictions
from jaxadv.threats import l2, linf
from jaxadv.types import Objective

__all__ = ["RULES"]


def _capped(beta):
  """The cross-entropy, whose gradient ends at `beta`."""
  return losses.cap(losses.cross_entropy, beta)


def _falling(share, loss=None, decay=0.0):
  """A step that falls along a cosine from a share of the radius."""

  def make(eps, *, norm, num_steps):
    step = optax.cosine_decay_schedule(share * eps, num_steps)
    return attacks.universal(eps, norm=norm, step_size=step, loss=loss, decay=decay)

  return make


def _constant(share, loss=None):
  """The same step throughout."""
  return lambda eps, *, norm, num_steps: attacks.universal(
    eps, norm=norm, step_size=share * eps, loss=loss
  )


def _units(eps, *, norm, num_steps):
  """Every example's gradient is scaled to length 1 before the mean."""
  step = optax.cosine_decay_schedule(eps, num_steps)
  return universal_attack(
    Objective(_capped(2.0), prepare=predictions),
    {"linf": linf, "l2": l2}[norm](eps),
    optax.chain(transforms.normalize(2), optax.scale_by_learning_rate(step)),
    example=transforms.normalize(2),
  )


def _adam(eps, *, norm, num_steps):
  """Adam, then the projection."""
  return attacks.universal(eps, norm=norm, transform=optax.adam(1e-3))


def _sequential(attack=None):
  """The published iterative algorithm: image by image, with an acceptance test."""
  return lambda eps, *, norm, num_steps: attacks.sequential_universal(
    eps, norm=norm, attack=attack
  )


RULES = {
  "released": _constant(0.8, _capped(12.0)),
  "default": attacks.universal,
  "constant 0.8": _constant(0.8),
  "constant 0.1": _constant(0.1),
  "falling 0.3": _falling(0.3),
  "falling 1": _falling(1.0),
  "falling 3": _falling(3.0),
  "momentum 0.9": _falling(1.0, decay=0.9),
  "cap 12": _falling(1.0, _capped(12.0)),
  "cap 1": _falling(1.0, _capped(1.0)),
  "unfooled only": _falling(1.0, losses.until_fooled(losses.cross_entropy)),
  "margin": _falling(1.0, losses.margin),
  "margin to 2": _falling(1.0, losses.cap(losses.margin, 2.0)),
  "unit gradients": _units,
  "adam 1e-3": _adam,
  "sequential FGSM": _sequential(),
  "sequential DeepFool": _sequential(attacks.deepfool(num_steps=10)),
}
