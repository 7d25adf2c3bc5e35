"""An image keeps its bits in any batch of a size, whatever way `freeze` takes."""

import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import benchmark


class Net(nn.Module):
  """By Winograd, a strided one, a pool, few rows, and one that enlarges."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(96, (3, 3))(x))
    x = nn.relu(nn.Conv(96, (3, 3))(x))
    x = nn.max_pool(nn.relu(nn.Conv(96, (3, 3), strides=2)(x)), (2, 2), (2, 2))
    x = nn.relu(nn.Conv(96, (3, 3))(x))
    return nn.Dense(3)(nn.ConvTranspose(8, (2, 2), strides=(2, 2))(x).mean((1, 2)))


@pytest.fixture(scope="module")
def script():
  with pytest.MonkeyPatch.context() as patch:
    for name in ("loop", "compaction", "peer_networks"):
      patch.setitem(sys.modules, name, benchmark(name))
    yield benchmark("batch_size")


def differing(script, wrap):
  rng = np.random.default_rng(0)
  x = rng.uniform(size=(script.TOGETHER, 8, 8, 3)).astype(np.float32)
  net = Net()
  variables = net.init(jax.random.key(0), x)
  y = np.asarray(net.apply(variables, x).argmax(-1))
  predict = wrap(lambda x: net.apply(variables, x))
  rows = script.measure(predict, x, y, eps=0.1, steps=20, sizes=[4])
  assert {run for run, _ in rows} == {"plain", "frozen"}
  return {place: row["values that differ"] for place, row in rows.items()}


def test_neighbours_and_places_change_no_bit(script):
  found = differing(script, lambda predict: predict)
  assert {
    found[run, way] for run in ("plain", "frozen") for way in ("order", "others")
  } == {0}


def test_a_model_that_mixes_its_batch_is_noticed(script):
  found = differing(
    script, lambda predict: lambda x: predict(x - x.mean(0, keepdims=True))
  )
  assert all(found[run, "others"] > 0.01 for run in ("plain", "frozen"))
