"""Universal perturbations on six modalities, and whether a victim has seen ImageNet.

Paper: Hirano, Minagi, Takemoto, "Universal adversarial attacks on deep neural networks
for medical image classification", BMC Medical Imaging 21:9 (2021), who fine-tune
ImageNet networks; here EfficientNet-Lite0 (Tan, Le, ICML 2019, arXiv 1905.11946), the
one of which we have the weights, beside the same network from nothing.
Data: MedNIST pack, 480 train and 118 test images of 64 pixels, grey; six classes.
Expected: docs/universal.md.
Time: about half an hour on one busy core.
"""

from jaxadv import studies
from jaxadv.experiments import UniversalStudy


def get_config(*, quick: bool = False) -> UniversalStudy:
  """Two victims, any class and towards each, 2, 4 and 8 % of the mean norm."""
  return studies.universal_transfer(
    6, "mednist_modality_64.npz", quick=quick, holdout=0.1, balance=True
  )
