"""The training step and the loop that drives it."""

import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import checkpoints, combine, free_training, loops, threats, training


def apply(params, extra, images, train):
  """Per-pixel linear model that counts its training calls in `extra`."""
  return images @ params["w"] + params["b"], {"calls": extra["calls"] + train}


def start(tx, channels=2):
  params = {"w": jnp.zeros((channels, 2)), "b": jnp.zeros((1, 1, 1, 2))}
  return training.init_state(jax.random.key(0), params, {"calls": jnp.int32(0)}, tx)


def masks(seed, n=4, size=8):
  rng = np.random.default_rng(seed)
  label = rng.integers(0, 2, (n, size, size))
  noise = rng.normal(0, 0.1, (n, size, size, 2))
  image = (np.stack([label, 1 - label], -1) + noise).astype(np.float32)
  ids = np.arange(n) + 10 * seed
  weight = np.ones(n, np.float32)
  return {"image": image, "label": label, "weight": weight, "id": ids}


def test_the_loss_falls_and_the_masks_are_learned():
  tx = optax.adam(0.1)
  step = jax.jit(training.train_step(apply, tx, augment=training.flips))
  seen = []
  state = loops.fit(
    step,
    start(tx),
    map(masks, itertools.count()),
    num_steps=40,
    on_step=lambda n, state, metrics: seen.append((n, float(metrics["loss"]))),
  )
  assert [n for n, _ in seen] == list(range(1, 41))
  assert seen[-1][1] < 0.5 * seen[0][1]
  batch = masks(1000)
  logits, _ = apply(state.params, state.extra, batch["image"], False)
  assert (np.argmax(logits, -1) == batch["label"]).mean() > 0.99
  assert int(state.step) == 40
  assert int(state.extra["calls"]) == 40


def test_padding_changes_nothing():
  tx = optax.sgd(0.1)
  step = jax.jit(training.train_step(apply, tx))
  batch = masks(0)
  padded = {k: np.concatenate([v, v[:2]]) for k, v in batch.items()}
  padded["image"][4:] = 1e3
  padded["weight"][4:] = 0
  want, _ = step(start(tx), batch)
  got, _ = step(start(tx), padded)
  np.testing.assert_allclose(got.params["w"], want.params["w"], atol=1e-7)
  padded["weight"][4:] = 1
  broken, _ = step(start(tx), padded)
  assert not np.allclose(broken.params["w"], want.params["w"], atol=1e-3)


def test_flips_move_image_and_mask_together_and_follow_the_key():
  batch = masks(0, n=1)
  image, label = jnp.asarray(batch["image"][0]), jnp.asarray(batch["label"][0])
  seen = set()
  for key in jax.random.split(jax.random.key(1), 20):
    flipped, mask = training.flips(key, image, label)
    assert (jnp.round(flipped[..., 0]).astype(int) == mask).all()
    seen.add(np.asarray(mask).tobytes())
  assert len(seen) == 4


def test_augmentation_depends_on_the_id_and_not_on_the_place():
  tx = optax.sgd(1.0)
  step = jax.jit(training.train_step(apply, tx, augment=only_noise))
  batch = masks(0)
  turned = {k: v[::-1] for k, v in batch.items()}
  one, _ = step(start(tx), batch)
  two, _ = step(start(tx), turned)
  np.testing.assert_allclose(one.params["w"], two.params["w"], atol=1e-6)
  other, _ = step(start(tx), batch | {"id": batch["id"] + 1})
  assert not np.allclose(one.params["w"], other.params["w"], atol=1e-3)


def only_noise(key, image, label):
  return image + jax.random.normal(key, image.shape), label


def test_a_class_label_needs_only_another_loss():
  def classify(params, extra, images, train):
    return images.mean((1, 2)) @ params, extra

  tx = optax.sgd(1.0)
  step = training.train_step(
    classify, tx, training.cross_entropy, augment=training.flips
  )
  state = training.init_state(jax.random.key(0), jnp.zeros((3, 2)), {}, tx)
  image = jnp.eye(3)[:, None, None, :] * jnp.ones((3, 4, 4, 1))
  state, metrics = step(state, {"image": image, "label": jnp.array([0, 1, 1])})
  assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-6)
  # The gradient of the mean is (softmax - one_hot) / 3 in each row, by hand:
  want = np.array([[1, -1], [-1, 1], [-1, 1]]) / 6
  np.testing.assert_allclose(state.params, want, atol=1e-6)


def test_dice_against_counting():
  label = jnp.array([[0, 1], [1, 2]])
  guess = jnp.array([[0, 1], [2, 2]])
  logits = 200 * jax.nn.one_hot(guess, 3)
  want = 1 - ((2 * 1 + 1) / (1 + 2 + 1) + (2 * 1 + 1) / (2 + 1 + 1)) / 2
  assert float(training.soft_dice(logits, label)) == pytest.approx(want, abs=1e-6)


