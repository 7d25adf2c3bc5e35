"""Universal perturbations on blood cells: one pattern, three kinds of cell.

Paper: Hirano, Minagi, Takemoto, "Universal adversarial attacks on deep neural networks
for medical image classification", BMC Medical Imaging 21:9 (2021), at a quarter of the
published width and from nothing in place of ImageNet weights.
Data: BCCD cells pack, 360 train and 90 test images of 64 pixels, RGB; red blood
cell, white blood cell, platelet, 120 and 30 images each.
Expected: docs/universal.md. With classes of equal size a perturbation that sends every
image to one class fools two thirds of them.
Time: about an hour on one busy core.
"""

from jaxadv import studies
from jaxadv.experiments import UniversalStudy


def get_config(*, quick: bool = False) -> UniversalStudy:
  """Seven architectures, any class and towards each, 2, 4 and 8 % of the mean norm."""
  return studies.universal_grid(
    3, "blood_bccd_cells_64.npz", quick=quick, holdout=0.1, balance=True
  )
