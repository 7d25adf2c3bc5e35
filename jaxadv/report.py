"""What people look at: the table, the gallery PNG and one self-contained report.html.

The page embeds its images, loads nothing from anywhere, follows the reader's light or
dark preference, and fits a phone.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

__all__ = [
  "COLUMNS",
  "Panel",
  "amplified",
  "as_bytes",
  "colored",
  "data_uri",
  "embedded",
  "gallery",
  "page",
  "png",
  "render",
  "table",
]

# Column of the rows -> heading and digits, in the order of the tables.
COLUMNS = {
  "iou_8bit": ("IoU", 3),
  "l2_8bit": ("L2", 2),
  "linf_8bit": ("Linf", 3),
  "psnr_8bit": ("PSNR dB", 1),
  "ssim_8bit": ("SSIM", 3),
  "low_band_8bit": ("low band", 2),
  "backwards": ("grads", 0),
  "seconds": ("s/pair", 1),
}
TITLES = (
  "image",
  "target mask",
  "attacked image",
  "perturbation",
  "mask before",
  "mask after",
)
# Colors of the classes, readable on light and dark and apart for the color-blind.
_CLASSES = np.array(
  [[24, 24, 28], [240, 228, 66], [86, 180, 233], [213, 94, 0], [0, 158, 115]], np.uint8
)


class Panel(NamedTuple):
  """One attacked pair, as stored.

  Attributes:
    row: its numbers.
    clean: `(H, W, C)` uint8.
    attacked: `(H, W, C)` uint8.
    target: `(H, W)` int mask that was wanted.
    before: `(H, W)` int mask predicted for `clean`.
    after: `(H, W)` int mask predicted for `attacked`.
  """

  row: Mapping[str, Any]
  clean: np.ndarray
  attacked: np.ndarray
  target: np.ndarray
  before: np.ndarray
  after: np.ndarray


def colored(mask: np.ndarray) -> np.ndarray:
  """A mask as an RGB picture: background dark, classes in fixed colors.

  Example:
    >>> colored(np.array([[0, 1]])).tolist()
    [[[24, 24, 28], [240, 228, 66]]]
  """
  return _CLASSES[mask % len(_CLASSES)]


def amplified(clean: np.ndarray, attacked: np.ndarray) -> tuple[np.ndarray, int]:
  """The perturbation around mid grey, enlarged until its largest hundredth saturates.

  Args:
    clean: `(H, W, C)` uint8.
    attacked: `(H, W, C)` uint8.

  Returns:
    `(H, W, C)` uint8, and the whole factor, 1 to 127.

  Example:
    >>> clean = np.full((1, 2, 1), 100, np.uint8)
    >>> picture, factor = amplified(clean, clean + np.uint8(2))
    >>> picture.ravel().tolist(), factor
    ([255, 255], 64)
  """
  delta = attacked.astype(int) - clean.astype(int)
  factor = max(1, round(127 / max(1, np.percentile(np.abs(delta), 99))))
  return np.clip(128 + factor * delta, 0, 255).astype(np.uint8), factor


def table(
  results: Mapping[str, Any], *, intervals: bool = True
) -> tuple[list[str], list[list[str]]]:
  """Headings and cells of the summary: one line per attack, means over all pairs.

  Ratios to the baseline are over the pairs where both succeed, with their `intervals`
  where there is room for them.
  """
  heads = ["attack", "success"] + [title for title, _ in COLUMNS.values()]
  baseline = results["baseline"]
  if baseline is not None:
    heads += ["L2 ratio", "Linf ratio"]
  lines = []
  for name, summary in results["attacks"].items():
    means = summary["all"]
    cells = [name, _number(means["success_8bit"]["mean"], 2)]
    cells += [_number(means[column]["mean"], d) for column, (_, d) in COLUMNS.items()]
    if baseline is not None:
      ratios = [summary["ratios"][key] for key in ("l2_8bit", "linf_8bit")]
      cells += [_spread(r) if intervals else _number(r["mean"]) for r in ratios]
    lines.append(cells)
  return heads, lines


def gallery(panels: Sequence[Panel]) -> bytes:
  """The panels as one PNG: a line per pair and attack, six pictures each."""
  from matplotlib.figure import Figure

  lines = len(panels)
  figure = Figure(figsize=(11, 1.95 * lines + 0.5), dpi=110, layout="constrained")
  axes = figure.subplots(lines, len(TITLES), squeeze=False)
  for line, panel in zip(axes, panels, strict=True):
    pictures, factor = _pictures(panel)
    for ax, title, picture in zip(line, TITLES, pictures, strict=True):
      ax.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255)
      ax.set(xticks=[], yticks=[])
      if ax in axes[0]:
        ax.set_title(title, fontsize=10)
    line[0].set_ylabel(f"{panel.row['attack']}\npair {panel.row['pair']}", fontsize=10)
    line[3].set_xlabel(f"x {factor}", fontsize=8)
    line[2].set_xlabel(_distortion(panel.row), fontsize=8)
    line[4].set_xlabel(f"target IoU {panel.row['initial_iou']:.2f}", fontsize=8)
    line[5].set_xlabel(f"target IoU {panel.row['iou_8bit']:.2f}", fontsize=8)
  return _figure_png(figure)


def page(
  results: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  panels: Sequence[Panel],
) -> str:
  """The report as one HTML file.

  Args:
    results: what `results.json` holds.
    rows: all rows, as numbers.
    panels: pairs to show, grouped by attack.

  Returns:
    HTML text without any external resource.
  """
  heads, lines = table(results)
  return render(
    "report.html.jinja",
    results=results,
    heads=heads,
    lines=lines,
    groups=_groups(panels),
    rows=rows,
    titles=TITLES,
  )


def render(template: str, **values: Any) -> str:
  """One of the package's templates as a page; a name it lacks is an error."""
  import jinja2

  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("jaxadv", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
  )
  environment.filters["number"] = _number
  return environment.get_template(template).render(**values)


