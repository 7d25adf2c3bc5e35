"""Pictures in files: finding them, reading them, and masks as class indices."""

import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image, UnidentifiedImageError

__all__ = ["as_classes", "binary", "listed", "one_channel", "partner", "read", "square"]

_SUFFIXES = ("", "_mask", "_segmentation", "_Segmentation")
_UNREADABLE = (
  UnidentifiedImageError,
  OSError,
  SyntaxError,
  Image.DecompressionBombError,
)
_MOST_CLASSES = 32  # above that, a mask holds grey values and not class indices
_DEEP = ("I;16", "I;16B", "I;16L", "I")


def listed(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Visible files of `folder` by name without ending, in order.

  Raises:
    FileNotFoundError: when the folder is missing or empty.
    ValueError: for two files of one name.
  """
  if not folder.is_dir():
    raise FileNotFoundError(
      f"there is no folder {folder}; put pictures into images/ and one mask each, of "
      "the same name, into masks/."
    )
  files = sorted(f for f in folder.iterdir() if f.is_file() and f.name[0] != ".")
  if not files:
    raise FileNotFoundError(f"{folder} is empty.")
  found: dict[str, pathlib.Path] = {}
  for file in files:
    if found.setdefault(file.stem, file) != file:
      raise ValueError(f"{found[file.stem]} and {file} have one name; keep one.")
  return found


def partner(file: pathlib.Path, masks: Mapping[str, pathlib.Path]) -> pathlib.Path:
  """The mask of the picture `file`, of those that a folder has by name.

  Raises:
    FileNotFoundError: when it has none.
  """
  for suffix in _SUFFIXES:
    if file.stem + suffix in masks:
      return masks[file.stem + suffix]
  place = next(iter(masks.values())).parent
  raise FileNotFoundError(f"{file} has no mask; {place / file.stem}.png is missing.")


def read(file: pathlib.Path, size: int | None, how: Image.Resampling) -> np.ndarray:
  """Pixels of one picture as stored.

  Args:
    file: any format of Pillow.
    size: side to stretch it to, or `None`.
    how: bilinear for images, which become RGB unless grey; nearest for masks, whose
      palette indices are kept.

  Returns:
    `(H, W)` or `(H, W, C)` uint8, or float32 in [0, 1] for 16 bits.

  Raises:
    ValueError: for a torn file and one that is no picture.
  """
  picture = _opened(file)
  if how == Image.Resampling.BILINEAR and picture.mode not in ("L", *_DEEP, "F"):
    picture = picture.convert("RGB")
  deep = picture.mode in _DEEP
  picture = picture.convert("F") if deep else picture
  picture = picture if size is None else picture.resize((size, size), how)
  pixels = np.asarray(picture)
  return pixels / np.float32(65535) if deep else pixels


def square(file: pathlib.Path, side: int, channels: int) -> np.ndarray:
  """An image, stretched to a square (bilinear, which averages where it shrinks).

  Args:
    file: of 8 bits per channel, grey, coloured or with a palette.
    side: in pixels.
    channels: 1 for grey, 3 for RGB, whatever is stored.

  Returns:
    `(side, side)` or `(side, side, 3)` uint8.

  Raises:
    ValueError: for a torn file, one that is no picture, and more than 8 bits.
  """
  picture = _opened(file)
  if picture.mode in (*_DEEP, "F"):
    raise ValueError(f"{file} has more than 8 bits per channel; save it with 8.")
  picture = picture.convert("L" if channels == 1 else "RGB")
  return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))


def binary(file: pathlib.Path, side: int) -> np.ndarray:
  """A mask of 0 and 255, stretched to a square (nearest): `(side, side)` bool.

  Raises:
    ValueError: for a torn file, one that is no picture, and a mask of small numbers.
  """
  picture = _opened(file).convert("L")
  highest = picture.getextrema()[1]
  if 0 < highest < 128:
    raise ValueError(f"{file} has no value above {highest}; a mask has 0 and 255.")
  return np.asarray(picture.resize((side, side), Image.Resampling.NEAREST)) > 127


def one_channel(place: str | pathlib.Path, masks: np.ndarray) -> np.ndarray:
  """Masks `(N, H, W)` of such, or of pictures `(N, H, W, C)` with equal channels.

  Raises:
    ValueError: for coloured ones.
  """
  if masks.ndim < 4:
    return masks
  colors = masks[..., :3]
  if (colors != colors[..., :1]).any():
    raise ValueError(
      f"the masks in {place} are coloured; save class indices, or 0 and 255, as "
      "greyscale PNG."
    )
  return masks[..., 0]


def as_classes(
  place: str | pathlib.Path, masks: np.ndarray, values: np.ndarray | None = None
) -> np.ndarray:
  """Class indices; 0 and 255, and pictures with equal channels, are understood.

  Args:
    place: of the masks, for errors.
    masks: `(N, H, W)` or `(N, H, W, C)`.
    values: in the masks of the whole source, ascending, where these are not all.

  Returns:
    `(N, H, W)` of integers or bool.

  Raises:
    ValueError: for colours and grey values.
  """
  masks = one_channel(place, masks)
  values = np.unique(masks) if values is None else values
  if set(values.tolist()) <= {0, 255}:
    return masks > 0
  if values[-1] >= _MOST_CLASSES or masks.dtype == np.float32:
    raise ValueError(
      f"the masks in {place} hold grey values such as {values[-1]}; save class "
      "indices, or 0 and 255, as PNG (JPEG smears them)."
    )
  return masks


def _opened(file):
  try:
    with Image.open(file) as opened:
      return opened.copy()
  except FileNotFoundError:
    raise
  except _UNREADABLE as error:
    raise ValueError(f"{file} is torn or no picture ({error}).") from error
