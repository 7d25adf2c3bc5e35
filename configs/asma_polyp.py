"""ASMA on polyps: the sweep of the calibrated preset, and what improves on it.

Paper: Ozbulak, Van Messem, De Neve, "Impact of adversarial examples on deep learning
models for biomedical image segmentation", MICCAI 2019, arXiv 1907.13124.
Data: Kvasir-SEG pack, 250 train and 50 val images of 128 pixels, RGB. Polyps are hard
to learn at this size; the attack aims at masks the victim itself predicts.
Expected: docs/segmentation.md. Time: about 15 minutes on two cores.
"""

import optax

from jaxadv import studies
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet


def get_config(*, quick: bool = False) -> Experiment:
  """ASMA's sweep, MSA and MAFL."""
  gradients, train_steps = (20, 40) if quick else (200, 500)
  return Experiment(
    model=UNet(num_classes=2, width=16),
    optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, train_steps)),
    data=("polyp_kvasir_seg_128.npz",),
    test_split="val",
    train_steps=train_steps,
    attacks=studies.minimum_distortion(gradients),
    baseline="asma 0.001",
    threshold=0.95,
    num_pairs=4 if quick else 8,
    attack_batch=4 if quick else 8,
  )
