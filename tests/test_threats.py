"""Threats: projections, starts, and the optimum on a linear model in closed form."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, losses, threats

SHAPE = (4, 5, 2)
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
BALLS = {"linf": threats.linf, "l2": threats.l2, "l1": threats.l1}
RADII = {"linf": 0.1, "l2": 0.5, "l1": 1.5}

each_ball = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


def norms(delta, norm):
  return np.linalg.norm(np.asarray(delta).reshape(len(delta), -1), ORDER[norm], 1)


def draws(n, scale, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(n, *SHAPE)) * scale, jnp.float32)


def images(n):
  return jnp.asarray(np.random.default_rng(1).random((n, *SHAPE)), jnp.float32)


@each_ball
@pytest.mark.parametrize("scale", [0.001, 0.3, 10.0])
def test_projection_lands_in_ball_and_range_and_stays_there(norm, scale):
  threat, x, delta = BALLS[norm](RADII[norm]), images(50), draws(50, scale)
  free = jax.vmap(lambda d: threat.project(d, None))(delta)
  bound = jax.vmap(threat.project)(delta, x)
  for projected in (free, bound):
    assert norms(projected, norm).max() <= RADII[norm] * (1 + 3e-7) + 1e-7
  assert ((x + bound >= -1e-7) & (x + bound <= 1 + 1e-7)).all()
  again = jax.vmap(lambda d: threat.project(d, None))(free)
  np.testing.assert_allclose(again, free, atol=2e-7)
  np.testing.assert_allclose(jax.vmap(threat.project)(bound, x), bound, atol=2e-7)
  inside = norms(delta, norm) <= RADII[norm]
  np.testing.assert_allclose(free[inside], delta[inside], atol=1e-7)


@each_ball
def test_projection_on_the_ball_is_the_nearest_point(norm):
  """`<d - P d, q - P d> <= 0` for all q of the ball; so it is non-expansive too."""
  with helpers.x64():
    project = BALLS[norm](RADII[norm]).project
    delta = draws(20, 0.5).astype(jnp.float64)
    near = jax.vmap(lambda d: project(d, None))(delta)
    others = jax.vmap(lambda d: project(d, None))(draws(200, 0.5, seed=2) + 0.0)
    others = jnp.concatenate([others, near]).reshape(-1, 40)
    flat, gap = near.reshape(20, 40), (delta - near).reshape(20, 40)
    products = gap @ others.T - (gap * flat).sum(1)[:, None]
    assert products.max() <= 1e-9
    # one step past the nearest point is no longer the nearest
    assert ((gap @ (others * 1.5).T) - (gap * flat).sum(1)[:, None]).max() > 1e-3


@each_ball
def test_projection_does_not_expand(norm):
  project = BALLS[norm](RADII[norm]).project
  a, b = draws(100, 0.3), draws(100, 0.3, seed=5)
  pa, pb = (jax.vmap(lambda d: project(d, None))(v) for v in (a, b))
  before, after = norms(a - b, "l2"), norms(pa - pb, "l2")
  assert (after <= before + 1e-6).all()
  assert after.mean() < 0.9 * before.mean()


@each_ball
def test_starts_are_inside_random_and_follow_their_key(norm):
  threat = BALLS[norm](RADII[norm])
  keys = jax.random.split(jax.random.key(3), 400)
  delta = jax.vmap(threat.init, (0, None))(keys, jnp.zeros(SHAPE))
  sizes = norms(delta, norm)
  assert sizes.max() <= RADII[norm] * (1 + 1e-6)
  alone = threat.init(keys[3], jnp.zeros(SHAPE))
  np.testing.assert_allclose(delta[3], alone, atol=1e-7)
  assert len(np.unique(np.asarray(delta)[:, 0, 0, 0])) == 400
  assert jnp.abs(delta.mean(0)).max() < 0.3 * jnp.abs(delta).max()
  # uniform: the ball of a share u of the radius holds u^40 of its volume
  shares = (sizes / RADII[norm]) ** 40
  assert np.abs(np.sort(shares) - np.linspace(0, 1, 400)).max() < 0.09


def test_published_projection_vectors():
  with helpers.x64():
    x, delta = jnp.array([0.5, 0.5]), jnp.array([0.3, 0.4])
    got = threats.l2(0.25).project(delta, x)
    np.testing.assert_allclose(got, [0.15, 0.20], atol=1e-12)
    assert threats.l2(0.25).project(jnp.zeros(2), x).tolist() == [0, 0]
    np.testing.assert_allclose(
      threats.l1(1.0).project(jnp.array([1.0, -0.5]), None), [0.75, -0.25], atol=1e-12
    )


def test_gradient_passes_straight_through_the_clip():
  for threat in (threats.box(), threats.stored(threats.linf(0.5))):
    x, delta = jnp.array([0.0, 0.9, 0.5]), jnp.array([-0.2, 0.3, 0.1])
    np.testing.assert_allclose(
      threat.apply(x, delta), [0, 1, 153 / 255], atol=0.5 / 255
    )
    slope = jax.grad(lambda d, x=x, t=threat: t.apply(x, d) @ jnp.arange(1.0, 4.0))(
      delta
    )
    np.testing.assert_array_equal(slope, [1, 2, 3])


def test_bounds_other_than_zero_and_one():
  threat = threats.linf(40.0, bounds=(-1000.0, 400.0))
  x = jnp.array([-990.0, 0.0, 390.0])
  np.testing.assert_allclose(
    threat.apply(x, threat.project(jnp.full(3, 99.0), x)), [-950, 40, 400]
  )
  stored = threats.stored(threat, bits=4).apply(x, jnp.zeros(3))
  steps = (np.asarray(stored) + 1000) / (1400 / 15)
  np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)


def test_stored_images_lie_on_the_grid_and_stay_in_balls_of_whole_levels():
  x = jnp.round(images(8) * 255) / 255
  threat = threats.stored(threats.linf(4 / 255))
  moved = jax.vmap(threat.apply)(x, jnp.clip(draws(8, 1.0), -4 / 255, 4 / 255))
  levels = np.asarray(moved) * 255
  np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
  assert jnp.abs(moved - x).max() <= 4 / 255 + 1e-6
  with pytest.raises(ValueError, match=r"storage needs a range; write threat._replace"):
    threats.stored(threat._replace(bounds=None))


def test_box_starts_at_the_clean_image():
  assert not threats.box().init(jax.random.key(0), jnp.ones(3)).any()


@each_ball
def test_a_negative_radius_is_refused_and_a_traced_one_is_not(norm):
  with pytest.raises(ValueError, match=r"`eps` is -0.1; it must be a number >= 0"):
    BALLS[norm](-0.1)
  with pytest.raises(ValueError, match=r"`eps` is nan"):
    BALLS[norm](float("nan"))
  project = jax.vmap(lambda eps: BALLS[norm](eps).project(jnp.ones(4), None))
  sizes = norms(project(jnp.array([0.0, 0.1, 0.2])), norm)
  np.testing.assert_allclose(sizes, [0, 0.1, 0.2], rtol=1e-6)


# The strength test: on a linear model the best perturbation is known.

WEIGHTS = np.random.default_rng(8).normal(size=100) * np.geomspace(0.05, 1, 100)
CLOSED_FORM = {  # the most `w . d` can gain inside the ball: eps times the dual norm
  "linf": 0.05 * np.abs(WEIGHTS).sum(),
  "l2": 0.3 * np.linalg.norm(WEIGHTS),
  "l1": 0.4 * np.abs(WEIGHTS).max(),
}
STRENGTH = {"linf": 0.05, "l2": 0.3, "l1": 0.4}


def gain(attack):
  """Mean gain of the linear score over 3 images in the middle of the range."""
  model = helpers.linear(jnp.stack([jnp.zeros(100), jnp.asarray(WEIGHTS)], 1))
  x = jnp.full((3, 100), 0.5, jnp.float32)
  result = attack(jax.random.key(0), model, x, jnp.zeros(3, jnp.int32))
  before = model(x)[:, 1]
  return np.asarray(result.logits[:, 1] - before, np.float64)


@pytest.mark.parametrize(
  ("attack", "norm", "share"),
  [
    (attacks.fgsm(0.05), "linf", 1.0),
    (attacks.mi_fgsm(0.05), "linf", 1.0),
    (attacks.pgd(0.05, num_steps=20), "linf", 1.0),
    (attacks.pgd(0.3, norm="l2", num_steps=40, step_size=0.05), "l2", 0.995),
    (attacks.pgd(0.4, norm="l1", num_steps=60, step_size=0.05), "l1", 0.995),
    (attacks.apgd(0.05, num_steps=30), "linf", 0.999),
    (attacks.apgd(0.3, norm="l2", num_steps=60), "l2", 0.995),
    (attacks.apgd(0.05, num_steps=30, loss=losses.margin), "linf", 0.999),
  ],
)
def test_the_optimum_on_a_linear_model_is_reached(attack, norm, share):
  got = gain(attack)
  assert (got <= CLOSED_FORM[norm] * (1 + 1e-4)).all()
  assert (got >= share * CLOSED_FORM[norm] * (1 - 1e-4)).all()


@each_ball
def test_the_strength_test_notices_attacks_that_do_nothing(norm):
  idle = attacks.pgd(STRENGTH[norm], norm=norm, step_size=0.0, num_steps=2)
  assert (gain(idle) < 0.5 * CLOSED_FORM[norm]).all()
