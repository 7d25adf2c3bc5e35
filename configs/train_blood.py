"""Blood cells in three classes: red, white, platelets.

Paper: the training of Hirano, Minagi, Takemoto, "Universal adversarial attacks on deep
neural networks for medical image classification", BMC Medical Imaging 21:9 (2021), with
a small network from nothing in place of ImageNet weights, and selected on a tenth of
the training part, not on the test part.
Data: BCCD pack, 360 train and 90 test cells of 64 pixels, RGB.
Expected: accuracy 0.989, AUROC 1.000. Time: a minute and a half on one core.
"""

from jaxadv import augment, studies, training
from jaxadv.experiments import Recipe
from jaxadv.models.convnet import ConvNet


def get_config(*, quick: bool = False) -> Recipe:
  """A victim that classifies."""
  train_steps = 40 if quick else 200
  return Recipe(
    model=ConvNet(num_classes=3, width=8 if quick else 16, norm="batch"),
    optimizer=studies.stepped_sgd(train_steps, learning_rate=0.03),
    data=("blood_bccd_cells_64.npz",),
    holdout=0.1,
    augment=augment.chain(training.flips, augment.affine()),
    train_steps=train_steps,
    batch_size=32,
    balance=True,
  )
