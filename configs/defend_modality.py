"""Defences of a network that names the modality of a medical image.

Paper: Xu et al., "Towards evaluating the robustness of deep diagnostic models by
adversarial attack", Medical Image Analysis 69 (2021), with a small network from nothing
in place of ImageNet weights, and radii in units of the pixel.
Data: MedNIST pack, 480 train and 118 test images of 64 pixels, grey, resized to 32.
Expected: docs/defences.md. Time: an hour on one core, by estimate.
"""

from jaxadv import augment, studies
from jaxadv.experiments import DefenceStudy


def get_config(*, quick: bool = False) -> DefenceStudy:
  """The plain model, MAAdvT, MPAdvT, and what they are compared with."""
  return studies.defence_study(
    6,
    "mednist_modality_64.npz",
    eps=4 / 255,
    quick=quick,
    side=32,
    holdout=0.15,
    augment=augment.affine(),
    balance=True,
  )
