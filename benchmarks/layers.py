"""A layer inside a compiled loop: as `lax` has it, and as `jaxadv.freeze` rewrites it.

    python benchmarks/layers.py [--repeats 5] [--out layers.json]
    python benchmarks/layers.py --accelerator --batch 64

CPU milliseconds of one forward pass and input gradient inside `fori_loop`, batch 8; the
process is pinned to one core, and the two take turns. Reported are medians, quartiles
and the ratio of medians. With `--accelerator` it is what the rules for CPU would do
there, by the wall's clock, and nothing is pinned.
"""

import argparse
import os
import pathlib
import sys
import time
from unittest import mock

if (
  __name__ == "__main__"  # before jax starts
  and "--accelerator" not in sys.argv
  and hasattr(os, "sched_setaffinity")
):
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxadv
from jaxadv import records

ACCELERATOR = "--accelerator" in sys.argv
STEPS = 64 if ACCELERATOR else 8


def _conv(channels, window, **options):
  return nn.Conv(channels, (window, window), use_bias=False, **options)


# name -> layer, side and channels of its image
LAYERS = {
  "convolution 3": (_conv(64, 3), 32, 64),
  "convolution 3, stride 2": (_conv(128, 3, strides=2), 32, 64),
  "convolution 7, stride 2": (_conv(64, 7, strides=2), 64, 3),
  "convolution 3, dilation 2": (_conv(64, 3, kernel_dilation=2), 16, 64),
  "convolution 3, 4 groups": (_conv(64, 3, feature_group_count=4), 16, 64),
  "convolution 3, map of 2": (_conv(512, 3), 2, 512),
  "convolution 1": (_conv(256, 1), 16, 64),
  "transposed 2, stride 2": (nn.ConvTranspose(32, (2, 2), (2, 2)), 32, 64),
  "transposed 4, stride 2": (nn.ConvTranspose(32, (4, 4), (2, 2)), 32, 64),
  "depthwise 3": (_conv(144, 3, feature_group_count=144), 16, 144),
  "depthwise 3, large map": (_conv(144, 3, feature_group_count=144), 56, 144),
  "depthwise 3, stride 2": (_conv(96, 3, strides=2, feature_group_count=96), 32, 96),
  "depthwise 5": (_conv(672, 5, feature_group_count=672), 4, 672),
  "max-pool 2": (lambda x: nn.max_pool(x, (2, 2), (2, 2)), 64, 64),
  "max-pool 3, stride 2": (lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"), 32, 64),
  "mean of 3, stride 1": (lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME"), 16, 256),
}


def programs(name, batch=8):
  """The layer in a loop, plain and frozen, as functions without arguments."""
  layer, side, channels = LAYERS[name]
  x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
  predict = layer
  if isinstance(layer, nn.Module):
    variables = layer.init(jax.random.key(1), x)
    predict = lambda x: layer.apply(variables, x)

  def loop(predict):
    gradient = jax.grad(lambda x: jnp.square(predict(x)).sum())
    step = lambda _, x: jnp.tanh(x + 0.01 * gradient(x))
    run = jax.jit(lambda x: jax.lax.fori_loop(0, STEPS, step, x))
    return lambda: run(x).block_until_ready()

  with mock.patch.object(jax, "default_backend", return_value="cpu"):  # whose rules
    frozen = jaxadv.freeze(predict, x)
  return {"lax": loop(predict), "frozen": loop(frozen)}


def measure(calls, repeats):
  """Milliseconds per step, `{name: [one per repeat]}`; the two take turns."""
  clock = time.perf_counter if ACCELERATOR else time.process_time
  times = {name: [] for name in calls}
  for turn in range(repeats + 1):
    for name, call in calls.items():
      start = clock()
      call()
      if turn:  # the first compiles
        times[name].append((clock() - start) / STEPS * 1e3)
  return times


def row(times):
  """Median and quartiles of both, and how many times faster the frozen layer is."""
  spread = {k: np.percentile(v, [25, 50, 75]).tolist() for k, v in times.items()}
  return spread | {"faster": spread["lax"][1] / spread["frozen"][1]}


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--accelerator", action="store_true")
  parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
  options = parser.parse_args()
  clock, kind = "wall" if ACCELERATOR else "CPU", jax.devices()[0].device_kind
  print(f"JAX {jax.__version__}, {kind}, {clock} ms per step: median (quartiles)\n")
  print("| layer | map | `lax` | frozen | times faster |\n|---|---|---|---|---|")
  rows = {}
  for name in options.layers:
    found = rows[name] = row(measure(programs(name, options.batch), options.repeats))
    _, side, channels = LAYERS[name]
    cells = ["{1:.3f} ({0:.3f}-{2:.3f})".format(*found[k]) for k in ("lax", "frozen")]
    size = f"{side} x {side} x {channels}"
    print(f"| {name} | {size} | {' | '.join(cells)} | {found['faster']:.2f} |")
  if options.out:
    records.write_json(options.out, {"jax": jax.__version__, "rows": rows})


if __name__ == "__main__":
  main()
