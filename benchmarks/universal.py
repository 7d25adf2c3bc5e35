"""The tables of docs/universal.md, from finished runs of `jaxadv uap`.

    jaxadv uap configs/uap_pneumonia.py --out runs/uap_pneumonia
    jaxadv uap configs/uap_blood.py --out runs/uap_blood
    python benchmarks/universal.py runs/uap_pneumonia runs/uap_blood

Of all runs together: the spread over the victims of what was crafted and of what it is
judged beside, and how often the best targeted perturbation fools as many images as the
non-targeted one. Then, for each run, every victim.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Sequence

from jaxadv import summaries, universal_report

POINTS = 0.04  # a difference in fooling that counts


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("runs", nargs="+", type=pathlib.Path, help="folders of runs")
  folders = parser.parse_args(arguments).runs
  runs = [json.loads((folder / "results.json").read_text()) for folder in folders]
  print("# Universal perturbations: all numbers\n")
  aimed = {run["name"]: universal_report.rates(run) for run in runs if has_targets(run)}
  if aimed:
    print("Over the victims, lowest to highest, and how many exceed 80 %:\n")
    print(summaries.markdown(*over_victims(aimed)))
    print(f"\n{best_target(aimed)}")
  for run in runs:
    print(f"\n## {run['name']}: {run['source']}\n")
    print(summaries.markdown(*universal_report.table(run)))
    print("\nMean success of all that was crafted, by how it was judged:\n")
    print(summaries.markdown(*over_views(run)))
    print(f"\n{summaries.signature(run)}")


def has_targets(results):
  return any(row["target"] is not None for row in results["rows"])


def over_victims(rates):
  """Heads and lines, one per run and share: the spread of every rate."""
  lines, heads = [], next(iter(rates.values()))[0]
  for name, (_, rows) in rates.items():
    for share in dict.fromkeys(row[2] for row in rows):
      columns = zip(*(row[3:] for row in rows if row[2] == share), strict=True)
      lines.append([name, f"{share:.1%}", *map(_spread, columns)])
  return ["run", *heads[2:]], lines


def best_target(rates):
  """How often the best of the targeted perturbations fools as many images, in words."""
  gaps = []
  for heads, rows in rates.values():
    one, other = heads.index("universal"), heads.index("best target fools")
    gaps += [row[other] - row[one] for row in rows]
  more, less = (sum(sign * gap > POINTS for gap in gaps) for sign in (1, -1))
  return (
    f"Of {len(gaps)} lines below the best of the targeted perturbations, chosen on the "
    f"test images, fools within {100 * POINTS:.0f} points of the non-targeted one in "
    f"{len(gaps) - more - less}, more in {more} and less in {less}."
  )


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