def test_interrupted_training_continues_bit_for_bit(tmp_path):
  tx = optax.adam(0.1)
  step = jax.jit(training.train_step(apply, tx, augment=training.flips))
  whole = loops.fit(step, start(tx), map(masks, itertools.count()), num_steps=6)
  half = loops.fit(step, start(tx), map(masks, itertools.count()), num_steps=3)
  checkpoints.save(tmp_path, half, step=3)
  half = checkpoints.restore(tmp_path, start(tx))
  rest = loops.fit(step, half, map(masks, itertools.count(3)), num_steps=3)
  np.testing.assert_array_equal(rest.params["w"], whole.params["w"])
  np.testing.assert_array_equal(
    jax.random.key_data(rest.key), jax.random.key_data(whole.key)
  )


def test_the_loop_draws_no_batch_too_many_and_says_when_they_run_out():
  batches = iter([{"image": 1.0}, {"image": 2.0}, {"image": 3.0}])

  def add(state, batch):
    return state + batch["image"], {}

  assert loops.fit(add, 0.0, batches, num_steps=2) == 3.0
  assert next(batches) == {"image": 3.0}
  with pytest.raises(ValueError, match="ran out after 0 of 1 steps"):
    loops.fit(add, 0.0, batches, num_steps=1)
  with pytest.raises(ValueError, match="write 0 or more"):
    loops.fit(add, 0.0, batches, num_steps=-1)


def perturbed(delta):
  def view(key, predict, x, y):
    return combine.fixed(threats.box(bounds=(-10, 10)), delta)(key, predict, x, y)

  return view


def same_state(one, other):
  helpers.assert_trees_equal(one._replace(key=()), other._replace(key=()))


def test_one_view_is_training_on_what_it_shows():
  tx, batch, delta = optax.sgd(0.5), masks(0), jnp.full((8, 8, 2), 0.3)
  outer = training.mean_over_views(training.dice_cross_entropy)
  step = training.adversarial_step(apply, tx, (perturbed(delta),), outer)
  moved = batch | {"image": batch["image"] + np.asarray(delta)}
  got, seen = jax.jit(step)(start(tx), batch)
  want, wanted = jax.jit(training.train_step(apply, tx))(start(tx), moved)
  same_state(got, want)
  assert seen["loss"] == wanted["loss"]


def test_views_pass_the_model_together_and_once():
  tx, batch = optax.sgd(0.5), masks(0)
  views = (combine.identity, perturbed(jnp.ones((8, 8, 2))), combine.identity)
  outer = training.mean_over_views(training.dice_cross_entropy)
  state, seen = jax.jit(training.adversarial_step(apply, tx, views, outer))(
    start(tx), batch
  )
  assert int(state.extra["calls"]) == 1  # making the views is no training call
  clean = jax.jit(training.train_step(apply, tx))(start(tx), batch)[1]["loss"]
  moved = batch | {"image": batch["image"] + 1}
  other = jax.jit(training.train_step(apply, tx))(start(tx), moved)[1]["loss"]
  np.testing.assert_allclose(seen["loss"], (2 * clean + other) / 3, rtol=1e-6)


def test_views_depend_on_the_example_and_the_step_not_on_the_place():
  noise = lambda key, predict, x, y: combine.identity(
    key, predict, x + jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(key), y
  )
  tx, batch = optax.sgd(0.5), masks(0)
  outer = training.mean_over_views(training.dice_cross_entropy)
  step = jax.jit(training.adversarial_step(apply, tx, (noise,), outer))
  turned = {name: values[::-1] for name, values in batch.items()}
  begun = start(tx)._replace(params=jax.tree.map(lambda p: p + 0.5, start(tx).params))
  begun.params["w"] *= jnp.array([[1, -1]])  # two classes that differ
  one, seen = step(begun, batch)
  other, again = step(begun, turned)
  np.testing.assert_allclose(seen["loss"], again["loss"], rtol=1e-6)
  helpers.assert_trees_close(one.params, other.params, atol=1e-6)
  later = step(begun._replace(step=jnp.int32(1)), batch)[1]
  assert abs(later["loss"] - seen["loss"]) > 1e-3


def test_shards_of_a_batch_train_as_the_whole():
  tx, batch = optax.sgd(0.5), masks(0)
  batch["weight"][3] = 0  # unequal shards: a mean of means would differ
  outer = training.mean_over_views(training.dice_cross_entropy)
  make = functools.partial(
    training.adversarial_step, apply, tx, (combine.identity,), outer
  )
  whole, seen = make()(start(tx), batch)
  shards = {k: v.reshape(2, 2, *v.shape[1:]) for k, v in batch.items()}
  step = jax.vmap(make(axis_name="devices"), (None, 0), axis_name="devices")
  state, parts = step(start(tx), shards)
  for leaf in (0, 1):
    params = jax.tree.map(lambda value, leaf=leaf: value[leaf], state.params)
    helpers.assert_trees_close(params, whole.params, atol=1e-6)
  np.testing.assert_allclose(parts["loss"], jnp.full(2, seen["loss"]), rtol=1e-6)


