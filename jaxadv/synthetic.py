"""Procedural phantoms: synthetic pictures of a lesion on skin, with their exact mask.

They imitate what makes a dermoscopic picture hard (soft and irregular borders, texture,
uneven light, hairs, noise) and nothing else. Use them to run the code without any data,
never to draw conclusions about medicine.
"""

import itertools

import numpy as np

__all__ = ["phantom"]

_SKIN = np.array([0.82, 0.62, 0.52])
_PIGMENT = np.array([0.36, 0.50, 0.48])  # what a lesion takes away from the skin
_HAIR = np.array([0.16, 0.11, 0.09])


def phantom(
  rng: np.random.Generator, size: int, num_classes: int = 2
) -> tuple[np.ndarray, np.ndarray]:
  """One picture and its mask.

  Args:
    rng: decides everything that is random.
    size: side in pixels, at least 16.
    num_classes: 2 for background and lesion; more add nested cores, each darker.

  Returns:
    uint8 `(size, size, 3)` and int32 `(size, size)` in `0 .. num_classes - 1`.

  Example:
    >>> image, mask = phantom(np.random.default_rng(0), 32)
    >>> image.shape, mask.shape, np.unique(mask).tolist()
    ((32, 32, 3), (32, 32), [0, 1])
  """
  depth = _depth(rng, size)
  levels = np.linspace(0, 1, num_classes)[:-1]  # depth at which each class begins
  mask = sum((depth > level).astype(np.int32) for level in levels)
  softness = rng.uniform(0.03, 0.12)
  shade = sum(_sigmoid((depth - level) / softness) for level in levels)
  mottle = 1 + 0.35 * _texture(rng, size, 1.2)
  strength = rng.uniform(0.45, 1.0) / len(levels)
  pigment = _PIGMENT * rng.uniform(0.85, 1.15, 3) * strength
  skin = _SKIN * rng.uniform(0.8, 1.1) * rng.uniform(0.95, 1.05, 3)
  image = skin + 0.04 * _texture(rng, size, 1.6)[..., None]
  image = image - (shade * mottle)[..., None] * pigment
  image = _with_hairs(rng, image * _light(rng, size)[..., None])
  image = image + rng.normal(0, 0.012, image.shape)
  return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), mask


def _grid(size):
  """Row and column coordinates in [-1, 1]."""
  return np.meshgrid(*[np.linspace(-1, 1, size)] * 2, indexing="ij")


def _depth(rng, size):
  """Positive inside a wobbly ellipse, 1 at its centre; 0 on the border."""
  row, col = _grid(size)
  middle = rng.uniform(-0.4, 0.4, 2)
  turn, stretch = rng.uniform(0, np.pi), rng.uniform(0.65, 1.0)
  row, col = row - middle[0], col - middle[1]
  along = np.cos(turn) * row + np.sin(turn) * col
  across = (np.cos(turn) * col - np.sin(turn) * row) / stretch
  angle = np.arctan2(across, along)
  border = np.full_like(angle, rng.uniform(0.25, 0.7))
  for waves in range(2, 8):
    height = rng.normal(0, 0.14 / waves)
    border *= 1 + height * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
  return 1 - np.hypot(along, across) / border


def _texture(rng, size, roughness):
  """Zero-mean noise with a power-law spectrum and unit spread."""
  row, col = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
  falloff = (np.hypot(row, col) + 1 / size) ** -roughness
  falloff[0, 0] = 0
  white = np.fft.rfft2(rng.normal(size=(size, size)))
  noise = np.fft.irfft2(white * falloff, (size, size))
  return noise / noise.std()


def _light(rng, size):
  """A tilted plane of light that falls off towards the corners."""
  row, col = _grid(size)
  slope = rng.uniform(-0.12, 0.12, 2)
  return 1 + slope[0] * row + slope[1] * col - rng.uniform(0, 0.15) * (row**2 + col**2)


def _with_hairs(rng, image):
  """Up to six thin dark arcs."""
  size = image.shape[0]
  row, col = _grid(size)
  for _ in range(rng.integers(0, 7)):
    ends, bend = rng.uniform(-1, 1, (2, 2)), rng.normal(0, 0.2, 2)
    t = np.linspace(0, 1, 17)[:, None]
    path = ends[0] + t * (ends[1] - ends[0]) + 4 * t * (1 - t) * bend
    near = [_to_segment(row, col, a, b) for a, b in itertools.pairwise(path)]
    width = rng.uniform(0.5, 1.0) * 2 / size
    cover = rng.uniform(0.5, 0.9) * np.exp(-np.min(near, 0) / width**2)
    image = image + cover[..., None] * (_HAIR - image)
  return image


def _to_segment(row, col, start, end):
  """Squared distance of every pixel to the segment between two points."""
  row, col, way = row - start[0], col - start[1], end - start
  along = np.clip((row * way[0] + col * way[1]) / (way @ way + 1e-12), 0, 1)
  return (row - along * way[0]) ** 2 + (col - along * way[1]) ** 2


def _sigmoid(value):
  return 1 / (1 + np.exp(-np.clip(value, -40, 40)))
