"""What `peers.py` measured, as Markdown tables, against its targets, and as a plot."""

from typing import Any

__all__ = ["markdown", "plot", "targets"]

MARKERS = "osD^v<>pPX*^svD"
FLOAT32 = ("plain", "frozen")  # attacks of ours; those on masks do more than a step


def markdown(report: dict[str, Any]) -> str:
  """Tables of times and ratios, universal perturbations, compiling, and the targets."""
  settings, rows = report["settings"], report["rows"]
  versions = ", ".join(f"{name} {v}" for name, v in settings["versions"].items())
  kept = "kept" if settings["keeps_memory"] else "given back"
  flags, device = settings["xla_flags"] or "not set", settings["device"]
  text = [f"{versions}; XLA_FLAGS {flags!r}; memory {kept}; device {device}."]
  for kind in ("classes", "masks"):
    chosen = {name: row for name, row in rows.items() if row.get("kind") == kind}
    if chosen:
      text += [_times(chosen, _clock(report)), _errors(chosen)]
  for name, table in (("compile", _compile), ("universal", _universal)):
    if name in rows:
      text.append(table(rows[name]))
  text.append(_table(["target", "work", "measured", "met"], targets(report)))
  return "\n\n".join(part for part in text if part)


def _clock(report):
  return "CPU" if report["settings"]["device"] == "cpu" else "Wall"


def _times(rows, clock):
  """Ms per step and quartiles: a column per work, four works a table."""
  names = list(dict.fromkeys(name for row in rows.values() for name in row["programs"]))
  heads = ["steps of a call", "GFLOP of a step", "peak, GFLOP/s", "ours, of it"]
  if clock == "Wall":
    heads += ["bf16 peak, GFLOP/s", "ours in bf16, of it"]
    heads += ["GB of a step", "copy, GB/s", "bare, of it"]
  heads += names
  tables = [f"{clock} ms per step (quartiles)"]
  for first in range(0, len(rows), 4):
    works = list(rows)[first : first + 4]
    columns = [_column(rows[work], names) for work in works]
    lines = [list(line) for line in zip(heads, *columns, strict=True)]
    tables.append(_table(["program", *works], lines))
  return "\n\n".join(tables)


def _column(row, names):
  cells = [_cell(row["programs"].get(name)) for name in names]
  share = _share(row)
  shown = "-" if share is None else f"{share:.0%}"
  peak = max(row["peak"].values())
  head = [str(row["steps"]), f"{row['gflop']:.1f}", f"{peak:.0f}", shown]
  return [*head, *_other_shares(row), *cells]


def _other_shares(row):
  """What an accelerator could do, and what steps make of it."""
  if not row["others"]:
    return []
  product, copy = row["others"]["product in bf16"], row["others"]["copy"]
  per_s = lambda name: 1e3 / row["programs"].get(name, {}).get("ms", float("inf"))
  half, moved = row["gflop"] * per_s("bf16"), row["gbyte"] * per_s("bare")
  shares = [f"{half / product:.0%}", f"{row['gbyte']:.2f}", f"{copy:.0f}"]
  return [f"{product:.0f}", *shares, f"{moved / copy:.0%}"]


def _cell(row):
  if row is None or "error" in row:
    return "-"
  low, high = row["quartiles_ms"]
  return f"{row['ms']:.1f} ({low:.1f}-{high:.1f})"


def _errors(rows):
  lines = []
  for work, row in rows.items():
    for name, program in row["programs"].items():
      if "error" in program:
        lines.append(f"- {work}, {name}: {program['error']}")
  return "\n".join(lines)


def _share(row):
  """What the fastest of our float32 attacks makes of the measured peak."""
  times = [row["programs"].get(name, {}).get("ms") for name in FLOAT32]
  found = [ms for ms in times if ms]
  if not found:
    return None
  return row["gflop"] / min(found) * 1e3 / max(row["peak"].values())


def _compile(rows):
  table = []
  for name, row in rows.items():
    for form in row["cold"]:
      cold, warm = row["cold"][form], row["warm"][form]
      cells = [
        f"{d[key]:.2f}" for d in (cold, warm) for key in ("trace_s", "compile_s")
      ]
      table.append([name, form, *cells, str(row["compilations for 8 radii"])])
  heads = ["PGD-40", "form", "cold: tracing s", "compiling s", "warm: tracing s"]
  return _table([*heads, "loading s", "compilations for 8 radii"], table)


def _universal(row):
  if "error" in row:
    return f"universal: {row['error']}"
  table = []
  for name, program in row["programs"].items():
    if "error" in program:
      table.append([name, program["error"], "", "", "", ""])
      continue
    there = program["cpu_s to 80 %"]
    done = f"{there:.1f}" if there else f"> {program['cpu_s']:.0f}"
    rate = [f"{program[key]:.0%}" for key in ("fooling", "at target")]
    count = str(program.get("images to 80 %") or program.get("images") or "-")
    table.append([name, f"{program['images per s']:.1f}", count, *rate, done])
  heads = ["universal perturbation", "images/s", "images", "fooled", "at the target"]
  return _table([*heads, "CPU s to 80 %"], table)


