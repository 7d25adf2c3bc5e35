"""How fast universal perturbations are crafted: images/s, and time to 80 % success.

    jaxadv uap configs/uap_blood.py --out runs/uap_blood
    python benchmarks/uap.py configs/uap_blood.py --out runs/uap_blood

Crafts anew the perturbations of the study against its trained victims, at one share, as
`jaxadv uap` does, and judges them on the test images, as stored in 8 bits, every few
steps: by fooling, and those with a target by the share decided as it. The clock is that
of the wall; making batches counts, judging does not, and of the first step, which
compiles, the median of the others. `settled` is the number of images after which the
success stayed within 0.02 of its last value.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np

from jaxadv import crafting, outcomes, progress, subjects, universal_job

EVERY = 5  # steps between two looks


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("config")
  parser.add_argument("--out", required=True, help="folder of the run")
  parser.add_argument("--quick", action="store_true", help="the config's quick form")
  parser.add_argument("--victims", nargs="+", help="all of the study by default")
  parser.add_argument("--share", type=float, default=0.04)
  parser.add_argument("--level", type=float, default=0.8, help="success to reach")
  options = parser.parse_args(arguments)
  run = universal_job.prepare(
    options.config, quick=options.quick, out=options.out, progress=progress.terminal
  )
  heads = ["victim", "perturbation", "images/s (10 % to 90 %)"]
  heads += [f"seconds to {options.level:.0%}", "images", "last", "settled", "one class"]
  print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
  for name in options.victims or run.study.victims:
    subject = universal_job.subject(run, name)
    for label, plan in run.plans.items():
      if plan.steps:
        cells = _measured(run, subject, plan, options)
        print("| " + " | ".join([name, f"`{label}`", *cells]) + " |", flush=True)


def _measured(run, subject, plan, options):
  seconds, judged, clock = [], {}, [time.perf_counter()]

  def on_step(n, state, metrics):
    jax.block_until_ready(state)
    seconds.append(time.perf_counter() - clock[0])
    if n % EVERY == 0 or n == plan.steps:
      judged[n] = _success(subject, plan, state.delta)
    clock[0] = time.perf_counter()

  crafting.craft(
    plan, subject, universal_job.radius(run, options.share), on_step=on_step
  )
  seconds[0] = statistics.median(seconds[1:] or seconds)
  reached = next((n for n, rate in judged.items() if rate >= options.level), None)
  cost = ["not reached", "-"]
  if reached is not None:
    cost = [f"{sum(seconds[:reached]):.1f}", str(reached * plan.batch)]
  last = judged[plan.steps]
  loose = [n for n, rate in judged.items() if abs(rate - last) > 0.02]
  settled = min(n for n in judged if n > max(loose, default=0)) * plan.batch
  speed = _speed(seconds, plan.batch)
  return [speed, *cost, f"{last:.2f}", str(settled), _bound(subject, plan)]


def _success(subject, plan, delta):
  images = subject.test.dataset.images
  after = subjects.decisions(
    subject.predict, subject.variables, images, delta, view="stored"
  )
  hit = after != subject.test.before if plan.target is None else after == plan.target
  return float(np.mean(hit))


def _bound(subject, plan):
  """What sending every image to one class would reach."""
  if plan.target is not None:
    return "1.00"
  before, classes = subject.test.before, len(subject.test.dataset.class_names)
  table = outcomes.count(before, before, before, num_classes=classes)
  return f"{outcomes.rates(np.asarray(table))['one_class']:.2f}"


def _speed(seconds, batch):
  low, high = np.percentile(seconds, [10, 90])
  middle = statistics.median(seconds)
  return f"{batch / middle:.0f} ({batch / high:.0f} to {batch / low:.0f})"


if __name__ == "__main__":
  main()
