"""What a gradient step costs inside a compiled loop, against the bare gradient.

    python benchmarks/loop.py [--models unet16-group twin16 resnet50] [--out loop.json]

Per model: CPU seconds of the jitted `value_and_grad` of the input (`bare`), of one sign
step inside `lax.scan` (`scan`), of one step of `jaxadv.attacks.pgd` inside the compiled
loop (`pgd`), of the same step called from a host loop (`host`), of `pgd` over the model
after `jaxadv.freeze` (`frozen`), and of a universal perturbation as `jaxadv uap` crafts
it, with the weights as arguments, without and with `freeze` (`uap`, `uap frozen`). The
process is pinned to one core and the programs take turns, so other work on the machine
disturbs all of them alike; reported are medians and quartiles, and ratios of medians to
`bare`.

`unet<width>-<norm>` is our U-Net. `twin<width>` has the same blocks on plain Flax
convolutions, transposed convolutions and pooling, for comparison. The classifiers have
the names of `jaxadv.studies.seven_architectures`, at a quarter of their width. With
`flax-` before it, any model of ours is built on the convolutions and pools of Flax.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import time
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__" and hasattr(os, "sched_setaffinity"):  # before jax starts
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxadv
from jaxadv import models, pooling, studies, types
from jaxadv.models import convolution

__all__ = ["OnFlax", "Twin", "build", "measure", "programs"]

MODELS = ("unet16-group", "unet16-none", "unet32-group", "unet32-none", "twin16")


class Twin(nn.Module):
  """The U-Net without norm as one would write it in plain Flax."""

  width: int = 16
  depth: int = 4

  @nn.compact
  def __call__(self, x):
    """Logits `(B, H, W, 2)`."""
    skips = []
    for level in range(self.depth):
      x = self._block(x, level)
      skips.append(x)
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = self._block(x, self.depth)
    for level in reversed(range(self.depth)):
      x = nn.ConvTranspose(self.width << level, (2, 2), (2, 2))(x)
      x = self._block(jnp.concatenate([skips[level], x], -1), level)
    return nn.Dense(2)(x)

  def _block(self, x, level):
    for _ in range(2):
      x = nn.relu(nn.Conv(self.width << level, (3, 3))(x))
    return x


class OnFlax(NamedTuple):
  """A model of ours on the convolutions and pools of Flax."""

  model: Any

  def init(self, *arguments):
    """Variables, the same as the model's own."""
    with _flax():
      return self.model.init(*arguments)

  def apply(self, *arguments):
    """Logits and features, the same but for rounding."""
    with _flax():
      return self.model.apply(*arguments)


@contextlib.contextmanager
def _flax():
  def pool(function, image, window=2, *, strides=None, padding="VALID", **kept):
    rank = image.ndim - 2
    sides, steps = (window,) * rank, (strides or window,) * rank
    return function(image, sides, steps, padding, **kept)

  def mean(*arguments, count_padding=False):
    return nn.avg_pool(*arguments, count_include_pad=count_padding)

  lax = jax.lax.conv_general_dilated
  with (
    mock.patch.object(convolution, "conv_general_dilated", lax),
    mock.patch.object(pooling, "max_pool", functools.partial(pool, nn.max_pool)),
    mock.patch.object(pooling, "avg_pool", functools.partial(pool, mean)),
  ):
    yield


def build(name):
  """The model called `unet<width>-<norm>`, `twin<width>`, or as in the study."""
  if name.startswith("flax-"):
    return OnFlax(build(name.removeprefix("flax-")))
  classifiers = studies.seven_architectures(num_classes=3)
  if name in classifiers:
    return classifiers[name]
  kind, _, norm = name.partition("-")
  if kind.startswith("twin"):
    return Twin(int(kind[4:]))
  return models.UNet(width=int(kind[4:]), norm=norm)