def targets(report: dict[str, Any]) -> list[list[str]]:
  """Target, work, what was measured, and whether it is met."""
  found: list[list[str]] = []
  rows = report["rows"]
  of_a_work = _class_targets if _clock(report) == "CPU" else _other_targets
  for work, row in rows.items():
    if row.get("kind") == "classes":
      found += of_a_work(work, row)
  for work, row in rows.get("compile", {}).items():
    for form, warm in row["warm"].items():
      found.append(_line(f"warm start, {form}", work, sum(warm.values()), 0.2))
    found.append(
      _line("compilations for 8 radii", work, row["compilations for 8 radii"], 1)
    )
  programs = rows.get("universal", {}).get("programs", {})
  speeds = {n: p["images per s"] for n, p in programs.items() if "images per s" in p}
  for name, speed in speeds.items():
    if name.startswith("art"):
      mine = "targeted_universal" if "Targeted" in name else "universal"
      ratio = speeds[f"ours {mine}"] / speed
      found.append(_line(f"images/s over {name}", "universal", ratio, 50, least=True))
  return found


def _other_targets(work, row):
  """Of an accelerator."""
  _, lines, ratio = _ratios(work, row)
  ratio("loop / bare, ours", "plain", "bare", 1.03)
  ratio("loop / bare, frozen Flax", "frozen", "bare flax", 1.03)
  return lines


def _ratios(work, row):
  """Times, a list of lines, and what adds a line to it."""
  programs = row["programs"]
  ms = {name: program["ms"] for name, program in programs.items() if "ms" in program}
  lines = []

  def ratio(title, name, base, limit):
    if name in ms and base in ms:
      lines.append(_line(title, work, ms[name] / ms[base], limit))

  return ms, lines, ratio


def _class_targets(work, row):
  ms, lines, ratio = _ratios(work, row)
  ratio("loop / bare, ours", "plain", "bare", 1.00)
  ratio("loop / bare, frozen Flax", "frozen", "bare flax", 1.05)
  best = min(FLOAT32, key=lambda name: ms.get(name, float("inf")))
  if work.startswith("unet"):
    ratio("ours / torchattacks", best, "torchattacks", 0.60)
    if (share := _share(row)) is not None:
      lines.append(_line("ours / matrix peak", work, share, 0.75, least=True))
  if work.startswith("resnet50-64"):
    ratio("ours / torchattacks", best, "torchattacks", 0.50)
  ratio("ours / torch folded", best, "torch folded", 1.00)
  return lines


def _line(title, work, value, limit, *, least=False):
  met = value >= limit if least else value <= limit
  sign = ">=" if least else "<="
  return [f"{title} {sign} {limit}", work, f"{value:.3f}", "yes" if met else "**no**"]


def _table(heads, rows):
  lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
  return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _look(name):
  """Colour and size: ours, the same without freezing or loop, PyTorch, libraries."""
  if name in (*FLOAT32, "bf16"):
    return "C3", 60
  if name in ("bare", "bare flax", "flax"):
    return "C1", 28
  return ("C0", 28) if name.startswith("torch ") or name == "torch" else ("0.4", 28)


def plot(report: dict[str, Any], path: Any) -> None:
  """Time per step relative to hand-folded channels-last PyTorch, by work."""
  from matplotlib.figure import Figure

  rows = {
    name: row["programs"]
    for name, row in report["rows"].items()
    if "ms" in row.get("programs", {}).get("torch folded", {})
  }
  if not rows:
    return
  names = list(dict.fromkeys(name for row in rows.values() for name in row))
  figure = Figure(figsize=(9, max(4, 1.5 + 0.4 * len(rows))), layout="constrained")
  axes = figure.add_subplot()
  for k, name in enumerate(names):
    points = [
      (row[name]["ms"] / row["torch folded"]["ms"], place)
      for place, row in enumerate(rows.values())
      if "ms" in row.get(name, {})
    ]
    if points:
      x, y = zip(*points, strict=True)
      color, size = _look(name)
      axes.scatter(x, y, size, color, MARKERS[k % len(MARKERS)], label=name, alpha=0.8)
  axes.axvline(1, color="0.7", zorder=0)
  axes.set_yticks(range(len(rows)), rows)
  axes.invert_yaxis()
  axes.set_xscale("log")
  ticks = (0.5, 0.7, 1, 1.5, 2, 3, 5, 10)
  axes.set_xticks(ticks, map(str, ticks))
  axes.minorticks_off()
  axes.set_xlabel(
    f"{_clock(report)} time per step, relative to channels-last PyTorch, norms folded"
  )
  axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
  figure.savefig(path, dpi=150)