def test_the_vector_of_free_adversarial_training():
  with helpers.x64():
    tx = optax.sgd(0.1)
    model = lambda params, extra, x, train: (x[:, 0] * params, extra)
    square = lambda logits, label: jnp.square(logits - label) / 2
    threat = threats.linf(0.5, bounds=(-10.0, 10.0))
    step = free_training.free_step(model, tx, threat, 0.5, loss=square)
    batch = {"image": jnp.ones((1, 1)), "label": jnp.array([2])}
    begun = training.init_state(jax.random.key(0), jnp.float64(1), {}, tx)
    state = free_training.FreeState(begun, jnp.zeros((1, 1)))
    for weight in (1.1, 1.1725):
      state, _ = jax.jit(step)(state, batch)
      assert state.delta.item() == -0.5
      assert state.train.params.item() == pytest.approx(weight, abs=1e-12)


def test_padding_moves_no_weight_and_no_perturbation_of_free_training():
  tx, batch = optax.sgd(0.1), masks(0)
  threat = threats.linf(0.1, bounds=(-10.0, 10.0))
  step = free_training.free_step(apply, tx, threat, 0.1)
  x = jnp.asarray(batch["image"])
  begun = start(tx)._replace(params=jax.tree.map(lambda p: p + 0.5, start(tx).params))
  begun.params["w"] *= jnp.array([[1, -1]])  # two classes that differ
  state = free_training.FreeState(begun, jnp.zeros_like(x))
  weight = jnp.ones(len(x)).at[0].set(0)
  one, _ = step(state, {**batch, "weight": weight})
  broken = x.at[0].set(0.123)
  carried, _ = step(one, {**batch, "weight": 1 - weight})
  np.testing.assert_array_equal(carried.delta[1:], one.delta[1:])
  two, _ = step(state, {**batch, "image": broken, "weight": weight})
  assert not one.delta[0].any()
  assert one.delta[1:].any()
  helpers.assert_trees_close(one.train.params, two.train.params, atol=1e-7)


def test_the_vector_of_adversarial_weights():
  moved = training.adversarial_weights(0.005)(
    {"w": jnp.array([[3.0, 4.0]]), "b": jnp.ones(2)},
    {"w": jnp.array([[0.0, 2.0]]), "b": jnp.ones(2)},
  )
  np.testing.assert_allclose(moved["w"], [[3.0, 4.025]], rtol=1e-6)
  np.testing.assert_array_equal(moved["b"], 1.0)
  for w, g, want in ((5.0, 0.0, 0.0), (5.0, 1e-30, 0.025), (5.0, 1e30, 0.025)):
    moved = training.adversarial_weights()(jnp.full((2, 2), w), jnp.full((2, 2), g))
    np.testing.assert_allclose(moved - w, want, rtol=1e-4)


def test_labels_that_are_not_known_train_nothing_and_are_not_attacked():
  seen = []

  def view(key, predict, x, y):
    seen.append(sorted(y))
    return combine.identity(key, predict, x, y)

  tx = optax.sgd(0.5)
  model = lambda params, extra, x, train: (x @ params, extra)
  known = jnp.array([[True, False], [True, True]])
  results = []
  for label in ([[1, 0], [0, 1]], [[1, 1], [0, 1]]):
    batch = {"image": jnp.eye(2), "label": jnp.array(label), "mask": known}
    for step in (
      training.adversarial_step(model, tx, (view,), training.mean_cross_entropy),
      training.train_step(model, tx, training.binary_cross_entropy),
    ):
      begun = training.init_state(jax.random.key(0), jnp.ones((2, 2)), {}, tx)
      results.append(step(begun, batch)[0].params)
  assert seen == [["label", "mask"]] * 2
  helpers.assert_trees_equal(results[:2], results[2:])
  assert (results[0] != 1).any()


def test_pixels_that_are_not_known_train_nothing():
  tx, batch = optax.sgd(0.5), masks(0)
  known = jnp.ones(batch["label"].shape, bool).at[:, :4].set(False)
  other = {**batch, "label": jnp.where(known, batch["label"], 1 - batch["label"])}
  step = training.train_step(apply, tx)
  one, two = (step(start(tx), {**b, "mask": known})[0] for b in (batch, other))
  helpers.assert_trees_equal(one.params, two.params)
  moving = training.train_step(apply, tx, augment=training.flips)
  with pytest.raises(ValueError, match="`augment` would move images"):
    moving(start(tx), {**batch, "mask": known})


def test_the_step_is_taken_from_the_weights_with_the_gradient_beside_them():
  tx, batch = optax.sgd(0.5), masks(0)
  outer = training.mean_over_views(training.dice_cross_entropy)
  begun = start(tx)._replace(params=jax.tree.map(lambda p: p + 0.5, start(tx).params))
  beside = jax.tree.map(lambda p: p + 0.1, begun.params)
  attack = lambda params, gradient: beside
  step = training.adversarial_step(apply, tx, (), outer, weights=attack)
  after, _ = step(begun, batch)
  plain = training.adversarial_step(apply, tx, (), outer)
  other, _ = plain(begun._replace(params=beside), batch)
  want = jax.tree.map(lambda p, q, r: p + q - r, begun.params, other.params, beside)
  helpers.assert_trees_close(after.params, want, atol=1e-6)
