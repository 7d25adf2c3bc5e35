"""Universal perturbations on retinas: five grades of diabetic retinopathy.

Paper: Hirano, Minagi, Takemoto, "Universal adversarial attacks on deep neural networks
for medical image classification", BMC Medical Imaging 21:9 (2021), at a quarter of the
published width and from nothing in place of ImageNet weights.
Data: IDRiD pack, 202 train and 53 test images of 128 pixels, RGB, resized to 64.
Expected: docs/universal.md. The victims are weak: the pack is small and the grades are
close.
Time: about an hour on one busy core.
"""

from jaxadv import studies
from jaxadv.experiments import UniversalStudy


def get_config(*, quick: bool = False) -> UniversalStudy:
  """Seven architectures, any class and towards each, 2, 4 and 8 % of the mean norm."""
  return studies.universal_grid(
    5, "fundus_idrid_dr_grade_128.npz", quick=quick, holdout=0.15, side=64, balance=True
  )
