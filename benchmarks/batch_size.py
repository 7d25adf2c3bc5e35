"""Are the bits of a result those in another batch, and in a batch of another size?

    python benchmarks/batch_size.py [--network convnet resnet50 unet32] [--sizes 1 2 4]

Eight images are attacked together with PGD in Linf, by the network as it is and frozen.
Then once more: `order` is the same batch backwards, `others` is each image at another
place among seven of noise, and a number is batches of that size. `convnet` is trained
on a pack of real images (`compaction.trained`); others are those of `peer_networks`,
with random weights, whose cross-entropy has no gradient. Reported are images without a
bit that differs, values that differ, the largest gap over the radius, other decisions.
"""

import argparse
import functools
import pathlib

import compaction
import jax
import numpy as np
import peer_networks

import jaxadv
from jaxadv import attacks, data, losses, records

__all__ = ["TOGETHER", "measure"]

TOGETHER = 8
HEADS = ["images alike", "values that differ", "largest gap", "other decisions"]


def measure(predict, x, y, *, eps, steps, sizes, loss=losses.margin):
  """What differs from one batch of all images, by network and way to cut it."""
  attack = attacks.pgd(eps, num_steps=steps, loss=loss)
  keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))
  rows = {}
  for name, make in {"plain": lambda p, x: p, "frozen": jaxadv.freeze}.items():
    run = jax.jit(lambda i, x, y, make=make: attack(keys(i), make(predict, x), x, y))
    whole = run(np.arange(len(x)), x, y)
    for way, parts in ways(x, y, sizes).items():
      rows[name, way] = _gaps(run, parts, whole, eps)
  return rows


def ways(x, y, sizes):
  """By name, pairs of places that count and batches of ids, images and labels."""
  ids, noise = np.arange(len(x)), np.random.default_rng(0)
  cut = lambda ids: (range(len(ids)), (ids, x[ids], y[ids]))

  def among_others(i):
    place, new = (i + 3) % len(x), noise.uniform(size=x.shape).astype(x.dtype)
    new[place] = x[i]
    return [place], (np.roll(ids, 3), new, np.roll(y, 3))

  found = {"order": [cut(ids[::-1])], "others": [among_others(i) for i in ids]}
  for size in sizes:
    found[str(size)] = [cut(part) for part in ids.reshape(-1, size)]
  return found


def _gaps(run, parts, whole, eps):
  gaps, others = [], 0
  for places, batch in parts:
    found, places = run(*batch), np.array(places)
    ids = batch[0][places]
    gaps.append(np.abs(found.image[places] - whole.image[ids]))
    others += int((found.success[places] != whole.success[ids]).sum())
  gaps = np.concatenate(gaps).reshape(len(whole.image), -1)
  alike, share = int((gaps.max(1) == 0).sum()), float((gaps > 0).mean())
  return dict(zip(HEADS, [alike, share, float(gaps.max() / eps), others], strict=True))


def _problem(options, name):
  if name == "convnet":
    predict, known = compaction.trained(options.pack, side=32, width=16, steps=400)
    return predict, data.as_float(known.images[:TOGETHER]), known.labels[:TOGETHER]
  built = peer_networks.build(name, side=options.side, batch=TOGETHER)
  return built.ours, built.x, built.y


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--network", nargs="+", default=["convnet", "resnet50", "unet32"])
  parser.add_argument("--pack", default="blood_bccd_cells_64")
  parser.add_argument("--side", type=int, default=64, help="of peer_networks, pixels")
  parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4])
  parser.add_argument("--loss", choices=["margin", "cross_entropy"], default="margin")
  parser.add_argument("--eps", type=float, default=0.01)
  parser.add_argument("--steps", type=int, default=40)
  parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
  options = parser.parse_args()
  how = {"eps": options.eps, "steps": options.steps, "sizes": options.sizes}
  loss = getattr(losses, options.loss)
  print(
    f"jax {jax.__version__}, PGD-{options.steps}, eps {options.eps}, {options.loss}\n"
  )
  print("| network | run | batch | " + " | ".join(HEADS) + " |\n" + "|---" * 7 + "|")
  results = []
  for network in options.network:
    found = measure(*_problem(options, network), **how, loss=loss)
    for (run, way), row in found.items():
      alike, share, gap, others = row.values()
      cells = [f"{alike} of {TOGETHER}", f"{share:.2%}", f"{gap:.2g}", str(others)]
      print("| " + " | ".join([network, run, way, *cells]) + " |", flush=True)
      results.append({"network": network, "run": run, "batch": way} | row)
  if options.out:
    about = {"jax": jax.__version__, "loss": options.loss, **how}
    records.write_json(options.out, about | {"rows": results})


if __name__ == "__main__":
  main()
