"""The demo: a small U-Net that finds the optic disc is made to see it elsewhere.

Paper: ASMA (Ozbulak et al., MICCAI 2019, arXiv 1907.13124), MSA (Shao et al.,
Information Sciences 554, 2021) and MAFL (Sun et al., J. Med. Imaging 12(4), 2025).
Data: IDRiD optic disc pack, 44 train and 10 test images of 128 pixels; synthetic
phantoms where the pack is absent.
Expected: to be measured. Time: to be measured.
"""

import functools

import optax

from jaxadv import attacks, line_search, threats, types
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet

THRESHOLD = 0.95


def get_config(*, quick: bool = False) -> Experiment:
  """Three targeted attacks, equal numbers of gradients where the method allows it."""
  steps = 20 if quick else 60
  train_steps = 40 if quick else 120
  asma = attacks.asma_calibrated(num_steps=steps, threshold=THRESHOLD, bits=8)
  return Experiment(
    model=UNet(num_classes=2, width=8),
    optimizer=optax.adam(optax.cosine_decay_schedule(5e-3, train_steps)),
    data=("fundus_idrid_optic_disc_128.npz", None),
    train_steps=train_steps,
    attacks={
      "asma": line_search.line_search(
        asma,
        threats.stored(threats.box()),
        success=functools.partial(types.reached, threshold=THRESHOLD),
      ),
      "msa": attacks.msa(num_steps=steps, threshold=THRESHOLD),
      "mafl": attacks.mafl(num_steps=steps, threshold=THRESHOLD),
    },
    baseline="asma",
    threshold=THRESHOLD,
    num_pairs=4 if quick else 8,
    attack_batch=4 if quick else 8,
    gallery=2 if quick else 3,
  )
