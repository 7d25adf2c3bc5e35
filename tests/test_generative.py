"""GAP: what is rescaled, what is trained, and what the trained attack promises."""

import pathlib
import re

import conformance
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, generative, loops, targets, training, types, victims
from jaxadv.models import Generator

EPS = 0.1
KEY = jax.random.key(0)
LINF = conformance.Row("gap", None, "class", EPS, "linf")


def test_a_channel_is_shrunk_to_the_radius_by_the_closed_form():
  with helpers.x64():
    delta = np.random.default_rng(0).normal(0, 0.1, (4, 5, 3))
    delta[..., 2] *= 1e-3  # this one fits already
    got = generative.rescale(jnp.asarray(delta), 0.05)
    factor = np.minimum(1, 0.05 / np.abs(delta).max((0, 1)))
    np.testing.assert_allclose(got, delta * factor, rtol=1e-12)
    assert factor[2] == 1
    assert (factor[:2] < 1).all()


@pytest.mark.parametrize("eps", [0.1, 1 / 255, 7 / 255, 0.3])
def test_every_channel_touches_the_ball(eps):
  delta = jnp.asarray(np.random.default_rng(1).normal(size=(64, 9, 9, 3)), jnp.float32)
  got = jax.vmap(generative.rescale, (0, None))(delta, eps)
  np.testing.assert_allclose(jnp.abs(got).max((1, 2)), eps, rtol=2e-7)


def test_nothing_times_any_radius_is_nothing_with_a_finite_gradient():
  for delta in (jnp.zeros((3, 3, 1)), jnp.full((3, 3, 1), 0.5)):
    for eps in (0.0, 1e-20, 0.1):
      pull = jax.grad(lambda d, eps=eps: generative.rescale(d, eps)[0, 0, 0])
      assert jnp.isfinite(pull(delta)).all()
  assert not generative.rescale(jnp.ones((3, 3, 1)), 0.0).any()


def test_the_gradient_passes_through_the_rescaling():
  with helpers.x64():
    rng = np.random.default_rng(2)
    delta, turn = rng.normal(size=(2, 4, 4, 2))
    tangent = (jnp.asarray(turn),)
    value, slope = jax.jvp(
      lambda d: generative.rescale(d, EPS), (jnp.asarray(delta),), tangent
    )
    # the closed form: eps (t / m - d sign(d*) t* / m^2), `*` the largest of a channel
    place = np.abs(delta).reshape(16, 2).argmax(0)
    top, turned = (v.reshape(16, 2)[place, [0, 1]] for v in (delta, turn))
    want = EPS * (turn / np.abs(top) - delta * np.sign(top) * turned / top**2)
    np.testing.assert_allclose(slope, want, rtol=1e-9, atol=1e-12)
    h = 1e-6
    moved = generative.rescale(jnp.asarray(delta + h * turn), EPS)
    np.testing.assert_allclose((moved - value) / h, slope, rtol=1e-4, atol=1e-6)
    # an untracked factor, as in the code of Xu et al., has another gradient
    untracked = turn * (EPS / np.abs(top))
    assert np.abs(untracked - slope).max() > 0.1 * np.abs(slope).max()


def linear(params, extra, x, train):
  """A generator of its own weights: `tanh(x W)`, each image by itself."""
  flat = x.reshape(len(x), -1)
  return jnp.tanh(flat @ params["w"] + params["b"][None]).reshape(x.shape), extra


def begin(apply_or_model, x, tx):
  if apply_or_model is linear:
    size = x[0].size
    w = 0.1 * jax.random.normal(jax.random.key(1), (size, size))
    return training.init_state(
      jax.random.key(2), {"w": w, "b": jnp.zeros(size)}, {}, tx
    )
  variables = dict(jax.jit(apply_or_model.init)(jax.random.key(1), x[:1]))
  return training.init_state(jax.random.key(2), variables.pop("params"), variables, tx)


