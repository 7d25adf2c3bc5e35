"""What an early end of attacks saves: steps of examples, and seconds.

    python benchmarks/compaction.py [--pack blood_bccd_cells_64] [--eps 0.01 0.03]

Trains a `ConvNet` on the training images of a pack of classes, and attacks images it is
right about with PGD in Linf, the best step kept, in three ways:

- `full`: every example takes all steps;
- `stop`: batch by batch, until the last example of a batch is fooled;
- `attack_dataset`, for several numbers of steps between two looks.

All call the model with as many images (`--bucket`); that the last two have the same
bits is checked. The process is pinned to one core and the three take turns;
reported are medians and quartiles of CPU seconds without compiling, and the images that
the model was shown, a forward and a backward pass each but for those at the end.
"""

import argparse
import functools
import itertools
import json
import os
import time

if __name__ == "__main__" and hasattr(os, "sched_setaffinity"):  # before jax starts
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import numpy as np
import optax

import jaxadv
from jaxadv import attacks, data, loops, models, sources, training, types, victims

__all__ = ["measure", "trained"]


def trained(pack, *, side, width, steps):
  """A network, as a function of images, and all images that it is right about."""
  train, every = (data.resize(data.load(pack, split=s), side) for s in ("train", None))
  model = models.ConvNet(num_classes=len(train.class_names), width=width, norm="none")
  stream = data.batches(train, 32, seed=0, balance=True)
  tx = optax.adam(1e-3)
  variables = jax.jit(model.init)(jax.random.key(0), np.ones((1, *_shape(train))))
  state = training.init_state(jax.random.key(1), variables["params"], {}, tx)
  step = training.train_step(
    victims.flax_apply(model), tx, training.cross_entropy, augment=training.flips
  )
  state = loops.fit(jax.jit(step), state, stream, num_steps=steps)
  predict = lambda x: model.apply({"params": state.params}, x)[0]
  decide = jax.jit(lambda x: predict(data.as_float(x)).argmax(-1))
  found = loops.over_batches(decide, every.images, size=32)
  right = np.flatnonzero(found == every.labels)
  print(f"right about {len(right)} of {len(every.images)} images", flush=True)
  return predict, sources.take(every, right)


def _shape(dataset):
  return dataset.images.shape[1:]


def programs(predict, dataset, eps, *, steps, bucket, chunks):
  """Functions without arguments that attack all images, by name."""
  make = functools.partial(attacks.pgd, eps, num_steps=steps, keep="best")
  batches = list(data.batches(dataset, bucket))
  key, stopped = jax.random.key(2), make(stop=types.fooled)

  def plain(attack):
    run = jax.jit(lambda keys, x, y: attack(keys, predict, x, y))
    fold = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))
    return lambda: [
      jax.tree.map(np.asarray, run(fold(key, b["id"]), b["image"], b["label"]))
      for b in batches
    ]

  def compacted(chunk):
    attack = functools.partial(jaxadv.attack_dataset, stopped, key, predict, batches)
    return lambda: list(attack(bucket=bucket, chunk=chunk))

  calls = {"full": plain(make()), "stop": plain(stopped)}
  return calls | {f"chunk {chunk}": compacted(chunk) for chunk in chunks}


def measure(calls, shown, *, repeats):
  """Per call: CPU seconds, images shown to the model, share fooled, mean steps.

  Args:
    calls: by name; they take turns.
    shown: a list that the model adds the size of each batch to.
    repeats: times each is measured, after one for compiling.
  """
  rows, last = {}, None
  for name, call in calls.items():
    shown.clear()
    results = call()
    jax.effects_barrier()
    fooled = np.concatenate([r.success for r in results])
    taken = np.concatenate([r.steps for r in results])
    rows[name] = {"images": sum(shown), "fooled": fooled.mean(), "steps": taken.mean()}
    rows[name]["seconds"] = []
    if name != "full":
      assert last is None or jax.tree.all(jax.tree.map(np.array_equal, results, last))
      last = results
  for _, (name, call) in itertools.product(range(repeats), calls.items()):
    start = time.process_time()
    call()
    rows[name]["seconds"].append(time.process_time() - start)
  return rows


def counted(predict, shown):
  """The model, which notes how many images it is shown."""

  def model(x):
    jax.debug.callback(lambda: shown.append(len(x)))
    return predict(x)

  return model


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--pack", default="blood_bccd_cells_64")
  parser.add_argument("--eps", nargs="+", type=float, default=[0.01, 0.03])
  parser.add_argument("--side", type=int, default=32, help="images are resized")
  parser.add_argument("--width", type=int, default=16)
  parser.add_argument("--training", type=int, default=400, help="steps")
  parser.add_argument("--steps", type=int, default=40)
  parser.add_argument("--bucket", type=int, default=16)
  parser.add_argument("--chunks", nargs="+", type=int, default=[1, 2, 4, 8])
  parser.add_argument("--images", type=int, default=256)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out", help="JSON file to write")
  return parser.parse_args()


def main():
  options, shown = _arguments(), []
  print(f"jax {jax.__version__}; CPU seconds (quartiles)")
  net = {"side": options.side, "width": options.width, "steps": options.training}
  predict, dataset = trained(options.pack, **net)
  dataset = sources.take(dataset, np.arange(min(options.images, len(dataset.images))))
  predict = jaxadv.freeze(predict, np.empty((options.bucket, *_shape(dataset)), "f"))
  report = {"jax": jax.__version__, **vars(options), "results": {}}
  how = {name: getattr(options, name) for name in ("steps", "bucket", "chunks")}
  for eps in options.eps:
    calls = programs(counted(predict, shown), dataset, eps, **how)
    rows = measure(calls, shown, repeats=options.repeats)
    report["results"][str(eps)] = rows
    for name, row in rows.items():
      low, middle, high = np.percentile(row["seconds"], [25, 50, 75])
      part = row["images"] / rows["full"]["images"]
      print(
        f"{eps:7} {name:8} {middle:8.2f} ({low:.2f}-{high:.2f})  images"
        f" {row['images']:7} x{part:.3f}  fooled {row['fooled']:.3f}"
        f"  steps {row['steps']:.1f}",
        flush=True,
      )
  if options.out:
    with open(options.out, "w") as file:
      json.dump(report, file, indent=1)


if __name__ == "__main__":
  main()
