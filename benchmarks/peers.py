"""Ours beside PyTorch, torchattacks, foolbox, ART and adv-lib, on the same networks.

    make peers    # or, where they are installed
    python benchmarks/peers.py [--work unet32-128-b1 ...] [--out peers.json]
    python benchmarks/peers.py --accelerator --steps 40    # on a GPU

Per work, every program attacks the same images of the same network with the same
weights, which is checked; `peer_attacks` says what a call is. The process is pinned to
one core and PyTorch to one thread, the programs take turns, among them a matrix
product, which is the peak, and CPU time is measured: medians, quartiles, ratios of
medians, and medians of the ratios within a turn. The process is as
`jaxadv.configure_cpu` sets it, whose memory all libraries profit from; `--as-it-is`
leaves that out. A library that cannot be run is listed with its error. The JSON is
written after every work, what it holds already is not measured again, and a plot lies
beside it.

PGD is in Linf, 8/255 by steps of 2/255, without random start. Steps per call are fewer
than 40 where the network is large (`--steps` sets them for all): ms per step hardly
depends on them, but for the one forward pass at the end, which all programs have.

With `--accelerator` the clock is the wall's, nothing is pinned, and products are in
TF32 in both libraries, as they come; a product in bfloat16 and a copy, which is the
bandwidth, take turns with the rest.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

if "--accelerator" in sys.argv:  # before jax starts
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others need some
elif __name__ == "__main__" and hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import peer_attacks
import peer_networks
import peer_report
import peer_universal

from jaxadv import compiling, records, types


class Work(NamedTuple):
  """A network, its images, and how many steps a call takes.

  Attributes:
    network: see `peer_networks.build`.
    side: of the images, pixels.
    batch: images.
    steps: of one call.
    kind: `classes` or `masks`.
    leave_out: programs that would take minutes a call.
  """

  network: str
  side: int
  batch: int
  steps: int
  kind: str = "classes"
  leave_out: tuple[str, ...] = ()


SLOW = ("flax", "bare flax", "torch compiled")
WORKS = {
  "unet32-128-b1": Work("unet32", 128, 1, 10),
  "resnet50-64-b8": Work("resnet50", 64, 8, 6),
  "unet32-128-b8": Work("unet32", 128, 8, 2),
  "unet32-256-b1": Work("unet32", 256, 1, 4),
  "unet64-128-b1": Work("unet64", 128, 1, 4),
  "resnet50-224-b1": Work("resnet50", 224, 1, 6),
  "vgg16-64-b8": Work("vgg16", 64, 8, 4),
  "densenet121-64-b8": Work("densenet121", 64, 8, 6),
  "inception_v3-128-b8": Work("inception_v3", 128, 8, 4),
  "resnet50-224-b8": Work("resnet50", 224, 8, 2, leave_out=SLOW),
  "unet64-256-b1": Work("unet64", 256, 1, 2, leave_out=SLOW),
  "masks-unet32-128-b1": Work("unet32", 128, 1, 10, "masks"),
  "masks-unet32-128-b8": Work("unet32", 128, 8, 2, "masks"),
  "masks-unet64-128-b1": Work("unet64", 128, 1, 4, "masks"),
  "masks-unet32-256-b1": Work("unet32", 256, 1, 4, "masks"),
}
# hours together on one core; only by name
LARGE = {
  "unet32-256-b8": Work("unet32", 256, 8, 2, leave_out=SLOW),
  "unet64-128-b8": Work("unet64", 128, 8, 2, leave_out=SLOW),
  "unet64-256-b8": Work("unet64", 256, 8, 1, leave_out=SLOW),
  "unet32-128-b64": Work("unet32", 128, 64, 1, leave_out=SLOW),
  "resnet50-224-b64": Work("resnet50", 224, 64, 1, leave_out=SLOW),
}
TINY = {"tiny": Work("unet16", 64, 2, 8)}
OTHERS = ("compile", "universal")
COMPILED = ("unet32-128-b1", "resnet50-64-b8")
GRAPHS = ("torch graphs",)  # programs that CPU has not
TOLERANCE = 1e-3  # of logits, relative to the largest: float32, norms folded or not


class Ceiling(NamedTuple):
  """What the machine can do at most: `amount` of GFLOP or GB per `call`."""

  call: Callable[[], Any]
  amount: float


def measure_work(work: Work, options) -> dict[str, Any]:
  """The row of a work: every program's times, or its error."""
  masks = work.kind == "masks"
  networks = peer_networks.build(
    work.network, side=work.side, batch=work.batch, masks=masks
  )
  makers = peer_attacks.MASKS if masks else peer_attacks.CLASSES
  steps = options.steps or work.steps
  rows, calls, reference, costs = {}, {}, None, {}
  leave_out = () if options.accelerator else work.leave_out
  for name, make in makers.items():
    if options.programs and name not in options.programs:
      continue
    if name in GRAPHS and not options.accelerator:
      continue
    if name in leave_out and not options.programs:
      rows[name] = {"error": "left out: takes minutes a call"}
      continue
    try:
      program = make(networks, steps)
      fooled = program.call()
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
      rows[name] = {
        "error": f"{type(error).__name__}: {error}".partition("\n")[0][:300]
      }
      continue
    reference = program.logits if reference is None else reference
    costs = costs or program.costs
    rows[name] = {"fooled": fooled, "difference": _difference(program, reference, name)}
    calls[name] = program.call
    print(f"  {name} is ready", file=sys.stderr, flush=True)
  ceilings = _products() | (_others() if options.accelerator else {})
  calls = {name: ceiling.call for name, ceiling in ceilings.items()} | calls
  times = _turns(calls, options.repeats, options.cap)
  rates = {
    name: ceiling.amount / statistics.median(times.pop(name))
    for name, ceiling in ceilings.items()
  }
  for name, row in _summary(times, steps).items():
    rows[name] |= row
  forward, step = _gflop(networks)
  found = {
    "steps": steps,
    "gflop": step + forward / steps,  # the judging, too, is work
    "gbyte": costs.get("bytes accessed", 0) / 1e9,
    "peak": {name: rates.pop(name) for name in _products()},
    "others": rates,
    "programs": rows,
  }
  return work._asdict() | found


