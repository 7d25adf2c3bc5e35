"""The step of a frozen network at two commits, in turns: what a change has brought.

    python benchmarks/commits.py 76373e0 HEAD --network unet32 --side 128 --batch 8

Each commit is laid out in a temporary folder and has a process of its own, which builds
the network of `peer_networks` and takes three sign steps in one compiled loop. Both are
pinned to one core, and as `configure_cpu` sets them. CPU milliseconds per step, medians
and quartiles, and the median of the ratios within a turn.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 3


def serve(network: str, side: int, batch: int) -> None:
  """Prints the CPU milliseconds of a step for every line that it reads."""
  if hasattr(os, "sched_setaffinity"):  # before jax starts
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  import jax
  import jax.numpy as jnp
  import peer_networks

  import jaxadv
  from jaxadv import types

  jaxadv.configure_cpu()
  networks = peer_networks.build(network, side=side, batch=batch)
  x = jnp.asarray(networks.x)
  predict = jaxadv.freeze(networks.ours, x)
  gradient = jax.grad(lambda x: jnp.square(types.call(predict, x)[0]).sum())
  step = lambda _, x: x + 0.01 * jnp.sign(gradient(x))
  run = jax.jit(lambda x: jax.lax.fori_loop(0, STEPS, step, x))
  jax.block_until_ready(run(x))
  print(jaxadv.__file__, flush=True)
  for _ in sys.stdin:
    start = time.process_time()
    jax.block_until_ready(run(x))
    print((time.process_time() - start) / STEPS * 1e3, flush=True)


@contextlib.contextmanager
def serving(commit: str, folder: pathlib.Path, words: list[str]):
  """A process over a commit, whose call gives the milliseconds of one turn."""
  archive = subprocess.run(
    ["git", "-C", ROOT, "archive", commit], check=True, stdout=subprocess.PIPE
  )
  folder.mkdir()
  subprocess.run(["tar", "x", "-C", folder], check=True, input=archive.stdout)
  command = [sys.executable, __file__, *words, "--serve"]
  path = os.pathsep.join(map(str, (folder, folder / "benchmarks")))
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  # its own folder goes before the path, with benchmarks of the present commit
  environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
  with subprocess.Popen(command, env=environment, **pipes) as process:
    where = process.stdout.readline().strip()
    if not where.startswith(str(folder)):
      raise RuntimeError(f"{commit}: got jaxadv from {where!r}, not from {folder}.")

    def turn():
      print(file=process.stdin, flush=True)
      return float(process.stdout.readline())

    yield turn
    process.stdin.close()


def main(words: list[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("commits", nargs=2, metavar="COMMIT")
  parser.add_argument("--network", default="unet32", help="see peer_networks")
  parser.add_argument("--side", type=int, default=128, help="of the images, pixels")
  parser.add_argument("--batch", type=int, default=1, help="images")
  parser.add_argument("--repeats", type=int, default=13, help="turns")
  parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
  words = sys.argv[1:] if words is None else words
  options = parser.parse_args(words)
  if options.serve:
    serve(options.network, options.side, options.batch)
    return
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    turns = [
      stack.enter_context(serving(commit, pathlib.Path(folder, str(n)), words))
      for n, commit in enumerate(options.commits)
    ]
    times = [[turn() for turn in turns] for _ in range(options.repeats)]
  cells = [f"{options.network}, {options.side} px, batch {options.batch}"]
  for values in zip(*times, strict=True):
    low, middle, high = np.percentile(values, [25, 50, 75])
    cells.append(f"{middle:.1f} ({low:.1f}-{high:.1f})")
  cells.append(f"{statistics.median(new / old for old, new in times):.3f}")
  heads = ["network", *options.commits, "ratio"]
  for line in (heads, ["---"] * 4, cells):
    print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
  main()
