"""The tables of docs/universal.md, from finished runs of `jaxadv uap`.

jaxadv uap configs/uap_blood.py --out runs/uap_blood
python benchmarks/universal.py runs/uap_blood
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Sequence

from jaxadv import summaries, universal_report


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("runs", nargs="+", type=pathlib.Path, help="folders of runs")
  for folder in parser.parse_args(arguments).runs:
    results = json.loads((folder / "results.json").read_text())
    print(f"\n### {results['name']}: {results['source']}\n")
    print(summaries.markdown(*universal_report.table(results)))
    print("\nOver the victims, lowest to highest, and how many exceed 80 %:\n")
    print(summaries.markdown(*over_victims(*universal_report.rates(results))))
    print("\nMean success of all that was crafted, by how it was judged:\n")
    print(summaries.markdown(*over_views(results)))
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    print(f"\ncommit {results['commit']}, {versions}; {results['machine']}")


def over_victims(heads, lines):
  """The table with one line per share: the spread of every rate over the victims."""
  found = []
  for share in dict.fromkeys(line[2] for line in lines):
    columns = zip(*(line[3:] for line in lines if line[2] == share), strict=True)
    found.append([f"{share:.1%}", *map(_spread, columns)])
  return heads[2:], found


def over_views(results):
  """Heads and lines, one line per share: fooling, or the share at the target."""
  views = ("train_stored", "test_stored", "test_clipped", "test_unclipped")
  crafted = [row for row in results["rows"] if row["steps"]]
  lines = []
  for share in dict.fromkeys(row["share"] for row in crafted):
    rows = [row for row in crafted if row["share"] == share]
    kinds = ["fooling" if row["target"] is None else "targeted" for row in rows]
    pairs = list(zip(kinds, rows, strict=True))
    means = [statistics.mean(row[f"{k}_{view}"] for k, row in pairs) for view in views]
    lines.append([f"{share:.1%}", *(f"{mean:.1%}" for mean in means)])
  return ["share", *(view.replace("_", ", ") for view in views)], lines


def _spread(rates):
  known = [rate for rate in rates if rate is not None]
  if not known:
    return "-"
  exceed = sum(rate > 0.8 for rate in known)
  return f"{100 * min(known):.0f} to {100 * max(known):.0f} % ({exceed}/{len(known)})"


if __name__ == "__main__":
  main()
