"""What several devices cost and bring: steps, their collective, and a model of it.

    python benchmarks/scaling.py --out scaling.json
    python benchmarks/scaling.py --tolerance

Starts 1, 2 and 4 processes that gloo joins, and one process with 2 and 4 simulated
devices, and lets each take a universal step, a PGD of five steps and a step of PGD
training on a small VGG: `weak` with one batch per worker, `strong` with one batch for
all. A worker has one core: processes are bound to cores in turn, one process with
several devices to as many; rows beyond the cores of the machine share them, and
`of cores` is their efficiency against what these cores could do. Wall clock, programs
in turn, a turn ends when the slowest process is done; medians and quartiles over all
turns of all rounds. The bytes of a collective are read from the compiled program, its
share of a step comes from the same step without it. The model

    t(n) = t_grad(B / n) + 2 (n - 1) / n * D / bandwidth + hops(n) * latency

is fitted to all-reduces alone, and then asked about 256 and 4096 chips.

On a cluster, where a launcher starts the processes, one run is one point:

    srun python benchmarks/scaling.py --here --distributed --out 16.json
    python benchmarks/scaling.py --points 1.json 16.json
"""

import argparse
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

if __name__ == "__main__" and "SCALING_CORES" in os.environ:  # before jax starts
  os.sched_setaffinity(0, set(map(int, os.environ["SCALING_CORES"].split(","))))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from scipy import optimize

from jaxadv import attacks, distributed, models, sharding, summaries, training, victims

__all__ = ["allreduce", "collectives", "fit", "measure", "merged", "report"]

