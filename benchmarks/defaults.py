"""How the defaults of MSA and MAFL were chosen: on pairs of training images.

    python benchmarks/defaults.py configs/asma_polyp.py --out runs/defaults-polyp
    python benchmarks/segmentation.py runs/defaults-polyp

Runs the grid below with the config's victim, trained with another seed, on pairs of the
images it has learnt from: the test images are not looked at.
"""

import argparse
import functools

from jaxadv import attacks, job, progress, studies

SEED = 100  # no table of the docs uses it
# Shrink, share of the peak, floor.
MSA = ((0.05, 0.2, 0.0), (0.1, 0.4, 0.0), (0.1, 0.4, 0.6))
# Shrink, low band given up, share of the peak, floor, decay of the momentum.
MAFL = (
  (0.1, 0.15, 0.6, 0.0, 0.5),
  (0.1, 0.25, 0.6, 0.6, 0.5),
  (0.1, 0.25, 0.6, 0.6, 0.0),
  (0.1, 0.4, 0.6, 0.65, 0.5),
  (0.1, 0.4, 0.8, 0.65, 0.5),
  (0.1, 0.6, 0.7, 0.65, 0.5),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("config")
  parser.add_argument("--out", required=True)
  parser.add_argument("--pairs", type=int, default=8)
  parser.add_argument("--gradients", type=int, default=200)
  parser.add_argument("--threshold", type=float, default=0.95)
  options = parser.parse_args()
  changes = {
    "seed": SEED,
    "test_split": "train",
    "num_pairs": options.pairs,
    "threshold": options.threshold,
    "attacks": grid(options.gradients, options.threshold),
    "baseline": "asma 0.003",
  }
  run = job.prepare(
    options.config, out=options.out, overrides=changes, progress=progress.terminal
  )
  job.attack(run)


def grid(gradients, threshold):
  """Two ASMAs of the sweep, and every variant of MSA and MAFL."""
  shared = {"threshold": threshold}
  swept = studies.minimum_distortion(gradients, scales=(1e-3, 3e-3), **shared)
  msa_steps = gradients - studies.UNET_SCALES
  msa = functools.partial(attacks.msa, num_steps=msa_steps, **shared)
  mafl = functools.partial(attacks.mafl, num_steps=gradients, **shared)
  return (
    {name: attack for name, attack in swept.items() if name.startswith("asma")}
    | {f"msa {a} {b} {c}": msa(shrink=a, peak=b, floor=c) for a, b, c in MSA}
    | {
      f"mafl {a} {b} {c} {d} {e}": mafl(
        shrink=a, band_shrink=b, peak=c, floor=d, decay=e
      )
      for a, b, c, d, e in MAFL
    }
  )


if __name__ == "__main__":
  main()
