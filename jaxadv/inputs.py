"""Refuses bad input before the first step, and says what to write instead.

Shapes and dtypes are checked always; values (range of the images, classes of the
labels) only where they are concrete, that is outside `jit`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
  "as_weights",
  "check_batch",
  "check_choice",
  "check_classes",
  "check_feature",
  "check_image",
  "check_interval",
  "check_num_steps",
  "check_positive",
  "check_range",
  "check_shapes",
  "check_share",
]


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
  """Raises `ValueError` unless `value` is one of the `choices`.

  Example:
    >>> check_choice("keep", "first", ("last", "best"))
    Traceback (most recent call last):
    ...
    ValueError: `keep` is 'first'; write one of last, best.
  """
  if value not in choices:
    raise ValueError(f"`{name}` is {value!r}; write one of {', '.join(choices)}.")


def check_positive(name: str, value: Any, *, zero: bool = True) -> None:
  """Raises `ValueError` when a concrete `value` is negative or not a number.

  Args:
    name: of the argument.
    value: a number or an array.
    zero: whether 0 will do.

  Example:
    >>> check_positive("eps", -1.0)
    Traceback (most recent call last):
    ...
    ValueError: `eps` is -1.0; it must be a number >= 0.
  """
  if not _is_concrete(value):
    return
  values = np.asarray(value, float)
  if not np.all(values >= 0 if zero else values > 0):
    sign = ">=" if zero else ">"
    raise ValueError(f"`{name}` is {value}; it must be a number {sign} 0.")


def check_share(name: str, value: Any) -> None:
  """Raises `ValueError` when a concrete `value` is outside [0, 1].

  Example:
    >>> check_share("weight", 1.5)
    Traceback (most recent call last):
    ...
    ValueError: `weight` is 1.5; it must be a number in [0, 1].
  """
  if not _is_concrete(value):
    return
  values = np.asarray(value, float)
  if not np.all((values >= 0) & (values <= 1)):
    raise ValueError(f"`{name}` is {value}; it must be a number in [0, 1].")


def check_interval(name: str, pair: Any) -> None:
  """Raises `ValueError` unless `pair` is two numbers >= 0, the smaller one first.

  Example:
    >>> check_interval("eps", (0.2, 0.1))
    Traceback (most recent call last):
    ...
    ValueError: `eps` is (0.2, 0.1); write two numbers >= 0, the smaller one first.
  """
  message = f"`{name}` is {pair}; write two numbers >= 0, the smaller one first."
  if not isinstance(pair, Sequence) or len(pair) != 2:
    raise ValueError(message)
  if _is_concrete(tuple(pair)) and not 0 <= pair[0] <= pair[1]:
    raise ValueError(message)


def check_num_steps(num_steps: Any) -> None:
  """Raises unless `num_steps` is a Python int of at least 1.

  Example:
    >>> check_num_steps(0)
    Traceback (most recent call last):
    ...
    ValueError: `num_steps` is 0; an attack needs at least 1 step.
  """
  if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer):
    raise TypeError(
      f"`num_steps` is {num_steps!r}; the loop is compiled for a fixed Python int."
    )
  if num_steps < 1:
    raise ValueError(f"`num_steps` is {num_steps}; an attack needs at least 1 step.")


def check_batch(x: Any, y: Any, bounds: tuple[Any, Any] | None) -> None:
  """Raises unless `x` is a float batch inside `bounds` and `y` labels each image.

  Args:
    x: `(B, ..., C)` float32 or float64.
    y: an array `(B, ...)` or a mapping with `"label"`; every leaf has leading axis B.
    bounds: the valid range, or `None`.

  Raises:
    TypeError: for a dtype that is not float32 or float64, and for a missing label.
    ValueError: for a rank below 2, an empty batch, other leading axes, and values
      outside the bounds or not finite.
  """
  dtype = getattr(x, "dtype", None)
  if dtype not in (jnp.float32, jnp.float64):
    raise TypeError(
      f"`x` has dtype {dtype or type(x).__name__}; attacks need float32 images inside "
      "the bounds. Write x.astype(jnp.float32) / 255 for 8-bit images, and let "
      "`predict` cast for a half-precision model."
    )
  if x.ndim < 2 or x.shape[0] == 0:
    raise ValueError(
      f"`x` has shape {x.shape}; attacks need a non-empty batch (B, ..., C). "
      "Write x[None] for a single image."
    )
  _check_leading_axis(y, x.shape[0])
  if bounds is not None:
    check_range(x, *bounds)


def check_range(x: Any, low: Any, high: Any) -> None:
  """Raises `ValueError` unless concrete `x` are finite and inside the bounds."""
  if not all(map(_is_concrete, (x, low, high))):
    return
  x = np.asarray(x)
  if not np.isfinite(x).all():
    raise ValueError("`x` holds values that are not finite; mend the images first.")
  # a rounding of the caller's own scaling is not an error
  slack = 1e-6 * (np.asarray(high) - np.asarray(low))
  if (x < low - slack).any() or (x > high + slack).any():
    raise ValueError(
      f"`x` spans [{x.min():g}, {x.max():g}], outside the bounds [{low}, {high}]. "
      "Divide 8-bit images by 255; keep mean/std normalisation inside `predict`."
    )


def as_weights(weight: Any, batch: int) -> jax.Array:
  """Weights `(B,)` of examples as floats, 1 for `None`; raises for any other shape.

  Example:
    >>> as_weights(jnp.array([True, False]), 2).tolist()
    [1.0, 0.0]
    >>> as_weights(jnp.ones(3), 2)
    Traceback (most recent call last):
    ...
    ValueError: `weight` has shape (3,); write one number per image, (2,).
  """
  if weight is None:
    return jnp.ones(batch)
  if jnp.shape(weight) != (batch,):
    shape = jnp.shape(weight)
    raise ValueError(
      f"`weight` has shape {shape}; write one number per image, ({batch},)."
    )
  check_positive("weight", weight)
  return jnp.asarray(weight, jnp.result_type(float))


def check_image(image: Any) -> None:
  """Raises unless `image` is ONE float image `(..., C)`."""
  dtype, shape = getattr(image, "dtype", type(image).__name__), jnp.shape(image)
  if dtype not in (jnp.float32, jnp.float64):
    raise TypeError(f"`image` has dtype {dtype}; write one float32 image (..., C).")
  if 0 in shape or not shape:
    raise ValueError(f"`image` has shape {shape}; write one image (..., C).")


def check_shapes(target: Any, logits: Any) -> None:
  """Raises `ValueError` unless labels, and the mask if any, fit the logits.

  Args:
    target: mapping with `"label"` `(B,)`, `(B, H, W)` or `(B, L)`.
    logits: the model's output for the same batch.
  """
  label, valid = target["label"], target.get("mask")
  if label.shape not in (logits.shape, logits.shape[:-1]):
    raise ValueError(
      f"labels have shape {label.shape} and logits {logits.shape}; labels must be "
      f"{logits.shape[:-1]} (classes, masks) or {logits.shape} (label sets)."
    )
  if valid is not None and valid.shape != label.shape:
    raise ValueError(f'y["mask"] is {valid.shape}; write the labels\' {label.shape}.')


def check_classes(target: Any, logits: Any) -> None:
  """Raises `ValueError` for a label outside the classes, where values are concrete.

  Args:
    target: mapping with `"label"`, and `"mask"` where some pixels do not count: those
      may hold any label, but every image needs one that counts.
    logits: the model's output for the same batch.
  """
  label, valid = target["label"], target.get("mask")
  if not _is_concrete((label, valid)):
    return
  classes = 2 if label.shape == logits.shape else logits.shape[-1]
  values = np.asarray(label)
  if valid is not None:
    values = _valid_values(values, np.asarray(valid, bool))
  wrong = values[(values < 0) | (values >= classes)]
  if wrong.size:
    raise ValueError(
      f"label {wrong.flat[0]} is outside the model's classes 0..{classes - 1}; mark "
      'pixels to ignore in y["mask"] (False there).'
    )


def check_feature(name: str, features: Any) -> None:
  """Raises `ValueError` unless the model returns a feature called `name`."""
  if name not in features:
    known = ", ".join(sorted(features)) or "none: predict returns logits only"
    raise ValueError(f"the model has no feature {name!r}; it has {known}.")


def _check_leading_axis(y, batch):
  if y is None or (isinstance(y, dict) and "label" not in y):
    raise TypeError('`y` holds no labels; write labels, or {"label": labels, ...}.')
  for path, leaf in jax.tree_util.tree_leaves_with_path(y):
    if jnp.ndim(leaf) < 1 or leaf.shape[0] != batch:
      name = "y" + jax.tree_util.keystr(path)
      raise ValueError(
        f"`{name}` has shape {jnp.shape(leaf)} but `x` holds {batch} images; write one "
        "entry per image."
      )
  label = y["label"] if isinstance(y, dict) else y
  if not (jnp.issubdtype(label.dtype, jnp.integer) or label.dtype == bool):
    raise TypeError(
      f"labels have dtype {label.dtype}; write integer class indices, one per image or "
      "pixel."
    )


def _valid_values(values, valid):
  empty = np.flatnonzero(~valid.reshape(len(valid), -1).any(1))
  if empty.size:
    raise ValueError(
      f'`y["mask"]` marks no pixel of image {empty[0]}; there is nothing to attack.'
    )
  return values[valid]


def _is_concrete(value):
  return not any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(value))
