"""Defences of a network that reports 14 findings in chest X-rays: label sets.

Paper: Xu et al., "Towards evaluating the robustness of deep diagnostic models by
adversarial attack", Medical Image Analysis 69 (2021), with a small network from nothing
in place of ImageNet weights, and radii in units of the pixel.
Data: NIH ChestX-ray14 pack, 433 train and 163 test images of 128 pixels, grey, resized
to 32; a set of 14 labels per image.
Expected: docs/defences.md. Time: forty minutes on one core.
"""

from jaxadv import augment, studies
from jaxadv.experiments import DefenceStudy


def get_config(*, quick: bool = False) -> DefenceStudy:
  """The plain model, MAAdvT, MPAdvT, and what they are compared with."""
  return studies.defence_study(
    14,
    "cxr_nih14_multilabel_128.npz",
    eps=2 / 255,
    quick=quick,
    side=32,
    holdout=0.15,
    augment=augment.affine(),
  )
