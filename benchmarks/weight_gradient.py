"""What the weight gradients of convolutions cost on CPU, alone and in a training step.

    python benchmarks/weight_gradient.py [--models vgg16-64] [--layers 8,64,32,32,3,1]

Layers: CPU milliseconds of one weight gradient, and the MiB of temporary memory its
program needs, for autodiff's, for the two of `jaxadv.models.weight_gradient`
(`convolution` and `product`, an im2col), and for other ways to write it: one product
per tap, `lax.conv_general_dilated_patches`, an im2col of one image at a time. A star
marks what the library takes. Models: the same for one training step (SGD) with
autodiff's and with our weight gradients. Both as a jitted call (`alone`), and per step
inside `lax.scan`. The process is pinned to one core and the programs take turns;
reported are medians (quartiles), and the median ratio of a turn.
"""

import argparse
import functools
import json
import operator
import os
import statistics
import subprocess
import time

if __name__ == "__main__":  # before jax starts
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
  )
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxadv import models, patches, training, victims
from jaxadv.models import convolution, weight_gradient

__all__ = ["MODELS", "WAYS", "layer_programs", "measure", "model_programs", "summary"]

# batch, side, channels in and out, window, stride
LAYERS = (
  *("32,32,3,16,3,1", "32,32,16,16,3,1", "32,16,32,32,3,1", "32,8,64,64,3,1"),
  *("32,4,128,128,3,1", "32,64,16,16,3,1", "8,64,32,32,3,1", "8,64,64,32,3,1"),
  *("8,128,32,32,3,1", "8,16,128,128,3,1", "8,4,512,512,3,1", "16,64,3,64,7,2"),
  *("16,16,64,256,1,1", "16,16,256,64,1,1", "16,16,128,128,3,2", "16,2,512,512,3,1"),
)

# name: model, side, batch
MODELS = {
  "convnet16-32": (models.ConvNet(3, width=16, depth=3), 32, 32),
  "convnet16-64": (models.ConvNet(3, width=16, depth=4), 64, 32),
  "unet32-64": (models.UNet(width=32), 64, 8),
  "unet32-128": (models.UNet(width=32), 128, 8),
  "vgg16-64": (models.vgg16(3, width=0.25, norm="batch"), 64, 16),
  "resnet50-64": (models.resnet50(3), 64, 16),
}


def by_taps(image, kernel, cotangent, shapes):
  """One matrix product per tap."""
  flat = cotangent.reshape(-1, cotangent.shape[-1])
  seen = patches.columns(image, kernel.shape[:-2], *shapes[:2])
  products = [part.reshape(-1, part.shape[-1]).T @ flat for part in seen]
  return jnp.stack(products).reshape(kernel.shape)


def by_patches(image, kernel, cotangent, shapes):
  """An im2col made by a convolution with an identity kernel."""
  layout = patches.layout(image.ndim)
  window = kernel.shape[:-2]
  seen = lax.conv_general_dilated_patches(
    image, window, *shapes[:2], dimension_numbers=layout
  )
  flat = cotangent.reshape(-1, cotangent.shape[-1])
  product = seen.reshape(-1, seen.shape[-1]).T @ flat
  return jnp.moveaxis(product.reshape(image.shape[-1], *window, -1), 0, -2)


def by_images(image, kernel, cotangent, shapes):
  """An im2col of one image at a time, summed."""

  def add(total, pair):
    x, y = pair
    return total + by_product(x[None], kernel, y[None], shapes), None

  return lax.scan(add, jnp.zeros_like(kernel), (image, cotangent))[0]


def by_autodiff(image, kernel, cotangent, shapes):
  """What autodiff makes of the library's forward pass."""

  def convolve(kernel):
    layout = patches.layout(image.ndim)
    return convolution.conv_general_dilated(
      image, kernel, *shapes[:2], dimension_numbers=layout
    )

  with weight_gradient.as_autodiff():
    return jax.vjp(convolve, kernel)[1](cotangent)[0]


def by_convolution(image, kernel, cotangent, shapes):
  forward = weight_gradient.as_convolution
  return weight_gradient.gradient(forward, image, kernel, cotangent, shapes=shapes)


def by_product(image, kernel, cotangent, shapes):
  forward = weight_gradient.as_product
  return weight_gradient.gradient(forward, image, kernel, cotangent, shapes=shapes)


WAYS = {
  "autodiff": by_autodiff,
  "convolution": by_convolution,
  "product": by_product,
  "taps": by_taps,
  "patches": by_patches,
  "images": by_images,
}


