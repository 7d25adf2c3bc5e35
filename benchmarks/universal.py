"""The tables of docs/universal.md, from finished runs of `jaxadv uap`.

jaxadv uap configs/uap_blood.py --out runs/uap_blood
python benchmarks/universal.py runs/uap_blood
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

from jaxadv import universal_report


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("runs", nargs="+", type=pathlib.Path, help="folders of runs")
  for folder in parser.parse_args(arguments).runs:
    results = json.loads((folder / "results.json").read_text())
    heads, lines = universal_report.table(results)
    print(f"\n### {results['name']}: {results['source']}\n")
    print(markdown(heads, lines))
    print("\nOver the victims, lowest to highest, and how many reach 80 %:\n")
    print(markdown(*over_victims(heads, lines)))
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    print(f"\ncommit {results['commit']}, {versions}; {results['machine']}")


def over_victims(heads, lines):
  """The table with one line per share: the spread of every rate over the victims."""
  shares = dict.fromkeys(line[2] for line in lines)
  found = []
  for share in shares:
    columns = zip(*(line[3:] for line in lines if line[2] == share), strict=True)
    found.append([share, *map(_spread, columns)])
  return heads[2:], found


def markdown(heads, lines):
  rows = [heads, ["---"] * len(heads), *lines]
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _spread(cells):
  rates = [float(cell.removesuffix(" %")) for cell in cells if cell != "-"]
  if not rates:
    return "-"
  reach = sum(rate >= 80 for rate in rates)
  return f"{min(rates):.0f} to {max(rates):.0f} % ({reach}/{len(rates)})"


if __name__ == "__main__":
  main()
