"""Auto-PGD against an implementation that is not ours, and the published details.

`golden/apgd.npz` holds float64 trajectories of torchattacks, which follows the authors'
code step by step; `golden/make_apgd.py` made it.
"""

import functools
import pathlib

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import apgd, attacks, losses, targets, threats
from jaxadv.engine import gradient_attack
from jaxadv.types import Objective

GOLDEN = pathlib.Path(__file__).parent / "golden" / "apgd.npz"
THREATS = {"linf": threats.linf, "l2": threats.l2}


@functools.cache
def golden():
  with np.load(GOLDEN) as stored:
    return dict(stored)


def network(x):
  first, second = jnp.asarray(golden()["first"]), jnp.asarray(golden()["second"])
  return jnp.tanh((x.reshape(len(x), -1) - 0.5) @ first) @ second


@functools.cache
def compiled(norm, steps, rho=0.75):
  """The attack from a given start, keeping the highest loss like the original."""

  def run(eps, x, y, start):
    transform = apgd.scale_by_apgd(eps, steps, norm=norm, rho=rho)
    attack = gradient_attack(
      Objective(losses.cross_entropy), THREATS[norm](eps), transform,
      num_steps=steps, keep="best",
    )  # fmt: skip
    state, target = attack.init(jax.random.key(0), network, x, y)
    state = state._replace(
      delta=start, best_delta=start, opt=jax.vmap(transform.init)(start)
    )
    step = functools.partial(attack.step, network, x, target)
    state, history = jax.lax.scan(lambda s, _: step(s), state, length=steps)
    return attack.finish(network, x, target, state, history)

  return jax.jit(run)


def from_golden_start(norm, eps, steps, **rule):
  data = golden()
  return compiled(norm, steps, **rule)(
    eps, data["x"], data["y"], data[f"{norm}_{eps}_start"]
  )


@pytest.mark.parametrize("steps", [10, 20, 50, 100])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_best_loss_and_best_image_equal_the_independent_ones(norm, steps):
  # On the sphere the loss is flat at its maximum: once the run has converged, losses
  # equal to the last bit fix the best image only to the root of the rounding.
  image_atol = 1e-12 if norm == "linf" or steps <= 20 else 1e-7
  with helpers.x64():
    for eps in (0.03, 0.1, 0.3):
      result, name = from_golden_start(norm, eps, steps), f"{norm}_{eps}_{steps}"
      loss, image = golden()[f"{name}_loss"], golden()[f"{name}_image"]
      np.testing.assert_allclose(result.score, loss, rtol=0, atol=1e-12, err_msg=name)
      np.testing.assert_allclose(
        result.image, image, rtol=0, atol=image_atol, err_msg=name
      )


def test_the_comparison_notices_a_changed_rule():
  with helpers.x64():
    result = from_golden_start("linf", 0.1, 50, rho=0.5)
  gap = np.abs(np.asarray(result.score) - golden()["linf_0.1_50_loss"])
  assert gap.max() > 1e-6


def test_checkpoints():
  assert apgd.checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
  # SEA's stages of 90 and 120 steps: first windows 19 and 26, shorter by 2 and 3
  assert np.diff((0, *apgd.checkpoints(90))).tolist() == [19, 17, 15, 13, 11, 9]
  assert np.diff((0, *apgd.checkpoints(120))).tolist() == [26, 23, 20, 17, 14, 11, 8]
  assert np.diff((0, *apgd.checkpoints(1000))).min() == 60
  assert apgd.checkpoints(1) == (1,)


def test_one_step_with_momentum_by_hand():
  with helpers.x64():
    threat, clean = threats.linf(0.1), jnp.array([0.5, 0.5])
    rule = apgd.scale_by_apgd(0.1, 100)
    previous, here = jnp.array([-0.05, 0.05]), jnp.array([-0.02, 0.03])
    project = functools.partial(threat.project, image=clean)
    state = rule.init(previous)._replace(seen=jnp.int32(1))
    update, _ = rule.update(
      jnp.array([-1.0, 1.0]), state, here, value=jnp.array(-1.0), project=project
    )
    np.testing.assert_allclose(
      clean + project(here + update), [0.5775, 0.4275], atol=1e-12
    )


def test_a_step_size_halves_when_the_loss_stops_rising():
  rule = apgd.scale_by_apgd(1.0, 100)
  state = rule.init(jnp.zeros(2))
  update = jax.jit(functools.partial(rule.update, project=lambda d: d))
  for t in range(23):
    cost = jnp.float32(t % 2)  # up and down: half of the steps rise
    _, state = update(jnp.ones(2), state, jnp.full(2, 1.0 * t), value=cost)
    assert state.step_size == (2.0 if t < 22 else 1.0)
  np.testing.assert_array_equal(state.previous, state.best)


def test_every_number_of_classes_and_loss_runs_and_fools():
  for classes, loss in [(3, losses.dlr), (2, losses.dlr), (2, losses.margin)]:
    predict = helpers.convnet(classes=classes)
    x = helpers.stripes(8)
    y = jnp.argmax(predict(x)[0], -1)
    result = attacks.apgd(0.2, num_steps=10, loss=loss)(
      jax.random.key(0), predict, x, y
    )
    assert float(result.success.mean()) > 0.8
    assert jnp.abs(result.image - x).max() > 0.1


def test_two_classes_and_dlr_is_the_margin_over_its_clean_size():
  with helpers.x64():
    clean = {"logits": jnp.array([5.0, 1.0])}
    sample = helpers.sample([3.0, 1.0], 0, target=clean)
    assert losses.dlr(sample).item() == pytest.approx(-0.5, abs=1e-9)
  prepared = targets.clean_logits(lambda x: x, jnp.ones((1, 2)), jnp.array([0]))
  assert set(prepared) == {"label", "logits"}


def test_a_targeted_run_goes_where_it_is_told():
  predict, x = helpers.convnet(classes=4), helpers.stripes(8)
  y = (jnp.argmax(predict(x)[0], -1) + 1) % 4
  for loss in (losses.cross_entropy, losses.negate(losses.dlr_targeted)):
    attack = attacks.apgd(0.3, num_steps=20, loss=loss, targeted=True)
    result = attack(jax.random.key(0), predict, x, y)
    assert result.success.mean() > 0.7
    np.testing.assert_array_equal(
      np.argmax(result.logits, -1) == y, np.asarray(result.success)
    )


def test_starts_lie_on_the_surface_of_the_ball():
  x = jnp.full((4, 6, 6, 1), 0.5)
  for norm, size in (("linf", lambda d: jnp.abs(d).max()), ("l2", jnp.linalg.norm)):
    attack = attacks.apgd(0.1, num_steps=1, norm=norm)
    state, _ = attack.init(
      jax.random.key(0), helpers.convnet(), x, jnp.zeros(4, jnp.int32)
    )
    for delta in state.delta:
      assert float(size(delta.ravel())) == pytest.approx(0.1, rel=1e-5)


def test_the_rule_is_an_ordinary_optax_transform():
  assert isinstance(apgd.scale_by_apgd(0.1, 5), optax.GradientTransformationExtraArgs)