def _difference(program, reference, name):
  """How far logits are from those of the first program; never far."""
  if program.logits is None:
    return None
  error = float(abs(program.logits - reference).max() / abs(reference).max())
  if not error < TOLERANCE:
    raise AssertionError(f"{name} has another network: logits differ by {error:.1e}")
  return error


def _turns(calls, repeats, cap):
  """Seconds per call, `{name: [one per turn]}`; past `cap` seconds, two turns."""
  clock = time.process_time
  if peer_networks.device() != "cpu":
    clock = time.perf_counter
  times: dict[str, list[float]] = {name: [] for name in calls}
  for turn in range(repeats):
    for name, call in calls.items():
      if turn >= 2 and sum(times[name]) > cap:
        continue
      start = clock()
      call()
      times[name].append(clock() - start)
  return times


def _summary(times, steps):
  rows = {}
  for name, values in times.items():
    low, middle, high = np.percentile(values, [25, 50, 75]) / steps * 1e3
    rows[name] = {"ms": middle, "quartiles_ms": [low, high], "turns": len(values)}
    for base in ("bare", "torch folded"):
      if base in times:
        pairs = zip(values, times[base], strict=False)
        rows[name][f"over {base}"] = {
          "medians": statistics.median(values) / statistics.median(times[base]),
          "pairs": statistics.median(a / b for a, b in pairs),
        }
  return rows


def _gflop(networks):
  """Of a forward pass, and of one with the input gradient, as XLA counts them."""
  x = jnp.asarray(networks.x)
  total = lambda x: types.call(networks.flax, x)[0].sum()  # ours may do a bit more
  count = lambda f: jax.jit(f).lower(x).cost_analysis()["flops"] / 1e9
  with jax.default_device(jax.devices("cpu")[0]):  # that for GPU counts nothing
    return count(total), count(jax.value_and_grad(total))


@functools.cache
def _products():
  """A float32 matrix product in either library, in GFLOP."""
  side = 2048 if peer_networks.device() == "cpu" else 8192
  matrix = np.random.default_rng(0).normal(size=(side, side)).astype(np.float32)
  ours, product = jnp.asarray(matrix), jax.jit(jnp.matmul)
  calls = {"product of jax": lambda: product(ours, ours).block_until_ready()}
  with contextlib.suppress(ImportError):
    theirs = peer_networks.import_torch().from_numpy(matrix).to(peer_networks.device())
    calls["product of torch"] = lambda: (theirs @ theirs)[0, 0].item()
  return _warm(calls, 2 * side**3 / 1e9)


@functools.cache
def _others():
  """A product in bfloat16, in GFLOP, and a copy, in GB read and written."""
  side, values = 8192, 1 << 28
  narrow = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
  wide = jax.random.normal(jax.random.key(1), (values,))
  product, copy = _often(lambda x: narrow @ x), _often(jnp.negative)
  multiply = {"product in bf16": lambda: product(narrow).block_until_ready()}
  move = {"copy": lambda: copy(wide).block_until_ready()}
  return _warm(multiply, 16 * 2 * side**3 / 1e9) | _warm(move, 16 * 8 * values / 1e9)


