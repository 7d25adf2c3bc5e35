"""Defences of a network that sees pneumonia in children's chest X-rays.

Paper: Xu et al., "Towards evaluating the robustness of deep diagnostic models by
adversarial attack", Medical Image Analysis 69 (2021), with a small network from nothing
in place of ImageNet weights, and radii in units of the pixel.
Data: PneumoniaMNIST pack, 4708 train and 524 val images of 28 pixels, grey; 128 of the
val part, which the pack has in place of a test part, are judged and attacked.
Expected: docs/defences.md. Time: forty minutes on one core.
"""

from jaxadv import augment, studies
from jaxadv.experiments import DefenceStudy


def get_config(*, quick: bool = False) -> DefenceStudy:
  """The plain model, MAAdvT, MPAdvT, and what they are compared with."""
  return studies.defence_study(
    2,
    "cxr_pneumoniamnist_28.npz",
    eps=4 / 255,
    quick=quick,
    train_steps=300,
    test_split="val",
    holdout=0.03,
    augment=augment.affine(),  # no flips: a body has a left and a right
    balance=True,
  )
