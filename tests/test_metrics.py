import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxadv import metrics


def _images(shape, seed=0):
  rng = np.random.default_rng(seed)
  clean = rng.random(shape)
  return clean, np.clip(clean + rng.normal(0, 0.05, shape), 0, 1)


def _masks(classes, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, classes, (9, 7)), rng.integers(0, classes, (9, 7))


def test_published_psnr_and_l2():
  with helpers.x64():
    clean, image = jnp.full((16, 16, 1), 0.5), jnp.full((16, 16, 1), 0.6)
    assert metrics.psnr(clean, image) == pytest.approx(20, abs=1e-9)
    assert metrics.psnr(clean, clean + 0.01) == pytest.approx(40, abs=1e-9)
    far = jnp.full((572, 572, 3), 1 / 255)
    assert metrics.l2(far) == pytest.approx(3.8852, abs=5e-5)


def test_published_ssim():
  flat = jnp.full((16, 16, 1), 0.5)
  assert metrics.ssim(flat, flat + 0.1) == pytest.approx(0.9836092444, abs=1e-3)
  with helpers.x64():
    flat = jnp.full((16, 16, 1), 0.5)
    assert metrics.ssim(flat, flat + 0.1) == pytest.approx(0.9836092444, abs=1e-9)


def _ssim_by_scipy(a, b):
  """Wang et al. over the pixels whose window lies inside; one channel."""
  blur = lambda x: ndimage.gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]
  mean_a, mean_b = blur(a), blur(b)
  spread = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
  common = blur(a * b) - mean_a * mean_b
  light = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
  return (light * (2 * common + 9e-4) / (spread + 9e-4)).mean()


def test_ssim_against_scipy():
  with helpers.x64():
    clean, image = _images((24, 20, 3))
    want = np.mean([_ssim_by_scipy(clean[..., c], image[..., c]) for c in range(3)])
    got = metrics.ssim(jnp.asarray(clean), jnp.asarray(image))
    assert got == pytest.approx(want, abs=1e-9)


def test_ssim_of_a_volume_is_the_mean_over_slices():
  clean, image = map(jnp.asarray, _images((3, 16, 16, 1)))
  slices = [metrics.ssim(a, b) for a, b in zip(clean, image, strict=True)]
  assert metrics.ssim(clean, image) == pytest.approx(np.mean(slices), abs=1e-6)


def test_ssim_of_a_tiny_image_is_finite():
  clean, image = map(jnp.asarray, _images((4, 6, 1)))
  assert 0 < metrics.ssim(clean, image) < 1


def test_equal_images_and_empty_masks():
  clean = jnp.asarray(_images((16, 16, 1))[0])
  empty = jnp.zeros((4, 4), int)
  assert metrics.psnr(clean, clean) == jnp.inf
  assert metrics.ssim(clean, clean) == pytest.approx(1)
  assert metrics.low_band_fraction(clean - clean) == 0
  assert metrics.iou(empty, empty, 2) == metrics.dice(empty, empty, 2) == 1
  assert metrics.iou(empty, empty.at[0, 0].set(1), 2) == 0
  assert metrics.dice(empty, empty.at[0, 0].set(1), 2) == 0


@pytest.mark.parametrize("classes", [2, 3])
def test_overlaps_against_numpy(classes):
  prediction, label = _masks(classes)
  label[label == 2] = 1 if classes == 2 else 2
  kinds = [1] if classes == 2 else range(classes)
  both = [((prediction == k) & (label == k)).sum() for k in kinds]
  either = [((prediction == k) | (label == k)).sum() for k in kinds]
  sizes = [(prediction == k).sum() + (label == k).sum() for k in kinds]
  got = [
    measure(jnp.asarray(prediction), jnp.asarray(label), classes)
    for measure in (metrics.iou, metrics.dice)
  ]
  want = np.mean(np.divide(both, either)), np.mean(2 * np.divide(both, sizes))
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_class_that_neither_mask_has_does_not_count():
  prediction, label = map(jnp.asarray, _masks(2))
  assert metrics.dice(prediction, label, 5) == metrics.dice(prediction, label, 3)


