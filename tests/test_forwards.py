"""Ways to call the model: randomness per example, and what it leaves alone."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import forwards, losses, threats, transforms, types
from jaxadv.engine import gradient_attack
from jaxadv.types import Objective

MODEL = helpers.convnet()
X = helpers.stripes(5)
KEYS = types.example_keys(jax.random.key(0), 5)


def shift(key, image):
  return image + jax.random.uniform(key)


def echo(x):
  return x.reshape(len(x), -1), {"image": x}


def test_expectation_is_the_mean_over_views_drawn_per_example():
  forward = forwards.expectation(shift, 400)
  logits, features = forward(echo, KEYS, X, X)
  np.testing.assert_allclose(features["image"], X + 0.5, atol=0.06)
  np.testing.assert_allclose(logits, features["image"].reshape(5, -1), atol=1e-6)
  shifts = (features["image"] - X).mean((1, 2, 3))
  assert len(np.unique(np.asarray(shifts).round(6))) == 5
  one, _ = forward(echo, KEYS[2:3], X[2:3], X[2:3])
  np.testing.assert_allclose(one[0], logits[2], atol=1e-6)


def test_expectation_sends_every_view_through_one_call():
  shapes = []

  def seen(x):
    shapes.append(x.shape)
    return MODEL(x)

  logits, features = forwards.expectation(shift, 3)(seen, KEYS, X, X)
  assert shapes == [(15, 8, 8, 2)]
  assert logits.shape == (5, 3)
  assert features["hidden"].shape == (5, 8, 8, 4)


def test_input_diversity_shrinks_and_moves_some_examples():
  x = jnp.full((200, 16, 16, 1), 0.7)
  keys = types.example_keys(jax.random.key(1), 200)
  forward = forwards.input_diversity(probability=0.5, shrink=0.6, fill=0.2)
  _, seen = forward(echo, keys, x, x)
  image = seen["image"]
  changed = jnp.abs(image - x).max((1, 2, 3)) > 1e-3
  assert 0.35 < changed.mean() < 0.65
  assert (image >= 0.2 - 1e-5).all()
  assert (image <= 0.7 + 1e-5).all()
  inside = (image > 0.69).mean((1, 2, 3))[changed]
  assert inside.min() > 0.6**2 - 0.15  # the border between the two is blurred
  assert inside.max() < 1
  corners = image[changed][:, 0, 0, 0]
  assert (corners < 0.5).any()  # not always in the same place
  assert (corners > 0.6).any()
  never = forwards.input_diversity(probability=0.0)(echo, keys, x, x)[1]["image"]
  np.testing.assert_array_equal(never, x)


def test_input_diversity_leaves_masks_behind_and_says_so():
  masks = lambda x: jnp.concatenate([x, -x], -1)
  forward = forwards.input_diversity()
  keys = types.example_keys(jax.random.key(1), len(X))
  with pytest.raises(ValueError, match="and not its mask"):
    forward(masks, keys, X, X)


def test_input_diversity_works_on_volumes_and_keeps_examples_apart():
  x = helpers.stripes(3, (4, 6, 6))
  keys = types.example_keys(jax.random.key(2), 3)
  forward = forwards.input_diversity(probability=1.0, shrink=0.7)
  moved = jax.jit(lambda keys, x: forward(echo, keys, x, x)[1]["image"])
  whole = moved(keys, x)
  assert whole.shape == x.shape
  alone = moved(keys[1:2], x[1:2])
  np.testing.assert_allclose(alone[0], whole[1], atol=1e-6)


def test_an_attack_through_a_random_forward_draws_anew_at_every_step():
  attack = gradient_attack(
    Objective(losses.cross_entropy, forward=forwards.expectation(shift, 2)),
    threats.linf(0.1),
    transforms.sign_step(0.0),
    num_steps=4,
    random_start=False,
  )
  y = jnp.argmax(MODEL(X)[0], -1)
  history = attack(jax.random.key(0), MODEL, X, y).losses
  assert len(np.unique(np.asarray(history)[:, 0])) == 4
  result = attack(jax.random.key(0), MODEL, X, y)
  np.testing.assert_array_equal(result.forwards, 8)
  np.testing.assert_array_equal(result.backwards, 4)