def test_the_step_is_training_of_the_victim_behind_the_generator():
  predict, x = helpers.convnet(), helpers.stripes(6)
  tx = optax.sgd(0.5)
  state = begin(linear, x, tx)
  step = generative.gap_step(linear, lambda x: predict(x)[0], tx, EPS)
  got, metrics = jax.jit(step)(state, {"image": x, "label": jnp.zeros(6, int)})
  worst = jnp.argmin(predict(x)[0], -1)

  def cost(params):
    delta = linear(params, {}, x, True)[0]
    size = jnp.abs(delta).max((1, 2), keepdims=True)
    logits = predict(x + EPS * delta / jnp.maximum(size, EPS))[0]
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits), worst[:, None], 1)
    return -taken.mean()

  value, slope = jax.jit(jax.value_and_grad(cost))(state.params)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  want = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, slope)
  helpers.assert_trees_close(got.params, want, atol=1e-6)


def test_other_targets_are_other_prepares():
  predict, x = helpers.convnet(), helpers.stripes(6)
  tx, y = optax.sgd(0.5), jnp.arange(6) % 3
  state = begin(linear, x, tx)

  def after(batch, **options):
    step = generative.gap_step(linear, predict, tx, EPS, **options)
    return jax.jit(step)(state, batch)[0].params

  batch = {"image": x, "label": y}
  one = after(batch, prepare=targets.constant(1))
  same = after({**batch, "label": jnp.ones(6, int)}, prepare=types.labels)
  helpers.assert_trees_equal(one, same)
  away = after(batch, prepare=types.labels, loss=lambda z, y: -training.task_loss(z, y))
  towards = after(batch, prepare=types.labels)
  back = jax.tree.map(lambda a, b: a + b, away, towards)
  helpers.assert_trees_close(
    back, jax.tree.map(lambda p: 2 * p, state.params), atol=1e-6
  )


@pytest.fixture(scope="module")
def victim():
  """A linear victim of three classes, learned, and its images."""
  rng = np.random.default_rng(3)
  centres = rng.normal(0, 0.06, (3, 8, 8, 2))
  y = jnp.asarray(np.arange(96) % 3)
  noise = rng.normal(0, 0.08, (96, 8, 8, 2))
  x = jnp.asarray(np.clip(0.5 + centres[y] + noise, 0, 1), jnp.float32)
  apply = lambda params, extra, x, train: (
    (x - 0.5).reshape(len(x), -1) @ params,
    extra,
  )
  tx = optax.adam(0.03)
  step = jax.jit(training.train_step(apply, tx, training.cross_entropy))
  state = training.init_state(jax.random.key(0), jnp.zeros((128, 3)), {}, tx)
  batch = {"image": x[:72], "label": y[:72]}
  state = loops.fit(step, state, [batch] * 40, num_steps=40)
  predict = lambda x: apply(state.params, {}, x, False)[0]
  assert (predict(x).argmax(1) == y).mean() > 0.9
  return predict, x, y


def fit(apply, start, victim, *, labels=None, num_steps=60, **options):
  """Trains a generator on the first 72 images: what it writes, and its state."""
  predict, x, y = victim
  tx = optax.adam(0.01)
  step = jax.jit(generative.gap_step(apply, predict, tx, EPS, **options))
  batch = {"image": x[:72], "label": (y if labels is None else labels)[:72]}
  state = loops.fit(step, begin(start, x, tx), [batch] * num_steps, num_steps=num_steps)
  return generative.generator(apply, state), state


def share(attack, predict, x, y):
  result = jax.jit(lambda x, y: attack(KEY, predict, x, y))(x, y)
  conformance.assert_allowed(LINF, x, result.image)
  return float(result.success.mean())


def signs(x):
  return jax.random.rademacher(jax.random.key(9), x.shape, x.dtype)


@pytest.fixture(scope="module")
def trained(victim):
  """A small U-Net with batch norm that was trained, and what it writes."""
  model = Generator(width=4, depth=1)
  return model, *fit(victims.flax_apply(model), model, victim)


def test_a_trained_generator_fools_on_images_it_has_not_seen(victim, trained):
  predict, x, _ = victim
  _, written, _ = trained
  x = x[72:]
  decided, worst = predict(x).argmax(1), predict(x).argmin(1)
  fooled = share(generative.gap(written, EPS), predict, x, decided)
  reached = share(generative.gap(written, EPS, targeted=True), predict, x, worst)
  noise = share(generative.gap(signs, EPS), predict, x, decided)
  assert fooled > noise + 0.4, (fooled, noise)
  assert reached > 0.4, reached
  # no attack inside the ball does better on a linear victim than one sign step
  best = share(attacks.fgsm(EPS, targeted=True), predict, x, worst)
  assert reached <= best + 0.1


