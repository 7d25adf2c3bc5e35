"""Attacks made of attacks: per example the best, in its own stream."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, combine, losses, models, stability
from jaxadv.types import AttackResult

KEY = jax.random.key(0)
MODEL = helpers.convnet()
X = helpers.stripes(12)
Y = jnp.argmax(MODEL(X)[0], -1)
WEAK = attacks.pgd(0.02, num_steps=2, loss=losses.margin)
STRONG = attacks.pgd(0.05, num_steps=5, loss=losses.margin)


def fixed(success, score, length=2, nonfinite=0):
  """An attack whose outcome is given; its image tells which one it was."""

  def attack(key, predict, x, y):
    del key, predict, y
    flags, ones = jnp.asarray(success), jnp.ones(len(x), jnp.int32)
    scores = jnp.asarray(score, jnp.float32)
    return AttackResult(
      image=x + scores[:, None],
      delta=x * 0 + scores[:, None],
      score=scores,
      logits=jnp.zeros((len(x), 2)),
      losses=jnp.arange(length * len(x), dtype=jnp.float32).reshape(length, -1),
      success=flags,
      steps=ones * length,
      nonfinite=ones * nonfinite,
      forwards=ones * length,
      backwards=ones * length,
    )

  return attack


def test_success_comes_before_score_and_evidence_adds_up():
  first = fixed([False, True, True, False], [9.0, 1.0, 5.0, 2.0], 2, 0)
  other = fixed([True, False, True, False], [0.0, 8.0, 4.0, 3.0], 3, 1)
  best = combine.best_of(first, other)(KEY, None, jnp.zeros((4, 1)), None)
  assert best.score.tolist() == [0.0, 1.0, 5.0, 3.0]
  assert best.image[:, 0].tolist() == [0.0, 1.0, 5.0, 3.0]
  assert best.success.tolist() == [True, True, True, False]
  assert best.steps.tolist() == [5] * 4
  assert best.forwards.tolist() == [5] * 4
  assert best.nonfinite.tolist() == [1] * 4
  assert not best.robust.any()
  # rows of two and of three steps: the shorter is padded with its last
  assert best.losses.T.tolist() == [[0, 4, 8], [1, 5, 5], [2, 6, 6], [3, 7, 11]]


def test_three_attacks_are_compared_with_the_best_so_far():
  one = fixed([False] * 2, [1.0, 3.0])
  two = fixed([False] * 2, [2.0, 2.0])
  three = fixed([False] * 2, [0.0, 4.0])
  best = combine.best_of(one, two, three)(KEY, None, jnp.zeros((2, 1)), None)
  assert best.score.tolist() == [2.0, 4.0]


def test_best_of_real_attacks_is_at_least_as_good_as_each():
  best = combine.best_of(WEAK, STRONG)(KEY, MODEL, X, Y)
  alone = STRONG(KEY, MODEL, X, Y)
  assert best.success.mean() >= alone.success.mean()
  assert (best.success == (jnp.argmax(MODEL(best.image)[0], -1) != Y)).all()
  assert jnp.abs(best.image - X).max() <= 0.05 + 1e-6


def test_restarts_are_different_and_none_is_worse_than_the_first():
  many = combine.with_restarts(WEAK, 4)(KEY, MODEL, X, Y)
  one = combine.with_restarts(WEAK, 1)(KEY, MODEL, X, Y)
  assert (many.score >= one.score).all() | (many.success != one.success).any()
  assert (many.score > one.score).sum() >= 3
  np.testing.assert_array_equal(many.steps, 8)


def test_the_identity_changes_nothing_and_reports_errors_of_the_model():
  wrong = Y.at[::2].set((Y[::2] + 1) % 3)
  result = combine.identity(KEY, MODEL, X, wrong)
  np.testing.assert_array_equal(result.image, X)
  assert result.success.tolist() == [True, False] * 6
  assert not result.delta.any()
  np.testing.assert_array_equal(result.nonfinite, 0)
  broken = combine.identity(KEY, lambda x: MODEL(x)[0] * jnp.nan, X, Y)
  assert not broken.success.any()
  assert not broken.robust.any()


def test_combined_attacks_keep_the_promises_of_their_parts():
  attack = combine.best_of(combine.identity, combine.with_restarts(WEAK, 2), STRONG)
  keys = jax.random.split(KEY, len(X))
  run = jax.jit(lambda keys, x, y: attack(keys, MODEL, x, y))
  whole = run(keys, X, Y)
  part = run(keys[3:8], X[3:8], Y[3:8])
  np.testing.assert_allclose(part.image, whole.image[3:8], atol=1e-6)
  np.testing.assert_array_equal(part.success, whole.success[3:8])
  eager = attack(keys, MODEL, X, Y)
  np.testing.assert_allclose(eager.image, whole.image, atol=1e-6)


def drawn(key):
  eps = jax.random.uniform(key, minval=0.01, maxval=0.2)
  return {"eps": eps, "step_size": eps / 4}


def test_a_random_budget_attacks_each_example_with_its_own_parameters():
  make = lambda eps, step_size: attacks.pgd(eps, step_size=step_size, num_steps=3)
  attack = combine.random_budget(make, drawn)
  keys = jax.random.split(KEY, len(X))
  result = jax.jit(attack, static_argnums=1)(keys, MODEL, X, Y)
  sizes = jnp.abs(result.image - X).max((1, 2, 3))
  assert len(np.unique(sizes.round(4))) == len(X)
  for i in (0, 5):
    draw_key, key = jax.random.split(keys[i])
    alone = make(**drawn(draw_key))(key[None], MODEL, X[i : i + 1], Y[i : i + 1])
    for name, got, want in zip(AttackResult._fields, result, alone, strict=True):
      got = got[:, i : i + 1] if name == "losses" else got[i : i + 1]
      np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


def test_a_random_budget_compiles_one_program_for_all_draws():
  traces = 0

  def model(x):
    nonlocal traces
    traces += 1
    return MODEL(x)

  make = lambda eps, step_size: attacks.pgd(eps, step_size=step_size, num_steps=3)
  run = jax.jit(lambda key: combine.random_budget(make, drawn)(key, model, X, Y).image)
  run(KEY)
  first = traces
  assert (run(jax.random.key(1)) != run(KEY)).any()
  assert traces == first


@pytest.mark.parametrize(
  ("x", "y", "message"),
  [
    (255 * X, Y, "outside the bounds"),
    (X, Y + 9, "outside the model's classes"),
    (X, Y[:5], "has shape \\(5,\\) but `x` holds 12"),
  ],
)
def test_a_random_budget_checks_what_its_attacks_cannot_see(x, y, message):
  make = lambda eps, step_size: attacks.pgd(eps, step_size=step_size, num_steps=2)
  with pytest.raises(ValueError, match=message):
    combine.random_budget(make, drawn)(KEY, MODEL, x, y)


def test_a_random_budget_keeps_single_precision_where_double_is_the_default():
  with helpers.x64():
    make = lambda eps, step_size: attacks.pgd(eps, step_size=step_size, num_steps=2)
    x = jnp.asarray(X, jnp.float32)
    result = combine.random_budget(make, drawn)(KEY, lambda x: x.mean((1, 2)), x, Y % 2)
    assert result.image.dtype == jnp.float32


def _unet():
  model = models.UNet(num_classes=2, width=4, depth=2)
  x = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
  variables = jax.jit(model.init)(jax.random.key(1), x)
  predict = lambda x: model.apply(variables, x)
  return predict, x, jnp.argmax(predict(x)[0], -1)


def test_bf16_steers_by_narrow_gradients_and_judges_by_the_model():
  predict, x, y = _unet()
  pgd = attacks.pgd(4 / 255, num_steps=5)
  narrow = combine.bf16(pgd)(jax.random.key(0), predict, x, y)
  wide = pgd(jax.random.key(0), predict, x, y)
  assert narrow.delta.dtype == jnp.float32
  assert np.abs(narrow.delta).max() <= 4 / 255 + 1e-7
  # the verdict is that of the model on the image that was found, in float32
  np.testing.assert_allclose(narrow.logits, predict(narrow.image)[0], atol=1e-6)
  # the way there is another one, to about the same place
  assert (narrow.delta != wide.delta).any()
  np.testing.assert_allclose(narrow.losses, wide.losses, rtol=0.02)


def test_bf16_in_a_host_loop_is_the_same():
  predict, x, y = _unet()
  attack = combine.bf16(attacks.pgd(4 / 255, num_steps=3))
  compiled = jax.jit(lambda x, y: attack(jax.random.key(0), predict, x, y))(x, y)
  stepped = attack.run_stepwise(jax.random.key(0), predict, x, y)
  np.testing.assert_allclose(stepped.losses, compiled.losses, rtol=1e-4)
  wide = attacks.pgd(4 / 255, num_steps=3).run_stepwise(
    jax.random.key(0), predict, x, y
  )
  assert np.abs(stepped.losses / wide.losses - 1).max() > 1e-3


def test_a_surrogate_gives_gradients_and_the_model_the_verdict():
  x, y = jnp.full((1, 2), 0.5), jnp.array([0])
  predict = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]])
  other = lambda x: x @ jnp.array([[-1.0, 1.0], [1.0, -1.0]])
  attack = attacks.pgd(0.1, random_start=False)
  transferred = attack._replace(surrogate=lambda predict, x: other)
  result = transferred(jax.random.key(0), predict, x, y)
  np.testing.assert_allclose(result.delta, [[0.1, -0.1]], atol=1e-6)
  np.testing.assert_allclose(result.logits, predict(x), atol=1e-6)
  entropy = -jax.nn.log_softmax(other(x))[0, 0]
  np.testing.assert_allclose(result.losses[0], [entropy], rtol=1e-6)


def _turned():
  """An attack that walks the wrong way, as its surrogate does the opposite."""
  attack = attacks.pgd(0.1, num_steps=4, random_start=False, keep="best")
  return attack._replace(surrogate=lambda predict, x: lambda x: -0.1 * predict(x))


def _linear(x):
  return x @ jnp.array([[1.0, -1.0], [1.0, -1.0]])


def test_the_surrogate_alone_chooses_the_point_that_is_kept():
  """Its scores are smaller: beside one of the model's, the last point would not win."""
  x, y = jnp.full((1, 2), 0.5), jnp.array([0])
  toward = _turned()._replace(surrogate=lambda predict, x: lambda x: 0.1 * predict(x))
  for attack, delta in ((_turned(), 0.1), (toward, -0.1)):
    result = attack(jax.random.key(0), _linear, x, y)
    np.testing.assert_allclose(result.delta, [[delta, delta]], atol=1e-6)
    np.testing.assert_allclose(result.logits, _linear(result.image), atol=1e-6)


def test_what_is_made_of_an_attack_follows_its_surrogate():
  x, y = jnp.full((1, 2), 0.5), jnp.array([0])
  run = lambda attack: attack(jax.random.key(0), _linear, x, y)
  want = run(_turned()).delta
  np.testing.assert_array_equal(run(combine.bf16(_turned())).delta, want)
  np.testing.assert_array_equal(run(stability.watch(_turned()))[0].delta, want)
  stepped = _turned().run_stepwise(jax.random.key(0), _linear, x, y)
  np.testing.assert_array_equal(stepped.delta, want)


def test_bf16_wants_an_attack():
  with pytest.raises(TypeError, match=r"got function; write an Attack"):
    combine.bf16(combine.identity)
