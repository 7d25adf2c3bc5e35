"""Pneumonia in children's chest X-rays, one normal image to three of pneumonia.

Paper: the training of Hirano, Minagi, Takemoto, "Universal adversarial attacks on deep
neural networks for medical image classification", BMC Medical Imaging 21:9 (2021), with
a small network from nothing in place of ImageNet weights, and selected on a tenth of
the training part, not on the test part.
Data: PneumoniaMNIST pack, 4708 train and 524 val images of 28 pixels, grey; the val
part, which the pack has in place of a test part, is only judged and attacked on.
Expected: balanced accuracy 0.973, AUROC 0.997. Time: half a minute on one core.
"""

from jaxadv import augment, studies
from jaxadv.experiments import Recipe
from jaxadv.models.convnet import ConvNet


def get_config(*, quick: bool = False) -> Recipe:
  """A victim that classifies."""
  train_steps = 60 if quick else 600
  return Recipe(
    model=ConvNet(num_classes=2, width=8 if quick else 16, depth=3, norm="batch"),
    optimizer=studies.stepped_sgd(train_steps, learning_rate=0.03),
    data=("cxr_pneumoniamnist_28.npz",),
    test_split="val",
    holdout=0.1,
    augment=augment.affine(),  # no flips: a body has a left and a right
    train_steps=train_steps,
    batch_size=32,
    balance=True,
    checkpoint_every=100,
  )
