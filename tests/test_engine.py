"""The engine: its loop, what it keeps, when it stops, what it counts."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, engine, losses, threats, transforms, types
from jaxadv.engine import gradient_attack
from jaxadv.types import Objective

KEY = jax.random.key(0)
MODEL = helpers.convnet()


def toy(n=6):
  x = helpers.stripes(n)
  return x, jnp.argmax(MODEL(x)[0], -1)


def test_fgsm_and_pgd_vectors():
  with helpers.x64():
    model = helpers.linear(np.array([[0.0, -1.0], [0.0, -1.0]]))
    x, y = jnp.array([[0.5, 0.5]]), jnp.array([0])
    result = attacks.fgsm(4 / 255)(KEY, model, x, y)  # the loss falls with x
    np.testing.assert_allclose(result.image, 0.5 - 4 / 255, rtol=0, atol=1e-12)
    steep = helpers.linear(np.array([[0.0, 3.0], [0.0, 4.0]]))
    for eps, want in ((1.0, (0.62, 0.66)), (0.25, (0.65, 0.70))):
      attack = attacks.pgd(
        eps, norm="l2", step_size=0.2 if eps == 1 else 0.5, num_steps=1,
        random_start=False,
      )  # fmt: skip
      got = attack(KEY, steep, x, y)
      np.testing.assert_allclose(got.image[0], want, rtol=0, atol=1e-12)
      assert got.image.dtype == jnp.float64


def test_mi_fgsm_moves_by_the_sign_of_its_momentum():
  """Gradients (2, -1, 1) then (-3, 1, 0): signs (+, -, +), then (-, 0, +)."""
  with helpers.x64():
    slopes = jnp.array([[2.0, -1.0, 1.0], [-3.0, 1.0, 0.0]])
    objective = Objective(lambda s: s.image @ slopes[(s.progress >= 0.5).astype(int)])
    attack = gradient_attack(
      objective._replace(success=lambda s: jnp.bool_(False)),
      threats.linf(0.2),
      optax.chain(transforms.normalize(1), optax.trace(1.0), transforms.sign_step(0.1)),
      num_steps=2,
      random_start=False,
    )
    x = jnp.full((1, 3), 0.5)
    result = attack(KEY, helpers.linear(np.zeros((3, 2))), x, jnp.array([0]))
    np.testing.assert_allclose(result.delta[0], [0.0, -0.1, 0.2], atol=1e-12)


def test_optax_optimisers_attack_as_they_are():
  x, y = toy()
  attack = gradient_attack(
    Objective(losses.cross_entropy),
    threats.linf(0.1),
    optax.adam(0.02),
    num_steps=10,
  )
  result = attack(KEY, MODEL, x, y)
  assert (result.losses[-1] > result.losses[0]).all()
  assert result.success.all()


def test_every_example_has_its_own_random_start_and_stream():
  x, y = toy()
  x = jnp.broadcast_to(x[:1], x.shape)
  attack = attacks.pgd(0.1, num_steps=1, step_size=0.0)
  delta = attack(KEY, MODEL, x, y).delta
  assert len(np.unique(np.asarray(delta)[:, 0, 0, 0])) == len(x)
  again = attack(KEY, MODEL, x, y).delta
  np.testing.assert_array_equal(delta, again)
  assert (attack(jax.random.key(1), MODEL, x, y).delta != delta).all()


def keeping(keep, losses_at, success_at):
  """An attack that walks +0.1 per step over a made-up landscape of scores."""

  def where(sample):
    return jnp.round(sample.image[0] * 10).astype(int)

  objective = Objective(
    loss=lambda s: s.image[0],  # its slope is what moves the walk
    score=lambda s: jnp.asarray(losses_at)[where(s)],
    success=lambda s: jnp.asarray(success_at)[where(s)],
  )
  return gradient_attack(
    objective, threats.box(), transforms.sign_step(0.1), num_steps=5,
    random_start=False, keep=keep,
  )  # fmt: skip


@pytest.mark.parametrize(
  ("keep", "place"), [("last", 0.5), ("best", 0.4), ("smallest", 0.3)]
)
def test_which_point_is_kept(keep, place):
  scores = [0.0, 5.0, 1.0, 2.0, 9.0, 3.0]
  success = [False, False, False, True, True, False]
  x, y = jnp.zeros((1, 1)), jnp.array([0])
  result = keeping(keep, scores, success)(KEY, helpers.linear(np.eye(1, 2)), x, y)
  assert result.image.item() == pytest.approx(place)
  at = round(place * 10)
  assert result.score.item() == scores[at]
  assert bool(result.success[0]) == success[at]


def test_smallest_is_the_best_score_until_there_is_a_success():
  x, y = jnp.zeros((1, 1)), jnp.array([0])
  attack = keeping("smallest", [0.0, 5.0, 1.0, 2.0, 4.0, 3.0], [False] * 6)
  result = attack(KEY, helpers.linear(np.eye(1, 2)), x, y)
  assert result.image.item() == pytest.approx(0.1)
  assert not result.success[0]
  # the last point counts too: it is seen only after the last step
  attack = keeping("best", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [False] * 6)
  result = attack(KEY, helpers.linear(np.eye(1, 2)), x, y)
  assert result.image.item() == pytest.approx(0.5)


def stopping(num_steps=30):
  return attacks.pgd(
    0.3, step_size=0.01, num_steps=num_steps, random_start=False, stop=types.fooled
  )


def test_stop_freezes_an_example_where_it_succeeds():
  x, y = toy()
  whole = attacks.pgd(0.3, step_size=0.01, num_steps=30, random_start=False)(
    KEY, MODEL, x, y
  )
  result = stopping()(KEY, MODEL, x, y)
  assert result.success.all()
  assert len(set(result.steps.tolist())) > 2
  for n, steps in enumerate(result.steps.tolist()):
    assert 0 < steps < 30
    shorter = attacks.pgd(0.3, step_size=0.01, num_steps=steps, random_start=False)
    alone = shorter(KEY, MODEL, x[n : n + 1], y[n : n + 1])
    np.testing.assert_allclose(result.image[n], alone.image[0], atol=1e-6)
  moved = jnp.abs(result.delta).max((1, 2, 3))
  assert (moved < 0.5 * jnp.abs(whole.delta).max((1, 2, 3))).any()
  np.testing.assert_array_equal(result.forwards, result.steps)
  np.testing.assert_array_equal(result.backwards, result.steps)


def test_a_stopped_state_does_not_change_any_more():
  x, y = toy()
  attack = stopping()
  state, target = attack.init(KEY, MODEL, x, y)
  step = jax.jit(functools.partial(attack.step, MODEL, x, target))
  while not state.done.any():
    state, _ = step(state)
  done = np.flatnonzero(state.done)
  assert len(done) < len(x)
  later, _ = step(step(state)[0])
  frozen, moved = (
    jax.tree.map(lambda leaf: leaf[done], s._replace(key=())) for s in (state, later)
  )
  helpers.assert_trees_equal(frozen, moved)
  others = np.flatnonzero(~np.asarray(state.done))
  assert (later.step[others] > state.step[others]).any()


def test_the_loop_ends_when_all_are_done():
  x, y = toy()
  runs = []

  def counted(x):
    jax.debug.callback(lambda: runs.append(1))
    return MODEL(x)

  result = stopping(200)(KEY, counted, x, y)
  jax.effects_barrier()
  longest = int(result.steps.max())
  assert longest < 30
  # one more step to see the last success, and one evaluation of the result
  assert len(runs) <= longest + 4
  assert result.losses.shape == (200, len(x))
  np.testing.assert_array_equal(
    result.losses[longest + 1 :],
    jnp.broadcast_to(result.losses[-1:], (199 - longest, 6)),
  )
  stepwise = stopping(200).run_stepwise(KEY, MODEL, x, y)
  np.testing.assert_array_equal(stepwise.steps, result.steps)
  np.testing.assert_allclose(stepwise.image, result.image, atol=1e-6)
  np.testing.assert_allclose(stepwise.losses, result.losses, atol=1e-5)


def test_stop_with_nobody_stopping_equals_no_stop():
  x, y = toy()
  plain = attacks.pgd(0.1, num_steps=4)
  never = attacks.pgd(0.1, num_steps=4, stop=lambda s: jnp.bool_(False))
  want, got = plain(KEY, MODEL, x, y), never(KEY, MODEL, x, y)
  np.testing.assert_array_equal(got.steps, 4)
  np.testing.assert_allclose(got.image, want.image, atol=1e-6)
  np.testing.assert_allclose(got.losses, want.losses, atol=1e-5)


def test_vector_losses_share_one_forward_pass():
  traces = helpers.Counter(MODEL)
  x, y = toy(2)
  weights = jnp.array([0.5, -2.0])

  def two(sample):
    return jnp.stack([losses.cross_entropy(sample), losses.margin(sample)])

  def summed(sample):
    return two(sample) @ weights

  reduce = optax.stateless(
    lambda g, _: jnp.tensordot(weights.astype(g.dtype), g, ((0,), (0,)))
  )
  options = {"num_steps": 3, "random_start": False}
  step = optax.scale_by_learning_rate(0.05)
  separate = gradient_attack(
    Objective(two), threats.box(), optax.chain(reduce, step), **options
  )
  together = gradient_attack(Objective(summed), threats.box(), step, **options)
  got, want = separate(KEY, traces, x, y), together(KEY, MODEL, x, y)
  np.testing.assert_allclose(got.image, want.image, atol=1e-6)
  assert got.losses.shape == (3, 2, 2)
  np.testing.assert_allclose(got.losses @ weights, want.losses, atol=1e-5)
  np.testing.assert_array_equal(got.forwards, 3)
  np.testing.assert_array_equal(got.backwards, 6)


def test_a_wrong_gradient_entry_is_zeroed_counted_and_never_robust():
  """One pixel of one example has a NaN gradient at every second step."""

  @jax.custom_vjp
  def spoil(image, bad):
    return image

  def backward(bad, g):
    return jnp.where(bad, g.at[0, 0, 0].set(jnp.nan), g), None

  spoil.defvjp(lambda image, bad: (image, bad), backward)

  def loss(sample):
    odd = jnp.round(sample.progress * 4).astype(int) % 2 == 1
    image = spoil(sample.image, odd & (sample.target["label"] == 1))
    return (image * jnp.arange(1.0, 5.0).reshape(2, 2, 1)).sum()

  attack = gradient_attack(
    Objective(loss, success=lambda s: jnp.bool_(False)), threats.linf(0.1),
    transforms.sign_step(0.01), num_steps=4, random_start=False,
  )  # fmt: skip
  x = jnp.full((2, 2, 2, 1), 0.5)
  result = attack(KEY, lambda x: x.reshape(2, 4)[:, :2], x, jnp.array([0, 1]))
  assert result.nonfinite.tolist() == [0, 2]
  assert result.robust.tolist() == [True, False]
  np.testing.assert_allclose(result.delta[0], 0.04, atol=1e-6)
  want = np.full((2, 2), 0.04)
  want[0, 0] = 0.02
  np.testing.assert_allclose(result.delta[1, ..., 0], want, atol=1e-6)


def test_nothing_flows_out_of_a_result():
  x, y = toy(2)

  def sensitivity(x):
    result = attacks.pgd(0.1, num_steps=2)(KEY, MODEL, x, y)
    return result.image.sum() + result.losses.sum() + result.score.sum()

  assert not jax.grad(sensitivity)(x).any()


def test_single_precision_images_stay_so_where_double_is_the_default():
  x, y = toy(2)
  x = np.asarray(x, np.float32)
  with helpers.x64():
    y = np.asarray(y)
    for attack in (attacks.pgd(0.1, num_steps=2), attacks.apgd(0.1, num_steps=5)):
      result = attack(jax.random.key(0), MODEL, jnp.asarray(x), jnp.asarray(y))
      assert result.image.dtype == jnp.float32
      assert result.losses.dtype == jnp.float64


def test_perturbations_may_be_trees():
  """A threat of two numbers, brightness and contrast, for the whole image."""

  def apply(image, delta):
    return jnp.clip(image * (1 + delta["gain"]) + delta["bias"], 0, 1)

  threat = types.Threat(
    init=lambda key, image: {"gain": jnp.zeros(()), "bias": jnp.zeros(())},
    project=lambda delta, image: jax.tree.map(lambda v: jnp.clip(v, -0.3, 0.3), delta),
    apply=apply,
    bounds=(0.0, 1.0),
  )
  attack = gradient_attack(
    Objective(losses.cross_entropy), threat, transforms.sign_step(0.05), num_steps=8
  )
  x, y = toy()
  result = attack(KEY, MODEL, x, y)
  assert set(result.delta) == {"gain", "bias"}
  assert result.delta["gain"].shape == (6,)
  assert jnp.abs(result.delta["gain"]).max() <= 0.3
  assert (result.losses[-1] > result.losses[0]).all()


def test_losses_scores_and_passes_of_a_run():
  x, y = toy(2)
  attack = attacks.pgd(0.1, num_steps=3, random_start=False)
  result = attack(KEY, MODEL, x, y)
  logits = MODEL(x)[0]
  first = optax.softmax_cross_entropy_with_integer_labels(logits, y)
  np.testing.assert_allclose(result.losses[0], first, atol=1e-5)
  last = optax.softmax_cross_entropy_with_integer_labels(MODEL(result.image)[0], y)
  np.testing.assert_allclose(result.score, last, atol=1e-5)
  assert engine.Attack._fields[:4] == ("init", "step", "finish", "num_steps")
