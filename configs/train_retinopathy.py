"""Retinas in five grades of diabetic retinopathy.

Paper: the training of Hirano, Minagi, Takemoto, "Universal adversarial attacks on deep
neural networks for medical image classification", BMC Medical Imaging 21:9 (2021), with
a small network from nothing in place of ImageNet weights, and selected on a share of
the training part, not on the test part.
Data: IDRiD pack, 202 train and 53 test images of 128 pixels, RGB, resized to 64.
Expected: accuracy 0.28, AUROC 0.70: the pack is small and the grades are close.
Time: two minutes on one core.
"""

from jaxadv import augment, studies, training
from jaxadv.experiments import Recipe
from jaxadv.models.convnet import ConvNet


def get_config(*, quick: bool = False) -> Recipe:
  """A victim that classifies."""
  train_steps = 40 if quick else 300
  return Recipe(
    model=ConvNet(num_classes=5, width=8 if quick else 16, norm="batch"),
    optimizer=studies.stepped_sgd(train_steps, learning_rate=0.03),
    data=("fundus_idrid_dr_grade_128.npz",),
    holdout=0.15,
    side=64,
    augment=augment.chain(training.flips, augment.affine()),
    train_steps=train_steps,
    batch_size=32,
    balance=True,
  )
