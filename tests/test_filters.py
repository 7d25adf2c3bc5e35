"""Filters: the published vectors, SciPy, and the algebra of projectors."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxadv import filters, transforms


@pytest.fixture(autouse=True)
def float64():
  with helpers.x64():
    yield


def noise(*shape):
  return jnp.asarray(np.random.default_rng(4).normal(size=shape))


def waves():
  a, b = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
  slow = 0.25 * np.cos(2 * np.pi * a / 8)
  fast = 0.125 * np.cos(2 * np.pi * 3 * b / 8)
  return slow[..., None], fast[..., None]


def test_published_low_pass_vector():
  slow, fast = waves()
  image = jnp.asarray(0.5 + slow + fast)
  low = filters.low_pass(image, 0.25)
  np.testing.assert_allclose(low, 0.5 + slow, atol=1e-15)
  assert jnp.square(image - low).sum() == pytest.approx(0.5, abs=1e-12)
  delta = image - 0.5
  low = filters.low_pass(delta, 0.25)
  assert jnp.square(low).sum() == pytest.approx(2.0, abs=1e-12)
  gradient = jax.grad(lambda d: jnp.square(filters.low_pass(d, 0.25)).sum())(delta)
  assert gradient[0, 0, 0] == pytest.approx(0.5, abs=1e-12)
  assert gradient[2, 5, 0] == pytest.approx(0, abs=1e-12)
  np.testing.assert_allclose(filters.low_pass(low, 0.25), low, atol=1e-15)
  np.testing.assert_allclose(delta - low, fast, atol=1e-15)


@pytest.mark.parametrize(
  ("n", "radius", "count"), [(8, 1, 5), (8, 2, 13), (16, 4, 49), (10, 3, 29)]
)
def test_mask_counts_include_the_circle(n, radius, count):
  assert filters.low_pass_mask((n, n), radius / n).sum() == count
  with jax.enable_x64(False):  # a cutoff rounded to float32 keeps the circle too
    assert filters.low_pass_mask((n, n), jnp.float32(radius / n)).sum() == count


@pytest.mark.parametrize("shape", [(8, 6, 2), (7, 9, 1), (4, 5, 6, 2)])
def test_low_pass_is_an_orthogonal_projector_and_high_pass_its_complement(shape):
  a, b = noise(*shape), noise(*shape)[::-1]
  low = filters.low_pass(a, 0.3)
  np.testing.assert_allclose(filters.low_pass(low, 0.3), low, atol=1e-12)
  assert (low * b).sum() == pytest.approx(
    float((a * filters.low_pass(b, 0.3)).sum()), abs=1e-12
  )
  high, _ = transforms.high_pass(0.3).update(a, None)
  lowered, _ = transforms.low_pass(0.3).update(a, None)
  np.testing.assert_allclose(high + lowered, a, atol=1e-12)
  assert float(jnp.abs(high).max()) > 0.1
  assert float(jnp.abs(lowered).max()) > 0.1


@pytest.mark.parametrize("shape", [(8, 6, 2), (7, 9, 1), (4, 5, 6, 2)])
def test_low_pass_against_numpy(shape):
  image = noise(*shape)
  axes = tuple(range(len(shape) - 1))
  frequencies = np.meshgrid(*map(np.fft.fftfreq, shape[:-1]), indexing="ij")
  radius = np.sqrt(np.square(frequencies).sum(0))
  kept = np.fft.fftn(image, axes=axes) * (radius <= 0.3)[..., None]
  want = np.fft.ifftn(kept, axes=axes)
  np.testing.assert_allclose(filters.low_pass(image, 0.3), want.real, atol=1e-12)
  assert np.abs(want.imag).max() < 1e-12


def test_haar_low_band():
  block = jnp.array([[1.0, 2.0], [3.0, 4.0]])[..., None]
  assert filters.haar_low_pass(block).tolist() == [[[2.5], [2.5]], [[2.5], [2.5]]]
  image, other = noise(8, 6, 2), noise(8, 6, 2)[::-1]
  low = filters.haar_low_pass(image)
  np.testing.assert_allclose(filters.haar_low_pass(low), low, atol=1e-15)
  assert (low * other).sum() == pytest.approx(
    float((image * filters.haar_low_pass(other)).sum()), abs=1e-12
  )
  odd = noise(5, 3, 1)
  got = filters.haar_low_pass(odd)
  assert got.shape == odd.shape
  np.testing.assert_allclose(got[4, 2], odd[4, 2], atol=1e-15)  # alone in its block
  np.testing.assert_allclose(got[4, :2], odd[4, :2].mean(), atol=1e-15)
  volume = filters.haar_low_pass(noise(4, 4, 4, 1))
  np.testing.assert_allclose(
    volume[:2, :2, :2], noise(4, 4, 4, 1)[:2, :2, :2].mean(), atol=1e-15
  )


def test_gaussian_kernel_and_blur_against_scipy():
  kernel = filters.gaussian_kernel(1.0, 3)
  np.testing.assert_allclose(kernel, [0.2740686, 0.4518628, 0.2740686], atol=1e-7)
  assert kernel.sum() == pytest.approx(1, abs=1e-12)
  kernel = filters.gaussian_kernel(1.7, 7)
  for shape in ((9, 6, 2), (5, 6, 7, 1)):
    image, want = noise(*shape), np.asarray(noise(*shape))
    for axis in range(len(shape) - 1):
      want = scipy.ndimage.correlate1d(want, kernel, axis, mode="constant")
    np.testing.assert_allclose(filters.blur(image, kernel), want, atol=1e-12)
  with pytest.raises(ValueError, match="`size` is 4; a centred kernel has an odd"):
    filters.gaussian_kernel(1.0, 4)


def test_cutoff_and_sigma_may_be_traced():
  image = noise(8, 8, 1)
  swept = jax.vmap(filters.low_pass, (None, 0))(image, jnp.array([0.1, 0.25, 1.0]))
  np.testing.assert_allclose(swept[1], filters.low_pass(image, 0.25), atol=1e-12)
  np.testing.assert_allclose(swept[2], image, atol=1e-12)
  assert jax.vmap(lambda s: filters.gaussian_kernel(s, 5))(jnp.ones(3)).shape == (3, 5)


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan])
def test_a_sigma_that_is_none_is_refused(sigma):
  with pytest.raises(ValueError, match=r"`sigma` is .*; it must be a number > 0"):
    filters.gaussian_kernel(sigma, 3)
