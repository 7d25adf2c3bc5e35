"""The demo: a small U-Net that finds the optic disc is made to see it elsewhere.

Paper: ASMA (Ozbulak et al., MICCAI 2019, arXiv 1907.13124), MSA (Shao et al.,
Information Sciences 554, 2021) and MAFL (Sun et al., J. Med. Imaging 12(4), 2025).
Data: IDRiD optic disc pack, 44 train and 10 test images of 128 pixels; synthetic
phantoms where the pack is absent.
Expected: all 8 pairs succeed, MSA and MAFL at 0.6 of ASMA's L2 and 0.4 of its Linf.
Time: under 2 minutes on two cores, training included.
"""

import optax

from jaxadv import studies
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet


def get_config(*, quick: bool = False) -> Experiment:
  """Three targeted attacks with equal numbers of gradients."""
  gradients, train_steps = (20, 40) if quick else (80, 120)
  return Experiment(
    model=UNet(num_classes=2, width=8),
    optimizer=optax.adam(optax.cosine_decay_schedule(5e-3, train_steps)),
    data=("fundus_idrid_optic_disc_128.npz", None),
    train_steps=train_steps,
    attacks=studies.minimum_distortion(gradients, scales=(1e-3,)),
    baseline="asma 0.001",
    num_pairs=4 if quick else 8,
    attack_batch=4,
    gallery=2 if quick else 3,
  )
