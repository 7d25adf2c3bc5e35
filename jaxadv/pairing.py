"""Which image is attacked towards whose mask: the pairs of targeted attacks."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

__all__ = ["Pairs", "pairs"]


class Pairs(NamedTuple):
  """Ordered pairs: image `source[i]` is attacked towards the mask of `target[i]`.

  Attributes:
    source: `(P,)` int64, positions of the attacked images.
    target: `(P,)` int64, positions of the images whose predicted mask is the wish.
    initial_iou: `(P,)` float64, IoU of the two predicted masks before the attack: the
      floor it starts from.
  """

  source: np.ndarray
  target: np.ndarray
  initial_iou: np.ndarray


def pairs(
  images: np.ndarray,
  predictions: np.ndarray,
  *,
  num: int,
  seed: int,
  num_classes: int,
  max_iou: float = 0.6,
  foreground: tuple[float, float] = (0.02, 0.6),
  exclude: Iterable[tuple[int, int]] = (),
) -> Pairs:
  """Draws ordered pairs whose target mask is the predicted mask of another image.

  A pair is admitted when the foreground share of the target mask lies in `foreground`,
  the IoU of the two predicted masks is below `max_iou`, and the two images differ. Of
  those, `num` are drawn in an order that `seed` decides: a smaller `num` gives a prefix
  of a larger one. When fewer exist, all of them are returned.

  Args:
    images: `(N, ...)`; equal images are never paired.
    predictions: `(N, ...)` int masks of the attacked model.
    num: pairs wanted, at least 1.
    seed: of the draw.
    num_classes: K; IoU of class 1 for two classes, else mean over the classes present.
    max_iou: upper limit, excluded, of the initial IoU.
    foreground: lowest and highest share of pixels that are not class 0.
    exclude: `(source, target)` pairs to leave out, for instance those that parameters
      were chosen on.

  Returns:
    `Pairs` of length at most `num`.

  Raises:
    ValueError: when there is no such pair, for `num` below 1 and for lengths that do
      not match.

  Example:
    >>> masks = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    >>> images = np.arange(3)[:, None]
    >>> drawn = pairs(images, masks, num=9, seed=0, num_classes=2)
    >>> sorted(zip(drawn.source.tolist(), drawn.target.tolist()))
    [(0, 1), (1, 0), (1, 2), (2, 1)]
  """
  if len(images) != len(predictions):
    raise ValueError(f"{len(images)} images but {len(predictions)} predictions.")
  if num < 1:
    raise ValueError(f"`num` is {num}; ask for at least one pair.")
  flat = predictions.reshape(len(predictions), -1)
  share = (flat != 0).mean(1)
  usable = (share >= foreground[0]) & (share <= foreground[1])
  overlap = _mutual_iou(flat, num_classes)
  same = _groups(images)
  admitted = usable[None, :] & (overlap < max_iou) & (same[:, None] != same[None, :])
  for source, target in exclude:
    admitted[source, target] = False
  candidates = np.argwhere(admitted)
  if not len(candidates):
    raise ValueError(
      f"no pair of {len(images)} images is admitted: {usable.sum()} predicted masks "
      f"have a foreground share in {foreground}, and two of them must overlap by less "
      f"than {max_iou}. Train the model longer, widen the limits or add images."
    )
  drawn = np.random.default_rng(seed).permutation(candidates)[:num]
  source, target = drawn.astype(np.int64).T
  return Pairs(source, target, overlap[source, target])


def _mutual_iou(flat, num_classes):
  """`(N, N)` IoU of every two masks, as `jaxadv.masks.iou` counts it."""
  total, present = np.zeros((2, len(flat), len(flat)))
  for k in range(1 if num_classes == 2 else 0, num_classes):
    member = (flat == k).astype(np.float64)  # counts stay exact
    common, area = member @ member.T, member.sum(1)
    union = area[:, None] + area[None, :] - common
    total += np.where(union > 0, common / np.maximum(union, 1), 0)
    present += union > 0
  return np.where(present > 0, total / np.maximum(present, 1), 1.0)


def _groups(images):
  """One number per image, equal for equal images."""
  seen: dict[bytes, int] = {}
  return np.array([seen.setdefault(image.tobytes(), len(seen)) for image in images])
