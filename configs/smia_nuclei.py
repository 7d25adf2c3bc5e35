"""SMIA on nuclei: the stabilized attack with three weights, beside PGD.

Paper: Qi, Gong, Song, Ma, Zheng, "Stabilized medical image attacks", ICLR 2021, arXiv
2103.05232; reconstructed, see `jaxadv.attacks.smia`.
Data: DSB 2018 nuclei pack, 241 train and 50 test images of 128 pixels, grey.
Expected: docs/smia.md. Nobody reaches the masks of another image at this radius; what
is compared is how near they come. `benchmarks/stability.py` has the untargeted attacks
on the same victim.
Time: about ten minutes on one busy core, most of it training.
"""

import functools

import optax

from jaxadv import attacks
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet

EPS = 8 / 255


def get_config(*, quick: bool = False) -> Experiment:
  """PGD and SMIA towards the masks of other images, with as many gradients."""
  steps, train_steps = (5, 40) if quick else (20, 300)
  options = {"step_size": EPS / 4, "num_steps": steps, "targeted": True}
  smia = functools.partial(attacks.smia, EPS, **options)
  return Experiment(
    model=UNet(num_classes=2, width=16),
    optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, train_steps)),
    data=("nuclei_dsb2018_128.npz",),
    train_steps=train_steps,
    attacks={"pgd": attacks.pgd(EPS, random_start=False, **options)}
    | {f"smia {weight:g}": smia(weight=weight) for weight in (0.25, 0.5, 1.0)},
    baseline="pgd",
    threshold=0.95,
    num_pairs=4 if quick else 8,
    attack_batch=4 if quick else 8,
  )
