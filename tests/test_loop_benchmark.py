"""The loop benchmark runs, and its cause is absent from our models.

Times depend on the machine, so they are not tested. What makes a loop slow is: a
convolution with other than the canonical labels, which XLA for CPU runs off its fast
path (an input gradient with output before input channels; map and kernel swapped,
because the map was smaller), a grouped one, and the scatter of a max-pool. Plain Flax
layers show that the test can tell.
"""

import re

import flax.linen as nn
import foreign
import jax
import jax.numpy as jnp
import pytest
from helpers import benchmark

from jaxadv import defences, models


@pytest.fixture(scope="module")
def loop():
  return benchmark("loop")


GROUPED = r"feature_group_count = (?!1\b)\d+"


def _slow_operations(model, side=32):
  """Operations in the compiled gradient loop that are off the fast path."""
  x = jnp.zeros((1, side, side, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)

  def cost(x, variables):
    out = model.apply(variables, x)
    return (out[0] if isinstance(out, tuple) else out).sum()

  def steps(x, variables):
    step = lambda _, x: x + jax.grad(cost)(x, variables)
    return jax.lax.fori_loop(0, 3, step, x)

  return _slow(steps, x, variables)


def _slow(function, *arguments):
  lowered = jax.jit(function).lower(*arguments)
  # the labels are decided before LLVM starts
  compiled = lowered.compile(foreign.FAST).as_text()
  labels = re.findall(r"dim_labels=(\w+_\w+->\w+)", compiled)
  slow = [label for label in labels if label != "b01f_01io->b01f"]
  # XLA rewrites these two beyond recognition
  scattered = re.findall("select_and_scatter", lowered.as_text())
  return slow + scattered + re.findall(GROUPED, lowered.as_text())


SMALL = {
  "unet": models.UNet(width=4, depth=2),
  "resnet18": models.ResNet(blocks=(1, 1, 1, 1), bottleneck=False, width=0.125),
  "resnet50": models.ResNet(blocks=(1, 1, 1, 1), width=0.125),
  "resnet50 of Keras": models.ResNet(blocks=(1, 1, 1, 1), width=0.125, variant="keras"),
  "vgg": models.VGG(convolutions=(1, 1, 1, 1, 1), width=0.125),
  "attn_vgg": models.AttnVGG(width=0.125),
  "densenet": models.DenseNet(blocks=(1, 1, 1, 1), width=0.25),
  "inception_v3": models.InceptionV3(width=0.125),
  "inception_v3 padded": models.InceptionV3(width=0.125, padding="SAME"),
  "inception_resnet_v2": models.InceptionResNetV2(width=0.125, repeats=(1, 1, 1)),
  "efficientnet_lite0": models.EfficientNetLite0(width=0.25),
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA for CPU")
@pytest.mark.parametrize("name", SMALL)
def test_no_gradient_of_ours_leaves_the_fast_path(name):
  side = 75 if "inception" in name and "padded" not in name else 32
  assert _slow_operations(SMALL[name], side) == []


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA for CPU")
def test_examples_that_draw_their_own_budget_stay_on_it():
  model = models.ConvNet(num_classes=3, width=4, depth=2)
  attack = defences.random_pgd((0.01, 0.1), (1, 3), step_size=0.02)
  x, y = jnp.zeros((2, 16, 16, 3)), jnp.zeros(2, int)

  def run(variables, x, y):
    predict = lambda x: model.apply(variables, x)
    return attack(jax.random.key(0), predict, x, y).image

  assert _slow(run, model.init(jax.random.key(0), x), x, y) == []


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA for CPU")
def test_plain_layers_leave_it(loop):
  slow = _slow_operations(loop.Twin(width=4, depth=2))
  assert "b01f_01oi->b01f" in slow
  assert "select_and_scatter" in slow
  assert "feature_group_count = 3" in _slow_operations(
    nn.Conv(3, (3, 3), feature_group_count=3)
  )
  assert _slow_operations(nn.Conv(3, (3, 3)), side=2) != []


@pytest.mark.parametrize(
  "model",
  [models.UNet(width=2, depth=1), models.ConvNet(num_classes=3, width=2, depth=1)],
  ids=["masks", "classes"],
)
def test_the_benchmark_measures_every_program(loop, model):
  calls = loop.programs(model, side=8, batch=1, steps=2)
  rows = loop.summary(loop.measure(calls, steps=2, repeats=2))
  names = ["bare", "scan", "pgd", "host", "frozen", "uap", "uap frozen"]
  assert list(rows) == names
  assert rows["bare"]["over_bare"] == 1
  assert all(row["ms"] > 0 for row in rows.values())
  assert isinstance(loop.build("twin8"), loop.Twin)
  assert loop.build("unet8-batch").norm == "batch"
  assert loop.build("resnet50").width == 0.25


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA for CPU")
def test_layers_are_faster_frozen_inside_a_loop():
  layers = benchmark("layers")
  for name in ("convolution 3, map of 2", "depthwise 5"):  # 20 to 40 times
    times = layers.measure(layers.programs(name), 3)
    assert layers.row(times)["faster"] > 4, name