def layer_programs(layer, place, *, steps):
  """`{way: compiled}`, their arguments, and the way the library takes."""
  batch, side, channels, features, window, stride = layer
  shapes = weight_gradient.Shapes((stride,) * 2, ((window // 2,) * 2,) * 2)
  rows = (side + 2 * (window // 2) - window) // stride + 1
  keys = jax.random.split(jax.random.key(0))
  image = jax.random.normal(keys[0], (batch, side, side, channels))
  kernel = jnp.zeros((window, window, channels, features))
  cotangent = jax.random.normal(keys[1], (batch, rows, rows, features))

  def alone(way, image, cotangent):
    return way(image, kernel, cotangent, shapes)

  def scan(way, image, cotangent):
    # the next step needs this gradient, so that no step can be left out
    step = lambda x, _: (x + 1e-9 * way(x, kernel, cotangent, shapes).mean(), None)
    return lax.scan(step, image, length=steps)[0]

  program = {"alone": alone, "scan": scan}[place]
  calls = {
    name: _compiled(functools.partial(program, way), image, cotangent)
    for name, way in WAYS.items()
  }
  forward = weight_gradient.way(image, kernel, cotangent)
  return calls, (image, cotangent), forward.__name__.removeprefix("as_")


def model_programs(model, side, batch, place, *, steps):
  """`{"autodiff" or "ours": compiled}` and the arguments of a training step."""
  x = jax.random.uniform(jax.random.key(0), (batch, side, side, 3))
  variables = _weights(jax.eval_shape(model.init, jax.random.key(1), x))
  logits = jax.eval_shape(model.apply, variables, x)[0]
  masks = logits.ndim > 2
  loss = training.dice_cross_entropy if masks else training.cross_entropy
  tx = optax.sgd(1e-3)
  step = training.train_step(victims.flax_apply(model), tx, loss)
  state = training.init_state(jax.random.key(2), variables.pop("params"), variables, tx)
  label = jax.random.randint(jax.random.key(3), logits.shape[:-1], 0, logits.shape[-1])
  data = {"image": x, "label": label}

  def scan(state, data):
    return lax.scan(lambda s, _: step(s, data), state, length=steps)

  program = {"alone": step, "scan": scan}[place]
  with weight_gradient.as_autodiff():
    plain = _compiled(lambda *a: program(*a), state, data)
  ours = _compiled(lambda *a: program(*a), state, data)
  return {"autodiff": plain, "ours": ours}, (state, data)


def _weights(shapes):
  """Numbers of the right size: initialisation would have to be compiled too."""
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(1, 1, leaf.shape) / leaf.size**0.5)
  return jax.tree.map(lambda leaf: draw(leaf).astype(leaf.dtype), dict(shapes))


def _compiled(function, *arguments):
  return jax.jit(function).lower(*arguments).compile()


def measure(programs, arguments, *, steps, repeats, seconds=60.0):
  """CPU ms per step, `{name: one per repeat}`; what has used `seconds` is left out."""
  times = {name: [] for name in programs}
  for program in programs.values():
    jax.block_until_ready(program(*arguments))
  for turn in range(repeats):
    for name in list(programs)[:: -1 if turn % 2 else 1]:
      if sum(times[name]) * steps < 1e3 * seconds:
        times[name].append(1e3 * _seconds(programs[name], arguments) / steps)
  return times


def _seconds(program, arguments, least=0.01):
  """CPU seconds of one call; short ones are repeated, as the clock is coarse."""
  start, calls = time.process_time(), 0
  while not calls or time.process_time() - start < least:
    jax.block_until_ready(program(*arguments))
    calls += 1
  return (time.process_time() - start) / calls


def summary(times, programs):
  """Median, quartiles, autodiff's time over this one, and temporary MiB, per program.

  The ratio is the median over turns, in which both met the same load.
  """
  rows = {}
  for name, values in times.items():
    low, middle, high = np.percentile(values, [25, 50, 75])
    memory = programs[name].memory_analysis().temp_size_in_bytes / 2**20
    rows[name] = {
      "ms": middle,
      "quartiles_ms": [low, high],
      "times_faster": statistics.median(
        map(operator.truediv, times["autodiff"], values)
      ),
      "temporary_mib": memory,
    }
  return rows


def _print(label, place, rows, chosen):
  for name, row in rows.items():
    low, high = row["quartiles_ms"]
    print(
      f"{label:18} {place:6} {name:11}{'*' if name == chosen else ' '}"
      f" {row['ms']:9.2f} ({low:.2f}-{high:.2f})"
      f"  x{row['times_faster']:.2f}  {row['temporary_mib']:.1f} MiB",
      flush=True,
    )


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="NAME")
  parser.add_argument("--layers", nargs="*", default=LAYERS, metavar="B,side,C,F,k,s")
  parser.add_argument("--places", nargs="+", default=["alone", "scan"])
  parser.add_argument("--steps", type=int, default=2, help="of a scan")
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--seconds", type=float, default=60.0, help="of CPU per program")
  parser.add_argument("--out", help="JSON file to write")
  return parser.parse_args()


def _commit():
  here = os.path.dirname(os.path.abspath(__file__))
  command = ["git", "-C", here, "describe", "--always", "--dirty"]
  return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _programs(label, place, steps):
  if label in MODELS:
    return *model_programs(*MODELS[label], place, steps=steps), "ours"
  return layer_programs(tuple(map(int, label.split(","))), place, steps=steps)


def main():
  options = _arguments()
  versions = {"jax": jax.__version__, "flax": flax.__version__, "commit": _commit()}
  print(", ".join(f"{name} {version}" for name, version in versions.items()))
  print("CPU ms per step (quartiles), times faster than autodiff, temporary memory")
  report = {**versions, **vars(options), "results": {}}
  settings = {"repeats": options.repeats, "seconds": options.seconds}
  for label in (*options.layers, *options.models):
    rows = report["results"][label] = {}
    for place in options.places:
      steps = options.steps if place == "scan" else 1
      calls, arguments, chosen = _programs(label, place, steps)
      times = measure(calls, arguments, steps=steps, **settings)
      rows[place] = summary(times, calls)
      _print(label, place, rows[place], chosen)
  if options.out:
    with open(options.out, "w") as file:
      json.dump(report, file, indent=1)


if __name__ == "__main__":
  main()
