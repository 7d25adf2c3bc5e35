"""One step on any mesh: the same numbers, one collective, whole states."""

import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxadv import attacks, loops, reduction, sharding, training
from jaxadv.models import ConvNet

SIDE, CLASSES, STEPS = 8, 3, 3
SHAPE = (SIDE, SIDE, 2)


def batches(size=16, steps=STEPS, dense=False):
  """Random images with labels, ids and unequal weights, a function of the step."""
  for t in range(steps):
    rng = np.random.default_rng(t)
    label = rng.integers(0, 2, (size, SIDE, SIDE) if dense else size)
    yield {
      "image": rng.random((size, *SHAPE), np.float32),
      "label": label.astype(np.int32),
      "weight": rng.random(size).astype(np.float32),
      "id": np.arange(t * size, (t + 1) * size, dtype=np.int32),
    }


def apply(params, extra, images, train):
  """A convolution that is trained, and a batch statistic that follows the images."""
  hidden = jnp.tanh(helpers.convnet(classes=4, dense=True)(images)[0])
  logits = hidden.mean((1, 2)) @ params["head"]
  moved = 0.9 * extra["mean"] + 0.1 * hidden.mean((0, 1, 2))
  return logits, {"mean": moved} if train else extra


def drive(make, state, devices, form, stream):
  """The last state of a step in one of its forms, on some of the devices."""
  mesh = sharding.mesh(jax.devices()[:devices])
  step = make(sharding.AXIS if form == "shard_map" else None)
  if form == "shard_map":
    step = sharding.data_parallel(step, mesh)
  state, step = sharding.put(mesh, state), jax.jit(step)
  batches = list(sharding.feed(mesh, stream))
  return loops.fit(step, state, batches, num_steps=len(batches))


@functools.cache
def craft(devices, form="jit", *, microbatches=None, stream=batches, dense=False):
  predict = helpers.convnet(classes=2 if dense else CLASSES, dense=dense)
  make = functools.partial(attacks.universal, 0.5, norm="l2", num_steps=STEPS)

  def step(axis_name):
    uap = make(microbatches=microbatches, axis_name=axis_name)
    return functools.partial(uap.step, predict)

  state = make().init(jax.random.key(1), jnp.zeros(SHAPE))
  return drive(step, state, devices, form, stream(dense=dense)).delta


@functools.cache
def train(devices, form="jit", *, microbatches=None, weights=None):
  # Adam divides by gradients as small as a rounding, which is for the exact tests.
  tx = optax.sgd(0.1, momentum=0.9) if microbatches is None else optax.adam(1e-2)
  views = (attacks.pgd(4 / 255, num_steps=2),)

  def step(axis_name):
    return training.adversarial_step(
      apply,
      tx,
      views,
      training.mean_over_views(training.cross_entropy),
      augment=training.flips,
      weights=weights,
      microbatches=microbatches,
      axis_name=axis_name,
    )

  head = jax.random.normal(jax.random.key(3), (4, CLASSES))
  state = training.init_state(
    jax.random.key(2), {"head": head}, {"mean": jnp.zeros(4)}, tx
  )
  state = drive(step, state, devices, form, batches(steps=2))
  return state.params, state.extra


# The fast sums: equal to rounding, and the form of the step makes no difference.


@pytest.mark.parametrize("run", [craft, train])
def test_eight_devices_step_as_one_up_to_rounding(run):
  alone = run(1)
  for form in ("jit", "shard_map"):
    helpers.assert_trees_close(run(8, form), alone, atol=2e-6)


def test_pmap_steps_as_shard_map():
  uap = attacks.universal(0.5, norm="l2", num_steps=STEPS, axis_name="i")
  step = functools.partial(uap.step, helpers.convnet())
  state = uap.init(jax.random.key(1), jnp.zeros(SHAPE))
  mapped = jax.pmap(step, "i", in_axes=(None, 0), out_axes=None)
  for batch in batches():
    cut = {name: v.reshape(8, 2, *v.shape[1:]) for name, v in batch.items()}
    state, _ = mapped(jax.device_get(state), cut)
  helpers.assert_trees_equal(np.asarray(state.delta), np.asarray(craft(8, "shard_map")))


# The fixed order: not one bit depends on the number of devices.


@pytest.mark.parametrize("run", [craft, train, functools.partial(craft, dense=True)])
def test_microbatches_give_the_same_bits_on_any_number_of_devices(run):
  alone = run(1, microbatches=8)
  for devices, form in ((1, "shard_map"), (2, "shard_map"), (8, "shard_map")):
    helpers.assert_trees_equal(run(devices, form, microbatches=8), alone)


