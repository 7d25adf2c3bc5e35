"""Adversarial training of a U-Net: half of what it sees was made by SegPGD.

Paper: Gu, Zhao, Tresp, Torr, "SegPGD: an effective and efficient adversarial attack for
evaluating and boosting segmentation robustness", ECCV 2022, arXiv 2207.12391, with a
small U-Net. `benchmarks/segmentation_defence.py` puts the plain one beside it.
Data: DSB 2018 nuclei pack, 241 train and 50 test images of 128 pixels, grey, resized
to 64; a share of the training part selects the checkpoint.
Expected: docs/defences.md. Time: four minutes on one core.
"""

import optax

from jaxadv import attacks, combine, training
from jaxadv.defences import Defence
from jaxadv.experiments import Recipe
from jaxadv.models.unet import UNet

EPS = 8 / 255


def get_config(*, quick: bool = False) -> Recipe:
  """A victim that segments, under attack while it learns."""
  train_steps = 6 if quick else 300
  view = attacks.seg_pgd(EPS, step_size=EPS / 2, num_steps=2 if quick else 3)
  mean = training.mean_over_views(training.dice_cross_entropy)
  return Recipe(
    model=UNet(num_classes=2, width=8 if quick else 16),
    optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, train_steps)),
    data=("nuclei_dsb2018_128.npz",),
    side=64,
    holdout=0.1,
    train_steps=train_steps,
    defence=Defence((combine.identity, view), mean),
    monitor=attacks.seg_pgd(EPS, step_size=EPS / 4, num_steps=10),
  )
