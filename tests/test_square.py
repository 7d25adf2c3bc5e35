"""Square: its schedule, the optimum of a linear model, and that logits are enough."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, losses
from jaxadv.attacks.square import side

KEY = jax.random.key(3)
EPS = 0.1


def away(x):
  """Two classes, the first far ahead: no attack of this size fools it."""
  weights = np.random.default_rng(0).normal(size=x[0].size)
  score = x.reshape(len(x), -1) @ jnp.asarray(weights)
  return jnp.stack([score + 50, -score], 1)


def images(n, shape=(4, 4, 1), dtype=jnp.float32):
  drawn = np.random.default_rng(1).uniform(0.2, 0.8, (n, *shape))
  return jnp.asarray(drawn, dtype)


def run(attack, predict, x, y):
  """Compiled as a whole, which takes less time than one small step after another."""
  return jax.jit(lambda x, y: attack(KEY, predict, x, y))(x, y)


def test_the_sides_are_those_of_the_published_schedule():
  after = (0, 11, 51, 201, 501, 1001, 2001, 4001)
  want = [200, 142, 100, 71, 50, 35, 25, 18]
  assert [int(side(0.8, (224, 224), n)) for n in after] == want
  # the last square of each side
  last = [int(side(0.8, (224, 224), n - 1)) for n in after[1:]]
  assert last == want[:-1]
  assert int(side(0.8, (224, 224), 10**6)) == 18


def test_the_side_stays_inside_the_image():
  assert int(side(0.8, (4, 4), 5000)) == 1
  assert int(side(0.8, (3, 40), 0)) == 3
  assert int(side(0.8, (8, 8, 8), 0)) == 7  # of a volume: round((0.8 * 512) ** (1/3))


def test_the_first_query_shows_stripes():
  x = images(5, (6, 7, 3))
  delta = np.asarray(run(attacks.square(EPS, num_steps=1), away, x, zeros(5)).delta)
  np.testing.assert_allclose(np.abs(delta), EPS, atol=1e-6)
  assert (delta.std(1) < 1e-6).all()
  assert (delta.std((0, 2)) > 0.5 * EPS).all()


def test_each_query_changes_one_square_with_one_sign_per_channel():
  x, steps = images(3, (24, 24, 3)), 30
  attack = attacks.square(EPS, num_steps=steps)
  state, target = attack.init(KEY, away, x, zeros(3))
  step = jax.jit(lambda state: attack.step(away, x, target, state)[0])
  seen = set()
  for n in range(steps):
    before, state = np.asarray(state.delta), step(state)
    changed = np.abs(np.asarray(state.delta) - before) > 1e-6
    length = int(side(0.8, (24, 24), n - 1))
    for i in np.flatnonzero(changed.any((1, 2, 3))):
      rows, columns = np.nonzero(changed[i].any(-1))
      assert max(np.ptp(rows), np.ptp(columns)) < length
      inside = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
      values = np.asarray(state.delta)[i][inside].reshape(-1, 3)
      signs = {tuple(s) for s in np.sign(values[changed[i][inside].any(-1).ravel()])}
      assert len(signs) == 1
      seen.add(n)
  assert len(seen) > 3


def test_squares_reach_every_pixel():
  x = images(200, (5, 5, 1))
  attack = attacks.square(EPS, num_steps=1, p_init=0.3)
  state, target = attack.init(KEY, away, x, zeros(200))
  state = state._replace(step=state.step + 1, delta=0 * state.delta)
  moved = np.abs(attack.step(away, x, target, state)[0].delta)[..., 0] > 0
  assert moved.any(0).all()
  assert set(moved.sum((1, 2))) == {9}  # side 3: round(sqrt(7.5))


def test_on_a_linear_model_it_finds_the_corner_of_the_ball():
  with helpers.x64():
    x = images(3, (3, 3, 1), jnp.float64)
    result = run(attacks.square(EPS, num_steps=600), away, x, zeros(3))
    clean = jax.vmap(margin)(away(x), zeros(3))
    weights = np.random.default_rng(0).normal(size=9)
    best = clean + 2 * EPS * np.abs(weights).sum()
    np.testing.assert_allclose(result.score, best, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.losses[-1], result.score, atol=1e-9)
    # a twin with too few queries is not there yet
    assert (result.losses[20] < best - 1e-3).all()
  assert (np.diff(result.losses, axis=0) >= 0).all()
  assert not result.success.any()
  np.testing.assert_array_equal(result.steps, 600)
  np.testing.assert_array_equal(result.forwards, 600)
  np.testing.assert_array_equal(result.backwards, 0)


def test_it_needs_no_gradient_and_one_call_per_query():
  calls = []
  weights = np.random.default_rng(2).normal(size=(16, 3)).astype(np.float32)

  def outside(x):
    calls.append(len(x))
    return np.asarray(x).reshape(len(x), -1) @ weights

  def predict(x):
    return jax.pure_callback(outside, jax.ShapeDtypeStruct((len(x), 3), x.dtype), x)

  x = images(8)
  y = jnp.asarray((np.asarray(x).reshape(8, -1) @ weights).argmax(1))
  with pytest.raises(ValueError, match="JVP"):
    attacks.fgsm(EPS)(KEY, predict, x, y)
  calls.clear()
  result = run(attacks.square(0.2, num_steps=40), predict, x, y)
  assert result.success.any()
  assert not result.success.all()
  assert calls == [8] * 41  # and one for the result


def test_a_fooled_example_rests_and_more_queries_fool_more():
  x = images(32, (8, 8, 2))
  predict = helpers.linear(np.random.default_rng(4).normal(size=(128, 3)))
  y = jnp.argmax(predict(x), -1)
  stripes, short, long = (
    run(attacks.square(0.15, num_steps=n), predict, x, y) for n in (1, 15, 60)
  )
  won = np.asarray(short.success)
  assert stripes.success.sum() < won.sum() < long.success.sum() < 32
  np.testing.assert_array_equal(long.image[won], short.image[won])
  np.testing.assert_array_equal(long.steps[won], short.steps[won])
  assert (long.steps[won] <= 15).all()
  assert len(set(np.asarray(long.steps[won]).tolist())) > 3
  assert (long.steps[~np.asarray(long.success)] == 60).all()


def test_label_sets_and_the_labels_that_are_not_known():
  predict, x = helpers.convnet(classes=4), helpers.stripes(16, channels=3)
  y = (predict(x)[0] > 0).astype(jnp.int32)
  result = run(attacks.square(0.05, num_steps=60), predict, x, y)
  flipped = (result.logits > 0) != y
  np.testing.assert_array_equal(result.success, flipped.any(1))
  assert 0 < result.success.mean() <= 1
  np.testing.assert_allclose(
    result.score, jnp.where(y == 1, -result.logits, result.logits).max(1), rtol=1e-6
  )
  some = {"label": y, "mask": jnp.zeros(y.shape, bool).at[:, 0].set(True)}
  part = run(attacks.square(0.05, num_steps=60), predict, x, some)
  np.testing.assert_array_equal(part.success, (part.logits[:, 0] > 0) != y[:, 0])


def test_towards_a_wanted_class():
  predict, x = helpers.convnet(), helpers.stripes(16)
  y = jnp.argmin(predict(x)[0], -1)
  result = run(attacks.square(0.2, num_steps=80, targeted=True), predict, x, y)
  np.testing.assert_array_equal(result.success, jnp.argmax(result.logits, -1) == y)
  assert result.success.any()


def test_volumes_are_searched_with_cubes():
  x = images(4, (4, 5, 6, 2))
  result = run(attacks.square(0.1, num_steps=40), away, x, zeros(4))
  assert result.image.shape == x.shape
  assert (result.losses[-1] > result.losses[0]).any()


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="`eps` is -1"):
    attacks.square(-1)
  with pytest.raises(ValueError, match="`p_init` is 2"):
    attacks.square(0.1, p_init=2)
  with pytest.raises(ValueError, match="`num_steps` is 0"):
    attacks.square(0.1, num_steps=0)
  attack = attacks.square(0.1)
  with pytest.raises(ValueError, match="squares need pixels"):
    attack(KEY, lambda x: x, jnp.ones((2, 3)), zeros(2))
  with pytest.raises(ValueError, match="outside the model's classes"):
    attack(KEY, away, images(2), zeros(2) + 2)


def zeros(n):
  return jnp.zeros(n, int)


def margin(logits, label):
  return losses.margin(helpers.sample(logits, label))
