"""What the XLA flags for CPU bring: PGD inside the compiled loop, flag set by flag set.

    python benchmarks/cpu_flags.py [--cases unet32 resnet50] [--flags none no-ynn-conv]
      [--rounds 7] [--dtype bfloat16] [--out flags.json]

XLA reads its flags once per process, so every set has a child of its own. For each case
all children compile `jaxadv.attacks.pgd`, one step inside `lax.scan`, with the weights
as arguments; then they take turns, pinned to one core, and the CPU clock is read, so
other work on the machine disturbs all of them alike. Reported are CPU milliseconds per
step (median and quartiles), the ratio of medians to `none`, CPU seconds to trace and
compile, and how far logits and input gradient are from those of `none`, relative to the
largest. Where a unit is next to zero a last bit decides whether it is on, so a gradient
may differ by more than rounding although the logits do not.

A flag that the installed jaxlib does not know ends its child; it is reported as such.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time

if __name__ == "__main__" and hasattr(os, "sched_setaffinity"):  # before jax starts
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np

import jaxadv
from jaxadv import models, types

__all__ = ["CASES", "FLAGS", "child", "measure", "summary"]

_YNN = "--xla_cpu_experimental_ynn_fusion_type"
_NO_YNN_CONV = f"{_YNN}=-individual_convolution"
_ONEDNN = "--xla_cpu_use_onednn=true --xla_cpu_experimental_onednn_custom_call=true"
FLAGS = {
  "none": "",
  "no-ynn-conv": _NO_YNN_CONV,
  "no-ynn-dot": f"{_YNN}=-individual_dot",
  "onednn": _ONEDNN,
  "onednn, no-ynn-conv": f"{_ONEDNN} {_NO_YNN_CONV}",
  "no-xnnpack": "--xla_cpu_use_xnnpack=false",
  "vector-512": "--xla_cpu_prefer_vector_width=512",
  "concurrency": "--xla_cpu_enable_concurrency_optimized_scheduler=true",
  "fast-runtime": "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_RUNTIME",
  "fast-compile": "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
  "opt-level-1": "--xla_backend_optimization_level=1",
  "split-1": "--xla_cpu_parallel_codegen_split_count=1",
  "one-thread": "--xla_cpu_multi_thread_eigen=false",
  "fast-math": "--xla_cpu_enable_fast_math=true",  # changes numbers: only to compare
}
# model, side, images; all of three channels
CASES = {
  "unet32": (models.UNet(width=32), 128, 1),
  "unet32 batch 4": (models.UNet(width=32), 128, 4),
  "unet64": (models.UNet(width=64), 128, 1),
  "resnet50": (models.ResNet(num_classes=3), 64, 8),
  "vgg16": (models.VGG(num_classes=3), 64, 8),
  "convnet": (models.ConvNet(num_classes=3), 64, 32),
}


def program(model, side, batch, *, steps, dtype=None):
  """A compiled PGD, CPU seconds to trace and compile it, logits and a gradient."""
  if dtype:
    model = model.clone(dtype=jnp.dtype(dtype))
  x = jax.random.uniform(jax.random.key(0), (batch, side, side, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(1), x)
  variables = jax.tree.map(_random, shapes)
  shape = jax.eval_shape(model.apply, variables, x)[0].shape
  y = jnp.zeros(shape[:-1], jnp.int32)
  attack = jaxadv.attacks.pgd(8 / 255, num_steps=steps)

  def run(variables, x, y, state):
    predict = functools.partial(model.apply, variables)
    step = lambda state, _: attack.step(predict, x, {"label": y}, state)
    return jax.lax.scan(step, state, length=steps)[0].delta

  def cost(x, variables):
    logits = types.call(functools.partial(model.apply, variables), x)[0]
    return jax.nn.log_softmax(logits)[..., 0].mean(), logits

  state, _ = attack.init(jax.random.key(2), lambda x: jnp.zeros(shape), x, y)
  times = [time.process_time()]
  lowered = jax.jit(run).lower(variables, x, y, state)
  times.append(time.process_time())
  compiled = lowered.compile()
  times.append(time.process_time())
  seconds = {"trace_s": times[1] - times[0], "compile_s": times[2] - times[1]}
  gradient, logits = jax.jit(jax.grad(cost, has_aux=True))(x, variables)
  numbers = {"logits": _some(logits), "gradient": _some(gradient)}
  return functools.partial(compiled, variables, x, y, state), seconds | numbers


def _some(array):
  flat = np.ravel(array).astype(float)
  return flat[:: max(1, len(flat) // 4096)].tolist()


def _random(leaf):
  """Weights of any shape quickly; a norm's scale and variance must be positive."""
  draw = np.random.default_rng(leaf.size).normal(size=leaf.shape)
  if len(leaf.shape) > 1:
    return jnp.asarray(draw / np.sqrt(np.prod(leaf.shape[:-1])), leaf.dtype)
  return jnp.asarray(0.1 * np.abs(draw) + 0.9, leaf.dtype)


