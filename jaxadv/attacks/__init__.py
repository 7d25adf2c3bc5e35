"""Named attacks: aliases of their parts, each an `attack(key, predict, x, y)`.

The universal ones make a `Universal` instead: one perturbation for many images.
"""

from jaxadv.attacks.asma import asma, asma_calibrated
from jaxadv.attacks.deepfool import deepfool
from jaxadv.attacks.iterative import apgd, di_fgsm, fgsm, mi_fgsm, pgd, ti_fgsm
from jaxadv.attacks.mafl import mafl, mafl_linf, mafl_literal
from jaxadv.attacks.msa import msa, msa_literal
from jaxadv.attacks.segmentation import cos_pgd, seg_pgd
from jaxadv.attacks.smia import smia
from jaxadv.attacks.square import square
from jaxadv.attacks.universal import (
  random_universal,
  sequential_universal,
  targeted_universal,
  universal,
)

__all__ = [
  "apgd",
  "asma",
  "asma_calibrated",
  "cos_pgd",
  "deepfool",
  "di_fgsm",
  "fgsm",
  "mafl",
  "mafl_linf",
  "mafl_literal",
  "mi_fgsm",
  "msa",
  "msa_literal",
  "pgd",
  "random_universal",
  "seg_pgd",
  "sequential_universal",
  "smia",
  "square",
  "targeted_universal",
  "ti_fgsm",
  "universal",
]
