"""The step rule of MSA and MAFL: out in small steps, home in ever smaller ones."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import engine, filters, losses, threats, transforms, types
from jaxadv.types import Objective

WEIGHTS = np.array([3.0, -1.0, 0.5, 2.0])


def predict(x):
  """One pixel, two classes: class 1 where `w x > 1`."""
  score = x.reshape(len(x), -1) @ jnp.asarray(WEIGHTS, x.dtype)
  return jnp.stack([jnp.ones_like(score), score], -1)


def sample(progress):
  return helpers.sample([0.0, 0.0], 0, progress=progress)


def run(transform, delta, gradients, successes, num_steps):
  state = transform.init(delta)
  path = [delta]
  for t, (gradient, success) in enumerate(zip(gradients, successes, strict=True)):
    updates, state = transform.update(
      gradient, state, delta, sample=sample(t / num_steps), success=jnp.bool_(success)
    )
    delta = delta + updates
    path.append(delta)
  return np.stack(path), state


def test_steps_grow_until_the_first_success_and_follow_its_size_after():
  with helpers.x64():
    rule = transforms.shrink_on_success(
      first=0.1, growth=2.0, longest=1.0, reach=0.5, last=1 / 64, shrink=0.2
    )
    successes = [False, False, True, False, True]
    path, _ = run(rule, jnp.zeros(4), [-jnp.ones(4)] * 5, successes, 8)
  # out by 0.1 and 0.2; the success at progress 2/8 has RMS 0.3 and shrinks by 0.2; the
  # failure at 3/8 moves by 0.5 * 0.3 * a, a = 1/2; at 4/8 a = 1/4, and the success
  # shrinks by 0.2 * sqrt(a)
  wanted = [0.0, 0.1, 0.3, 0.24, 0.315, 0.9 * 0.315]
  np.testing.assert_allclose(path[:, 0], wanted, atol=1e-12)


def test_steps_do_not_grow_beyond_the_longest():
  """Without it the last steps towards a hard target would jump over it."""
  with helpers.x64():
    rule = transforms.shrink_on_success(first=0.1, growth=2.0, longest=0.3)
    path, _ = run(rule, jnp.zeros(4), [-jnp.ones(4)] * 5, [False] * 5, 8)
  np.testing.assert_allclose(np.diff(path[:, 0]), [0.1, 0.2, 0.3, 0.3, 0.3], atol=1e-12)


def test_what_is_given_up_fades_with_the_steps_and_refers_to_the_first_success():
  given, first = [], []

  def constrain(delta, amount, reference):
    given.append(float(amount))
    first.append(np.asarray(reference))
    return delta

  with helpers.x64():
    rule = transforms.shrink_on_success(last=0.01, constrain=constrain)
    run(rule, jnp.ones(4), [jnp.ones(4)] * 3, [True] * 3, 4)
  np.testing.assert_allclose(given, [1, 0.01**0.125, 0.01**0.25], rtol=1e-12)
  np.testing.assert_array_equal(first, np.ones((3, 4)))


def closest(scale=1.0, **options):
  """Distance found to the linear model's boundary, and the closed form of it."""
  x = jnp.full((1, 1, 4, 1), 0.1)
  rule = transforms.shrink_on_success(**options)
  attack = engine.gradient_attack(
    Objective(lambda s: -scale * losses.margin(s), success=types.reached),
    threats.box(),
    optax.chain(transforms.normalize(2), transforms.scale_by_size(), rule),
    num_steps=300,
    random_start=False,
    keep="smallest",
  )
  result = attack(jax.random.key(0), predict, x, jnp.array([1]))
  assert result.success.all()
  best = abs(1 - 0.1 * WEIGHTS.sum()) / np.linalg.norm(WEIGHTS)
  return float(jnp.linalg.norm(result.image - x)), best


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_it_finds_the_closest_point_of_a_linear_model(scale):
  distance, best = closest(scale, first=1e-3, growth=1.05)
  assert best * (1 - 1e-5) <= distance <= 1.01 * best


def test_a_rule_that_never_walks_home_keeps_its_overshoot():
  """The twin of the test above, which must fail its bound."""
  distance, best = closest(first=0.05, growth=1.0, shrink=0.0)
  assert distance > 1.01 * best
  assert closest(first=0.05, growth=1.0)[0] < 1.01 * best


def test_peaks_are_clipped_relative_to_the_largest():
  delta = jnp.array([1.0, -0.9, 0.2])
  got = transforms.clip_peaks(delta, 0.25, first=delta, floor=0.5)
  np.testing.assert_allclose(got, [0.75, -0.75, 0.2], atol=1e-7)


def test_peaks_are_left_their_floor():
  delta = jnp.array([1.0, -0.9, 0.2])
  first = jnp.array([4.0, 2.0, 2.0])  # peak / RMS = sqrt(2)
  got = transforms.clip_peaks(delta, 1.0, first=first, floor=0.5)
  floor = 0.5 * np.sqrt(2) * np.sqrt((1 + 0.81 + 0.04) / 3)
  np.testing.assert_allclose(got, [floor, -floor, 0.2], atol=1e-7)


def fraction(delta):
  return np.square(filters.low_pass(delta, 0.25)).sum() / np.square(delta).sum()


@pytest.mark.parametrize(("share", "floor"), [(0.9, 0.6), (1.0, 0.0), (0.1, 0.6)])
def test_a_band_is_given_up_down_to_its_floor(share, floor):
  first, delta = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
  band = functools.partial(filters.low_pass, cutoff=0.25)
  with helpers.x64():
    delta = jnp.asarray(delta) + band(jnp.asarray(delta))
    got = transforms.shrink_band(delta, band, share, first=first, floor=floor)
    low, kept = band(delta), band(got)
    np.testing.assert_allclose(got - kept, delta - low, atol=1e-12)
    if share == 0.1:  # far from the floor
      np.testing.assert_allclose(kept, 0.9 * low, atol=1e-12)
    else:
      assert fraction(got) == pytest.approx(floor * fraction(first), abs=1e-12)
      again = transforms.shrink_band(got, band, share, first=first, floor=floor)
      np.testing.assert_allclose(again, got, atol=1e-12)
