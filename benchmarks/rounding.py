"""Does scoring at the stored image stall below one grey level?

    python benchmarks/rounding.py configs/msa_optic_disc.py --out runs/disc-0

Targets close to what the victim predicts (its own mask, grown by `--grow` pixels) need
perturbations of less than one grey level RMS. The same attack runs twice, scored at the
image as stored in 8 bits and at the image as it is; both results are then rounded.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import assessment, attacks, data, job, masks, metrics, victim_job


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("config")
  parser.add_argument("--out", required=True, help="run that holds the victim")
  parser.add_argument("--images", type=int, default=4)
  parser.add_argument("--gradients", type=int, default=100)
  parser.add_argument("--grow", type=int, default=2, help="pixels")
  parser.add_argument("--side", type=int, help="resize the images to this side")
  parser.add_argument("--seed", type=int, default=0, help="of the run")
  options = parser.parse_args()
  run = job.prepare(options.config, out=options.out, overrides={"seed": options.seed})
  variables = victim_job.train(run.task).variables
  predict = functools.partial(assessment.predictor(run.experiment.model), variables)
  x = jnp.asarray(data.as_float(run.test_set.images[: options.images]))
  if options.side:
    shape = (len(x), options.side, options.side, x.shape[-1])
    x = metrics.round8(jax.image.resize(x, shape, "bilinear"))
  clean = jnp.argmax(jax.jit(predict)(x)[0], -1)
  wish = _grown(clean, options.grow)
  print(
    "| scored at | success after rounding | IoU after rounding | RMS, grey levels |"
  )
  print("|---|---|---|---|")
  for name, bits in (("the stored image", 8), ("the image as it is", None)):
    attack = attacks.msa(num_steps=options.gradients, taps=["dec4"], bits=bits)
    program = jax.jit(lambda k, x, y, attack=attack: attack(k, predict, x, y).image)
    image = program(jax.random.key(0), x, {"label": wish, "image": x})
    print(f"| {name} | " + " | ".join(_measured(predict, x, image, wish)) + " |")
  print(f"\ninitial IoU {np.mean(_ious(clean, wish)):.3f}, {len(x)} images")


def _grown(mask, pixels):
  """The mask and every pixel up to `pixels` steps beside it."""
  for _ in range(pixels):
    shifted = [jnp.roll(mask, step, axis) for axis in (1, 2) for step in (-1, 1)]
    mask = functools.reduce(jnp.maximum, shifted, mask)
  return mask


def _ious(prediction, wish):
  return jax.vmap(functools.partial(masks.iou, num_classes=2))(prediction, wish)


def _measured(predict, x, image, wish):
  stored = metrics.round8(image)
  iou = np.asarray(_ious(jnp.argmax(jax.jit(predict)(stored)[0], -1), wish))
  rms = 255 * np.sqrt(np.square(np.asarray(image - x)).mean((1, 2, 3)))
  wins = f"{(iou >= 0.95).sum()}/{len(iou)}"
  spread = f"{rms.mean():.2f} ({rms.min():.2f} to {rms.max():.2f})"
  return [wins, f"{iou.mean():.3f}", spread]


if __name__ == "__main__":
  main()