def child(case, *, steps, dtype):
  """Compiles, tells how long it took, and takes a turn for every line of its input."""
  call, told = program(*CASES[case], steps=steps, dtype=dtype)
  jax.block_until_ready(call())
  print(json.dumps(told), flush=True)
  for _ in sys.stdin:
    start = time.process_time()
    jax.block_until_ready(call())
    print((time.process_time() - start) / steps * 1e3, flush=True)


def measure(case, flags, *, rounds, steps, dtype=None):
  """What each set of flags told and its milliseconds; `None` where it did not start."""
  words = [sys.executable, __file__, "--child", case, "--steps", str(steps)]
  words += ["--dtype", dtype] if dtype else []
  children, found = {}, {}
  for name in flags:  # one after another, so that compile times do not mix
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS[name]}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    quiet = {"stderr": subprocess.DEVNULL, "text": True}
    children[name] = subprocess.Popen(words, env=environment, **pipes, **quiet)
    line = children[name].stdout.readline()
    found[name] = json.loads(line) | {"ms": []} if line else None
  for _ in range(rounds):
    for name in (name for name in flags if found[name]):
      children[name].stdin.write("\n")
      children[name].stdin.flush()
      found[name]["ms"].append(float(children[name].stdout.readline()))
  for process in children.values():
    process.communicate()
  return found


def summary(found):
  """Median, quartiles and ratio to `none` of every set of flags."""
  base, rows = found["none"], {}
  for name, row in found.items():
    if row is None:
      rows[name] = None
      continue
    low, middle, high = np.percentile(row["ms"], [25, 50, 75])
    rows[name] = {
      "ms": middle,
      "quartiles_ms": [low, high],
      "over_none": middle / statistics.median(base["ms"]),
      "trace_s": row["trace_s"],
      "compile_s": row["compile_s"],
      "logits_error": _error(row["logits"], base["logits"]),
      "gradient_error": _error(row["gradient"], base["gradient"]),
    }
  return rows


def _error(got, want):
  got, want = np.asarray(got), np.asarray(want)
  return float(np.abs(got - want).max() / np.abs(want).max())


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
  parser.add_argument("--flags", nargs="+", default=list(FLAGS), choices=FLAGS)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--steps", type=int, default=4)
  parser.add_argument("--dtype", help="that the models compute in")
  parser.add_argument("--out", help="JSON file to write")
  parser.add_argument("--child", help=argparse.SUPPRESS)
  return parser.parse_args()


def _print(case, rows):
  for name, row in rows.items():
    if row is None:
      print(f"{case:15} {name:20} did not start", flush=True)
      continue
    low, high = row["quartiles_ms"]
    print(
      f"{case:15} {name:20} {row['ms']:8.1f} ({low:.1f}-{high:.1f})"
      f"  x{row['over_none']:.3f}  compile {row['compile_s']:.1f} s"
      f"  logits {row['logits_error']:.0e} gradient {row['gradient_error']:.0e}",
      flush=True,
    )


def main():
  options = _arguments()
  how = {"steps": options.steps, "dtype": options.dtype}
  if options.child:
    child(options.child, **how)
    return
  flags = ["none", *(name for name in options.flags if name != "none")]
  print(f"jax {jax.__version__}; CPU ms per step (quartiles), ratio to no flags")
  report = {"jax": jax.__version__, **vars(options), "results": {}}
  for case in options.cases:
    found = measure(case, flags, rounds=options.rounds, **how)
    report["results"][case] = summary(found)
    _print(case, report["results"][case])
  if options.out:
    with open(options.out, "w") as file:
      json.dump(report, file, indent=1)


if __name__ == "__main__":
  main()
