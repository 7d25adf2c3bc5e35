"""Where the time of an attack's step goes: by kind of layer, beside the matrix peak.

    python benchmarks/profile_step.py resnet50 --side 64 --batch 8

Three sign steps in one compiled loop over a frozen network of `peer_networks`, under
JAX's profiler, on one pinned core. Operations of the same shapes are one row: their
wall milliseconds per step, GFLOP/s, and what a product at the measured peak would have
saved; the kinds beyond `--rows` are one row, and so is the rest, which multiplies
nothing. Five calls, medians.
"""

import argparse
import collections
import glob
import gzip
import json
import math
import os
import re
import statistics
import tempfile
import time

if __name__ == "__main__" and hasattr(os, "sched_setaffinity"):  # before jax starts
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import peer_networks

import jaxadv
from jaxadv import compiling, types

STEPS, CALLS, SIDE = 3, 5, 2048
LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]\S* ([\w\-]+)\((.*)")


def program(networks):
  """Three sign steps over the frozen network, compiled, and the images."""
  x = jnp.asarray(networks.x)
  predict = jaxadv.freeze(networks.ours, x)
  gradient = jax.grad(lambda x: jnp.square(types.call(predict, x)[0]).sum())
  step = lambda _, x: x + 0.01 * jnp.sign(gradient(x))
  run = jax.jit(lambda x: jax.lax.fori_loop(0, STEPS, step, x))
  return run.lower(x).compile(), x


def durations(run, x) -> dict[str, float]:
  """Median milliseconds of every operation."""
  jax.block_until_ready(run(x))
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(CALLS):
        jax.block_until_ready(run(x))
    (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
    with gzip.open(path) as file:
      events = json.load(file)["traceEvents"]
  found = collections.defaultdict(list)
  for event in events:
    if name := event.get("args", {}).get("hlo_op"):
      found[name].append(event["dur"] / 1e3)
  return {name: statistics.median(times) for name, times in found.items()}


def products(text: str) -> dict[str, tuple[float, str]]:
  """Operations that hold a product or a convolution: their GFLOP, and its shapes."""
  shapes, inside, lines, where = {}, collections.defaultdict(list), {}, None
  for line in text.splitlines():
    if line.endswith("{") and (head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line)):
      where = head[1]
    elif found := LINE.match(line):
      name, sides, kind, rest = found.groups()
      shapes[name] = [int(n) for n in sides.split(",") if n]
      lines[name] = rest
      if kind in ("dot", "convolution"):
        inside[where].append((name, kind, rest))
  work = {}
  for each in inside.values():
    for name, kind, rest in each:
      work[name] = _work(kind, shapes[name], shapes, rest)
  for name, rest in lines.items():
    called = re.search(r"calls=%?([\w.\-]+)", rest)
    if called and inside.get(called[1]):
      parts = [work[part] for part, _, _ in inside[called[1]]]
      work[name] = sum(p[0] for p in parts), "; ".join(p[1] for p in parts)
  return work


def _work(kind, out, shapes, rest):
  left, right = (shapes[name] for name in re.findall(r"%([\w.\-]+)", rest)[:2])
  if kind == "dot":
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
    depth = math.prod(left[int(axis)] for axis in axes.split(","))
  else:
    depth = math.prod(right) // out[-1]
  title = f"{kind} {'x'.join(map(str, left))} . {'x'.join(map(str, right))}"
  if stride := re.search(r"stride=(\w+)", rest):
    title += f", stride {stride[1]}"
  return 2 * math.prod(out) * depth / 1e9, title


def peak() -> float:
  """GFLOP/s of a float32 matrix product, the median of nine."""
  matrix, product, times = jnp.ones((SIDE, SIDE)), jax.jit(jnp.matmul), []
  for _ in range(10):
    start = time.process_time()
    product(matrix, matrix).block_until_ready()
    times.append(time.process_time() - start)
  return 2 * SIDE**3 / 1e9 / statistics.median(times[1:])


def rows(times, work, best):
  """Kind of layer, how many, ms, GFLOP/s, ms lost; the most lost first."""
  kinds = collections.defaultdict(lambda: [0, 0.0, 0.0])
  for name, ms in times.items():
    gflop, kind = work.get(name, (0.0, "the rest"))
    kinds[kind] = [a + b for a, b in zip(kinds[kind], (1, ms, gflop), strict=True)]
  table = [
    (kind, count, ms, gflop / ms * 1e3, ms - gflop / best * 1e3)
    for kind, (count, ms, gflop) in kinds.items()
  ]
  return sorted(table, key=lambda row: (row[0] == "the rest", -row[4]))


def shortened(table, most):
  """The first rows of a table, one for all others that multiply, and the last."""
  first, others, last = table[:most], table[most:-1], table[-1]
  if not others:
    return table
  count, ms, lost = (sum(row[k] for row in others) for k in (1, 2, 4))
  gflop = sum(ms * speed for _, _, ms, speed, _ in others)
  return [*first, ("other products", count, ms, gflop / ms, lost), last]


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("network", help="unet<width> or a classifier of peer_networks")
  parser.add_argument("--side", type=int, default=64, help="of the images, pixels")
  parser.add_argument("--batch", type=int, default=8, help="images")
  parser.add_argument("--rows", type=int, default=12, help="how many kinds to print")
  options = parser.parse_args()
  compiling.configure_cpu()
  networks = peer_networks.build(
    options.network, side=options.side, batch=options.batch
  )
  run, x = program(networks)
  work, best = products(run.as_text()), peak()
  inner = {name: ms for name, ms in durations(run, x).items() if "while" not in name}
  table = rows(inner, work, best)
  total, gflop = sum(row[2] for row in table), sum(row[2] * row[3] for row in table)
  print(
    f"{total:.1f} ms per step, {gflop / total:.0f} GFLOP/s; the peak is {best:.0f}\n\n"
    "| layer | how many | ms | GFLOP/s | ms lost |\n|---|---|---|---|---|"
  )
  for kind, count, ms, speed, lost in shortened(table, options.rows):
    print(f"| {kind} | {count} | {ms:.2f} | {speed:.0f} | {lost:.2f} |")


if __name__ == "__main__":
  main()
