"""The commands attack frozen models: on CPU no pool scatters in what they compile."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import (
  assessment,
  attacks,
  crafting,
  data,
  inspection,
  robustness,
  subjects,
  trials,
)

KEY = jax.random.key(0)
BATCH = 4
Y = jnp.zeros(BATCH, jnp.int32)
PGD = attacks.pgd(0.1, num_steps=2)


class Net(nn.Module):
  """A model of a user's own, on the layers of Flax; `masks` are as large as images."""

  masks: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    size = x.shape[1:3]
    x = nn.max_pool(nn.Conv(4, (3, 3))(x), (2, 2), (2, 2))
    if self.masks:
      x = nn.Conv(2, (1, 1))(jax.image.resize(x, (len(x), *size, 4), "nearest"))
      return x, {}
    return nn.Dense(2)(x.mean((1, 2))), {}


def attack(predict, variables, x):
  images, masks = np.asarray(x), np.zeros((BATCH, 8, 8), np.int32)
  pairs = data.Pairs(np.arange(3), np.arange(1, 4), np.zeros(3))
  scene = trials.Scene(
    predict, variables, images, masks, np.arange(BATCH), pairs, KEY, 0.5
  )
  return trials.compile_attack(scene, PGD, 2).as_text()


def uap(predict, variables, x, microbatches=None):
  plan = crafting.Plan(attacks.universal, "linf", None, 2, BATCH, 0, 1, microbatches)
  rule = crafting._rule(plan)
  state = crafting._start(rule, KEY, x[0], (0.1, None))
  batch = {"image": x, "label": Y, "decision": Y}
  given = rule, predict, None, (0.1, None), variables, state, batch
  return crafting._step.lower(*given).as_text()


def uap_in_parts(predict, variables, x):
  return uap(predict, variables, x, microbatches=2)


def per_image(predict, variables, x):
  return subjects._fool.lower(predict, "linf", variables, 0.1, x, Y).as_text()


def defend(predict, variables, x):
  given = {"variables": variables, "eps": 0.1, "seed": 0, "number": 0}
  given |= {"image": x, "label": Y, "id": Y}
  return robustness._attacked.lower(predict, "pgd", 2, given).as_text()


def analyse(predict, variables, x):
  return inspection._attacked.lower(predict, variables, 0.1, Y, x, Y).as_text()


def train(predict, variables, x):
  given = predict, PGD, variables, KEY, Y, x, Y
  return assessment._answer.lower(*given).as_text()


JOBS = [attack, uap, uap_in_parts, per_image, defend, analyse, train]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="models stay as they are")
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_what_a_command_attacks_is_frozen(job, monkeypatch):
  model = Net(masks=job is attack)
  x = jax.random.uniform(KEY, (BATCH, 8, 8, 3))
  variables = model.init(KEY, x)
  # in a compiled program the pool is beyond recognition, but not the convolution
  scatters = "_01oi->" if job is attack else "select_and_scatter"
  predict = assessment.predictor(model)
  assert scatters not in job(predict, variables, x)
  # left alone, the model does scatter: the line above can fail
  for module in (trials, crafting, subjects, robustness, inspection, assessment):
    monkeypatch.setattr(module, "freeze", lambda predict, x, **how: predict)
  jax.clear_caches()
  assert scatters in job(predict, variables, x)
