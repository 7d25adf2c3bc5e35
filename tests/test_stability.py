"""The measures of variance against NumPy, closed forms, and attacks that are steady."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance

from jaxadv import attacks, losses, models, stability, threats

KEY = jax.random.key(0)
MODEL = helpers.convnet()
X = helpers.stripes(5)
Y = jnp.argmax(MODEL(X)[0], -1)
RNG = np.random.default_rng(0)


def watch(attack, x=X, y=Y, model=MODEL):
  return jax.jit(lambda x, y: stability.watch(attack)(KEY, model, x, y))(x, y)


def test_an_attack_that_does_not_show_its_gradient_is_refused():
  attack = attacks.pgd(0.1)._replace(follow=None)
  with pytest.raises(ValueError, match="has no `follow`"):
    stability.watch(attack)


def test_watching_takes_no_pass_more():
  """The gradient is that of the step: no convolution is there twice."""
  attack = attacks.smia(0.05, num_steps=3)
  model = models.ConvNet(num_classes=3, width=4, depth=2, norm="none")
  variables = model.init(KEY, X)
  predict = lambda x: model.apply(variables, x)
  labels = jnp.argmax(predict(X)[0], -1)

  def convolutions(run):
    call = jax.jit(lambda x, y: run(KEY, predict, x, y))
    return call.lower(X, labels).compile().as_text().count(" convolution(")

  assert convolutions(stability.watch(attack)) == convolutions(attack) > 0


@pytest.mark.parametrize(
  "attack",
  [attacks.pgd(0.1, num_steps=4), attacks.smia(0.1, num_steps=4, step_size=0.04)],
  ids=["pgd", "smia"],
)
def test_watching_changes_nothing_and_sees_the_gradient_that_was_followed(attack):
  result, path = watch(attack)
  alone = jax.jit(lambda x, y: attack(KEY, MODEL, x, y))(X, Y)
  helpers.assert_trees_close(result, alone, atol=1e-6)
  assert path.delta.shape == path.gradient.shape == (5, 4, *X.shape[1:])
  step = 0.25 * 0.25 if result.forwards[0] == 4 else 0.04
  project = jax.vmap(jax.vmap(threats.linf(0.1).project, (0, None)))
  after = project(path.delta + step * jnp.sign(path.gradient), X)
  want = jnp.concatenate([path.delta[:, 1:], result.delta[:, None]], 1)
  np.testing.assert_allclose(after, want, atol=1e-6)


def test_sign_flips_against_numpy():
  gradients = RNG.normal(size=(6, 4, 3, 2))
  gradients[RNG.random(gradients.shape) < 0.1] = 0
  where = RNG.random(gradients.shape) < 0.6
  flips = np.sign(gradients[1:]) != np.sign(gradients[:-1])
  assert stability.sign_flips(jnp.asarray(gradients)) == pytest.approx(flips.mean())
  both = where[1:] & where[:-1]
  got = stability.sign_flips(jnp.asarray(gradients), jnp.asarray(where))
  assert got == pytest.approx(flips[both].mean())
  assert got != pytest.approx(flips.mean(), abs=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_direction_consistency_against_scipy(scale):
  gradients = RNG.normal(size=(6, 4, 3, 2)).astype(np.float32)
  where = RNG.random(gradients.shape) < 0.6
  both = where[1:] & where[:-1]

  def mean(masks):
    pairs = zip(gradients[:-1], gradients[1:], masks, strict=True)
    cosine = scipy.spatial.distance.cosine
    return np.mean([1 - cosine((a * m).ravel(), (b * m).ravel()) for a, b, m in pairs])

  small = jnp.asarray(scale * gradients)
  got = stability.direction_consistency(small)
  assert got == pytest.approx(mean(np.ones_like(both)), abs=1e-6)
  got = stability.direction_consistency(small, jnp.asarray(where))
  assert got == pytest.approx(mean(both), abs=1e-6)


def test_steps_without_a_gradient_have_no_direction():
  gradients = jnp.array([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])
  assert stability.direction_consistency(gradients) == pytest.approx(1)
  assert stability.sign_flips(gradients) == pytest.approx((1 + 2) / 6)
  nothing = jnp.zeros(gradients.shape, bool)
  for measure in (stability.sign_flips, stability.direction_consistency):
    assert np.isnan(measure(gradients, nothing))
    assert np.isnan(measure(gradients[:1]))
  assert np.isnan(stability.direction_consistency(0 * gradients))


def test_values_at_the_surface_or_the_end_of_the_range_are_not_free():
  x = jnp.array([0.5, 0.5, 0.98, 0.0, 0.0])
  delta = threats.linf(0.1).project(jnp.array([0.3, -0.05, 0.05, 0.0, 0.02]), x)
  got = stability.free(delta[None], x, 0.1)
  assert got.tolist() == [[False, True, False, False, True]]
  wide = stability.free(delta[None], x, 0.2, bounds=(-1.0, 2.0))
  assert wide.all()


def test_saturated_values_can_make_an_attack_look_steady():
  """Half of the values stand at the surface and keep their sign, the others do not."""
  signs = jnp.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, 1, 1, 1]])
  delta = jnp.array([[0.1, 0.1, 0.0, 0.0]] * 3)
  loose = stability.free(delta, jnp.full(4, 0.5), 0.1)
  gradients = signs.astype(jnp.float32)
  assert stability.sign_flips(gradients) == 0.5
  assert stability.sign_flips(gradients, loose) == 1
  assert stability.direction_consistency(gradients) == 0
  assert stability.direction_consistency(gradients, loose) == pytest.approx(-1)


def test_a_linear_model_of_two_classes_has_the_steadiest_path():
  weights = RNG.normal(size=(12, 2))
  x = jnp.asarray(RNG.uniform(0.3, 0.7, (4, 4, 3, 1)), jnp.float32)
  model, y = helpers.linear(weights), jnp.zeros(4, jnp.int32)
  attack = attacks.pgd(0.05, num_steps=5)
  _, path = watch(attack, x, y, model)
  np.testing.assert_array_equal(jax.vmap(stability.sign_flips)(path.gradient), 0)
  consistency = jax.vmap(stability.direction_consistency)(path.gradient)
  np.testing.assert_allclose(consistency, 1, atol=1e-6)
  # one that is not linear is less steady
  _, path = watch(attacks.pgd(0.3, step_size=0.15, num_steps=5))
  assert jax.vmap(stability.sign_flips)(path.gradient).min() > 0.01
  assert jax.vmap(stability.direction_consistency)(path.gradient).max() < 0.999


def test_the_margin_is_that_of_the_losses():
  for shape in ((4,), (3, 3, 4)):
    z, y = RNG.normal(size=shape), RNG.integers(0, 4, shape[:-1])
    want = -losses.margin(helpers.sample(z, y))
    got = stability.true_margin(jnp.asarray(z), jnp.asarray(y))
    assert got == pytest.approx(float(want), abs=1e-6)
  z, y = jnp.array([2.0, -1.0, 0.5]), jnp.array([1, 0, 0])
  for dtype in (jnp.int32, jnp.uint8, bool):
    got = stability.true_margin(z, y.astype(dtype))
    assert got == pytest.approx((2 + 1 - 0.5) / 3)


def test_spreads():
  values = RNG.normal(size=20)
  assert stability.spread(jnp.asarray(values)) == pytest.approx(values.std(), abs=1e-6)
  clean, attacked = np.array([0.9, 0.8, 0.6]), np.array([0.3, 0.4, 0.0])
  want = np.std([2 / 3, 1 / 2, 1])
  assert stability.spread_over_tasks(clean, attacked) == pytest.approx(want)
