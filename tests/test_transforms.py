"""Transforms of one gradient: published vectors, and what each must keep."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage

from jaxadv import transforms
from jaxadv.attacks import parts


@pytest.fixture(autouse=True)
def float64():
  with helpers.x64():
    yield


def run(transform, gradients, **extra):
  """Updates of a transform for a list of gradients."""
  transform = optax.with_extra_args_support(transform)
  params = jnp.zeros_like(jnp.asarray(gradients[0]))
  state, out = transform.init(params), []
  for gradient in gradients:
    update, state = transform.update(jnp.asarray(gradient), state, params, **extra)
    out.append(np.asarray(update))
  return out


def noise(*shape):
  return np.random.default_rng(2).normal(size=shape)


@pytest.mark.parametrize("ord", [1, 2])
def test_normalize_gives_unit_norm_and_leaves_zero(ord):
  for scale in (1e-30, 1.0, 1e30):
    (unit,) = run(transforms.normalize(ord), [scale * noise(4, 5, 2)])
    assert np.linalg.norm(unit.ravel(), ord) == pytest.approx(1, abs=1e-12)
  assert not run(transforms.normalize(ord), [np.zeros((2, 2))])[0].any()


STEPS = [(1, -3, 0, 4), (-2, 2, 2, 2)]


@pytest.mark.parametrize(
  ("decay", "gradients", "want"),
  [
    (1.0, [(2, -1, 1), (-3, 1, 0)], [(0.5, -0.25, 0.25), (-0.25, 0, 0.25)]),
    (1.0, STEPS, np.array([(0.5, -1.5, 0, 2), (-0.5, -0.5, 1, 3)]) / 4),
    (0.5, STEPS, np.array([(0.5, -1.5, 0, 2), (-0.75, 0.25, 1, 2)]) / 4),
  ],
)
def test_momentum_of_mi_fgsm(decay, gradients, want):
  """The specs divide by the mean of 4 values, ours by their sum: a quarter of it."""
  got = run(parts.momentum(decay), np.array(gradients, float))
  np.testing.assert_allclose(got, want, atol=1e-12)


def test_momentum_of_the_l2_direction():
  chain = optax.chain(
    transforms.normalize(2), optax.trace(0.5), transforms.normalize(2)
  )
  _, got = run(chain, [np.array([0.6, 0.8]), np.array([0.0, 1.0])])
  np.testing.assert_allclose(got, [0.2095290887, 0.9778024141], atol=1e-9)


def test_combination_of_msa_gradients():
  stacked = np.array([[-0.320821300825, -0.320821300825], [-0.9, -2.45]])
  first = transforms.combine_normalized([1.0, 0.2])
  (combined,) = run(first, [stacked])
  np.testing.assert_allclose(-combined, [0.7760702737, 0.8948407331], atol=1e-9)
  step = optax.chain(first, transforms.normalize(2), optax.scale_by_learning_rate(0.1))
  (move,) = run(step, [stacked])
  np.testing.assert_allclose(move / 0.1, [0.6551916331, 0.7554627217], atol=1e-9)
  x = np.array([0.5, 0.25]) + move
  np.testing.assert_allclose(x, [0.5655191633, 0.3255462722], atol=1e-9)
  by_count = transforms.combine_normalized(lambda n: [1.0] + [0.2] * (n - 1))
  np.testing.assert_allclose(run(by_count, [stacked])[0], combined, atol=1e-15)


def test_pgd_and_fgsm_steps():
  slopes = np.array([-1.29131261, -0.90033201, 1.37994896, 0.90033201])
  (move,) = run(transforms.sign_step(0.01), [slopes])
  want = [0.21, 0.61, 0.89, 0.39]
  np.testing.assert_allclose([0.2, 0.6, 0.9, 0.4] + move, want, atol=1e-12)
  unit = optax.chain(transforms.normalize(2), optax.scale_by_learning_rate(0.2))
  (move,) = run(unit, [np.array([-3.0, -4.0])])
  np.testing.assert_allclose(0.5 + move, [0.62, 0.66], atol=1e-12)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.1, 4), (1.0, 40)])
def test_sparse_sign_moves_the_steepest_entries_by_equal_parts(share, count):
  gradient = noise(4, 5, 2)
  (step,) = run(transforms.sparse_sign(share), [gradient])
  assert (step != 0).sum() == count
  assert np.abs(step).sum() == pytest.approx(1, abs=1e-12)
  assert set(np.round(np.abs(step[step != 0]) * count, 9)) == {1}
  assert np.abs(gradient)[step != 0].min() >= np.abs(gradient)[step == 0].max(initial=0)
  assert not run(transforms.sparse_sign(share), [np.zeros((4, 5, 2))])[0].any()


def test_smooth_against_scipy():
  gradient = noise(20, 18, 2)
  (got,) = run(transforms.smooth(1.5, size=7), [gradient])
  taps = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)
  want = gradient
  for axis in (0, 1):
    want = scipy.ndimage.correlate1d(want, taps / taps.sum(), axis, mode="constant")
  np.testing.assert_allclose(got, want, atol=1e-12)


def test_masked_by_an_entry_of_the_target():
  place = np.arange(12).reshape(3, 4) % 2
  sample = helpers.sample([0.0], 0, target={"where": place})
  gradient = noise(3, 4, 2)
  (got,) = run(transforms.masked_by("where"), [gradient], sample=sample)
  np.testing.assert_array_equal(got, gradient * place[..., None])


def test_for_steps_stops_by_itself_also_when_traced():
  ones = [np.ones(2)] * 4
  got = [u[0] for u in run(transforms.for_steps(2), ones)]
  assert got == [1, 1, 0, 0]

  def last(n):
    transform = transforms.for_steps(n)
    state = transform.init(jnp.zeros(2))
    _, state = transform.update(jnp.ones(2), state)
    return transform.update(jnp.ones(2), state)[0][0]

  assert jax.vmap(last)(jnp.array([0, 1, 2])).tolist() == [0, 0, 1]


def test_asma_multiplier_follows_the_overlap():
  gradient = np.ones(4)
  label = np.array([1, 1, 0, 0])
  for decided, overlap in [((1, 1, 0, 0), 1), ((0, 0, 1, 1), 0), ((1, 0, 0, 0), 0.5)]:
    sample = helpers.sample(np.eye(2)[list(decided)], label)
    scale = transforms.scale_by_mask_iou(1e-6, 1e-7)
    (got,) = run(scale, [gradient], sample=sample)
    np.testing.assert_allclose(-got, 1e-7 + 1e-6 * overlap, rtol=1e-12)


def test_scales():
  gradient = noise(4, 5, 2)
  (got,) = run(
    optax.chain(transforms.normalize(2), transforms.scale_by_size()), [gradient]
  )
  assert np.sqrt(np.mean(got**2)) == pytest.approx(1, abs=1e-12)
  first, second = run(transforms.scale_by_first_norm(), [gradient, 3 * gradient])
  assert np.linalg.norm(first) == pytest.approx(1, abs=1e-12)
  assert np.linalg.norm(second) == pytest.approx(3, abs=1e-12)
  zero, later = run(transforms.scale_by_first_norm(), [0 * gradient, gradient])
  assert not zero.any()
  assert np.linalg.norm(later) == pytest.approx(1, abs=1e-12)


def test_every_transform_keeps_shape_and_dtype_and_takes_extra_arguments():
  with jax.enable_x64(False):
    keeps_shape_and_dtype()


def keeps_shape_and_dtype():
  gradient = jnp.asarray(noise(4, 5, 2), jnp.float32)
  sample = helpers.sample(
    np.eye(2, dtype=np.float32)[[0, 1]], [1, 1], target={"where": np.ones((4, 5))}
  )
  extra = {
    "sample": sample,
    "success": jnp.bool_(False),
    "value": jnp.float32(0),
    "project": lambda d: d,
  }
  for transform in (
    transforms.sign_step(0.1),
    transforms.normalize(1),
    transforms.normalize(2),
    transforms.sparse_sign(),
    transforms.smooth(1.0),
    transforms.low_pass(0.25),
    transforms.high_pass(0.25),
    transforms.masked_by("where"),
    transforms.for_steps(2),
    transforms.scale_by_mask_iou(0.1, 0.1),
    transforms.scale_by_size(),
    transforms.scale_by_first_norm(),
    transforms.shrink_on_success(),
  ):
    transform = optax.with_extra_args_support(transform)
    state = transform.init(gradient)
    got, after = transform.update(gradient, state, gradient, **extra)
    assert (got.shape, got.dtype) == (gradient.shape, gradient.dtype)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    dtypes = [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(after)]
    assert dtypes == [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(state)]
