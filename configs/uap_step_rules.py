"""Step rules for universal perturbations: which of them stall?

Paper: Shafahi, Najibi, Xu, Dickerson, Davis, Goldstein, "Universal adversarial
training", AAAI 2020, arXiv 1811.11304, and the rules around it; the victim is the
VGG16 and the ResNet-50 of `uap_pneumonia`.
Data: PneumoniaMNIST pack, 4708 train and 524 val images of 28 pixels, grey, of which
val is attacked; resized to 32 pixels.
Expected: docs/universal.md. With a high cap the images that are fooled already lead,
and the perturbation stays at the class that they went to.
Time: about half an hour on one busy core.
"""

from jaxadv import studies
from jaxadv.experiments import UniversalStudy


def get_config(*, quick: bool = False) -> UniversalStudy:
  """Two victims, many rules, three radii in L2."""
  return studies.step_rules("l2", quick=quick)
