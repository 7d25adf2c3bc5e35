"""Training on universal perturbations: rounds, freshness, repeatability."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import (
  assessment,
  attacks,
  augment,
  combine,
  crafting,
  data,
  loops,
  retraining,
  subjects,
  threats,
  training,
  victims,
)
from jaxadv.models import ConvNet

EPS = 0.35


def colors(n, seed):
  """Noise with a faint tint of one of three colours."""
  rng = np.random.default_rng(seed)
  labels = np.arange(n) % 3
  tint = 50 * np.eye(3)[labels][:, None, None]
  images = (rng.normal(110, 20, (n, 8, 8, 3)) + tint).clip(0, 255).astype(np.uint8)
  return data.Dataset(
    images, labels.astype(np.int32), np.arange(n), ["x"] * n, ("r", "g", "b")
  )


@pytest.fixture(scope="module")
def victim():
  """A trained network and how it is trained on."""
  model, tx = ConvNet(num_classes=3, width=4, depth=2, norm="none"), optax.adam(1e-2)
  apply, train = victims.flax_apply(model), colors(48, 0)
  variables = dict(model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
  params = variables.pop("params")
  state = training.init_state(jax.random.key(0), params, variables, tx)
  step = jax.jit(training.train_step(apply, tx, training.cross_entropy))
  state = loops.fit(step, state, data.batches(train, 12, seed=0), num_steps=60)
  subject = subjects.subject(
    assessment.predictor(model), {"params": state.params}, train, colors(96, 1)
  )
  schedule = retraining.Schedule(
    apply, optax.adam(3e-3), augment.affine(), False, 80, 12, functools.partial(
      attacks.universal, norm="l2"), pool=2,
  )  # fmt: skip
  return subject, schedule


PLAN = crafting.Plan(attacks.universal, "l2", None, 8, 12, 0, 50)


def accuracy(subject):
  return np.mean(subject.test.before == subject.test.dataset.labels)


def fooled(subject, delta):
  table = subjects.measure(subject, delta)["test"]["stored"]
  return 1 - np.trace(table.sum(0)) / table.sum()


@pytest.mark.parametrize("arm", retraining.ARMS)
def test_the_old_perturbation_loses_its_power(victim, arm):
  subject, schedule = victim
  assert accuracy(subject) > 0.9
  run = lambda: list(
    retraining.rounds(retraining.ARMS[arm], subject, schedule, PLAN, eps=EPS, count=2)
  )
  first, *_, last = found = run()
  assert [done.number for done in found] == [0, 1, 2]
  helpers.assert_trees_equal(first.subject.variables, subject.variables)
  assert fooled(subject, first.delta) > 0.4
  assert fooled(last.subject, first.delta) < fooled(subject, first.delta) - 0.05
  assert accuracy(last.subject) > 0.7
  for done in found:
    assert jnp.linalg.norm(done.delta.ravel()) <= EPS * (1 + 1e-5)
    # crafted against these weights, and not only against the first ones
    again = crafting.craft(PLAN, done.subject, EPS).delta
    np.testing.assert_array_equal(done.delta, again)
  for one, other in zip(found, run(), strict=True):
    np.testing.assert_array_equal(one.delta, other.delta)


def test_a_view_of_several_perturbations():
  pool = jnp.stack([jnp.full(4, 0.1), jnp.full(4, -0.1)])
  view = combine.one_of(threats.box(), pool, share=0.5)
  x, y = jnp.full((400, 4), 0.5), jnp.zeros(400, int)
  keys = jax.random.split(jax.random.key(0), 400)
  image = view(keys, lambda x: x, x, y).image
  shares = [float((image[:, 0] == level).mean()) for level in (0.5, 0.6, 0.4)]
  np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=0.08)
  part = view(keys[7:9], lambda x: x, x[7:9], y[7:9]).image
  np.testing.assert_array_equal(part, image[7:9])
  with pytest.raises(ValueError, match=r"`share` is 1\.5"):
    combine.one_of(threats.box(), pool, share=1.5)
