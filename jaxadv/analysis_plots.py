"""Pictures of what `jaxadv.analysis` measures, each as the bytes of a PNG file.

Colors can be told apart by the color-blind, and lines and points also by their form.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxadv import analysis

__all__ = [
  "accuracy_curves",
  "correlation_matrices",
  "distances_by_layer",
  "embeddings",
  "heat_maps",
  "landscapes",
]

# Okabe and Ito, without the yellow, which is lost on white
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*X"
_LINES = ("-", "--", "-.", ":")
_HEAT, _SIGNED = "viridis", "RdBu_r"


def accuracy_curves(
  eps: Sequence[float],
  curves: Mapping[str, Sequence[float]],
  *,
  score: str = "accuracy",
  title: str = "",
) -> bytes:
  """Accuracy at every radius, one line for each model, with and without a defence.

  Args:
    eps: E radii in pixels, in [0, 1], rising; the axis counts in 255ths. 0 is clean.
    curves: name of a model and its attack to E accuracies in [0, 1].
    score: what is counted, beside the axis.
    title: above the picture.

  Raises:
    ValueError: for a line of another length than `eps`.

  Example:
    >>> accuracy_curves([0, 1 / 255], {"no defence": [0.9, 0.1]})[1:4]
    b'PNG'
  """
  figure, axes = _figure(6.4, 4.0)
  ax = axes[0, 0]
  for k, (name, values) in enumerate(curves.items()):
    if len(values) != len(eps):
      raise ValueError(f"{name!r} has {len(values)} accuracies for {len(eps)} radii.")
    ax.plot([255 * value for value in eps], values, label=name, **_form(k), zorder=3)
  ax.set(xlabel="radius (1/255)", ylabel=score, ylim=(-0.03, 1.03), title=title)
  ax.set_xticks([255 * value for value in eps])
  ax.xaxis.set_major_formatter("{x:g}")
  _beside(ax)
  return _png(figure)


def heat_maps(
  images: np.ndarray,
  attacked: np.ndarray,
  heat: np.ndarray,
  attacked_heat: np.ndarray,
  *,
  notes: Sequence[str] = (),
) -> bytes:
  """Each image, where the model looks, and the same after the attack, in one row.

  A heat map lies over its image in grey, from the least to the most of its own values.

  Args:
    images: `(N, H, W, C)` in [0, 1], C 1 or 3.
    attacked: `(N, H, W, C)`.
    heat: `(N, h, w)` of the images; any sides, which are stretched.
    attacked_heat: `(N, h, w)` of the attacked ones.
    notes: one line under each row, such as the overlap of its maps.

  Returns:
    A PNG file.
  """
  titles = ("image", "heat map", "attacked image", "its heat map")
  rows, height = len(images), 2.0 * images.shape[1] / images.shape[2] + 0.3
  figure, axes = _figure(
    8.4, height * rows + 0.3, rows=rows, columns=4, layout="constrained"
  )
  for k, row in enumerate(axes):
    pairs = ((images[k], heat[k]), (attacked[k], attacked_heat[k]))
    for two, (image, values) in zip((row[:2], row[2:]), pairs, strict=True):
      two[0].imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
      _overlay(two[1], image, values)
    for ax, title in zip(row, titles, strict=True):
      ax.set(xticks=[], yticks=[], title=title if k == 0 else "")
      ax.spines[:].set_visible(False)
    if len(notes):
      row[3].set_xlabel(notes[k], fontsize=9)
  return _png(figure)


def distances_by_layer(
  names: Sequence[str], distances: Mapping[str, np.ndarray]
) -> bytes:
  """The cosine distance clean to attacked along the network: median and quartiles.

  Args:
    names: N layers in the order of the network.
    distances: name of a model to `(B, N)`, B images; see `analysis.layer_distances`.

  Returns:
    A PNG file.
  """
  figure, axes = _figure(max(5.0, 0.75 * len(names) + 2.5), 4.0)
  ax = axes[0, 0]
  places = np.arange(len(names))
  for k, (name, values) in enumerate(distances.items()):
    low, middle, high = np.percentile(values, (25, 50, 75), axis=0)
    form = _form(k)
    ax.plot(places, middle, label=name, **form, zorder=3)
    ax.fill_between(places, low, high, color=form["color"], alpha=0.18, linewidth=0)
  ax.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
  ax.set(ylabel="cosine distance, clean to attacked")
  ax.set_ylim(bottom=0)
  _beside(ax)
  return _png(figure)


def embeddings(
  clean: np.ndarray,
  attacked: np.ndarray,
  labels: np.ndarray,
  *,
  class_names: Sequence[str],
) -> bytes:
  """An embedding of clean and of attacked images, in two panels with the same axes.

  Args:
    clean: `(N, 2)` places, from one call of `analysis.embedding` with the next.
    attacked: `(N, 2)`.
    labels: `(N,)` int, true classes.
    class_names: K names.

  Returns:
    A PNG file.
  """
  figure, axes = _figure(8.4, 4.2, columns=2, sharex=True, sharey=True)
  figure.subplots_adjust(wspace=0.05)
  for ax, places, title in zip(
    axes[0], (clean, attacked), ("clean", "attacked"), strict=True
  ):
    for k, name in enumerate(class_names):
      x, y = places[labels == k].T
      color, marker = _COLORS[k % len(_COLORS)], _MARKERS[k % len(_MARKERS)]
      ax.scatter(
        x, y, s=22, color=color, marker=marker, alpha=0.75, linewidth=0, label=name
      )
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(True)
  _beside(axes[0, 1])
  return _png(figure)


def correlation_matrices(
  found: analysis.LabelCorrelation, *, class_names: Sequence[str]
) -> bytes:
  """The correlations on clean and on attacked images, and their difference.

  What is constant, and has none, is grey.

  Args:
    found: of `analysis.label_correlation`.
    class_names: L names.

  Returns:
    A PNG file.
  """
  import matplotlib

  colors = matplotlib.colormaps[_SIGNED].with_extremes(bad="0.75")
  side = max(3.0, 0.2 * len(class_names) + 1.2)
  figure, axes = _figure(3 * side + 1.6, side + 1.4, columns=3, layout="constrained")
  difference = found.attacked - found.clean
  largest = max(np.nanmax(np.abs(difference)), 1e-6)
  titles = (
    f"clean\nmean |r| off the diagonal {found.off_diagonal_clean:.2f}",
    f"attacked\nmean |r| off the diagonal {found.off_diagonal_attacked:.2f}",
    f"difference\nFrobenius norm {found.frobenius:.2f}",
  )
  shown = zip(
    axes[0], (found.clean, found.attacked, difference), (1, 1, largest), strict=True
  )
  pictures = []
  for ax, matrix, limit in shown:
    pictures.append(ax.imshow(matrix, cmap=colors, vmin=-limit, vmax=limit))
    ax.set_title(titles[len(pictures) - 1], fontsize=10)
    ax.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=8)
    names = class_names if ax is axes[0, 0] else [""] * len(class_names)
    ax.set_yticks(range(len(class_names)), names, fontsize=8)
    ax.grid(False)
  figure.colorbar(pictures[0], ax=axes[0, :2], shrink=0.7, pad=0.02)
  figure.colorbar(pictures[2], ax=axes[0, 2], shrink=0.7, pad=0.04)
  return _png(figure)


def landscapes(
  found: analysis.Landscape, *, titles: Sequence[str] = (), columns: int = 4
) -> bytes:
  """The loss in the plane of the attack and a random direction, a panel per example.

  All panels share their colors, so that they can be compared.

  Args:
    found: of `analysis.landscape`, B examples.
    titles: one for each of them.
    columns: panels side by side, at most.

  Returns:
    A PNG file.
  """
  from matplotlib import ticker

  loss, along, across = map(np.asarray, found)
  count = len(loss)
  columns = min(columns, count)
  rows = math.ceil(count / columns)
  figure, axes = _figure(
    2.7 * columns + 1.2,
    2.6 * rows + 0.5,
    rows=rows,
    columns=columns,
    layout="constrained",
  )
  levels = ticker.MaxNLocator(20).tick_values(loss.min(), loss.max())
  for k, ax in enumerate(axes.flat):
    if k >= count:
      ax.set_axis_off()
      continue
    picture = ax.contourf(along, across, loss[k].T, levels=levels, cmap=_HEAT)
    for place, form, name in ((0, "o", "clean"), (1, "X", "attacked")):
      ax.plot(
        place, 0, form, color="white", markeredgecolor="black", markersize=8, label=name
      )
    ax.set_title(titles[k] if len(titles) else "", fontsize=9)
    if k % columns == 0:
      ax.set_ylabel("random direction")
    if k + columns >= count:
      ax.set_xlabel("direction of the attack")
  figure.colorbar(picture, ax=axes, label="loss", pad=0.02)
  handles, names = axes[0, 0].get_legend_handles_labels()
  figure.legend(
    handles, names, loc="outside upper right", ncols=2, frameon=True, facecolor="0.85"
  )
  return _png(figure)


def _figure(width, height, *, rows=1, columns=1, layout=None, **options):
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=120, layout=layout)
  axes = figure.subplots(rows, columns, squeeze=False, **options)
  for ax in axes.flat:
    ax.grid(color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
  return figure, axes


def _form(k) -> dict[str, Any]:
  """Color, line and marker of the k-th curve; seven times eight of them differ."""
  return {
    "color": _COLORS[k % len(_COLORS)],
    "linestyle": _LINES[k % len(_LINES)],
    "marker": _MARKERS[k % len(_MARKERS)],
    "linewidth": 1.8,
    "markersize": 6,
  }


def _beside(ax):
  """The legend to the right, where it hides no line; the picture grows with it."""
  ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)


def _overlay(ax, image, heat):
  ax.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1)
  height, width = image.shape[:2]
  extent = (-0.5, width - 0.5, height - 0.5, -0.5)
  ax.imshow(heat, cmap=_HEAT, alpha=0.55, extent=extent, interpolation="bilinear")


def _png(figure):
  file = io.BytesIO()
  # "tight" around all there is: long names make the picture larger, and are not cut
  figure.savefig(
    file, format="png", facecolor="white", bbox_inches="tight", pad_inches=0.1
  )
  return file.getvalue()