def test_the_fast_sums_do_depend_on_it():
  """The twin that must fail: without it, the test above could not tell."""
  assert (np.asarray(craft(8)) != np.asarray(craft(1))).any()


def test_weights_that_are_attacked_keep_their_bits_too():
  run = functools.partial(train, weights=training.adversarial_weights(), microbatches=4)
  helpers.assert_trees_equal(run(4, "shard_map"), run(1))


def test_microbatches_are_the_batch_up_to_rounding():
  helpers.assert_trees_close(craft(1, microbatches=8), craft(1), atol=2e-6)


def test_microbatches_pass_the_model_one_after_another():
  shapes = []

  def predict(x):
    shapes.append(x.shape[0])
    return x.reshape(len(x), -1)[:, :2]

  uap = attacks.universal(0.5, microbatches=4)
  state = uap.init(jax.random.key(1), jnp.zeros(SHAPE))
  uap.step(predict, state, next(batches()))
  assert set(shapes) == {4}


@pytest.mark.parametrize("count", [3, 32, 0])
def test_microbatches_that_do_not_divide_the_batch_are_refused(count):
  with pytest.raises(ValueError, match=f"cannot be {count} equal microbatches"):
    reduction.total(jnp.sum, jnp.ones(16), microbatches=count)


def test_microbatches_that_the_devices_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="16 rows on 8 devices cannot be 4 equal"):
    craft(8, "shard_map", microbatches=4)


# Padding.


@pytest.mark.parametrize("microbatches", [None, 8])
def test_rows_without_weight_change_nothing(microbatches):
  def padded(dense):
    for batch in batches(dense=dense):
      more = {k: np.concatenate([v, v[:1].repeat(16, 0)]) for k, v in batch.items()}
      more["image"][16:] = 0.5
      more["weight"][16:] = 0
      yield more

  form = "jit" if microbatches is None else "shard_map"
  got = craft(8, form, microbatches=microbatches and 16, stream=padded)
  helpers.assert_trees_close(got, craft(8, form, microbatches=microbatches), atol=2e-6)


# What the compiler adds.


def collectives(compiled):
  """Name and result of every collective in the text of a compiled program."""
  kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
  return re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", compiled.as_text())


def test_a_sharded_attack_needs_no_collective():
  mesh, attack = sharding.mesh(), attacks.pgd(4 / 255, num_steps=3)

  @jax.jit
  def run(keys, x, y):
    return attack(keys, helpers.convnet(), x, y)

  batch = sharding.scatter(mesh, next(batches()))
  keys = sharding.put(mesh, jax.random.split(jax.random.key(0), 16), axis="data")
  compiled = run.lower(keys, batch["image"], batch["label"]).compile()
  assert collectives(compiled) == []
  image = compiled(keys, batch["image"], batch["label"]).image
  assert image.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), image.ndim)


@pytest.mark.parametrize("form", ["jit", "shard_map"])
def test_a_universal_step_reduces_once_the_size_of_an_image(form):
  mesh = sharding.mesh()
  axis_name = "data" if form == "shard_map" else None
  uap = attacks.universal(0.5, norm="l2", num_steps=STEPS, axis_name=axis_name)
  step = functools.partial(uap.step, helpers.convnet())
  step = sharding.data_parallel(step, mesh) if axis_name else step
  state = sharding.put(mesh, uap.init(jax.random.key(1), jnp.zeros(SHAPE)))
  batch = sharding.scatter(mesh, next(batches()))
  found = collectives(jax.jit(step).lower(state, batch).compile())
  ((shapes, kind),) = found
  assert kind == "all-reduce"
  sizes = sorted(re.findall(r"f32\[([\d,]*)\]", shapes))
  # Beside the gradient, in the same message, three means and the sum of the weights.
  assert sizes == ["", "", "", "", f"{SIDE},{SIDE},2"]


# Several at once.


def states_of(uap, seeds):
  init = lambda seed: uap.init(jax.random.key(seed), jnp.zeros(SHAPE))
  return jax.vmap(init)(jnp.asarray(seeds))


