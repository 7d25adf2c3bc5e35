"""MAFL on cell nuclei: a low-frequency constrained attack against an ASMA sweep.

Paper: Sun et al., "Momentum-driven adaptive feature-cosine-similarity attack with
low-frequency constraint", J. Med. Imaging 12(4):044501 (2025), doi
10.1117/1.JMI.12.4.044501; reconstructed, see `jaxadv.attacks.mafl`. Baseline: ASMA,
arXiv 1907.13124, calibrated, each kept iterate searched back to the threshold.
Data: DSB 2018 nuclei pack, 241 train and 50 test images of 128 pixels, grey. Masks of
many small nuclei: an IoU of 0.95 is out of reach for most pairs, so success means 0.80.
Expected: to be measured. Time: to be measured.
"""

import functools

import optax

from jaxadv import attacks, line_search, threats, types
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet

THRESHOLD = 0.80


def get_config(*, quick: bool = False) -> Experiment:
  """MAFL, its plain reading, and ASMA with three multipliers."""
  steps, train_steps = (20, 40) if quick else (200, 400)
  searched = functools.partial(
    line_search.line_search,
    threat=threats.stored(threats.box()),
    success=functools.partial(types.reached, threshold=THRESHOLD),
  )
  asma = functools.partial(
    attacks.asma_calibrated, num_steps=steps, threshold=THRESHOLD, bits=8
  )
  return Experiment(
    model=UNet(num_classes=2, width=16),
    optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, train_steps)),
    data=("nuclei_dsb2018_128.npz",),
    train_steps=train_steps,
    attacks={
      "asma 1e-3": searched(asma(scale=1e-3)),
      "asma 4e-3": searched(asma(scale=4e-3)),
      "asma 3e-4": searched(asma(scale=3e-4)),
      "mafl": attacks.mafl(num_steps=steps, threshold=THRESHOLD),
      "mafl literal": attacks.mafl_literal(num_steps=steps, threshold=THRESHOLD),
    },
    baseline="asma 1e-3",
    threshold=THRESHOLD,
    num_pairs=4 if quick else 32,
    attack_batch=4 if quick else 8,
  )