def test_pixels_that_are_not_valid_do_not_count():
  prediction, label = map(jnp.asarray, _masks(2))
  valid = prediction == label
  assert metrics.iou(prediction, label, 2, valid) == 1
  assert metrics.dice(prediction, label, 2, valid) == 1
  assert metrics.dice(prediction, label, 2) < 1


def test_low_band_fraction_of_the_published_waves():
  a, b = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
  slow = 0.25 * np.cos(2 * np.pi * a / 8)
  fast = 0.125 * np.cos(2 * np.pi * 3 * b / 8)
  with helpers.x64():
    got = metrics.low_band_fraction(jnp.asarray(slow + fast)[..., None])
    assert got == pytest.approx(2.0 / 2.5, abs=1e-12)


@pytest.mark.parametrize("shape", [(8, 9, 3), (4, 6, 8, 1)])
def test_low_band_fraction_is_one_for_a_constant_and_for_every_frequency(shape):
  delta = jnp.asarray(_images(shape)[0])
  assert metrics.low_band_fraction(jnp.ones(shape)) == pytest.approx(1)
  assert metrics.low_band_fraction(delta, 1.0) == pytest.approx(1)
  assert 0 < metrics.low_band_fraction(delta - delta.mean()) < 1


def test_round8_equals_a_stored_file():
  image = jnp.asarray(_images((16, 16, 3))[1], jnp.float32)
  stored = np.rint(255 * np.asarray(image)).astype(np.uint8)
  rounded = np.asarray(metrics.round8(image))
  np.testing.assert_allclose(rounded, stored / np.float32(255), atol=1e-7)
  np.testing.assert_array_equal(np.rint(255 * rounded), stored)


def test_report_measures_the_image_and_its_rounded_twin():
  clean = jnp.full((2, 16, 16, 1), 100 / 255)
  image = clean.at[0].add(0.3 / 255).at[1].add(60.4 / 255)
  target, before = jnp.ones((2, 16, 16), int), jnp.zeros((2, 16, 16), int)
  run = jax.jit(metrics.segmentation_report, static_argnums=0)
  report = run(helpers.per_pixel, clean, image, target=target, clean_prediction=before)
  names = ["iou", "dice", "pixel_accuracy", "clean_iou"]
  names += ["l2", "linf", "psnr", "ssim", "low_band"]
  assert set(report) == {*names, *(name + "_8bit" for name in names)}
  assert all(value.shape == (2,) for value in report.values())
  np.testing.assert_allclose(report["iou"], [0, 1])
  np.testing.assert_allclose(report["clean_iou"], [1, 0])
  np.testing.assert_allclose(255 * report["linf"], [0.3, 60.4], rtol=1e-3)
  np.testing.assert_allclose(255 * report["linf_8bit"], [0, 60], atol=1e-3)
  np.testing.assert_allclose(report["l2_8bit"], 16 * report["linf_8bit"], rtol=1e-5)
  assert report["psnr_8bit"][0] > 100
  np.testing.assert_allclose(report["low_band"], 1, atol=1e-5)


def test_report_reads_only_valid_pixels_and_models_with_features():
  clean = jnp.full((1, 16, 16, 1), 0.2)
  image = clean.at[:, :8].set(0.9)
  target, before = jnp.ones((1, 16, 16), int), jnp.zeros((1, 16, 16), int)
  valid = jnp.zeros((1, 16, 16), bool).at[:, :8].set(True)
  predict = lambda x: (helpers.per_pixel(x), {"pixels": x})
  report = functools.partial(
    metrics.segmentation_report, predict, clean, image, target=target
  )
  part = report(clean_prediction=before, mask=valid)
  whole = report(clean_prediction=before)
  assert part["iou"].item() == part["pixel_accuracy"].item() == 1
  assert whole["iou"].item() == whole["pixel_accuracy"].item() == 0.5
