"""The training step and the loop that drives it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import checkpoints, loops, training


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
