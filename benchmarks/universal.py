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
    rows = [heads, ["---"] * len(heads), *lines]
    print(f"\n### {results['name']}: {results['source']}\n")
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    print(f"\ncommit {results['commit']}, {versions}; {results['machine']}")


if __name__ == "__main__":
  main()