def test_several_radii_and_targets_on_a_leading_axis_or_in_groups():
  """Four perturbations at once equal four alone, on one device and in two groups."""
  predict = helpers.convnet()

  def step(eps, target, state, batch):
    uap = attacks.targeted_universal(eps, target=target, norm="l2", step_size=0.1)
    return uap.step(predict, state, batch)[0]

  eps, target = jnp.array([0.2, 0.2, 0.4, 0.8]), jnp.array([0, 1, 2, 0])
  uap = attacks.targeted_universal(0.1, target=0, norm="l2", step_size=0.1)
  states, stream = states_of(uap, [0, 1, 2, 3]), list(batches(steps=2))
  want = []
  for n in range(4):
    state = jax.tree.map(lambda leaf, n=n: leaf[n], states)
    for batch in stream:
      state = jax.jit(step)(eps[n], target[n], state, batch)
    want.append(np.asarray(state.delta))
  many = jax.jit(jax.vmap(step, (0, 0, 0, None)))
  mesh = sharding.mesh(groups=2)
  cut = sharding.put(mesh, (eps, target, states), axis="group")
  for given, feed in (
    ((eps, target, states), stream),
    (cut, sharding.feed(mesh, stream)),
  ):
    *aim, state = given
    for batch in feed:
      state = many(*aim, state, batch)
    np.testing.assert_allclose(state.delta, np.stack(want), atol=2e-6)
  assert state.delta.sharding.spec[0] == "group"


def test_several_victims_on_a_leading_axis():
  victims = jax.random.normal(jax.random.key(5), (3, SIDE * SIDE * 2, CLASSES))
  uap = attacks.universal(0.5, norm="l2", num_steps=1)
  batch = next(batches())

  def step(weights, state):
    return uap.step(helpers.linear(weights), state, batch)[0].delta

  state = uap.init(jax.random.key(0), jnp.zeros(SHAPE))
  many = jax.jit(jax.vmap(step, (0, None)))(victims, state)
  for weights, delta in zip(victims, many, strict=True):
    np.testing.assert_allclose(delta, step(weights, state), atol=2e-6)
  assert not np.allclose(many[0], many[1])


def test_parameters_too_large_for_one_device_are_cut_over_all():
  model = ConvNet(num_classes=CLASSES, width=16, depth=2)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
  uap = attacks.universal(0.5, norm="l2", num_steps=STEPS)
  mesh = sharding.mesh()
  cut = jax.device_put(variables, sharding.spread(mesh, variables))
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  own = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(cut))
  assert own < whole / 6
  step = jax.jit(lambda v, s, b: uap.step(functools.partial(model.apply, v), s, b)[0])
  start = uap.init(jax.random.key(1), jnp.zeros(SHAPE))
  alone, shared = start, sharding.put(mesh, start)
  for batch in batches():
    alone = step(variables, alone, batch)
    shared = step(cut, shared, sharding.scatter(mesh, batch))
  np.testing.assert_allclose(shared.delta, alone.delta, atol=2e-6)


# The mesh in use.


def test_a_mesh_is_used_inside_its_block_only():
  assert sharding.current() is None
  with sharding.use(sharding.mesh()):
    assert sharding.current().size == 8
    with sharding.use(None):
      assert sharding.current() is None
    assert sharding.share() == (0, 1)
  assert sharding.current() is None
  with sharding.use(sharding.mesh(jax.devices()[:1])):
    assert sharding.current() is None  # one device needs no mesh


@pytest.mark.parametrize(
  ("rows", "microbatches", "devices"),
  [(16, None, 8), (12, None, 6), (7, None, 7), (11, None, None), (16, 4, 4)],
)
def test_a_batch_takes_the_most_devices_that_cut_it_evenly(rows, microbatches, devices):
  with sharding.use(sharding.mesh()):
    mesh = sharding.fitting(rows, microbatches=microbatches)
  assert (mesh and mesh.size) == devices


@pytest.mark.parametrize("total", [1, 7, 16, 45])
def test_loops_over_images_are_the_same_on_a_mesh(total):
  x, y = np.random.default_rng(0).random((total, 3)), np.arange(total)
  seen = []

  def function(x, y):
    seen.append(x.shape)
    return x * y[:, None]

  with sharding.use(sharding.mesh()):
    got = loops.over_batches(function, x, y, size=2)
  np.testing.assert_allclose(got, x * y[:, None], rtol=1e-6)
  assert set(seen) == {(16, 3)}


def test_rows_that_cannot_be_cut_evenly_are_refused():
  with pytest.raises(ValueError, match="12 rows cannot be cut evenly over 8 devices"):
    sharding.scatter(sharding.mesh(), {"image": np.zeros((12, 2))})
  with pytest.raises(ValueError, match="8 devices make no 3 groups"):
    sharding.mesh(groups=3)
