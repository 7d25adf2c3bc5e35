"""The tables of docs/segmentation.md, from finished runs of `jaxadv attack`.

    for seed in 0 1; do
      jaxadv attack configs/msa_optic_disc.py --seed $seed --out runs/disc-$seed
    done
    python benchmarks/segmentation.py runs/disc-*

Runs of one table share their config; rows of different seeds are put together. The
second table is over the pairs on which both attacks succeed after rounding to 8 bits.
"""

import argparse
import csv
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxadv import summaries

MEANS = ("l2_8bit", "linf_8bit", "psnr_8bit", "ssim_8bit", "low_band_8bit")
MEAN_HEADS = "attack", "success", "L2", "Linf", "PSNR", "SSIM", "low band", "gradients"
PAIRED_HEADS = ("attack", "pairs", "L2 ratio", "Linf ratio", "low band ratio")
PAIRED_HEADS += ("PSNR dB", "SSIM", "best per pair: L2 ratio", "Linf ratio")


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("runs", nargs="+", type=pathlib.Path)
  parser.add_argument("--baseline", default="asma", help="prefix of the swept attack")
  options = parser.parse_args(arguments)
  rows = [row for folder in options.runs for row in _rows(folder)]
  names = list(dict.fromkeys(row["attack"] for row in rows))
  sweep = [name for name in names if name.startswith(options.baseline)]
  best = _best(rows, sweep)
  rows += _oracle(rows, sweep)
  print(_about(options.runs))
  print(f"\nPaired with `{best}`, the best of its sweep, and with the best per pair.")
  print("\n" + summaries.markdown(MEAN_HEADS, [_means(rows, n) for n in names]))
  pairs = [_pairs(rows, name, best) for name in names]
  print("\n" + summaries.markdown(PAIRED_HEADS, pairs))


def _rows(folder: pathlib.Path) -> list[dict[str, Any]]:
  if not (folder / "rows.csv").exists():
    raise SystemExit(f"{folder} holds no rows.csv; run jaxadv attack --out {folder}")
  with (folder / "rows.csv").open(newline="") as stream:
    rows = list(csv.DictReader(stream))
  text = ("attack", "pair")
  numbers = [{k: v if k in text else float(v) for k, v in r.items()} for r in rows]
  return [row | {"pair": f"{folder.name}/{row['pair']}"} for row in numbers]


def _best(rows, sweep):
  """The member of the sweep with most successes; among equals, the smallest L2."""

  def rank(name):
    won = _won(rows, name)
    return (-len(won), _mean(won, "l2_8bit"))

  return min(sweep, key=rank)


def _oracle(rows, sweep):
  """For each pair, the row of the sweep with the smallest L2 among its successes."""
  won = [row for name in sweep for row in _won(rows, name)]
  pairs = dict.fromkeys(row["pair"] for row in won)
  best = [
    min((r for r in won if r["pair"] == pair), key=lambda r: r["l2_8bit"])
    for pair in pairs
  ]
  return [row | {"attack": "best per pair"} for row in best]


def _won(rows, name):
  return [row for row in rows if row["attack"] == name and row["success_8bit"]]


def _mean(rows, column):
  return sum(row[column] for row in rows) / len(rows) if rows else math.nan


def _means(rows, name):
  mine = [row for row in rows if row["attack"] == name]
  won = _won(rows, name)
  values = [f"{_mean(won, column):.3f}" for column in MEANS]
  gradients = f"{_mean(mine, 'backwards'):.0f}"
  return [f"`{name}`", f"{len(won)}/{len(mine)}", *values, gradients]


def _pairs(rows, name, best):
  ratios = summaries.ratios(rows, name, best)
  others = summaries.differences(rows, name, best)
  oracle = summaries.ratios(rows, name, "best per pair")
  intervals = [*ratios.values(), *others.values(), *list(oracle.values())[:2]]
  return [f"`{name}`", str(ratios["l2_8bit"]["n"]), *map(_interval, intervals)]


def _interval(estimate):
  if estimate["mean"] is None:
    return "-"
  return f"{estimate['mean']:.3f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _about(folders):
  return "\n".join(f"- `{folder.name}`: {_origin(folder)}" for folder in folders)


def _origin(folder):
  path = folder / "results.json"
  if not path.exists():
    return "unfinished: only some attacks have run"
  result = json.loads(path.read_text())
  versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
  victim = f"victim's test IoU {result['victim']['iou']:.3f}"
  return f"commit {_short(result['commit'])}, {versions}; {victim}"


def _short(commit):
  number, *dirty = (commit or "unknown").split("-")
  return "-".join([number[:12], *dirty])


if __name__ == "__main__":
  main()
