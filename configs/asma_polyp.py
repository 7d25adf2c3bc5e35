"""ASMA on polyps: how much depends on the multiplier, and what the newer attacks gain.

Paper: Ozbulak, Van Messem, De Neve, "Impact of adversarial examples on deep learning
models for biomedical image segmentation", MICCAI 2019, arXiv 1907.13124.
Data: Kvasir-SEG pack, 250 train and 50 val images of 128 pixels, RGB. Polyps are hard:
a wider U-Net and more steps than for the other packs.
Expected: to be measured. Time: to be measured.
"""

import functools

import optax

from jaxadv import attacks, line_search, threats, types
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet

THRESHOLD = 0.95


def get_config(*, quick: bool = False) -> Experiment:
  """The reference preset, a sweep of the calibrated one, MSA and MAFL."""
  steps, train_steps = (20, 40) if quick else (200, 800)
  searched = functools.partial(
    line_search.line_search,
    threat=threats.stored(threats.box()),
    success=functools.partial(types.reached, threshold=THRESHOLD),
  )
  asma = functools.partial(
    attacks.asma_calibrated, num_steps=steps, threshold=THRESHOLD, bits=8
  )
  return Experiment(
    model=UNet(num_classes=2, width=24),
    optimizer=optax.adam(optax.cosine_decay_schedule(2e-3, train_steps)),
    data=("polyp_kvasir_seg_128.npz",),
    test_split="val",
    train_steps=train_steps,
    attacks={
      "asma reference": attacks.asma(num_steps=steps, threshold=THRESHOLD),
      "asma 1e-3": searched(asma(scale=1e-3)),
      "asma 2e-4": searched(asma(scale=2e-4)),
      "asma 5e-3": searched(asma(scale=5e-3)),
      "msa": attacks.msa(num_steps=steps, threshold=THRESHOLD),
      "mafl": attacks.mafl(num_steps=steps, threshold=THRESHOLD),
    },
    baseline="asma 1e-3",
    threshold=THRESHOLD,
    num_pairs=4 if quick else 32,
    attack_batch=4 if quick else 8,
  )