def _often(step):
  """So often that a call costs nothing."""
  return jax.jit(lambda x: jax.lax.fori_loop(0, 16, lambda _, x: step(x), x))


def _warm(calls, amount):
  for call in calls.values():
    call()
  return {name: Ceiling(call, amount) for name, call in calls.items()}


def measure_compile(as_it_is=False, names=COMPILED) -> dict[str, Any]:
  """Seconds until PGD-40 can run, in new processes, and tracings for eight radii."""
  rows = {}
  for name in names:
    with tempfile.TemporaryDirectory() as cache:
      command = [sys.executable, __file__, "--probe", name, cache]
      command += ["--as-it-is"] * as_it_is
      cold, warm = (
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(2)
      )
    work = (WORKS | TINY)[name]
    networks = peer_networks.build(work.network, side=work.side, batch=work.batch)
    run, traces = peer_attacks.radii(networks, 1)
    for radius in range(1, 9):
      run(radius / 255).block_until_ready()
    rows[name] = {"cold": cold, "warm": warm, "compilations for 8 radii": len(traces)}
  return rows


def probe(name: str, cache: str) -> dict[str, dict[str, float]]:
  """CPU seconds of tracing and compiling in this process, with a cache on disk."""
  jax.config.update("jax_compilation_cache_dir", cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  work = (WORKS | TINY)[name]
  networks = peer_networks.build(work.network, side=work.side, batch=work.batch)
  x, y = jnp.asarray(networks.x), jnp.asarray(networks.y)
  found = {}
  forms = {
    "weights in it": peer_attacks.compiled(networks, "plain", 40).lower,
    "weights given": peer_attacks.as_in_the_commands(networks, 40),
  }
  for form, lower in forms.items():
    start = time.process_time()
    lowered = lower(jax.random.key(0), x, y)
    traced = time.process_time()
    lowered.compile()
    found[form] = {"trace_s": traced - start, "compile_s": time.process_time() - traced}
  return found


def settings(configured: compiling.CpuFlags | None = None) -> dict[str, Any]:
  """What times depend on beside the work; of `configure_cpu`, what it did."""
  packages = ("jax", "jaxlib", "flax", "numpy", "torch", "torchvision", "torchattacks")
  packages += ("foolbox", "adversarial-robustness-toolbox", "adv-lib")
  versions = {"python": sys.version.partition(" ")[0]}
  for package in packages:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = "not installed"
  flags = os.environ.get("XLA_FLAGS", "")
  kept = bool(configured and configured.keeps_memory)
  about = {"versions": versions, "xla_flags": flags, "keeps_memory": kept}
  kind = jax.devices()[0].device_kind
  return {**about, "cores": os.cpu_count(), "device": kind}


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  every = [*WORKS, *OTHERS, *LARGE, *TINY]
  parser.add_argument("--work", nargs="+", choices=every, metavar="NAME")
  parser.add_argument("--programs", nargs="+", metavar="NAME", help="all by default")
  parser.add_argument("--repeats", type=int, default=5, help="turns")
  parser.add_argument("--steps", type=int, help="of one call, for all works")
  parser.add_argument("--cap", type=float, default=15, help="CPU seconds of a program")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("peers.json"))
  parser.add_argument("--as-it-is", action="store_true", help="no `configure_cpu`")
  parser.add_argument("--accelerator", action="store_true", help="a GPU, by the wall")
  parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
  return parser.parse_args()


def main():
  warnings.simplefilter("ignore")
  options = _arguments()
  as_it_is = options.as_it_is or options.accelerator
  configured = None if as_it_is else compiling.configure_cpu()
  if options.accelerator == (peer_networks.device() == "cpu"):
    sys.exit("Write --accelerator where JAX finds one, and JAX_PLATFORMS=cpu else.")
  if options.probe:
    print(json.dumps(probe(*options.probe)))
    return
  report = {"settings": settings(configured), "rows": {}}
  if options.out.exists():
    stored = json.loads(options.out.read_text())
    if stored["settings"] != report["settings"]:
      sys.exit(
        f"{options.out} has other versions, flags or memory; choose another --out."
      )
    report = stored
  works = {
    **{name: functools.partial(measure_work, work, options) for name, work in _all()},
    "compile": functools.partial(measure_compile, options.as_it_is),
    "universal": peer_universal.measure,
  }
  for name in options.work or [*WORKS, *OTHERS]:
    if name not in report["rows"]:
      print(name, file=sys.stderr, flush=True)
      report["rows"][name] = works[name]()
      records.write_json(options.out, report)
  peer_report.plot(report, options.out.with_suffix(".png"))
  print(peer_report.markdown(report))


def _all():
  return (WORKS | LARGE | TINY).items()


if __name__ == "__main__":
  main()
