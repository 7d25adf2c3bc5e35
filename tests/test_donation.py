"""Steps take the memory of the state before them, and nothing else loses its own."""

import functools
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import (
  attacks,
  checkpoints,
  crafting,
  data,
  loops,
  retraining,
  sharding,
  subjects,
  training,
  victims,
)
from jaxadv.models import ConvNet

MODEL = ConvNet(num_classes=3, width=2, depth=1, norm="none")
PLAN = crafting.Plan(attacks.universal, "linf", None, 4, 4, 0, 1)


def classes(n):
  labels = np.arange(n, dtype=np.int32) % 3
  images = np.asarray(helpers.stripes(n))
  return data.Dataset(images, labels, np.arange(n), ["x"] * n, ("a", "b", "c"))


@pytest.fixture(scope="module")
def subject():
  variables = dict(MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 8, 2))))
  predict = lambda variables, x: MODEL.apply(variables, x)
  return subjects.subject(predict, variables, classes(12), classes(6))


def deleted(tree):
  return [leaf.is_deleted() for leaf in jax.tree.leaves(tree)]


def test_a_crafting_step_takes_the_state(subject):
  states = []
  last = crafting.craft(PLAN, subject, 0.2, on_step=lambda _, s, m: states.append(s))
  # the best so far is not read by a step
  taken = [deleted(state._replace(best_delta=())) for state in states]
  assert [all(flags) for flags in taken] == [True, True, True, False]
  assert not any(deleted((last, subject.variables)))


@pytest.mark.parametrize("microbatches", [None, 2])
def test_it_takes_a_state_on_two_devices_too(microbatches, subject):
  states, plan = [], PLAN._replace(microbatches=microbatches)
  alone = crafting.craft(plan, subject, 0.2)
  with sharding.use(sharding.mesh(jax.devices()[:2])):
    last = crafting.craft(plan, subject, 0.2, on_step=lambda _, s, m: states.append(s))
  assert [state.delta.is_deleted() for state in states] == [True, True, True, False]
  if microbatches:  # else only up to rounding, which may turn a sign
    helpers.assert_trees_equal(last.delta, alone.delta)


def test_views_and_checkpoints_of_a_state_keep_its_values(subject, tmp_path):
  views = []

  def on_step(n, state, metrics):
    views.append(np.asarray(state.delta))

  last = crafting.craft(PLAN, subject, 0.2, folder=tmp_path, on_step=on_step)
  undisturbed = crafting.craft(PLAN, subject, 0.2)
  helpers.assert_trees_equal(last.delta, undisturbed.delta)
  for step in (3, 4):  # those that are kept
    found = checkpoints.restore(tmp_path, last, step=step)
    np.testing.assert_array_equal(found.delta, views[step - 1])
  assert (views[2] != views[3]).any()


def test_a_training_step_takes_the_state():
  tx = optax.adam(1e-2)
  step = victims._step(MODEL, tx, None, training.cross_entropy, None, None, None, None)
  variables = dict(MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 8, 2))))
  state = training.init_state(jax.random.key(0), variables["params"], {}, tx)
  batch = next(data.batches(classes(4), 4))
  after, _ = step(state, batch)
  assert all(deleted(state))
  assert not any(deleted(after))


@pytest.mark.parametrize("arm", retraining.ARMS)
def test_retraining_leaves_the_victim_its_weights(arm, subject, monkeypatch):
  taken = []

  def fit(step, state, batches, **options):
    def watched(state, batch):
      after = step(state, batch)
      taken.append(state)
      return after

    return loops.fit(watched, state, batches, **options)

  universal = functools.partial(attacks.universal, norm="linf", num_steps=4)
  schedule = retraining.Schedule(
    victims.flax_apply(MODEL), optax.adam(1e-2), None, False, 2, 4, universal, pool=2
  )
  monkeypatch.setattr(retraining, "loops", types.SimpleNamespace(fit=fit))
  plan = PLAN._replace(
    steps=0, make=lambda eps, norm: attacks.universal(eps, norm=norm)
  )
  rounds = retraining.rounds(
    retraining.ARMS[arm], subject, schedule, plan, eps=0.1, count=2
  )
  kept = [each.subject.variables for each in rounds]
  assert len(taken) == 4
  assert all(deleted(jax.tree.leaves(state)[1]) for state in taken)  # a weight
  assert not any(deleted(kept))
  assert kept[0] is subject.variables
