"""Defences of a network that tells three kinds of blood cell apart.

Paper: Xu et al., "Towards evaluating the robustness of deep diagnostic models by
adversarial attack", Medical Image Analysis 69 (2021), with a small network from nothing
in place of ImageNet weights, and radii in units of the pixel.
Data: BCCD pack, 360 train and 90 test cells of 64 pixels, RGB, resized to 32.
Expected: docs/defences.md. Time: forty minutes on one core.
"""

from jaxadv import augment, studies, training
from jaxadv.experiments import DefenceStudy


def get_config(*, quick: bool = False) -> DefenceStudy:
  """The plain model, MAAdvT, MPAdvT, and what they are compared with."""
  return studies.defence_study(
    3,
    "blood_bccd_cells_64.npz",
    eps=4 / 255,
    quick=quick,
    side=32,
    holdout=0.15,
    augment=augment.chain(training.flips, augment.affine()),
    balance=True,
  )
