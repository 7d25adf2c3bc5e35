"""Named attacks: aliases of their parts, each an `attack(key, predict, x, y)`."""

from jaxadv.attacks.asma import asma, asma_calibrated
from jaxadv.attacks.iterative import apgd, fgsm, mi_fgsm, pgd
from jaxadv.attacks.mafl import mafl, mafl_linf, mafl_literal
from jaxadv.attacks.msa import msa, msa_literal
from jaxadv.attacks.segmentation import cos_pgd, seg_pgd

__all__ = [
  "apgd",
  "asma",
  "asma_calibrated",
  "cos_pgd",
  "fgsm",
  "mafl",
  "mafl_linf",
  "mafl_literal",
  "mi_fgsm",
  "msa",
  "msa_literal",
  "pgd",
  "seg_pgd",
]