def test_a_trained_generator_turns_label_sets_around(victim):
  predict, x, _ = victim
  odds = lambda x: predict(x) - predict(x).mean(1, keepdims=True)
  labels = (odds(x) > 0).astype(jnp.int32)
  written, _ = fit(linear, linear, (odds, x, labels))
  x, labels = x[72:], labels[72:]

  def turn(attack):
    image = jax.jit(lambda x, y: attack(KEY, odds, x, y).image)(x, labels)
    return float(((odds(image) > 0) != labels).mean())

  turned, noise = turn(generative.gap(written, EPS)), turn(generative.gap(signs, EPS))
  assert turned > noise + 0.3, (turned, noise)
  wanted = 1 - labels
  result = generative.gap(written, EPS, targeted=True)(
    KEY, odds, x, {"label": wanted, "mask": jnp.ones(wanted.shape, bool)}
  )
  np.testing.assert_array_equal(result.success, ((result.logits > 0) == wanted).all(1))


def test_a_universal_generator_writes_one_perturbation_for_all(victim):
  predict, x, _ = victim
  noise = jax.random.uniform(jax.random.key(4), x.shape[1:])
  apply = generative.from_noise(linear, noise)
  away = lambda z, y: -jnp.log(training.task_loss(z, y))
  written, _ = fit(apply, linear, victim, prepare=targets.constant(2))
  delta = generative.rescale(written(x[:1])[0], EPS)
  assert (written(x) == written(x[:1])).all()
  x = x[72:]
  y = jnp.full(len(x), 2)
  moved = share(generative.gap(written, EPS, targeted=True), predict, x, y)
  before = float((predict(x).argmax(1) == 2).mean())
  assert moved > before + 0.4, (before, moved)
  result = generative.gap(written, EPS)(KEY, predict, x, y)
  np.testing.assert_allclose(result.image, jnp.clip(x + delta[None], 0, 1), atol=1e-6)
  other, _ = fit(apply, linear, victim, prepare=targets.predictions, loss=away)
  decided = predict(x).argmax(1)
  fooled = share(generative.gap(other, EPS), predict, x, decided)
  assert fooled > share(generative.gap(signs, EPS), predict, x, decided) + 0.3


WILD = lambda x: 3 * jnp.sin(40 * x)


def test_ball_and_bounds_and_a_twin_that_leaves_them():
  predict, x = helpers.convnet(), helpers.stripes(16)
  x = x.at[:, :4].set(1.0).at[:, 4:].multiply(0.02)  # much of it next to a bound
  y = predict(x)[0].argmax(1)
  result = generative.gap(WILD, EPS)(KEY, predict, x, y)
  conformance.assert_allowed(LINF, x, result.image)
  np.testing.assert_allclose(result.logits, predict(result.image)[0], atol=1e-5)
  np.testing.assert_array_equal(result.success, result.logits.argmax(1) != y)
  np.testing.assert_array_equal(result.backwards, 0)
  np.testing.assert_allclose(x + result.delta, result.image, atol=1e-7)
  with pytest.raises(AssertionError, match="range"):
    conformance.assert_allowed(LINF, x, x + EPS * jnp.sign(WILD(x)))
  with pytest.raises(AssertionError, match="ball"):
    conformance.assert_allowed(LINF, x, jnp.clip(x + WILD(x), 0, 1))


def test_an_image_does_not_see_its_batch_once_the_generator_is_trained(victim, trained):
  predict, x, y = victim
  model, calm, state = trained
  variables = {"params": state.params, **state.extra}
  assert set(variables) == {"params", "batch_stats"}
  busy = lambda x: model.apply(variables, x, True, mutable=["batch_stats"])[0]

  def images(generate, x):
    run = jax.jit(lambda x, y: generative.gap(generate, EPS)(KEY, predict, x, y).image)
    return run(x, y[: len(x)])

  np.testing.assert_allclose(images(calm, x[:6])[2:4], images(calm, x[2:4]), atol=1e-5)
  assert jnp.abs(images(busy, x[:6])[2:4] - images(busy, x[2:4])).max() > 1e-3


