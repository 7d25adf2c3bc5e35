"""Radii of models that normalize their images outside: pixels and normalized units.

A published radius is often meant in the units of `(x - mean) / std`. In pixels, where
this library measures, it is smaller by the factor `std`, another one per channel.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxadv import inputs

__all__ = ["beside", "described", "in_pixels", "normalized"]


def in_pixels(eps: Any, std: Any) -> Any:
  """A radius in normalized units as one in pixels: `eps * std`.

  Args:
    eps: a number, or one per channel.
    std: what the images were divided by: a number, or one per channel, above 0.

  Returns:
    A number, or an array `(C,)`. `threats.linf` takes it for images `(H, W, C)` as
    `(1, 1, C)`.

  Raises:
    ValueError: for a negative radius, and a `std` not above 0.

  Example:
    >>> round(255 * in_pixels(2 / 255, 0.0942), 4)
    0.1884
  """
  eps, std = _checked(eps, std)
  return eps * std


def normalized(eps: Any, std: Any) -> Any:
  """A radius in pixels as one in normalized units: `eps / std`.

  Args:
    eps: a number, or one per channel.
    std: what the images are divided by: a number, or one per channel, above 0.

  Returns:
    A number, or an array `(C,)`.

  Raises:
    ValueError: for a negative radius, and a `std` not above 0.

  Example:
    >>> normalized(in_pixels(0.5, [0.25, 0.5]), [0.25, 0.5]).tolist()
    [0.5, 0.5]
  """
  eps, std = _checked(eps, std)
  return eps / std


def described(eps: Any, std: Any) -> str:
  """A radius in normalized units, and what it is in pixels, as one line of a report.

  Args:
    eps: concrete, as for `in_pixels`.
    std: as for `in_pixels`.

  Raises:
    ValueError: as for `in_pixels`.

  Example:
    >>> described(2 / 255, [0.0942, 0.1331, 0.1521])
    '2/255 normalized (0.19, 0.27, 0.30 /255 in pixels)'
  """
  return f"{_exact(eps)} normalized ({_rounded(in_pixels(eps, std))} in pixels)"


def beside(eps: Any, std: Any) -> str:
  """A radius in pixels, and what it is in normalized units, as one line of a report.

  Args:
    eps: concrete, as for `normalized`.
    std: as for `normalized`.

  Raises:
    ValueError: as for `normalized`.

  Example:
    >>> beside(2 / 255, [0.5, 0.25])
    '2/255 in pixels (4.00, 8.00 /255 normalized)'
  """
  return f"{_exact(eps)} in pixels ({_rounded(normalized(eps, std))} normalized)"


def _exact(radii):
  return ", ".join(f"{255 * value:g}" for value in np.atleast_1d(radii)) + "/255"


def _rounded(radii):
  return ", ".join(f"{255 * value:.2f}" for value in np.atleast_1d(radii)) + " /255"


def _checked(eps, std):
  """Both as given, or as arrays where they are one per channel."""
  inputs.check_positive("eps", eps)
  inputs.check_positive("std", std, zero=False)
  return _as_row(eps), _as_row(std)


def _as_row(value: Any) -> Any:
  return np.asarray(value) if isinstance(value, Sequence) else value
