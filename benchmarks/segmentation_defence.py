"""Masks under attack, of a U-Net trained plainly and with SegPGD: docs/defences.md.

    python benchmarks/segmentation_defence.py --out runs/nuclei_segpgd

Trains both for every seed, or reads what is there, and attacks the test images with
twenty steps of PGD, SegPGD and CosPGD at every radius. The IoU is a mean over the
images; behind it stands half of its 95 % interval over the seeds. At the largest radius
the numbers are doubted as `jaxadv.trust` doubts those of classes, by points of IoU.
"""

import argparse
import dataclasses
import pathlib
import statistics
from collections.abc import Sequence

from jaxadv import (
  assessment,
  attacks,
  combine,
  config_files,
  progress,
  summaries,
  victim_job,
)

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "train_nuclei_segpgd.py"
SLACK = 2.0  # points of IoU
MADE = {"PGD": attacks.pgd, "SegPGD": attacks.seg_pgd, "CosPGD": attacks.cos_pgd}


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", type=pathlib.Path, default=CONFIG)
  parser.add_argument("--out", type=pathlib.Path, default="runs/nuclei_segpgd")
  parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
  parser.add_argument("--radii", type=float, nargs="+", default=(2, 4, 8), help="/255")
  parser.add_argument("--data", help="source to use instead of the config's")
  parser.add_argument("--quick", action="store_true", help="the smallest sensible form")
  options = parser.parse_args(arguments)
  config = config_files.load_config(options.config, quick=options.quick)
  views = {"clean": combine.identity} | {
    f"{name} {radius:g}": _attack(make, radius / 255, 2 if options.quick else 20)
    for radius in options.radii
    for name, make in MADE.items()
  }
  controls = _controls(max(options.radii) / 255, 4 if options.quick else 60)
  plain = {"defence": None, "weights": None, "monitor": None}
  models = {
    name: _measured(config.experiment, options, changes, name, views | controls)
    for name, changes in {"standard": plain, "SegPGD": {}}.items()
  }
  lines = [[name, *(_cell(found[v]) for v in views)] for name, found in models.items()]
  print(f"# Adversarial training of a U-Net: {config.name}\n")
  print("`python benchmarks/segmentation_defence.py`\n")
  print(summaries.markdown(["IoU in percent", *views], lines) + "\n")
  for name, found in models.items():
    for n, seed in enumerate(options.seeds):
      ious = {view: values[n] for view, values in found.items()}
      for doubt in doubts(ious, f"PGD {max(options.radii):g}"):
        print(f"- **Unreliable**: {name} {seed}: {doubt}")
  print(f"\n{summaries.signature(summaries.origin())}")


def doubts(ious, pgd):
  """What speaks against the robustness of one model, in words; usually nothing."""
  at = ious.__getitem__
  checks = {
    "noise does more harm than PGD": at("noise") < at(pgd) - SLACK,
    "FGSM does more harm than PGD": at("FGSM") < at(pgd) - SLACK,
    "more steps do less harm": at("PGD long") > at(pgd) + SLACK,
    "masks survive a radius of 0.5": at("PGD huge") > SLACK,
  }
  return [doubt for doubt, found in checks.items() if found]


def _controls(eps, num_steps):
  """What the numbers are doubted by; a start without a step is noise in the ball."""
  return {
    "noise": attacks.pgd(eps, step_size=0.0, num_steps=1),
    "FGSM": attacks.fgsm(eps),
    "PGD long": _attack(attacks.pgd, eps, num_steps),
    "PGD huge": attacks.pgd(0.5, num_steps=num_steps, random_start=False, keep="best"),
  }


def _attack(make, eps, num_steps):
  return make(eps, step_size=2.5 * eps / num_steps, num_steps=num_steps)


def _measured(recipe, options, changes, name, views):
  """View to IoU in percent, one for each seed."""
  found = {view: [] for view in views}
  for seed in options.seeds:
    changed = dataclasses.replace(recipe, seed=seed, **changes)
    parts = victim_job.load(changed, options.data)
    task = victim_job.plan(changed, parts, options.out / f"{name} {seed}")
    victim = victim_job.train(task, progress=progress.terminal)
    for view, attack in views.items():
      scores = assessment.assess(
        victim.predict, victim.variables, parts.test, attack=attack
      )
      found[view].append(100 * scores["iou"])
  return found


def _cell(values):
  margin = summaries.margin(values)
  half = "" if margin is None else f" ± {margin:.0f}"
  return f"{statistics.mean(values):.0f}{half}"


if __name__ == "__main__":
  main()
