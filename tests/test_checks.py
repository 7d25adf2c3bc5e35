import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, checks, threats

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).random((4, 6, 6, 1)), jnp.float32)
Y = jnp.array([0, 1, 2, 0])
WEIGHTS = jnp.asarray(np.random.default_rng(1).normal(size=(36, 3)), jnp.float32)


def predict(x):
  return x.reshape(len(x), -1) @ WEIGHTS


def test_a_sound_model_passes():
  report = checks.check_model(predict, X, Y)
  assert report.ok
  report.raise_if_any()


@pytest.mark.parametrize(
  ("broken", "words"),
  [
    (lambda x: jax.nn.softmax(predict(x)), "probabilities: return logits"),
    (lambda x: predict(x - x.mean(0, keepdims=True)), "evaluation mode"),
    (lambda x: predict(jnp.round(4 * x)), "image 0 is zero: gradients are masked"),
    (lambda x: predict(x) / 0, "not finite"),
  ],
)
def test_what_breaks_attacks_is_named(broken, words):
  report = checks.check_model(broken, X, Y)
  assert not report.ok
  with pytest.raises(ValueError, match=words):
    report.raise_if_any()


def test_dropout_left_on_is_found():
  calls = iter(range(100))

  def random(x):
    return predict(x) + jax.random.normal(jax.random.key(next(calls)), (len(x), 3))

  problems = checks.check_model(random, X, Y).problems
  assert any("switch dropout off" in problem for problem in problems)


def test_bad_input_is_refused_before_the_model_is_judged():
  with pytest.raises(TypeError, match="dtype uint8"):
    checks.check_model(predict, (255 * X).astype(jnp.uint8), Y)
  with pytest.raises(ValueError, match=r"label 7 is outside .* 0\.\.2"):
    checks.check_model(predict, X, jnp.array([0, 1, 2, 7]))


def test_masks_are_checked_too():
  def pixelwise(x):
    return jnp.concatenate([0.5 - x, x - 0.5], -1)

  assert checks.check_model(pixelwise, X, (X[..., 0] > 0.5).astype(jnp.int32)).ok


def test_results_are_held_against_their_threat():
  threat = threats.linf(0.1)
  result = attacks.pgd(0.1)(KEY, predict, X, Y)
  assert checks.check_result(result, threat, X).ok
  outside = result._replace(delta=result.delta.at[2].mul(3))
  problems = checks.check_result(outside, threat, X).problems
  assert any("image 2 leaves the threat" in problem for problem in problems)
  other = result._replace(image=result.image.at[1].add(0.01))
  problems = checks.check_result(other, threat, X).problems
  assert any("image 1 is not the threat's" in problem for problem in problems)
  broken = result._replace(image=result.image.at[0].set(jnp.nan))
  assert not checks.check_result(broken, threat, X).ok
