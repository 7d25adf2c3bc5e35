"""The way back: the shortest success between the clean and the attacked image."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, combine, threats, types
from jaxadv.line_search import line_search

KEY = jax.random.key(0)
X = jnp.array([[0.5], [0.5], [0.2]])
Y = jnp.zeros(3, jnp.int32)


def above(x):
  """Class 0 iff x > 0.4: the third image is wrong from the start."""
  return jnp.stack([x[..., 0], 0.4 + 0 * x[..., 0]], -1)


def search(eps, **options):
  attack = attacks.pgd(eps, random_start=False)
  return line_search(attack, threats.box(), success=types.fooled, **options)


def test_the_threshold_is_found_to_the_promised_precision():
  result = search(0.4, num_steps=10)(KEY, above, X, Y)
  assert result.success.all()
  np.testing.assert_allclose(result.image[:2, 0], 0.4, atol=0.4 / 2**10 + 1e-6)
  assert (result.image[:2, 0] < 0.4).all()
  assert jnp.abs(result.delta[2]).max() <= 0.4 / 2**10
  np.testing.assert_allclose(result.image, X + result.delta, atol=1e-6)
  np.testing.assert_allclose(result.logits, above(result.image), atol=1e-6)
  plain = attacks.pgd(0.4, random_start=False)(KEY, above, X, Y)
  assert (jnp.abs(result.delta) < 0.5 * jnp.abs(plain.delta)).all()
  assert (result.forwards > plain.forwards).all()
  np.testing.assert_array_equal(result.backwards, plain.backwards)


def test_an_attack_that_failed_comes_back_as_it_was():
  plain = attacks.pgd(0.05, random_start=False)(KEY, above, X, Y)
  result = search(0.05)(KEY, above, X, Y)
  assert result.success.tolist() == [False, False, True]
  np.testing.assert_array_equal(result.image[:2], plain.image[:2])
  np.testing.assert_array_equal(result.losses, plain.losses)


def test_examples_do_not_meet_and_jit_changes_nothing():
  model = helpers.convnet()
  x = helpers.stripes(6)
  y = jnp.argmax(model(x)[0], -1)
  attack = line_search(
    attacks.pgd(0.1, num_steps=5), threats.box(), success=types.fooled
  )
  keys = types.example_keys(KEY, 6)
  whole = jax.jit(lambda k, x, y: attack(k, model, x, y))(keys, x, y)
  part = attack(keys[2:4], model, x[2:4], y[2:4])
  np.testing.assert_allclose(part.image, whole.image[2:4], atol=1e-4)
  np.testing.assert_array_equal(part.success, whole.success[2:4])


def test_at_least_one_halving():
  with pytest.raises(ValueError, match=r"`num_steps` is 0"):
    search(0.1, num_steps=0)


def shifted(amount):
  """An attack that adds `amount` and claims success."""

  def attack(key, predict, x, y):
    result = combine.identity(key, predict, x, y)
    image = x + jnp.float32(amount)
    claimed = jnp.ones(len(x), bool)
    return result._replace(image=image, delta=image - x, success=claimed)

  return attack


def test_what_it_returns_can_be_stored():
  attack = line_search(
    shifted(-0.3), threats.stored(threats.box()), success=types.fooled
  )
  result = attack(KEY, above, X, Y)
  grey = 255 * np.asarray(result.image[:2])
  np.testing.assert_allclose(grey, np.rint(grey), atol=1e-4)
  assert result.success.all()


def test_a_success_lost_by_rounding_is_not_claimed_for_a_shorter_one():
  """One bit stores 0.6 as 1 and 0.3 as 0: nothing on the way up is a success."""
  attack = line_search(
    shifted(0.1), threats.stored(threats.box(), bits=1), success=types.fooled
  )
  result = attack(KEY, above, X, Y)
  np.testing.assert_array_equal(result.image[:2], X[:2] + jnp.float32(0.1))
  assert result.image[2] == 0
