"""MSA on the optic disc: a multi-scale attack against the best of an ASMA sweep.

Paper: Shao, Zhang, Zuo, Meng, "Target attack on biomedical image segmentation model
based on multi-scale gradients", Information Sciences 554 (2021) 33-46; reconstructed,
see `jaxadv.attacks.msa`, with its plain reading beside it.
Data: IDRiD optic disc pack, 44 train and 10 test images of 128 pixels, RGB.
Expected: docs/segmentation.md. Time: about 15 minutes on two cores.
"""

import optax

from jaxadv import attacks, studies
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet


def get_config(*, quick: bool = False) -> Experiment:
  """MSA, MAFL and ASMA's sweep, and the plain readings of the two papers."""
  gradients, train_steps = (20, 40) if quick else (200, 250)
  return Experiment(
    model=UNet(num_classes=2, width=16),
    optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, train_steps)),
    data=("fundus_idrid_optic_disc_128.npz",),
    train_steps=train_steps,
    attacks=studies.minimum_distortion(gradients)
    | {
      # The steps of the specification, 1e-4, are too small to arrive in 200 gradients.
      "msa literal": attacks.msa_literal(
        num_steps=gradients // 2, taps=["dec4"], far=3e-3, near=3e-4
      ),
      "mafl literal": attacks.mafl_literal(num_steps=gradients),
    },
    baseline="asma 0.001",
    threshold=0.95,
    num_pairs=4 if quick else 8,
    attack_batch=4 if quick else 8,
  )