CLASSES = 8
IMAGE = 224 * 224 * 3 * 4  # bytes of the gradient for an image of ImageNet
SIZES = (12 << 10, 48 << 10, IMAGE, 3 << 20)
IN_A_ROW = 20  # all-reduces of one measurement
NETS = {
  "vgg": models.VGG(num_classes=CLASSES, convolutions=(1,) * 5, width=0.25),
  "convnet": models.ConvNet(num_classes=CLASSES, width=4, depth=1, norm="none"),
}
WORKS = ("universal", "pgd", "training")
TORUS = {256: (16, 16), 4096: (16, 16, 16)}
WIDTHS = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4}
WIDTHS |= {"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}


def main(arguments: Sequence[str] | None = None) -> None:
  options = _parser().parse_args(arguments)
  if options.here is None and options.tolerance:
    (said,) = _finish(_start(1, 8, ["--here", "--tolerance"]))
    print(said, end="")
    return
  if options.here is not None:
    if options.distributed or distributed.wanted():
      distributed.start()
    if options.tolerance:
      tolerance()
      return
    points = [measure(options)]
    if not distributed.is_first():
      return
  elif options.points:
    points = [point for path in options.points for point in json.loads(_read(path))]
  else:
    points = drive(options)
  if options.out:
    with open(options.out, "w") as file:
      json.dump(points, file)
  print(report(points, bandwidth=options.bandwidth, latency=options.latency))


def _parser():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--processes", type=int, nargs="*", default=(1, 2, 4))
  parser.add_argument("--devices", type=int, nargs="*", default=(2, 4))
  parser.add_argument("--side", type=int, default=64, help="of an image, in pixels")
  parser.add_argument("--net", choices=NETS, default="vgg")
  parser.add_argument("--batch", type=int, default=16, help="of each worker, weak form")
  parser.add_argument("--total", type=int, default=64, help="of all, strong form")
  parser.add_argument("--microbatches", type=int, default=4, help="of the fixed order")
  parser.add_argument("--repeats", type=int, default=8, help="turns of a round")
  parser.add_argument("--rounds", type=int, default=1, help="starts of each point")
  parser.add_argument("--bandwidth", type=float, default=100e9, help="assumed, bytes/s")
  parser.add_argument("--latency", type=float, default=1e-6, help="assumed, s per hop")
  parser.add_argument("--tolerance", action="store_true", help="fast against fixed sum")
  here = "measure in this process, on so many of its devices [all]"
  parser.add_argument("--here", type=int, nargs="?", const=0, metavar="N", help=here)
  parser.add_argument(
    "--distributed", action="store_true", help="join the others first"
  )
  parser.add_argument("--points", nargs="+", metavar="JSON", help="measured before")
  parser.add_argument("--out", help="JSON file to write")
  return parser


# Processes.


def drive(options):
  """Every point, in rounds, so that other work on the machine disturbs all alike."""
  names = ("side", "net", "batch", "total", "microbatches", "repeats")
  words = [f"--{name}={getattr(options, name)}" for name in names]
  kinds = [(n, 1) for n in options.processes] + [(1, n) for n in options.devices]
  points = []
  with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/point.json"
    for turn in range(options.rounds):
      for processes, devices in kinds:
        print(f"round {turn + 1}: {processes} x {devices}", file=sys.stderr, flush=True)
        here = ["--here", f"--out={path}", *words]
        _finish(_start(processes, devices, here))
        points += json.loads(_read(path))
  return merged(points)


def merged(points):
  """One point for each set-up, with the seconds of all rounds."""
  found = {}
  for point in points:
    first = found.setdefault((point["processes"], point["devices"]), point)
    if first is not point:
      for mine, more in zip(first["runs"], point["runs"], strict=True):
        mine["seconds"] += more["seconds"]
  return list(found.values())


def _start(processes, devices, words):
  """This script in so many processes of so many simulated devices, on their cores."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  cores, started = sorted(os.sched_getaffinity(0)), []
  flags = f" --xla_force_host_platform_device_count={devices}"
  for process in range(processes):
    told = {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + flags,
    }
    own = [cores[(process + n) % len(cores)] for n in range(min(devices, len(cores)))]
    told["SCALING_CORES"] = ",".join(map(str, own))
    if processes > 1:
      told |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(process)}
      told |= {"JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, __file__, *words]
    started.append(
      subprocess.Popen(
        command,
        env=os.environ | told,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
    )
  return started


def _finish(started):
  """What each printed; a failure of one ends all."""
  try:
    ended = [(*process.communicate(timeout=900), process) for process in started]
  finally:
    for process in started:
      process.kill()
  for _, error, process in ended:
    if process.returncode:
      raise RuntimeError(f"a worker ended with {process.returncode}: {error[-2000:]}")
  return [said for said, _, _ in ended]


# Work.


def measure(options):
  """One point: every program on the devices of all processes, in turns."""
  own = options.here or len(jax.local_devices())
  mesh = distributed.mesh(own)
  distributed.barrier("start")  # gloo gives the first collective no more than 30 s
  programs, runs = {}, []
  batches = sorted({options.batch * mesh.size, options.total})
  for batch in batches:
    every = _works(mesh, batch, options, weak=batch == options.batch * mesh.size)
    for work, (function, given) in every.items():
      compiled = jax.jit(function).lower(*given).compile()
      found = collectives(compiled.as_text())
      runs.append({"work": work, "batch": batch, "collectives": found})
      programs[work, batch] = functools.partial(compiled, *given)
  if mesh.size > 1:
    for size in SIZES:
      runs.append({"work": "all-reduce", "bytes": size})
      programs["all-reduce", size] = _all_reduces(mesh, size)
  for run, seconds in zip(runs, _clock(programs, options.repeats), strict=True):
    shared = IN_A_ROW if run["work"] == "all-reduce" else 1
    run["seconds"] = [value / shared for value in seconds]
  return {
    "processes": jax.process_count(),
    "devices": mesh.size // jax.process_count(),
    "cores": os.cpu_count() if "SCALING_CORES" not in os.environ else _cores(),
    "backend": jax.default_backend(),
    **{name: getattr(options, name) for name in ("side", "net", "batch", "total")},
    "runs": runs,
    **summaries.origin(),
  }


def _cores():
  """Of the machine; this process is bound to its own."""
  return len(os.sched_getaffinity(os.getppid()))


def _clock(programs, repeats):
  """Wall seconds of every program and turn, of the slowest process."""
  times = {name: [] for name in programs}
  for turn in range(repeats + 1):
    for name, call in programs.items():
      distributed.barrier("turn")
      start = time.perf_counter()
      jax.block_until_ready(call())
      if turn:  # the first warms up
        times[name].append(time.perf_counter() - start)
  seconds = np.array(list(times.values()))
  if jax.process_count() > 1:
    seconds = multihost_utils.process_allgather(seconds).max(0)
  return seconds.tolist()


def _works(mesh, batch, options, *, weak):
  """Functions and what they are called with, by name."""
  side = options.side
  model = NETS[options.net]
  shape = jnp.zeros((1, side, side, 3))
  variables = dict(jax.jit(model.init)(jax.random.key(1), shape))
  rows = sharding.scatter(mesh, _rows(batch, side))
  whole = functools.partial(sharding.put, mesh)
  keys = sharding.put(mesh, jax.random.split(jax.random.key(2), batch), axis="data")
  pgd = attacks.pgd(4 / 255, num_steps=5)
  start = _uap().init(jax.random.key(3), shape[0])
  given = whole((variables, start))

  def attack(variables, keys, rows):
    predict = functools.partial(model.apply, variables)
    return pgd(keys, predict, rows["image"], rows["label"]).image

  tx = optax.sgd(0.01, momentum=0.9)
  views = (attacks.pgd(4 / 255, num_steps=2),)
  loss = training.mean_over_views(training.cross_entropy)
  step = training.adversarial_step(victims.flax_apply(model), tx, views, loss)
  params = variables.pop("params")
  state = whole(training.init_state(jax.random.key(4), params, variables, tx))
  found = {
    "universal": (_universal(model), (given, rows)),
    "pgd": (attack, (given[0], keys, rows)),
    "training": (step, (state, rows)),
  }
  if weak and mesh.size > 1:
    found["no collective"] = (
      sharding.data_parallel(_universal(model), mesh),
      (given, rows),
    )
  if weak:
    fixed = {"microbatches": max(options.microbatches, mesh.size)}
    if mesh.size > 1:
      fixed["axis_name"] = sharding.AXIS
    step = _universal(model, **fixed)
    step = sharding.data_parallel(step, mesh) if mesh.size > 1 else step
    found["fixed order"] = (step, (given, rows))
  return found


def _uap(**form):
  return attacks.universal(1.0, norm="l2", num_steps=100, **form)


def _universal(model, **form):
  uap = _uap(**form)

  def step(given, batch):
    variables, state = given
    return uap.step(functools.partial(model.apply, variables), state, batch)

  return step


def _rows(batch, side):
  """The rows of this process, of a batch that all of them draw."""
  rng = np.random.default_rng(batch)
  images = rng.random((batch, side, side, 3), np.float32)
  label = rng.integers(0, CLASSES, batch).astype(np.int32)
  own = batch // jax.process_count()
  part = slice(jax.process_index() * own, (jax.process_index() + 1) * own)
  return {"image": images[part], "label": label[part], "decision": label[part]}


def _all_reduces(mesh, size):
  """So many all-reduces in a row in one program: dispatch counts once."""
  add = lambda _, value: jax.lax.psum(value, sharding.AXIS) / mesh.size
  row = lambda value: jax.lax.fori_loop(0, IN_A_ROW, add, value)
  whole = {"mesh": mesh, "in_specs": P(), "out_specs": P(), "check_vma": False}
  given = sharding.put(mesh, jnp.ones(size // 4, jnp.float32))
  compiled = jax.jit(jax.shard_map(row, **whole)).lower(given).compile()
  return functools.partial(compiled, given)


def collectives(text):
  """`[kind, bytes of its result]` of every collective of a compiled program."""
  kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
  found = re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", text)
  return [[kind, _size(shapes)] for shapes, kind in found]


def _size(shapes):
  total = 0
  for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
    total += WIDTHS[dtype] * math.prod(int(n) for n in sides.split(",") if n)
  return total


# The model.


def allreduce(workers, size, *, bandwidth, latency, shape="ring"):
  """Seconds of an all-reduce of `size` bytes."""
  return 2 * (workers - 1) / workers * size / bandwidth + hops(workers, shape) * latency


def hops(workers, shape):
  """Messages that wait for each other: there and back."""
  if shape == "ring":
    return 2 * (workers - 1)
  if shape == "tree":
    return 2 * math.log2(workers)
  return 2 * sum(side - 1 for side in TORUS[workers])


def fit(points):
  """Bandwidth and latency of a ring from `(workers, bytes, seconds)`.

  The least squares of the relative errors, with neither below zero.
  """
  workers, size, seconds = np.array(points, float).T
  costs = np.stack([2 * (workers - 1) / workers * size, 2 * (workers - 1)], 1)
  (slowness, latency), _ = optimize.nnls(
    costs / seconds[:, None], np.ones(len(seconds))
  )
  return (1 / slowness if slowness else math.inf), latency


# Tables.


def report(points, *, bandwidth, latency):
  """Everything that was measured and what follows from it, in Markdown."""
  points = sorted(points, key=lambda point: (point["devices"], point["processes"]))
  first = points[0]
  about = (
    f"{first['cores']} cores; {first['side']} x {first['side']} x 3 pixels, "
    f"{first['net']}; weak: "
    f"{first['batch']} images per worker, strong: {first['total']} for all."
  )
  parts = [about, *(_steps(points, work) for work in WORKS)]
  if any(_workers(point) > 1 for point in points):
    parts += [_shares(points), _alone(points)]
  parts.append(_projection(bandwidth, latency))
  parts.append(summaries.signature(first))
  return "\n\n".join(parts)


def _workers(point):
  return point["processes"] * point["devices"]


def _name(point):
  """What the workers are."""
  many = point["processes"], point["devices"]
  name = f"{many[0]} x {many[1]} devices" if many[1] > 1 else f"{many[0]} processes"
  beyond = point["backend"] == "cpu" and _workers(point) > point["cores"]
  return name.removesuffix("es") if name == "1 processes" else name + "*" * beyond


def _seconds(point, work, **which):
  """Of one program; `None` where it did not run."""
  for run in point["runs"]:
    if run["work"] == work and all(run[k] == v for k, v in which.items()):
      return run["seconds"]
  return None


def _ms(seconds):
  low, middle, high = np.percentile(seconds, [25, 50, 75]) * 1e3
  digits = 1 if middle >= 10 else 2 if middle >= 1 else 3
  return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _steps(points, work):
  """Weak and strong scaling of one piece of work."""
  heads = ["workers", "form", "images", "ms (quartiles)", "images/s", "efficiency"]
  lines = []
  alone = next((point for point in points if _workers(point) == 1), None)
  for form in ("weak", "strong"):
    for point in points:
      n = _workers(point)
      batch = point["batch"] * n if form == "weak" else point["total"]
      seconds = _seconds(point, work, batch=batch)
      speed = batch / np.median(seconds)
      cells = [_name(point), form, str(batch), _ms(seconds), f"{speed:.0f}"]
      if alone:
        one = point["batch"] if form == "weak" else point["total"]
        base = one / np.median(_seconds(alone, work, batch=one))
        useful = n if point["backend"] != "cpu" else min(n, point["cores"])
        cells += [f"{speed / base / n:.2f}", f"{speed / base / useful:.2f}"]
      lines.append(cells)
  heads += ["of cores"] if alone else []
  text = summaries.markdown(heads[: len(lines[0])], lines)
  return f"### {work.capitalize()}\n\n{text}\n\n\\* more workers than cores"


def _shares(points):
  """What the collectives of a step carry, and what they and a fixed order cost."""
  heads = [
    "workers",
    "step",
    "collectives",
    "bytes",
    "ms (quartiles)",
    "over universal",
  ]
  lines = []
  for point in points:
    batch = point["batch"] * _workers(point)
    base = np.median(_seconds(point, "universal", batch=batch))
    for run in point["runs"]:
      if run.get("batch") == batch and (_workers(point) > 1 or "order" in run["work"]):
        found = run["collectives"]
        kinds = ", ".join(
          f"{sum(kind == k for k, _ in found)} {kind}" for kind in sorted(dict(found))
        )
        over = f"{np.median(run['seconds']) / base:.2f}"
        lines.append(
          [_name(point), run["work"], kinds or "none", str(sum(n for _, n in found))]
          + [_ms(run["seconds"]), over if run["work"] not in WORKS else "-"]
        )
  return "### Collectives of a step, weak form\n\n" + summaries.markdown(heads, lines)


def _alone(points):
  """All-reduces alone, the model fitted to them, and what it says of a step."""
  parts = []
  for kind in ("processes", "devices"):
    chosen = [p for p in points if p[kind] > 1]
    if not chosen:
      continue
    within = [p for p in chosen if p["backend"] != "cpu" or _workers(p) <= p["cores"]]
    used = within or chosen
    bandwidth, latency = fit(
      [
        (_workers(point), run["bytes"], np.median(run["seconds"]))
        for point in used
        for run in point["runs"]
        if run["work"] == "all-reduce"
      ]
    )
    model = functools.partial(allreduce, bandwidth=bandwidth, latency=latency)
    heads = ["workers", *(f"{_bytes(size)}: ms" for size in SIZES)]
    heads += ["step: t_grad", "+ model", "measured"]
    lines = []
    for point in chosen:
      n = _workers(point)
      cells = [_name(point)]
      for size in SIZES:
        seconds = _seconds(point, "all-reduce", bytes=size)
        cells.append(f"{_ms(seconds)}; model {model(n, size) * 1e3:.2f}")
      batch = point["batch"] * n
      bare = np.median(_seconds(point, "no collective", batch=batch))
      step = np.median(_seconds(point, "universal", batch=batch))
      said = bare + model(n, 4 * point["side"] ** 2 * 3)
      lines.append([*cells, *(f"{t * 1e3:.1f}" for t in (bare, said, step))])
    names = ", ".join(_name(point) for point in used)
    parts.append(
      f"### All-reduce alone, {kind}\n\n{summaries.markdown(heads, lines)}\n\n"
      f"Fitted to {names}: {bandwidth / 1e9:.2f} GB/s, {latency * 1e6:.0f} us per hop."
    )
  return "\n\n".join(parts)


def _bytes(size):
  return f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"


def _projection(bandwidth, latency):
  """What the model says of chips that nobody here has."""
  heads = [
    "chips",
    "network",
    "hops",
    "message",
    "all-reduce us",
    "E, 1 ms",
    "E, 10 ms",
  ]
  heads.append("E = 0.95 from")
  lines = []
  for chips, sides in TORUS.items():
    for shape in ("torus", "tree", "ring"):
      for side in (64, 224):
        size = 4 * side**2 * 3
        cost = allreduce(chips, size, bandwidth=bandwidth, latency=latency, shape=shape)
        name = "x".join(map(str, sides)) if shape == "torus" else shape
        lines.append(
          [
            str(chips),
            name,
            f"{hops(chips, shape):.0f}",
            f"{side} px",
            f"{cost * 1e6:.0f}",
          ]
          + [f"{t / (t + cost):.3f}" for t in (1e-3, 1e-2)]
          + [f"{19 * cost * 1e3:.2f} ms"]
        )
  return (
    "### Projected, not measured\n\n"
    f"Assumed: {bandwidth / 1e9:g} GB/s per chip, {latency * 1e6:g} us per hop, a "
    "gradient of the worker's own batch in 1 or 10 ms, nothing overlapped, no "
    "stragglers, input always ready; a message of 4 H W 3 bytes. E = t_grad / t(n); a "
    "torus adds up along one axis after the other.\n\n"
    + summaries.markdown(heads, lines)
  )


# How far the fast sum may be off.


def tolerance():
  """Prints the largest gap between one device and all, over the largest value."""
  devices = jax.device_count()
  nets = {
    "ConvNet": (models.ConvNet(num_classes=3, width=8, depth=3), (16,)),
    "U-Net": (models.UNet(num_classes=2, width=8, depth=2), (16, 32, 32)),
  }
  works = {"universal, 6 L2 steps": _crafted, "training, 3 Adam steps": _trained}
  lines = []
  for name, (model, labels) in nets.items():
    for work, run in works.items():
      cells = [name, work]
      for microbatches in (None, devices):
        meshes = (sharding.mesh(jax.devices()[:n]) for n in (1, devices))
        cells.append(_gap(*(run(model, labels, mesh, microbatches) for mesh in meshes)))
      lines.append(cells)
  print(f"1 against {devices} devices, the largest gap over the largest value\n")
  print(summaries.markdown(["network", "work", "fast sum", "fixed order"], lines))
  print("\n" + summaries.signature(summaries.origin()))


def _gap(one, other):
  pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
  gap = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs)
  largest = max(np.abs(np.asarray(a)).max() for a, _ in pairs)
  return f"{gap / largest:.1e}" if gap else "0, every bit"


def _crafted(model, labels, mesh, microbatches):
  variables = _variables(model)

  def make(**form):
    uap = attacks.universal(2.0, norm="l2", num_steps=6, **form)
    return functools.partial(uap.step, functools.partial(model.apply, variables))

  uap = attacks.universal(2.0, norm="l2", num_steps=6)
  start = uap.init(jax.random.key(3), jnp.zeros(_SMALL))
  return _driven(make, start, labels, mesh, microbatches, steps=6).delta


def _trained(model, labels, mesh, microbatches):
  tx, loss = optax.adam(1e-3), training.task_loss
  params = _variables(model)["params"]
  step = functools.partial(training.train_step, victims.flax_apply(model), tx, loss)
  start = training.init_state(jax.random.key(4), params, {}, tx)
  return _driven(step, start, labels, mesh, microbatches, steps=3).params


_SMALL = (32, 32, 3)


def _variables(model):
  return jax.device_get(jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, *_SMALL))))


def _driven(make, state, labels, mesh, microbatches, steps):
  """The state after some steps of `make(**form)` on random images."""
  form = {} if microbatches is None else {"microbatches": microbatches}
  if form and mesh.size > 1:
    step = sharding.data_parallel(make(**form, axis_name=sharding.AXIS), mesh)
  else:
    step = make(**form)
  state, step = sharding.put(mesh, state), jax.jit(step)
  rng = np.random.default_rng(0)
  for _ in range(steps):
    image = rng.random((labels[0], *_SMALL), np.float32)
    label = rng.integers(0, 2, labels).astype(np.int32)
    state, _ = step(state, sharding.scatter(mesh, {"image": image, "label": label}))
  return state


def _read(path):
  with open(path) as file:
    return file.read()


if __name__ == "__main__":
  main()