def test_the_generator_takes_sides_that_its_pools_do_not_divide(trained):
  model, _, state = trained
  image = jax.random.uniform(jax.random.key(0), (1, 7, 8, 2))
  variables = {"params": state.params, **state.extra}
  got = jax.jit(model.apply)(variables, image)
  assert got.shape == image.shape
  mirrored = jnp.concatenate([image, image[:, -1:]], 1)
  whole = jax.jit(model.apply)(variables, mirrored)
  np.testing.assert_allclose(got, whole[:, :7], atol=1e-5)
  volume = jax.ShapeDtypeStruct((1, 5, 8, 6, 1), jnp.float32)
  shapes = jax.eval_shape(Generator().init_with_output, jax.random.key(0), volume)
  assert shapes[0].shape == volume.shape


def test_a_new_radius_compiles_nothing_anew():
  counter = helpers.Counter(helpers.convnet())
  x, tx = helpers.stripes(4), optax.sgd(0.1)
  state = begin(linear, x, tx)
  batch = {"image": x, "label": jnp.zeros(4, int)}

  @jax.jit
  def run(eps, state):
    state, _ = generative.gap_step(linear, counter, tx, eps)(state, batch)
    attack = generative.gap(generative.generator(linear, state), eps)
    return attack(KEY, counter, x, batch["label"]).image

  moved = [jnp.abs(run(jnp.float32(eps), state) - x).max() for eps in (0.01, 0.02)]
  np.testing.assert_allclose(moved, [0.01, 0.02], rtol=1e-5)
  assert counter.traces == 3


def test_a_half_precision_generator_keeps_the_ball():
  x = helpers.stripes(4)
  half = lambda x: jnp.sin(40 * x).astype(jnp.bfloat16)
  y = jnp.zeros(4, int)
  result = generative.gap(half, EPS)(KEY, helpers.convnet(), x, y)
  conformance.assert_allowed(LINF, x, result.image)
  assert result.image.dtype == jnp.float32


def test_what_cannot_be_an_attack_is_refused():
  predict, x, y = helpers.convnet(), helpers.stripes(2), jnp.zeros(2, int)
  tx = optax.sgd(0.1)
  with pytest.raises(ValueError, match="`eps` is -1"):
    generative.gap(WILD, -1.0)
  with pytest.raises(ValueError, match="`eps` is -1"):
    generative.gap_step(linear, predict, tx, -1.0)
  grey = generative.gap(lambda x: x[..., :1], EPS)
  with pytest.raises(ValueError, match=r"returned \(2, 8, 8, 1\) for images"):
    grey(KEY, predict, x, y)
  with pytest.raises(TypeError, match="dtype int32"):
    generative.gap(WILD, EPS)(KEY, predict, (255 * x).astype(jnp.int32), y)
  with pytest.raises(ValueError, match="outside"):
    generative.gap(WILD, EPS)(KEY, predict, 2 * x, y)


def test_the_generator_has_the_sizes_of_its_u_net():
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(Generator().init, jax.random.key(0), image)
  kernel = variables["params"]["unet"]["enc1"]["Conv_0"]["kernel"]
  assert kernel.shape == (3, 3, 3, 64)
  assert variables["params"]["unet"]["head"]["kernel"].shape == (64, 3)
  assert "batch_stats" in variables


def test_the_page_of_the_docs_runs():
  page = (pathlib.Path(__file__).parents[1] / "docs/gap.md").read_text()
  (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  smaller = {"width=64": "width=2, depth=1", "num_steps=1000": "num_steps=2"}
  for large, small in smaller.items():
    assert large in block
    block = block.replace(large, small)
  images = jnp.asarray(helpers.stripes(4))
  predict = lambda x: helpers.convnet()(x)[0]
  labels = predict(images).argmax(-1)
  names = {"images": images, "labels": labels, "predict": predict, "key": KEY}
  names["batches"] = [{"image": images, "label": labels}] * 2
  exec(block, names)
  moved = jnp.abs(names["result"].image - images)
  assert 0 < moved.max() <= 8 / 255 + 1e-6
