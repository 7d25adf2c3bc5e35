"""Defences of an ImageNet network that names the modality of a medical image.

Paper: Xu et al., "Towards evaluating the robustness of deep diagnostic models by
adversarial attack", Medical Image Analysis 69 (2021), who fine-tune ImageNet networks;
here EfficientNet-Lite0 (Tan, Le, ICML 2019, arXiv 1905.11946), the one of which we have
the weights. Radii are in units of the pixel.
Data: MedNIST pack, 480 train and 118 test images of 64 pixels, grey; six classes.
Expected: docs/defences.md.
Time: five and a half minutes on an H100, the models divided among five processes by a
script of our own (docs/defences.md).
"""

from jaxadv import augment, studies
from jaxadv.experiments import DefenceStudy


def get_config(*, quick: bool = False) -> DefenceStudy:
  """The plain model, MAAdvT, MPAdvT, and what they are compared with."""
  return studies.defence_study(
    6,
    "mednist_modality_64.npz",
    eps=2 / 255,
    quick=quick,
    train_steps=120,
    learning_rate=0.01,
    holdout=0.15,
    augment=augment.affine(),
    balance=True,
    **studies.imagenet_lite0(6),
  )
