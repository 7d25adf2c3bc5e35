"""Blood cells in three classes, by a network that has seen ImageNet.

Paper: the training of Hirano, Minagi, Takemoto, "Universal adversarial attacks on deep
neural networks for medical image classification", BMC Medical Imaging 21:9 (2021), who
fine-tune all layers of ImageNet networks; here EfficientNet-Lite0 (Tan, Le, ICML 2019,
arXiv 1905.11946).
Data: BCCD pack, 360 train and 90 test cells, RGB, resized from 64 to 128 pixels. The
weights are a file of the weights pack, in $JAXADV_WEIGHTS or ../shared/weights.
Expected: accuracy 0.989, AUROC 1.000. Time: 9 minutes on a busy core.
"""

from jaxadv import augment, studies
from jaxadv.experiments import Recipe


def get_config(*, quick: bool = False) -> Recipe:
  """A victim that classifies."""
  train_steps = 2 if quick else 100
  return Recipe(
    **studies.imagenet_lite0(3),
    optimizer=studies.stepped_sgd(train_steps, learning_rate=0.01),
    data=("blood_bccd_cells_64.npz",),
    holdout=0.1,
    side=64 if quick else 128,
    augment=augment.affine(),
    train_steps=train_steps,
    batch_size=32,
    balance=True,
    checkpoint_every=25,
  )
