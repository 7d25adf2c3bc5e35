"""MAFL on nuclei: low frequencies kept, against the best of an ASMA sweep.

Paper: Sun et al., "Momentum-driven adaptive feature-cosine-similarity attack with
low-frequency constraint", J. Med. Imaging 12(4):044501 (2025), doi
10.1117/1.JMI.12.4.044501; reconstructed, see `jaxadv.attacks.mafl`.
Data: DSB 2018 nuclei pack, 241 train and 50 test images of 128 pixels, grey. Masks of
many small nuclei need large perturbations: ASMA's sweep lies higher than elsewhere.
Expected: docs/segmentation.md. Time: about 15 minutes on two cores.
"""

import optax

from jaxadv import studies
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet


def get_config(*, quick: bool = False) -> Experiment:
  """MAFL, MSA and ASMA's sweep."""
  gradients, train_steps = (20, 40) if quick else (200, 300)
  return Experiment(
    model=UNet(num_classes=2, width=16),
    optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, train_steps)),
    data=("nuclei_dsb2018_128.npz",),
    train_steps=train_steps,
    attacks=studies.minimum_distortion(gradients, scales=(1e-3, 3e-3, 1e-2)),
    baseline="asma 0.003",
    threshold=0.95,
    num_pairs=4 if quick else 8,
    attack_batch=4 if quick else 8,
  )
