"""Nothing is traced again for what may change from call to call.

Beside these: `test_conformance.py` traces every float of every attack,
`test_universal_job.py` new targets, `test_robustness.py` new weights.
"""

import conformance
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import (
  attacks,
  crafting,
  data,
  loops,
  robustness,
  subjects,
  training,
  trials,
)

ATTACKED = ("pgd", "mi_fgsm", "apgd", "square", "smia", "asma", "mafl")
EFFORT = robustness.Effort(steps=2, restarts=2, queries=5)


def classes(n, side=8):
  """Images of three classes."""
  labels = np.arange(n, dtype=np.int32) % 3
  images = np.asarray(helpers.stripes(n, (side, side)))
  return data.Dataset(images, labels, np.arange(n), ["x"] * n, ("a", "b", "c"))


def attacked(name):
  """A new size and a new key."""
  row = next(row for row in conformance.ROWS if row.name == name)
  task = conformance.problem(row).take(slice(0, 2))

  def prepare(counter):
    run = jax.jit(lambda size, keys: row.make(size)(keys, counter, task.x, task.y))
    sizes = (row.size, 0.8 * row.size)
    return lambda n: run(sizes[n], jax.random.key(n)).delta

  return prepare, task.predict


def stepped(counter):
  """A new radius and step size of PGD."""

  @jax.jit
  def run(eps, step_size):
    attack = attacks.pgd(eps, step_size=step_size, num_steps=3)
    y = jnp.zeros(2, int)
    return attack(jax.random.key(0), counter, helpers.stripes(2), y).delta

  return lambda n: run(*((0.1, 0.02), (0.2, 0.05))[n])


def measured(counter):
  """A new radius and seed, and a short last batch."""
  predict = lambda variables, x: counter(x)
  names = ["clean", "fgsm", "pgd", "square"]

  def use(n):
    how = {"seed": n, "batch_size": 2, "names": names, "effort": EFFORT}
    found = robustness.measure(predict, {}, classes(4 + n), (0.05, 0.1)[n], **how)
    return np.stack([found[name][:4] for name in names])

  return use


def crafted(counter):
  """A new radius and seed."""
  predict = lambda variables, x: counter(x)
  subject = subjects.subject(predict, {}, classes(10), classes(5))
  plan = crafting.Plan(attacks.universal, "linf", None, 4, 4, 0, 9)

  def use(n):
    return crafting.craft(plan._replace(seed=n), subject, (0.05, 0.1)[n]).delta

  return use


def decided(counter):
  """A new perturbation, and more images with a short last batch."""
  predict = lambda variables, x: counter(x)
  images = (classes(8).images, classes(10).images)

  def use(n):
    delta = jnp.full((8, 8, 2), 0.1 * n)
    return subjects.decisions(predict, {}, images[n], delta, batch_size=4)

  return use


def paired(counter):
  """A short last batch of pairs."""
  predict = lambda variables, x: counter(x)
  images = np.asarray(helpers.stripes(4, channels=1))
  masks = np.asarray(helpers.per_pixel(images).argmax(-1), np.int32)
  pairs = data.Pairs(np.arange(3), np.array([1, 2, 3]), np.full(3, 0.5))
  scene = trials.Scene(
    predict, {}, images, masks, np.arange(4), pairs, jax.random.key(0), 0.9
  )
  program = trials.compile_attack(scene, attacks.asma_calibrated(num_steps=2), 2)
  first, last = trials.batches(3, 2)
  assert (len(first), len(last)) == (2, 1)
  return lambda n: trials.run_batch(scene, program, (first, last)[n], 2)[1]


def trained(counter):
  """Another epoch, in order, whose last batch is filled up."""

  def apply(params, extra, images, train):
    return counter(params * images)[0], extra

  tx = optax.sgd(0.1)
  step = jax.jit(
    training.train_step(apply, tx, training.cross_entropy), donate_argnums=0
  )
  start = training.init_state(jax.random.key(0), jnp.ones(()), {}, tx)
  states = [start]

  def use(n):
    batches = data.batches(classes(10), 4, seed=(0, None)[n])
    states.append(loops.fit(step, states[-1], batches, num_steps=3))
    return np.asarray(states[-1].params)

  return use


NETWORK = helpers.convnet()
TABLE = {name: attacked(name) for name in ATTACKED} | {
  "pgd, step size": (stepped, NETWORK),
  "robustness.measure": (measured, NETWORK),
  "crafting.craft": (crafted, NETWORK),
  "subjects.decisions": (decided, NETWORK),
  "trials.run_batch": (paired, helpers.per_pixel),
  "training.train_step": (trained, NETWORK),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_second_use_traces_nothing(name):
  prepare, predict = TABLE[name]
  first, second, traces = twice(prepare, predict)
  assert traces[0] == traces[1] > 0
  # it was another use indeed
  assert np.shape(first) != np.shape(second) or (first != second).any()


def twice(prepare, predict):
  """What two uses return, and how often the model was traced after each."""
  counter = helpers.Counter(predict)
  use, found, traces = prepare(counter), [], []
  for n in range(2):
    found.append(np.asarray(use(n)))
    traces.append(counter.traces)
  return *found, traces


def baked(counter):
  """The radius is a number of the program."""

  def use(n):
    attack = attacks.pgd((0.1, 0.2)[n], num_steps=2)
    run = jax.jit(lambda x, y: attack(jax.random.key(0), counter, x, y).delta)
    return run(helpers.stripes(2), jnp.zeros(2, int))

  return use


def cut_short(counter):
  """The last batch comes as it is."""
  run = jax.jit(counter)
  return lambda n: run(helpers.stripes((4, 2)[n]))[0]


@pytest.mark.parametrize("prepare", [baked, cut_short])
def test_the_count_tells_a_program_that_is_traced_again(prepare):
  _, _, (before, after) = twice(prepare, NETWORK)
  assert after > before
