"""Defences of a network that grades diabetic retinopathy.

Paper: Xu et al., "Towards evaluating the robustness of deep diagnostic models by
adversarial attack", Medical Image Analysis 69 (2021), with a small network from nothing
in place of ImageNet weights, and radii in units of the pixel.
Data: IDRiD pack, 202 train and 53 test images of 128 pixels, RGB, resized to 32.
Expected: docs/defences.md. Time: half an hour on one core.
"""

from jaxadv import augment, studies, training
from jaxadv.experiments import DefenceStudy


def get_config(*, quick: bool = False) -> DefenceStudy:
  """The plain model, MAAdvT, MPAdvT, and what they are compared with."""
  return studies.defence_study(
    5,
    "fundus_idrid_dr_grade_128.npz",
    eps=2 / 255,
    quick=quick,
    side=32,
    holdout=0.15,
    augment=augment.chain(training.flips, augment.affine()),
    balance=True,
  )
