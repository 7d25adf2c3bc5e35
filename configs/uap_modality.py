"""Universal perturbations on six modalities: which scanner made this image?

Paper: Hirano, Minagi, Takemoto, "Universal adversarial attacks on deep neural networks
for medical image classification", BMC Medical Imaging 21:9 (2021), at a quarter of the
published width and from nothing in place of ImageNet weights.
Data: MedNIST pack, 480 train and 118 test images of 64 pixels, grey; six classes of
about equal size.
Expected: docs/universal.md. Sending every image to one class fools five sixths.
Time: about an hour on one busy core.
"""

from jaxadv import studies
from jaxadv.experiments import UniversalStudy


def get_config(*, quick: bool = False) -> UniversalStudy:
  """Seven architectures, any class and towards each, 2, 4 and 8 % of the mean norm."""
  return studies.universal_grid(
    6, "mednist_modality_64.npz", quick=quick, holdout=0.1, balance=True
  )