def programs(model, *, side, batch, steps):
  """Functions without arguments that take `steps` steps each, by name."""
  x = jax.random.uniform(jax.random.key(0), (batch, side, side, 3))
  variables = jax.jit(model.init)(jax.random.key(1), x)
  predict = lambda x: model.apply(variables, x)
  shape = jax.eval_shape(lambda x: types.call(predict, x)[0], x).shape
  y = jnp.zeros(shape[:-1], jnp.int32)

  def cost(x):
    logits = types.call(predict, x)[0]
    return -(nn.log_softmax(logits) * jax.nn.one_hot(y, shape[-1])).sum(-1).mean()

  def sign_step(x, _):
    value, gradient = jax.value_and_grad(cost)(x)
    return jnp.clip(x + 0.001 * jnp.sign(gradient), 0, 1), value

  attack = jaxadv.attacks.pgd(8 / 255, num_steps=steps)
  state, target = attack.init(jax.random.key(2), predict, x, y)
  step = lambda state, _: attack.step(predict, x, target, state)
  bare = jax.jit(jax.value_and_grad(cost))
  scan = jax.jit(lambda x: jax.lax.scan(sign_step, x, length=steps))
  pgd = jax.jit(lambda state: jax.lax.scan(step, state, length=steps))
  host = jax.jit(step)
  stepped = functools.partial(attack.step, jaxadv.freeze(predict, x), x, target)
  frozen = jax.jit(
    lambda state: jax.lax.scan(lambda s, _: stepped(s), state, length=steps)
  )
  craft = functools.partial(_craft, model, variables, x, y, steps)
  return {
    "bare": lambda: [bare(x) for _ in range(steps)],
    "scan": lambda: scan(x),
    "pgd": lambda: pgd(state),
    "host": lambda: functools.reduce(
      lambda s, _: host(s, None)[0], range(steps), state
    ),
    "frozen": lambda: frozen(state),
    "uap": craft(lambda predict, x: predict),
    "uap frozen": craft(functools.partial(jaxadv.freeze, once=True)),
  }


def _craft(model, variables, x, y, steps, bind):
  """Steps of a universal perturbation, with the weights as arguments."""
  uap = jaxadv.attacks.universal(8 / 255, num_steps=steps)
  start = uap.init(jax.random.key(2), x[0])

  @jax.jit
  def step(variables, state):
    predict = bind(functools.partial(model.apply, variables), x)
    return uap.step(predict, state, {"image": x, "decision": y})[0]

  return lambda: functools.reduce(lambda s, _: step(variables, s), range(steps), start)


def measure(calls, *, steps, repeats):
  """CPU milliseconds per step, `{name: [one per repeat]}`; the programs take turns."""
  for call in calls.values():
    jax.block_until_ready(call())
  times = {name: [] for name in calls}
  for _ in range(repeats):
    for name, call in calls.items():
      start = time.process_time()
      jax.block_until_ready(call())
      times[name].append((time.process_time() - start) / steps * 1e3)
  return times


def summary(times):
  """Median, quartiles and ratio to `bare` of every program."""
  bare = statistics.median(times["bare"])
  rows = {}
  for name, values in times.items():
    low, middle, high = np.percentile(values, [25, 50, 75])
    rows[name] = {
      "ms": middle,
      "quartiles_ms": [low, high],
      "over_bare": middle / bare,
    }
  return rows


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
  parser.add_argument("--side", type=int, default=64)
  parser.add_argument("--batch", type=int, default=2)
  parser.add_argument("--steps", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--out", help="JSON file to write")
  return parser.parse_args()


def main():
  options = _arguments()
  print(f"jax {jax.__version__}, flax {flax.__version__}; CPU ms per step (quartiles)")
  report = {"jax": jax.__version__, "flax": flax.__version__, **vars(options)}
  report["results"] = {}
  for name in options.models:
    steps = options.steps
    calls = programs(build(name), side=options.side, batch=options.batch, steps=steps)
    times = measure(calls, steps=steps, repeats=options.repeats)
    rows = report["results"][name] = summary(times)
    for program, row in rows.items():
      low, high = row["quartiles_ms"]
      print(
        f"{name:18} {program:10} {row['ms']:8.1f} ({low:.1f}-{high:.1f})"
        f"  x{row['over_bare']:.3f}",
        flush=True,
      )
  if options.out:
    with open(options.out, "w") as file:
      json.dump(report, file, indent=1)


if __name__ == "__main__":
  main()
