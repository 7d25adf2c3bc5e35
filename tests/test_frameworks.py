"""The one-liners of docs/models.md give a `predict` that can be attacked."""

import os
import pathlib
import re

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadv

os.environ.setdefault("KERAS_BACKEND", "jax")
PAGE = pathlib.Path(__file__).parents[1] / "docs/models.md"


def _predict(heading, **names):
  """What the code below a heading of the page calls `predict`."""
  section = PAGE.read_text().partition(f"### {heading}\n")[2]
  exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
  return names["predict"]


IMAGES = helpers.stripes(4, (8, 6), 3)  # not square: height and width could be swapped


def _attack(predict, want):
  """`predict` is what the framework says; steps raise the loss of its labels."""
  images = IMAGES
  np.testing.assert_allclose(predict(images), want, rtol=1e-4, atol=1e-5)
  labels = predict(images).argmax(-1)
  attack = jaxadv.attacks.pgd(0.1, num_steps=5)
  run = jax.jit(lambda key, x, y: attack(key, predict, x, y))
  result = run(jax.random.key(0), images, labels)
  pick = lambda x: jnp.take_along_axis(
    jax.nn.log_softmax(predict(x)), labels[:, None], 1
  )
  assert predict(images).shape == (4, 3)
  assert (pick(result.image) < pick(images)).all()
  assert jnp.abs(result.image - images).max() > 0.05


def test_flax_linen():
  model = nn.Sequential(
    [nn.Conv(4, (3, 3)), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(3)]
  )
  variables = model.init(jax.random.key(0), IMAGES)
  want = model.apply(variables, IMAGES)
  _attack(_predict("Flax linen", model=model, variables=variables), want)


def test_flax_nnx():
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(
    nnx.Conv(3, 4, (3, 3), rngs=rngs),
    nnx.BatchNorm(4, rngs=rngs),
    nnx.relu,
    nnx.Dropout(0.5, rngs=rngs),
    lambda x: x.mean((1, 2)),
    nnx.Linear(4, 3, rngs=rngs),
  )
  model(3 * IMAGES)  # moves the running statistics, which evaluation must use
  predict = _predict("Flax NNX", model=model)
  model.eval()
  _attack(predict, model(IMAGES))


def test_keras():
  keras = pytest.importorskip("keras")
  if keras.backend.backend() != "jax":
    pytest.skip("Keras runs on another backend; KERAS_BACKEND=jax was not set first")
  layers = keras.layers
  with jax.numpy_rank_promotion("allow"):
    model = keras.Sequential(
      [
        layers.Input((8, 6, 3)),
        layers.Conv2D(4, 3, activation="relu"),
        layers.BatchNormalization(),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3),
      ]
    )
    model(3 * IMAGES, training=True)
    want = model(IMAGES, training=False)
    _attack(_predict("Keras 3 on JAX", model=model), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torch():
  torch = pytest.importorskip("torch")
  pytest.importorskip("torchax")
  torch.manual_seed(0)
  model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 3),
    torch.nn.BatchNorm2d(4),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1),
    torch.nn.Flatten(),
    torch.nn.Linear(4, 3),
  )
  channels_first = torch.from_numpy(np.moveaxis(np.asarray(IMAGES), -1, 1).copy())
  model(3 * channels_first)
  predict = _predict("PyTorch through torchax", model=model)
  with jax.numpy_rank_promotion("allow"), torch.no_grad():
    _attack(predict, model.eval()(channels_first).numpy())
