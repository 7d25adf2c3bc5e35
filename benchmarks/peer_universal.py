"""Universal perturbations of ours and of ART against one network, for `peers.py`.

A ResNet-18 of torchvision learns the five grades of the IDRiD pack, at 64 pixels, and
goes to both libraries. All perturbations are crafted on its training images, judged on
the same, and the clock is CPU time; judging and, for ours, compiling are not counted.
"""

import functools
import importlib
import math
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peer_networks

import jaxadv
from jaxadv import attacks, data, loops, models

__all__ = ["measure"]

PACK = "fundus_idrid_dr_grade_128"
EPS, LEVEL, TARGET = 0.1, 0.8, 1
EPOCHS, BATCH, STEPS = 12, 32, 400  # steps: as long as ART may take, or to the level
CAP = 90  # CPU seconds that one program of ART may take, about
# attack of ART -> inner attack and its parameters
ART = {
  "art UniversalPerturbation, fgsm": ("fgsm", {"eps": EPS / 5}),
  "art UniversalPerturbation, deepfool": (
    "deepfool",
    {"max_iter": 10, "verbose": False},
  ),
  "art TargetedUniversalPerturbation, fgsm": (
    "fgsm",
    {"eps": EPS / 5, "targeted": True},
  ),
}


class Victim(NamedTuple):
  """A trained network in both libraries.

  Attributes:
    network: of torchvision, frozen.
    predict: ours, images to logits.
    x: `(N, H, W, 3)` training images.
    before: decisions on them.
    classes: how many.
  """

  network: Any
  predict: Any
  x: np.ndarray
  before: np.ndarray
  classes: int


def measure() -> dict[str, Any]:
  """Images per second, fooling, and CPU seconds to 80 %, by program; or an error."""
  try:
    victim = _victim()
  except Exception as error:  # noqa: BLE001 - no PyTorch, no data: listed as the result
    return {"error": f"{type(error).__name__}: {error}"}
  judge = _judge(victim)
  rows = {
    "ours universal": _ours(victim, judge, None),
    "ours targeted_universal": _ours(victim, judge, TARGET),
  }
  for name in ART:
    print(f"  {name}", file=sys.stderr, flush=True)
    try:
      rows[name] = _art(victim, judge, name)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
      rows[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
  shares = np.bincount(victim.before, minlength=victim.classes) / len(victim.before)
  about = {"pack": PACK, "eps": EPS, "images": len(victim.x)}
  return {**about, "largest class": float(shares.max()), "programs": rows}


def _victim():
  torch = peer_networks.import_torch()
  dataset = data.resize(data.load(PACK, split="train"), 64)
  x = np.asarray(data.as_float(dataset.images), np.float32)
  classes = len(dataset.class_names)
  torch.manual_seed(0)
  network = peer_networks.import_torchvision().models.resnet18(num_classes=classes)
  images = torch.from_numpy(x).permute(0, 3, 1, 2)
  labels = torch.from_numpy(np.array(dataset.labels)).long()
  optimizer = torch.optim.Adam(network.parameters(), 1e-3)
  for _ in range(EPOCHS):
    for rows in torch.randperm(len(x)).split(BATCH):
      loss = torch.nn.functional.cross_entropy(network(images[rows]), labels[rows])
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
  network = network.eval().requires_grad_(False)
  model = models.resnet18(classes)
  variables = peer_networks.for_jax(network, model, x.shape[1])
  predict = lambda x: model.apply(variables, x)[0]
  with torch.no_grad():
    before = torch.cat([network(part).argmax(1) for part in images.split(64)]).numpy()
  return Victim(network, predict, x, before, classes)


def _judge(victim):
  """`delta` to the shares of changed decisions and of decisions for the target."""
  decide = jax.jit(lambda x, d: victim.predict(jnp.clip(x + d, 0, 1)).argmax(-1))

  def judge(delta):
    call = functools.partial(decide, d=jnp.asarray(delta))
    after = loops.over_batches(call, victim.x, size=60)
    return float((after != victim.before).mean()), float((after == TARGET).mean())

  return judge


def _ours(victim, judge, target):
  if target is None:
    attack = attacks.universal(EPS, num_steps=STEPS)
  else:
    attack = attacks.targeted_universal(EPS, target=target, num_steps=STEPS)
  predict = jaxadv.freeze(victim.predict, jnp.asarray(victim.x[:BATCH]))
  step = jax.jit(functools.partial(attack.step, predict))
  state = attack.init(jax.random.key(0), jnp.asarray(victim.x[0]))
  seconds, reached = [], None
  for n, batch in zip(range(1, STEPS + 1), _batches(victim), strict=False):
    start = time.process_time()
    state, _ = jax.block_until_ready(step(state, batch))
    seconds.append(time.process_time() - start)
    if n % 3 == 0 and judge(state.delta)[target is not None] >= LEVEL:
      reached = n
      break
  compiling, seconds[0] = seconds[0], float(np.median(seconds[1:]))
  fooling, hits = judge(state.delta)
  return {
    "images per s": BATCH / float(np.median(seconds)),
    "cpu_s": sum(seconds),
    "first step, with compiling": compiling,
    "fooling": fooling,
    "at target": hits,
    "cpu_s to 80 %": sum(seconds[:reached]) if reached else None,
    "images to 80 %": reached * BATCH if reached else None,
  }


def _batches(victim):
  rng = np.random.default_rng(0)
  while True:
    order = rng.permutation(len(victim.x))
    for first in range(0, len(order) - BATCH + 1, BATCH):
      rows = order[first : first + BATCH]
      decision = victim.before[rows].astype(np.int32)
      yield {"image": victim.x[rows], "decision": decision}


def _art(victim, judge, name):
  """Timed on a few images first, then on as many as the cap allows."""
  inner, parameters = ART[name]
  evasion = importlib.import_module("art.attacks.evasion")
  classification = importlib.import_module("art.estimators.classification")
  x = np.ascontiguousarray(np.moveaxis(victim.x, -1, 1))
  model = classification.PyTorchClassifier(
    victim.network,
    peer_networks.import_torch().nn.CrossEntropyLoss(),
    x.shape[1:],
    victim.classes,
    clip_values=(0, 1),
    device_type="cpu",
  )
  targeted = "Targeted" in name
  options = {"attacker": inner, "attacker_params": parameters, "norm": np.inf}
  options |= {"eps": EPS, "delta": 1 - LEVEL}
  if not targeted:
    options["verbose"] = False
  make = getattr(evasion, name.split(",")[0].split()[1])
  wish = np.eye(victim.classes, dtype=np.float32)[np.full(len(x), TARGET)]

  def craft(count, passes):
    attack = make(model, max_iter=passes, **options)
    start = time.process_time()
    attack.generate(x[:count], *([wish[:count]] if targeted else []))
    return time.process_time() - start, attack

  first, _ = craft(4, 1)
  count = int(min(len(x), max(4, CAP / first * 4)))
  seconds, attack = craft(count, 1)
  speed, passes = count / seconds, math.floor(CAP / seconds)
  if count == len(x) and passes > 1:  # it stops at the pass that reaches the level
    seconds, attack = craft(count, passes)
  fooling, hits = judge(np.moveaxis(attack.noise[0], 0, -1))
  done = (hits if targeted else fooling) >= LEVEL
  return {
    "images per s": speed,
    "cpu_s": seconds,
    "images": count,
    "fooling": fooling,
    "at target": hits,
    "cpu_s to 80 %": seconds if done else None,
  }
