"""Weight gradients: the numbers of autodiff, in the form that stays fast in a loop."""

import contextlib
import functools
import re

import foreign
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import benchmark
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxadv import attacks, models, patches
from jaxadv.models import convolution, weight_gradient

# side of the image, of the kernel, stride, padding: among them rows that no window
# sees, a cotangent with more pixels than the image, and a kernel larger than its image
CASES = [
  (6, 3, 1, (1, 1)),
  (6, 3, 2, (0, 0)),
  (7, 2, 3, (0, 1)),
  (5, 1, 2, (0, 0)),
  (4, 3, 1, (2, 2)),
  (2, 3, 1, (1, 1)),
]
FORWARDS = [weight_gradient.as_convolution, weight_gradient.as_product]


def _arrays(rank, side, window, stride, pad):
  """Image, kernel and cotangent in float64, no two axes alike."""
  rng = np.random.default_rng(side + window)
  sides = [side + k for k in range(rank)]
  rows = [(n + sum(pad) - window) // stride + 1 for n in sides]
  shapes = [(2, *sides, 3), (window,) * rank + (3, 4), (2, *rows, 4)]
  return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def _plain(image, kernel, shapes):
  layout = patches.layout(image.ndim)
  return lax.conv_general_dilated(image, kernel, *shapes[:2], dimension_numbers=layout)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_both_ways_give_the_numbers_of_autodiff_in_float64(rank):
  shapes = [weight_gradient.Shapes((s,) * rank, (pad,) * rank) for *_, s, pad in CASES]

  @jax.jit
  def all_gradients(arrays):
    return [
      [
        weight_gradient.gradient(forward, image, kernel, cotangent, shapes=shape)
        for (image, kernel, cotangent), shape in zip(arrays, shapes, strict=True)
      ]
      for forward in (_plain, *FORWARDS)
    ]

  with helpers.x64():
    want, *got = all_gradients([_arrays(rank, *case) for case in CASES])
    assert want[0].dtype == np.float64
  for gradients in got:
    helpers.assert_trees_close(gradients, want, atol=1e-9)


@pytest.mark.parametrize("forward", FORWARDS)
def test_both_ways_write_the_convolution_itself(forward):
  image, kernel, _ = (a.astype(jnp.float32) for a in _arrays(2, *CASES[1]))
  shapes = weight_gradient.Shapes((2, 2), ((0, 0), (0, 0)))
  want = _plain(image, kernel, shapes)
  helpers.assert_trees_close(forward(image, kernel, shapes), want, atol=1e-5)


def test_the_way_follows_from_the_shapes():
  ways = [weight_gradient.way(*_arrays(2, *case)) for case in CASES]
  convolve, product = FORWARDS
  assert ways == [convolve] * 3 + [product] * 3


@pytest.mark.parametrize(
  "options", [{"rhs_dilation": (2, 2)}, {"lhs_dilation": (2, 2)}]
)
@pytest.mark.parametrize("groups", [1, 3])
def test_dilation_and_groups_keep_autodiffs(options, groups):
  layout = ("NHWC", "HWIO", "NHWC")
  options |= {"dimension_numbers": layout, "feature_group_count": groups}
  pads = [(1, 2), (0, 1)]

  def gradient(conv, image, kernel):
    energy = lambda k: (conv(image, k, (1, 1), pads, **options) ** 2).sum()
    return jax.grad(energy)(kernel)

  rng = np.random.default_rng(0)
  with helpers.x64():
    image = jnp.asarray(rng.normal(size=(2, 6, 5, 3)))
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3 // groups, 6)))
    got = gradient(convolution.conv_general_dilated, image, kernel)
    want = gradient(lax.conv_general_dilated, image, kernel)
  helpers.assert_trees_close(got, want, atol=1e-9)


def _energy(kernels, image, strides=(2, 1, 1)):
  """A strided stem, a plain and a one-pixel convolution."""
  for kernel, stride in zip(kernels, strides, strict=True):
    image = convolution.conv_general_dilated(
      image, kernel, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
  return (image**2).sum()


def _kernels():
  rng = np.random.default_rng(0)
  shapes = [(7, 7, 3, 4), (3, 3, 4, 4), (1, 1, 4, 4)]
  return [jnp.asarray(rng.normal(size=s) / 5, jnp.float32) for s in shapes]


def _labels(context):
  """Of the convolutions in the compiled loop of a gradient descent on kernels."""

  def descend(kernels, image):
    step = lambda _, kernels: jax.tree.map(
      lambda k, g: k - 1e-3 * g, kernels, jax.grad(_energy)(kernels, image)
    )
    return lax.fori_loop(0, 3, step, kernels)

  with context:
    lowered = jax.jit(descend).lower(_kernels(), jnp.ones((2, 16, 16, 3)))
  text = lowered.compile(foreign.FAST).as_text()
  return set(re.findall(r"dim_labels=(\w+_\w+->\w+)", text))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA for CPU")
def test_a_training_loop_stays_on_the_fast_path_unless_switched_off():
  fast = {"b01f_01io->b01f"}
  assert _labels(contextlib.nullcontext()) == fast
  assert _labels(weight_gradient.as_autodiff()) > fast


def test_an_attack_is_lowered_to_the_same_program():
  model = models.ConvNet(num_classes=3, width=4, depth=2)
  x, y = jnp.full((2, 16, 16, 1), 0.5), jnp.zeros(2, jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  attack = attacks.pgd(0.1, num_steps=2)

  def text(context):
    run = lambda v, x: attack(
      jax.random.key(1), functools.partial(model.apply, v), x, y
    )
    with context:
      return jax.jit(lambda v, x: run(v, x).image).lower(variables, x).as_text()

  assert text(contextlib.nullcontext()) == text(weight_gradient.as_autodiff())


def test_accelerators_keep_autodiffs(monkeypatch):
  trace = lambda: str(
    jax.make_jaxpr(jax.grad(_energy))(_kernels(), jnp.ones((2, 16, 16, 3)))
  )
  ours = trace()
  with weight_gradient.as_autodiff():
    theirs = trace()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert trace() == theirs != ours


@pytest.mark.parametrize("explicit", [False, True])
def test_a_batch_over_devices(explicit):
  """Manual axes are followed through the transpose; explicit ones keep autodiff's."""
  kernels = _kernels()[1:2]
  image = jnp.linspace(0, 1, 2 * 8 * 8 * 4).reshape(2, 8, 8, 4)
  gradient = lambda kernels, image: jax.grad(_energy)(kernels, image, strides=(1,))
  want = gradient(kernels, image)
  kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((2,), ("batch",), (kind,), devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    if explicit:
      image = jax.device_put(image, NamedSharding(mesh, P("batch")))
      kernels = jax.device_put(kernels, NamedSharding(mesh, P()))
    else:
      gradient = jax.shard_map(gradient, in_specs=(P(), P("batch")), out_specs=P())
    got = jax.jit(gradient)(kernels, image)
  helpers.assert_trees_close(got, want, atol=1e-4)


def test_the_benchmark_measures_layers_and_models():
  script = benchmark("weight_gradient")
  for place, steps in (("alone", 1), ("scan", 2)):
    layer = script.layer_programs((2, 6, 2, 3, 3, 1), place, steps=steps)
    model = models.ConvNet(num_classes=3, width=2, depth=1)
    step = script.model_programs(model, 8, 2, place, steps=steps)
    assert set(layer[0]) == set(script.WAYS)
    assert layer[2] == "convolution"
    for calls, arguments, *_ in (layer, step):
      times = script.measure(calls, arguments, steps=steps, repeats=2)
      rows = script.summary(times, calls)
      assert rows["autodiff"]["times_faster"] == 1
      assert all(row["ms"] > 0 for row in rows.values())


def test_all_ways_of_the_benchmark_agree():
  script = benchmark("weight_gradient")
  with helpers.x64():
    image, kernel, cotangent = _arrays(2, *CASES[1])
    shapes = weight_gradient.Shapes((2, 2), ((0, 0), (0, 0)))
    want, *others = (f(image, kernel, cotangent, shapes) for f in script.WAYS.values())
  for got in others:
    helpers.assert_trees_close(got, want, atol=1e-9)
