"""What gradients in bfloat16 cost and bring: success beside float32, and time.

    python benchmarks/bf16.py [--pack blood_bccd_cells_64] [--eps 0.005 0.01 0.02]

Trains a `ConvNet` on the training images of a pack of classes, and attacks images it is
right about with PGD in Linf from the clean image:

- `float32`: the attack as it is, over the frozen model;
- `bf16`: `combine.bf16` of it: narrow gradients, float32 perturbation and verdict;
- `bf16 throughout`: the narrow model also says what is fooled, as a user would who only
  casts the model. Its word is compared with that of the float32 model.

The process is pinned to one core and the three take turns; reported are medians and
quartiles of CPU milliseconds per step of a batch.
"""

import argparse
import functools
import os
import pathlib
import time

if __name__ == "__main__" and hasattr(os, "sched_setaffinity"):  # before jax starts
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import compaction
import jax
import jax.numpy as jnp
import numpy as np

import jaxadv
from jaxadv import attacks, combine, data, records, sources


def programs(predict, like, eps, steps):
  """Functions of images and labels to results, by name."""
  attack = attacks.pgd(eps, num_steps=steps, random_start=False)
  wide, narrow = (jaxadv.freeze(predict, like, bf16=bf16) for bf16 in (False, True))
  run = lambda attack, model: jax.jit(
    functools.partial(attack, jax.random.key(0), model)
  )
  return {
    "float32": run(attack, wide),
    "bf16": run(combine.bf16(attack), wide),
    "bf16 throughout": run(attack, narrow),
  }


def measure(calls, judge, batches, *, steps, repeats):
  """Per program: success as it says, as the model says, and CPU ms per step."""
  rows = {}
  for name, call in calls.items():
    results = [call(b["image"], b["label"]) for b in batches]
    said = np.concatenate([r.success for r in results])
    is_so = [
      judge(r.image) != b["label"] for r, b in zip(results, batches, strict=True)
    ]
    rows[name] = {"said": said, "so": np.concatenate(is_so), "ms": []}
  for _ in range(repeats):
    for name, call in calls.items():
      start = time.process_time()
      jax.block_until_ready(call(batches[0]["image"], batches[0]["label"]))
      rows[name]["ms"].append((time.process_time() - start) / steps * 1e3)
  return rows


def report(rows):
  """Shares of images, how many differ from float32, and the spread of the times."""
  base, found = rows["float32"]["so"], {}
  for name, row in rows.items():
    found[name] = {
      "success": float(row["said"].mean()),
      "of the float32 model": float(row["so"].mean()),
      "other images": int((row["so"] != base).sum()),
      "wrong verdicts": int((row["said"] != row["so"]).sum()),
      "ms": np.percentile(row["ms"], [25, 50, 75]).tolist(),
    }
  return found


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--pack", default="blood_bccd_cells_64")
  parser.add_argument("--eps", nargs="+", type=float, default=[0.005, 0.01, 0.02])
  parser.add_argument("--side", type=int, default=32, help="images are resized")
  parser.add_argument("--width", type=int, default=16)
  parser.add_argument("--training", type=int, default=400, help="steps")
  parser.add_argument("--steps", type=int, default=40)
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--images", type=int, default=256)
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
  return parser.parse_args()


def main():
  options = _arguments()
  net = {"side": options.side, "width": options.width, "steps": options.training}
  predict, dataset = compaction.trained(options.pack, **net)
  dataset = sources.take(dataset, np.arange(min(options.images, len(dataset.images))))
  size = len(dataset.images) // options.batch * options.batch
  dataset = sources.take(dataset, np.arange(size))
  batches = list(data.batches(dataset, options.batch))
  judge = jax.jit(lambda x: jnp.argmax(predict(x), -1))
  print(f"jax {jax.__version__}, {size} images; CPU ms per step of {options.batch}\n")
  heads = ["eps", "run", "success", "other images", "wrong verdicts", "ms (quartiles)"]
  print("| " + " | ".join(heads) + " |" + "\n" + "|---" * len(heads) + "|")
  results = {}
  for eps in options.eps:
    calls = programs(predict, batches[0]["image"], eps, options.steps)
    how = {"steps": options.steps, "repeats": options.repeats}
    results[eps] = found = report(measure(calls, judge, batches, **how))
    for name, row in found.items():
      low, middle, high = row["ms"]
      cells = [f"{eps}", name, f"{row['of the float32 model']:.3f}"]
      cells += [f"{row['other images']}", f"{row['wrong verdicts']}"]
      print(
        f"| {' | '.join(cells)} | {middle:.1f} ({low:.1f}-{high:.1f}) |", flush=True
      )
  if options.out:
    kept = {"jax": jax.__version__, "settings": {**vars(options), "out": None}}
    records.write_json(options.out, kept | {"results": results})


if __name__ == "__main__":
  main()
