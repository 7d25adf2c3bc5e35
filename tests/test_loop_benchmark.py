"""The loop benchmark runs, and its cause is absent from our models.

Times depend on the machine, so they are not tested. What makes a loop slow is: an input
gradient whose kernel is labelled `oi` (output before input channels) and which XLA for
CPU therefore runs off its fast path. The plain Flax twin shows that the test can tell.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from helpers import benchmark


@pytest.fixture(scope="module")
def loop():
  return benchmark("loop")


def _slow_convolutions(model):
  """Input-gradient convolutions in the compiled loop that are not canonical."""
  x = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)

  def cost(x, variables):
    out = model.apply(variables, x)
    return (out[0] if isinstance(out, tuple) else out).sum()

  def steps(x, variables):
    step = lambda _, x: x + jax.grad(cost)(x, variables)
    return jax.lax.fori_loop(0, 3, step, x)

  text = jax.jit(steps).lower(x, variables).compile().as_text()
  return len(re.findall(r"dim_labels=\w+_\d+oi->", text))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA for CPU")
def test_no_gradient_of_ours_leaves_the_fast_path(loop):
  assert _slow_convolutions(loop.Twin(width=4, depth=2)) > 0
  assert _slow_convolutions(loop.models.UNet(width=4, depth=2)) == 0


def test_the_benchmark_measures_every_program(loop):
  model = loop.models.UNet(width=2, depth=1)
  calls = loop.programs(model, side=8, batch=1, steps=2)
  rows = loop.summary(loop.measure(calls, steps=2, repeats=2))
  assert list(rows) == ["bare", "scan", "pgd", "host"]
  assert rows["bare"]["over_bare"] == 1
  assert all(row["ms"] > 0 for row in rows.values())
  assert isinstance(loop.build("twin8"), loop.Twin)
  assert loop.build("unet8-batch").norm == "batch"
