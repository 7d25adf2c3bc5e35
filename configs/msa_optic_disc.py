"""MSA on the optic disc: a multi-scale attack against the best of an ASMA sweep.

Paper: Shao, Zhang, Zuo, Meng, "Target attack on biomedical image segmentation model
based on multi-scale gradients", Information Sciences 554 (2021) 33-46; reconstructed,
see `jaxadv.attacks.msa`. Baseline: ASMA, arXiv 1907.13124, calibrated, each kept
iterate searched back to the threshold.
Data: IDRiD optic disc pack, 44 train and 10 test images of 128 pixels, RGB.
Expected: to be measured. Time: to be measured.
"""

import functools

import optax

from jaxadv import attacks, line_search, threats, types
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet

THRESHOLD = 0.95


def get_config(*, quick: bool = False) -> Experiment:
  """MSA, its plain reading, and ASMA with three multipliers."""
  steps, train_steps = (20, 40) if quick else (200, 300)
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
    data=("fundus_idrid_optic_disc_128.npz",),
    train_steps=train_steps,
    attacks={
      "asma 1e-3": searched(asma(scale=1e-3)),
      "asma 2e-4": searched(asma(scale=2e-4)),
      "asma 5e-3": searched(asma(scale=5e-3)),
      "msa": attacks.msa(num_steps=steps, threshold=THRESHOLD),
      "msa literal": attacks.msa_literal(num_steps=steps, threshold=THRESHOLD),
    },
    baseline="asma 1e-3",
    threshold=THRESHOLD,
    num_pairs=4 if quick else 32,
    attack_batch=4 if quick else 8,
  )
