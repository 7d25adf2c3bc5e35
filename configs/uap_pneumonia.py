"""Universal perturbations on chest X-rays: normal or pneumonia.

Paper: Hirano, Minagi, Takemoto, "Universal adversarial attacks on deep neural networks
for medical image classification", BMC Medical Imaging 21:9 (2021), at a quarter of the
published width and from nothing in place of ImageNet weights.
Data: PneumoniaMNIST pack, 4708 train and 524 val images of 28 pixels, grey, of which
val is attacked; resized to 32 pixels, below which VGG has nothing to pool.
Expected: docs/universal.md. Of two classes, sending every image to the rarer one
fools the share of the other.
Time: about an hour on one busy core.
"""

from jaxadv import studies
from jaxadv.experiments import UniversalStudy


def get_config(*, quick: bool = False) -> UniversalStudy:
  """Seven architectures, any class and towards each, 2, 4 and 8 % of the mean norm."""
  return studies.universal_grid(
    2,
    "cxr_pneumoniamnist_28.npz",
    quick=quick,
    test_split="val",
    train_steps=400,
    craft_steps=60,
    holdout=0.05,
    side=32,
    balance=True,
  )
