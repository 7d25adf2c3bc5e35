"""From rows to results: means with intervals, paired comparisons, versions."""

import importlib.metadata
import math
import operator
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

import jaxadv

__all__ = [
  "LABELS",
  "commit",
  "differences",
  "interval",
  "margin",
  "markdown",
  "origin",
  "ratios",
  "signature",
  "summarize",
]

# Columns that describe a row and are not averaged.
LABELS = ("attack", "pair", "source", "target")
_SUCCESS = "success_8bit"
_RATIOS = ("l2_8bit", "linf_8bit", "low_band_8bit")
_DIFFERENCES = ("psnr_8bit", "ssim_8bit")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

Row = Mapping[str, Any]


def interval(
  values: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> dict[str, float | int | None]:
  """The mean and its 95 % percentile bootstrap interval over the finite values.

  Args:
    values: one number per pair; non-finite ones are left out and not counted.
    resamples: bootstrap resamples.
    seed: of the resampling.

  Returns:
    `{"mean", "low", "high", "n"}`; `None` for the numbers when nothing is finite.

  Example:
    >>> interval([1.0, 1.0, 1.0])
    {'mean': 1.0, 'low': 1.0, 'high': 1.0, 'n': 3}
    >>> interval([])
    {'mean': None, 'low': None, 'high': None, 'n': 0}

  Reference: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13.
  """
  finite = np.asarray([v for v in values if math.isfinite(v)], float)
  if not finite.size:
    return {"mean": None, "low": None, "high": None, "n": 0}
  picks = np.random.default_rng(seed).integers(0, finite.size, (resamples, finite.size))
  low, high = np.percentile(finite[picks].mean(1), [2.5, 97.5])
  mean = float(finite.mean())
  return {"mean": mean, "low": float(low), "high": float(high), "n": int(finite.size)}


def margin(values: Sequence[float]) -> float | None:
  """Half the width of the mean's 95 % interval over a few runs, by Student's t.

      t_{0.975, n-1} * s / sqrt(n)

  Args:
    values: one number per run, such as per seed.

  Returns:
    In their units; `None` for fewer than two.

  Example:
    >>> round(margin([0.0, 1.0, 2.0]), 3)
    2.484
    >>> print(margin([1.0]))
    None
  """
  n = len(values)
  if n < 2:
    return None
  quantile = float(stats.t.ppf(0.975, n - 1))
  return quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


def summarize(rows: Sequence[Row], *, baseline: str | None = None) -> dict[str, Any]:
  """Means per attack, over all pairs and over the successes, and against a baseline.

  Args:
    rows: numbers, with `attack`, `pair` and `success_8bit` among the columns.
    baseline: the attack that `ratios` and `differences` refer to.

  Returns:
    `{attack: {"all": {column: interval}, "successes": ..., "ratios": ...,
    "differences": ...}}`, the last two with a baseline only.
  """
  summary = {}
  for attack in dict.fromkeys(row["attack"] for row in rows):
    mine = [row for row in rows if row["attack"] == attack]
    won = [row for row in mine if row[_SUCCESS]]
    summary[attack] = {"all": _means(mine), "successes": _means(won)}
    if baseline is not None:
      summary[attack]["ratios"] = ratios(rows, attack, baseline)
      summary[attack]["differences"] = differences(rows, attack, baseline)
  return summary


def ratios(rows: Sequence[Row], attack: str, baseline: str) -> dict[str, Any]:
  """Mean ratio to the baseline on the pairs where both succeed, for each distortion.

  Example:
    >>> rows = [
    ...   {"attack": a, "pair": 0, "success_8bit": 1, "l2_8bit": l2, "linf_8bit": 1.0,
    ...    "low_band_8bit": 1.0} for a, l2 in (("base", 2.0), ("new", 1.0))]
    >>> ratios(rows, "new", "base")["l2_8bit"]
    {'mean': 0.5, 'low': 0.5, 'high': 0.5, 'n': 1}
  """

  def ratio(mine, base):
    return mine / base if base else math.nan

  return _paired(rows, attack, baseline, _RATIOS, ratio)


def differences(rows: Sequence[Row], attack: str, baseline: str) -> dict[str, Any]:
  """Mean difference to the baseline on the same pairs, in PSNR (dB) and SSIM.

  Means over each attack's own successes do not compare where one of them succeeds on
  the easy pairs only; these do.

  Example:
    >>> rows = [
    ...   {"attack": a, "pair": 0, "success_8bit": 1, "psnr_8bit": psnr,
    ...    "ssim_8bit": 0.5} for a, psnr in (("base", 30.0), ("new", 31.0))]
    >>> differences(rows, "new", "base")["psnr_8bit"]
    {'mean': 1.0, 'low': 1.0, 'high': 1.0, 'n': 1}
  """
  return _paired(rows, attack, baseline, _DIFFERENCES, operator.sub)


def origin() -> dict[str, Any]:
  """What made the numbers: `versions`, `commit` and `machine`."""
  others = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {
    "versions": {"jaxadv": jaxadv.__version__} | others,
    "commit": commit(pathlib.Path(__file__).parent),
    "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
  }


def signature(results: Mapping[str, Any]) -> str:
  """The line under a table of the docs, from results that hold an `origin`.

  Example:
    >>> signature({"versions": {"jax": "0.10.2"}, "commit": "0" * 40, "machine": "cpu"})
    'Commit 0000000, jax 0.10.2; cpu.'
  """
  versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
  commit, _, dirty = (results["commit"] or "unknown").partition("-")
  changed = " with changes" if dirty else ""
  return f"Commit {commit[:7]}{changed}, {versions}; {results['machine']}."


def commit(folder: pathlib.Path) -> str | None:
  """The git commit of the checkout around `folder`, `-dirty` if changed, or `None`."""
  command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  except FileNotFoundError:  # no git on this machine
    return None
  return done.stdout.strip() or None


def _paired(rows, attack, baseline, names, compare):
  won = {(row["attack"], row["pair"]): row for row in rows if row[_SUCCESS]}
  pairs = [p for a, p in won if a == attack and (baseline, p) in won]
  both = [(won[attack, p], won[baseline, p]) for p in pairs]
  return {
    n: interval([compare(mine[n], base[n]) for mine, base in both]) for n in names
  }


def _means(rows):
  names = [name for name in rows[0] if name not in LABELS] if rows else []
  return {name: interval([float(row[name]) for row in rows]) for name in names}


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """A table for a page of the docs.

  Example:
    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
  """
  rows = ["| " + " | ".join(line) + " |" for line in (heads, *lines)]
  return "\n".join([rows[0], "|---" * len(heads) + "|", *rows[1:]])
