"""The tables of docs/defences.md, from finished runs of `jaxadv defend`.

    jaxadv defend configs/defend_blood.py --out runs/defend_blood
    python benchmarks/defences.py runs/defend_blood

For each run every model under every attack, what each defence won and cost, and the
checks that failed.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

from jaxadv import defence_report, summaries


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("runs", nargs="+", type=pathlib.Path, help="folders of runs")
  print("# Defences: all numbers")
  for folder in parser.parse_args(arguments).runs:
    show(json.loads((folder / "results.json").read_text()))


def show(run):
  print(f"\n## {run['name']}: {run['source']}, {run['images']} test images\n")
  command = f"jaxadv defend configs/{run['name']}.py"
  print(f"`{command}`, then `python benchmarks/defences.py`.\n")
  print(f"Trained for {run['budget']}, by the standard deviation of the images.\n")
  for score, words in defence_report.SCORES[run["labels"]].items():
    print(f"{words}, in percent; radii in 255ths:\n")
    print(summaries.markdown(*defence_report.table(run, score)) + "\n")
  print(f"Won and lost at {255 * run['eps']:g}/255:\n")
  print(summaries.markdown(*defence_report.gains(run)) + "\n")
  for model, check, evidence in defence_report.verdicts(run):
    print(f"- **Unreliable**: {model} fails `{check}`. {evidence}")
  print(f"\n{summaries.signature(run)}")


if __name__ == "__main__":
  main()
