"""Named defences: what their views show, what they cost, and that they defend."""

import functools

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, combine, defences, training
from jaxadv.defences import random_pgd

KEY = jax.random.key(0)
WEIGHTS = np.array([[1.0, -1.0], [-0.5, 0.5], [0.25, -0.25]])
GREY = jnp.full((400, 3), 0.5)
ZEROS = jnp.zeros(400, int)


@pytest.mark.parametrize(("eps", "steps"), [(0.01, 9), (0.04, 1), (0.04, 9)])
def test_the_vector_of_mpadvt(eps, steps):
  """TV-MPADV: how far from its random start an image gets, given radius and steps."""
  with helpers.x64():
    grey, labels = jnp.full((400, 3), 0.5), jnp.zeros(400, int)
    view = functools.partial(random_pgd, (eps, eps), (steps, steps))
    model = helpers.linear(WEIGHTS)
    run = lambda view: view(jax.random.key(0), model, grey, labels).delta
    start, end, clean = map(run, (view(step_size=0.0), view(), view(clean=1.0)))
  assert end.dtype == np.float64
  way, size = np.abs(end - start), np.abs(end)
  free = size < eps - 1e-9
  np.testing.assert_allclose(way[free], steps / 255, rtol=1e-9)
  np.testing.assert_allclose(size[~free], eps, rtol=1e-9)
  assert (way <= steps / 255 + 1e-9).all()
  assert free.any() == (steps / 255 < 2 * eps)  # else everyone reaches the surface
  np.testing.assert_array_equal(clean, 0)


def test_every_example_draws_for_itself():
  view = random_pgd((1 / 255, 10 / 255), (1, 9), scaled_step=True, clean=0.5)
  keys = jax.random.split(KEY, 400)
  result = view(keys, helpers.linear(WEIGHTS), GREY, ZEROS)
  sizes = np.abs(result.delta).max(1)
  assert 0.4 < (sizes == 0).mean() < 0.6
  moved = sizes[sizes > 0]
  assert moved.min() >= 1 / 255 - 1e-6
  assert moved.max() <= 10 / 255 + 1e-6
  counts, _ = np.histogram(moved, 9, (1 / 255, 10 / 255))
  assert counts.min() > 8  # of about 22 in each
  part = view(keys[100:107], helpers.linear(WEIGHTS), GREY[:7], ZEROS[:7])
  np.testing.assert_array_equal(part.delta, result.delta[100:107])


@pytest.mark.parametrize(
  ("eps", "steps", "options", "message"),
  [
    ((0.1, 0.05), (1, 2), {}, r"`eps` is \(0.1, 0.05\); write two numbers"),
    ((-0.1, 0.05), (1, 2), {}, r"`eps` is \(-0.1, 0.05\)"),
    (8 / 255, (1, 2), {}, "`eps` is 0.03.*; write two numbers"),
    ((0.1, 0.2), (0, 2), {}, "needs at least 1 step"),
    ((0.1, 0.2), (3, 2), {}, r"`steps` is \(3, 2\)"),
    ((0.1, 0.2), (1, 2), {"clean": 1.5}, "`clean` is 1.5"),
    ((0.1, 0.2), (1, 2), {"step_size": -1}, "`step_size` is -1"),
  ],
)
def test_ranges_that_are_none_are_refused(eps, steps, options, message):
  with pytest.raises(ValueError, match=message):
    random_pgd(eps, steps, **options)


