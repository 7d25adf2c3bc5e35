"""Defences of an ImageNet network that grades diabetic retinopathy.

Paper: Xu et al., "Towards evaluating the robustness of deep diagnostic models by
adversarial attack", Medical Image Analysis 69 (2021), who fine-tune ImageNet networks;
here EfficientNet-Lite0 (Tan, Le, ICML 2019, arXiv 1905.11946), the one of which we have
the weights. Radii are in units of the pixel.
Data: IDRiD pack, 202 train and 53 test images of 128 pixels, RGB; five grades.
Expected: docs/defences.md. Time: minutes on a GPU, by estimate.
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
    train_steps=120,
    learning_rate=0.01,
    holdout=0.15,
    augment=augment.chain(training.flips, augment.affine()),
    balance=True,
    **studies.imagenet_lite0(5),
  )