def _pictures(panel):
  perturbation, factor = amplified(panel.clean, panel.attacked)
  before, after, target = map(colored, (panel.before, panel.after, panel.target))
  return (panel.clean, target, panel.attacked, perturbation, before, after), factor


def _groups(panels):
  """Attack -> its panels as embedded pictures with captions."""
  groups: dict[str, list[dict[str, Any]]] = {}
  for panel in panels:
    pictures, factor = _pictures(panel)
    notes = ("", "", _distortion(panel.row), f"x {factor}") + (
      f"target IoU {panel.row['initial_iou']:.2f}",
      f"target IoU {panel.row['iou_8bit']:.2f}",
    )
    shown = zip(TITLES, map(data_uri, pictures), notes, strict=True)
    groups.setdefault(panel.row["attack"], []).append(
      {"pair": panel.row["pair"], "pictures": list(shown)}
    )
  return groups


def _distortion(row):
  return f"L2 {row['l2_8bit']:.2f}, Linf {row['linf_8bit']:.3f}"


def data_uri(picture: np.ndarray) -> str:
  """A picture `(H, W, 1 or 3)` uint8 as an embedded PNG."""
  return embedded(png(picture))


def embedded(content: bytes) -> str:
  """A PNG file as an address that holds it."""
  return "data:image/png;base64," + base64.b64encode(content).decode()


def png(picture: np.ndarray) -> bytes:
  """A picture `(H, W, 1 or 3)` uint8 as a PNG file."""
  file = io.BytesIO()
  picture = picture.squeeze(-1) if picture.shape[-1] == 1 else picture
  Image.fromarray(picture).save(file, "PNG", optimize=True)
  return file.getvalue()


def as_bytes(image: np.ndarray) -> np.ndarray:
  """An image in [0, 1] as uint8.

  Example:
    >>> as_bytes(np.array([0.0, 0.5, 1.0])).tolist()
    [0, 128, 255]
  """
  return np.rint(255 * image).astype(np.uint8)


def _figure_png(figure):
  file = io.BytesIO()
  figure.savefig(file, format="png", facecolor="white")
  return file.getvalue()


def _number(value, digits=3):
  if not isinstance(value, (int, float)):
    return "-" if value is None else str(value)
  return f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def _spread(interval):
  if interval["mean"] is None:
    return "-"
  return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