class Small(nn.Module):
  """A network with batch statistics."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(8, (3, 3))(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    return nn.Dense(3)(x.mean((1, 2)))


NETWORK = Small()


def apply(params, extra, images, train):
  variables = {"params": params, **extra}
  if not train:
    return NETWORK.apply(variables, images, False), extra
  return NETWORK.apply(variables, images, True, mutable=["batch_stats"])


EPS = 0.08
NAMED = {
  "pgd": defences.adversarial_training(EPS, num_steps=3),
  "fast": defences.fast_adversarial_training(EPS),
  "trades": defences.trades(EPS, num_steps=3),
  "mart": defences.mart(EPS, num_steps=3),
  "mpadvt": defences.mpadvt((0.0, EPS), (1, 3), scaled_step=True),
}
each = pytest.mark.parametrize("name", NAMED)


def images(seed, n=48):
  """Three kinds of stripes: strong under noise in one channel, weak in the other."""
  rng = np.random.default_rng(seed)
  labels = np.arange(n) % 3
  wave = np.sign(np.sin(np.arange(8) * np.pi / 2 + 0.5))
  rows, columns = wave[None, :, None], wave[None, None, :]
  sign = np.where(labels[:, None, None] == 0, rows, columns)
  sign = np.where(labels[:, None, None] == 2, rows * columns, sign)
  strong = 0.5 + 0.2 * sign + rng.normal(0, 0.3, (n, 8, 8))
  x = np.stack([strong, 0.5 + 0.03 * sign], -1).clip(0, 1).astype(np.float32)
  return {"image": jnp.asarray(x), "label": jnp.asarray(labels)}


def start(tx):
  variables = NETWORK.init(jax.random.key(1), jnp.zeros((1, 8, 8, 2)), False)
  extra = {"batch_stats": variables["batch_stats"]}
  return training.init_state(KEY, variables["params"], extra, tx)


@each
def test_crafting_leaves_the_batch_statistics_alone(name):
  """They are those of ONE training call on what the views show, bit for bit."""
  tx, batch = optax.sgd(0.1), images(0)
  state = start(tx)
  shown = []

  def evaluated(x):
    return apply(state.params, state.extra, x, False)[0]

  def spied(view):
    def attack(key, predict, x, y):
      result = view(key, predict, x, y)
      shown.append(result.image)
      # what was attacked is the model in evaluation mode
      expected = view(key, evaluated, x, y).image
      np.testing.assert_array_equal(result.image, expected)
      return result

    return attack

  views, outer = NAMED[name]
  step = training.adversarial_step(apply, tx, tuple(map(spied, views)), outer)
  after, _ = step(state, batch)
  _, want = apply(state.params, state.extra, jnp.concatenate(shown), True)
  helpers.assert_trees_equal(after.extra, want)
  assert jax.tree.leaves(after.extra)[0].any()


@functools.cache
def trained(name, steps=150):
  tx = optax.adam(3e-3)
  defence = NAMED.get(
    name, defences.Defence((), lambda z, y: training.cross_entropy(z[0], y))
  )
  step = jax.jit(training.adversarial_step(apply, tx, *defence))
  state = start(tx)
  for number in range(steps):
    state, _ = step(state, images(number))
  return lambda x: apply(state.params, state.extra, x, False)[0]


def right(predict, attack):
  batch = images(10_000, 120)
  return 1 - float(attack(KEY, predict, batch["image"], batch["label"]).success.mean())


@each
def test_a_defended_model_withstands_more(name):
  strong = attacks.pgd(EPS, num_steps=20)
  plain, defended = (right(trained(one), strong) for one in ("none", name))
  assert defended > plain + 0.25, (plain, defended)
  assert right(trained(name), combine.identity) > 0.8


def test_the_start_beside_the_image_has_a_gradient_and_the_image_none():
  model, x = trained("none"), images(3)["image"]
  attack = defences.trades(EPS, num_steps=3).views[1]
  assert jnp.abs(attack(KEY, model, x, images(3)["label"]).delta).max() > EPS / 2


def test_maadvt_is_mart_with_its_own_defaults():
  one, other = defences.maadvt(EPS), defences.mart(EPS, num_steps=4)
  x, y = images(0)["image"], images(0)["label"]
  model = lambda x: x.mean((1, 2)) @ jnp.asarray(WEIGHTS.T[:, :3])
  shown = [view(KEY, model, x, y).image for view in (one.views[1], other.views[1])]
  np.testing.assert_array_equal(*shown)
  logits = jnp.array([[1.0, 2.0], [0.5, 0.1]])
  assert one.outer(logits, jnp.int32(0)) == other.outer(logits, jnp.int32(0))


def test_the_radii_of_random_pgd_may_be_traced():
  run = jax.jit(lambda high: random_pgd((0.0, high), (1, 3))(KEY, MODEL3, X3, Y3).delta)
  assert jnp.abs(run(0.01)).max() <= 0.01 + 1e-6 < jnp.abs(run(0.1)).max()


MODEL3 = helpers.linear(WEIGHTS)
X3, Y3 = GREY[:40], ZEROS[:40]


def test_a_negative_radius_is_named_as_such():
  for make in (defences.trades, defences.mart, defences.adversarial_training):
    with pytest.raises(ValueError, match=r"`eps` is -0\.1"):
      make(-0.1)
