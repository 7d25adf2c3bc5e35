"""The pictures of an analysis: whole PNG files that show what they are given."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxadv import analysis
from jaxadv import analysis_plots as plots

RNG = np.random.default_rng(0)
NAMES = ["Atelectasis", "Cardiomegaly", "Pleural thickening and scarring"]


def noise(*shape):
  return RNG.uniform(size=shape)


def accuracies(last):
  eps = [0, 1 / 255, 8 / 255]
  return plots.accuracy_curves(eps, {"none": [0.9, 0.1, 0], NAMES[2]: [0.8, 0.7, last]})


IMAGES, PLACES = noise(2, 8, 12, 3), noise(12, 2)


def heats(last):
  heat = np.tile([[0.0, 1.0], [0.5, last]], (2, 1, 1))
  return plots.heat_maps(IMAGES, IMAGES, heat, heat, notes=["IoU 0.25", "IoU 0.5"])


def distances(last):
  return plots.distances_by_layer(
    ["stage1", "a rather long name of a layer"],
    {"no defence": np.array([[0.1, 0.5], [0.2, last]]), "MART": np.ones((3, 2)) / 9},
  )


def scatter(last):
  moved = np.concatenate([PLACES[:-1], [[0.5, last]]])
  labels = np.arange(12) % 3
  return plots.embeddings(PLACES, moved, labels, class_names=NAMES)


def matrices(last):
  clean = np.array([[1, 2, 3.0], [2, 1, 5], [4, 4, 1]])
  attacked = np.array([[1, 2, 3.0], [2, last, 3], [4, 1, 3]])  # the third is constant
  found = analysis.label_correlation(clean, attacked)
  return plots.correlation_matrices(found, class_names=NAMES)


def grids(last):
  loss = np.arange(60.0).reshape(5, 3, 4)
  loss[-1, -1, -1] = 59 - 30 * last
  found = analysis.Landscape(loss, np.array([-1, 0, 1.0]), np.arange(4.0) - 1)
  return plots.landscapes(found, titles=[f"image {k}" for k in range(5)])


@pytest.mark.parametrize(
  "draw", [accuracies, heats, distances, scatter, matrices, grids]
)
def test_a_picture_is_whole_and_shows_its_numbers(draw):
  first, same, other = draw(0.2), draw(0.2), draw(0.9)
  with Image.open(io.BytesIO(first)) as image:
    assert image.format == "PNG"
    pixels = np.asarray(image.convert("RGB"))
  assert pixels.std() > 5
  for border in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
    assert (border == 255).all(), "something runs over the edge"
  assert first == same
  assert first != other


def test_a_long_name_makes_the_picture_larger():
  sizes = []
  for name in ("short", "long " * 30):
    with Image.open(io.BytesIO(plots.accuracy_curves([0], {name: [0.5]}))) as image:
      sizes.append(image.width)
  assert sizes[1] > sizes[0] + 300


def test_one_flat_landscape_and_a_grey_image():
  flat = analysis.Landscape(np.ones((1, 3, 3)), np.arange(3.0), np.arange(3.0))
  assert plots.landscapes(flat).startswith(b"\x89PNG")
  grey, heat = noise(1, 8, 8, 1), np.zeros((1, 2, 2))
  assert plots.heat_maps(grey, grey, heat, heat).startswith(b"\x89PNG")


def test_a_curve_has_a_value_for_every_radius():
  with pytest.raises(ValueError, match="'none' has 1 accuracies for 2 radii"):
    plots.accuracy_curves([0, 0.1], {"none": [0.9]})
