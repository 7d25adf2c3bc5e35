import functools
import statistics

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxadv import canonical, pooling
from jaxadv.models import convolution

LAYOUTS = {
  1: ("NWC", "WIO", "NWC"),
  2: ("NHWC", "HWIO", "NHWC"),
  3: ("NDHWC", "DHWIO", "NDHWC"),
}
# side of the image, of the kernel, stride: among them a kernel larger than the image,
# of one pixel, and shorter than its stride
CASES = [(8, 3, 1), (8, 3, 2), (7, 2, 3), (5, 1, 2), (2, 3, 1), (3, 2, 2)]
PADDINGS = {
  "same": lambda rank: "SAME",
  "valid": lambda rank: "VALID",
  "lopsided": lambda rank: [(2, 1)] * rank,
  "beyond the kernel": lambda rank: [(4, 0)] * rank,
}


def _arrays(rank, side, window, dtype=np.float64, channels=(3, 2)):
  rng = np.random.default_rng(rank + side + window)
  image = rng.normal(size=(2, *(side + k for k in range(rank)), channels[0]))
  kernel = rng.normal(size=(window,) * rank + channels) / window**rank
  return jnp.asarray(image, dtype), jnp.asarray(kernel, dtype)


def _results(conv, image, kernel, stride, padding):
  """Output and both gradients for one cotangent."""
  rank = image.ndim - 2

  def apply(image, kernel):
    layout = LAYOUTS[rank]
    return conv(image, kernel, (stride,) * rank, padding, dimension_numbers=layout)

  out, pull = jax.vjp(apply, image, kernel)
  cotangent = np.random.default_rng(0).normal(size=out.shape)
  return out, *pull(jnp.asarray(cotangent, out.dtype))


def _check_in_float64(rank, padding, cases, channels=(3, 2)):
  @functools.partial(jax.jit, static_argnums=0)
  def all_results(conv, arrays):
    strides = [stride for _, _, stride in cases]
    return [
      _results(conv, *pair, stride, padding)
      for pair, stride in zip(arrays, strides, strict=True)
    ]

  with helpers.x64():
    arrays = [_arrays(rank, *case[:2], channels=channels) for case in cases]
    got = all_results(convolution.conv_general_dilated, arrays)
    want = all_results(lax.conv_general_dilated, arrays)
  assert got[0][0].dtype == np.float64
  helpers.assert_trees_close(got, want, atol=1e-12)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_are_those_of_autodiff_in_float64(rank, padding):
  padding = PADDINGS[padding](rank)
  cases = [case for case in CASES if padding != "VALID" or case[0] >= case[1]]
  _check_in_float64(rank, padding, cases)


# a stem, whose gradient is a product per pixel; three channels that become four;
# phases; and few features
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("channels", [(3, 64), (3, 24), (8, 8), (64, 3)])
def test_stems_and_layers_of_larger_images(channels, padding):
  cases = [(16, 7, 2), (18, 3, 2), (17, 4, 3), (24, 4, 2), (16, 3, 3), (16, 3, 1)]
  _check_in_float64(2, PADDINGS[padding](2), cases, channels)


def _program(channels, side, window, stride, batch=2, padding="SAME"):
  """Convolutions and products of a layer and its input gradient."""
  image = jnp.zeros((batch, side, side, channels[0]))
  kernel = jnp.zeros((window, window, *channels))
  layout, strides = LAYOUTS[2], (stride, stride)
  apply = functools.partial(
    convolution.conv_general_dilated, dimension_numbers=layout, padding=padding
  )
  gradient = jax.grad(lambda x, kernel: (apply(x, kernel, strides) ** 2).sum())
  text = jax.jit(gradient).lower(image, kernel).compile().as_text()
  return [text.count(f" {name}(") for name in ("convolution", "dot")]


@pytest.mark.parametrize(
  ("case", "found"),
  [
    (((3, 64), 32, 7, 2), [1, 1]),  # behind a stem, one product for all phases
    (((16, 64), 32, 7, 2), [5, 0]),  # a convolution per phase
    (((8, 64), 32, 2, 2), [1, 1]),  # one pixel to one window
    (((64, 64), 5, 3, 1), [0, 2]),  # few pixels
    (((64, 64), 6, 3, 1), [2, 0]),
    (((64, 64), 4, 3, 2, 99), [3, 2]),  # fewer than taps, but for the phases
    (((64, 64), 4, 3, 1, 16, "VALID"), [0, 2]),  # as its result, so its gradient
  ],
)
def test_which_layers_are_products(case, found):
  assert _program(*case) == found


def test_an_empty_result_is_that_of_lax():
  image, kernel = jnp.ones((2, 2, 2, 3)), jnp.ones((4, 4, 3, 4))
  layout = LAYOUTS[2]
  apply = convolution.conv_general_dilated
  got = apply(image, kernel, (1, 1), "VALID", dimension_numbers=layout)
  assert got.shape == (2, 0, 0, 4)


@pytest.mark.parametrize(("features", "channels"), [(16, 3), (24, 4), (32, 4), (33, 3)])
def test_three_channels_are_four_where_xla_is_slow(features, channels):
  kernel = jnp.zeros((3, 3, 3, features))
  apply = functools.partial(
    convolution.conv_general_dilated, padding="SAME", dimension_numbers=LAYOUTS[2]
  )
  text = str(
    jax.make_jaxpr(lambda x: apply(x, kernel, (1, 1)))(jnp.zeros((1, 9, 9, 3)))
  )
  assert f"f32[1,9,9,{channels}]" in text
  assert f"f32[3,3,{channels},{features}]" in text


@pytest.mark.parametrize(
  ("side", "window", "stride"), [(16, 3, 1), (15, 3, 2), (2, 3, 1)]
)
def test_gradients_are_those_of_autodiff_in_float32(side, window, stride):
  image, kernel = _arrays(2, side, window, np.float32)
  want = _results(lax.conv_general_dilated, image, kernel, stride, "SAME")
  got = _results(convolution.conv_general_dilated, image, kernel, stride, "SAME")
  helpers.assert_trees_close(got, want, atol=1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
def test_depthwise_gradients_are_those_of_autodiff_in_float64(padding):
  padding = PADDINGS[padding](2)
  cases = [case for case in CASES if padding != "VALID" or case[0] >= case[1]]

  @functools.partial(jax.jit, static_argnums=0)
  def all_results(conv, arrays):
    grouped = functools.partial(conv, feature_group_count=3)
    return [
      _results(grouped, image, kernel[..., None, :, 0], stride, padding)
      for (image, kernel), (_, _, stride) in zip(arrays, cases, strict=True)
    ]

  with helpers.x64():
    arrays = [_arrays(2, *case[:2]) for case in cases]
    got = all_results(convolution.conv_general_dilated, arrays)
    want = all_results(lax.conv_general_dilated, arrays)
  helpers.assert_trees_close(got, want, atol=1e-12)


def test_second_derivatives():
  image, kernel = _arrays(2, 5, 3, np.float32)

  def energy(conv, image):
    layout = LAYOUTS[2]
    return (conv(image, kernel, (2, 2), "SAME", dimension_numbers=layout) ** 3).sum()

  def curvature(conv):
    slope = lambda image: (jax.grad(energy, 1)(conv, image) ** 2).sum()
    return jax.grad(slope)(image)

  ours = curvature(convolution.conv_general_dilated)
  helpers.assert_trees_close(ours, curvature(lax.conv_general_dilated), atol=1e-4)


def test_bfloat16_stays_bfloat16():
  image, kernel = _arrays(2, 8, 3, jnp.bfloat16)
  got = _results(convolution.conv_general_dilated, image, kernel, 1, "SAME")
  want = _results(lax.conv_general_dilated, image, kernel, 1, "SAME")
  assert {part.dtype for part in got} == {jnp.dtype(jnp.bfloat16)}
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0.05, atol=0.1)


def test_maps_over_images_and_over_kernels():
  image, kernel = _arrays(2, 8, 3, np.float32)
  images, kernels = jnp.stack([image, 2 * image]), jnp.stack([kernel, -kernel])

  def gradient(conv, image, kernel):
    return _results(conv, image, kernel, 1, "SAME")[1:]

  ours = jax.vmap(lambda *a: gradient(convolution.conv_general_dilated, *a))
  want = jax.vmap(lambda *a: gradient(lax.conv_general_dilated, *a))
  helpers.assert_trees_close(ours(images, kernels), want(images, kernels), atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
def test_dilation_and_groups_have_the_gradients_of_autodiff(groups, strides):
  with helpers.x64():
    image = _arrays(2, 9, 3)[0]
    shape = (3, 2, 3 // groups, 6)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=shape))
    how = {"rhs_dilation": (2, 3), "feature_group_count": groups}

    def results(conv):
      apply = lambda *pair: conv(
        *pair, strides, "SAME", dimension_numbers=LAYOUTS[2], **how
      )
      out, pull = jax.vjp(apply, image, kernel)
      return out, *pull(jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    ours = results(convolution.conv_general_dilated)
    theirs = results(lax.conv_general_dilated)
    for got, want in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(got, want, atol=1e-11)


@pytest.mark.parametrize(
  "options",
  [
    {"lhs_dilation": (2, 2), "padding": [(1, 1), (1, 2)]},
    {"preferred_element_type": jnp.float32},
  ],
)
def test_what_has_no_rule_goes_to_lax(options):
  groups = options.get("feature_group_count", 1)
  image = _arrays(2, 8, 3, np.float32)[0]
  kernel = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 3 // groups, 6)))
  options = {"padding": "SAME", "dimension_numbers": LAYOUTS[2]} | options
  arguments = (image, kernel.astype(jnp.float32), (1, 1))
  got = convolution.conv_general_dilated(*arguments, **options)
  helpers.assert_trees_equal(got, lax.conv_general_dilated(*arguments, **options))


def test_channels_first_goes_to_lax():
  image, kernel = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
  got = convolution.conv_general_dilated(image, kernel, (1, 1), "VALID")
  assert got.shape == (1, 4, 6, 6)


def test_wrong_channels_raise_as_in_lax():
  image, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 4, 2))
  with pytest.raises(ValueError, match="feature"):
    convolution.conv_general_dilated(
      image, kernel, (1, 1), "SAME", dimension_numbers=LAYOUTS[2]
    )


def test_flax_takes_it():
  image = _arrays(2, 8, 3, np.float32)[0]
  ours = nn.Conv(4, (3, 3), conv_general_dilated=convolution.conv_general_dilated)
  variables = ours.init(jax.random.key(0), image)
  want = nn.Conv(4, (3, 3)).apply(variables, image)
  helpers.assert_trees_equal(ours.apply(variables, image), want)


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (2, 7, 5, 3), (1, 4, 6, 4, 2)])
def test_max_pool_equals_reduce_window_bit_for_bit(shape):
  rank = len(shape) - 2
  # few distinct values, so that most windows hold ties
  image = jnp.asarray(np.random.default_rng(0).integers(0, 3, shape), jnp.float32)
  window = (2,) * rank
  ours, our_pull = jax.vjp(pooling.max_pool, image)
  want, pull = jax.vjp(lambda x: nn.max_pool(x, window, window), image)
  cotangent = jnp.asarray(np.random.default_rng(1).normal(size=want.shape), jnp.float32)
  helpers.assert_trees_equal((ours, *our_pull(cotangent)), (want, *pull(cotangent)))


@pytest.mark.parametrize(
  ("side", "window", "stride", "padding"),
  [
    (9, 3, 2, "VALID"),
    (8, 3, 2, "SAME"),
    (7, 3, 2, [(1, 1)] * 2),
    (6, 3, 1, "SAME"),
    (7, 2, 3, "VALID"),
    (1, 3, 2, [(1, 1)] * 2),
  ],
)
def test_pools_with_overlap_and_padding(side, window, stride, padding):
  shape = (2, side, side + 1, 3)
  image = jnp.asarray(np.random.default_rng(0).integers(-3, 0, shape), jnp.float32)
  own = {"strides": stride, "padding": padding}
  flax = (window,) * 2, (stride,) * 2, padding
  pairs = [
    (lambda x: pooling.max_pool(x, window, **own), lambda x: nn.max_pool(x, *flax)),
    (
      lambda x: pooling.avg_pool(x, window, **own),
      lambda x: nn.avg_pool(x, *flax, count_include_pad=False),
    ),
    (
      lambda x: pooling.avg_pool(x, window, count_padding=True, **own),
      lambda x: nn.avg_pool(x, *flax),
    ),
  ]
  for ours, theirs in pairs:
    got, our_pull = jax.vjp(ours, image)
    want, pull = jax.vjp(theirs, image)
    cotangent = np.random.default_rng(1).normal(size=want.shape).astype(np.float32)
    atol = 0 if ours is pairs[0][0] else 1e-6  # a maximum is bit-equal
    helpers.assert_trees_close(
      (got, *our_pull(cotangent)), (want, *pull(cotangent)), atol=atol
    )


@pytest.mark.parametrize(
  ("window", "strides", "pads"),
  [
    ((3,), (2,), ((2, 0),)),
    ((5,), (3,), ((1, 2),)),
    ((3, 2), (1, 2), ((1, 1), (0, 1))),
    ((2, 4), (5, 3), ((0, 0), (3, 1))),
    ((2, 3, 2), (2, 2, 1), ((0, 0), (1, 2), (0, 1))),
  ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_windows_of_other_sides_along_every_axis(window, strides, pads, dtype):
  rng, rank = np.random.default_rng(0), len(window)
  image = jnp.asarray(rng.integers(-3, 3, (2, *range(9, 9 + rank), 3)), dtype)
  over = [(1, *window, 1), (1, *strides, 1), ((0, 0), *pads, (0, 0))]
  for ours, start, operation in [
    (pooling.max_windows, -jnp.inf, lax.max),
    (pooling.sum_windows, 0, lax.add),
  ]:
    start = jnp.asarray(start, dtype)
    theirs = lambda x, a=start, b=operation: lax.reduce_window(x, a, b, *over)
    got, our_pull = jax.vjp(lambda x, f=ours: f(x, window, strides, pads), image)
    want, pull = jax.vjp(theirs, image)
    cotangent = jnp.asarray(rng.integers(-3, 3, want.shape), dtype)  # sums are exact
    helpers.assert_trees_equal((got, *our_pull(cotangent)), (want, *pull(cotangent)))


@pytest.mark.parametrize("pool", [pooling.max_pool, pooling.avg_pool])
@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 2), (3, 1), (2, 3)])
def test_the_gradient_of_a_pool_has_a_gradient(pool, window, stride):
  image = jax.random.normal(jax.random.key(0), (1, 7, 7, 1))
  with helpers.x64():
    image = jnp.asarray(image, jnp.float64)
    direction = jnp.sin(jnp.arange(49.0)).reshape(image.shape)
    cost = lambda x: (pool(x, window, strides=stride) ** 3).sum()
    got = jax.jvp(jax.grad(cost), (image,), (direction,))[1]
    near = lambda step: jax.grad(cost)(image + step * direction)
    want = (near(1e-5) - near(-1e-5)) / 2e-5
    helpers.assert_trees_close(got, want, atol=1e-7)
    again = jax.grad(lambda x: (jax.grad(cost)(x) * direction).sum())(image)
    helpers.assert_trees_close(again, want, atol=1e-7)


@pytest.mark.parametrize("pool", [pooling.max_pool, pooling.avg_pool])
def test_what_the_cotangent_comes_from_is_not_computed_for_every_tap(pool):
  image, *others = jax.random.normal(jax.random.key(0), (9, 4, 32, 32, 32))
  image = jnp.pad(image, ((0, 0), (0, 33), (0, 33), (0, 0)))  # of 65 pixels
  cotangent = jax.jit(
    lambda others: functools.reduce(lambda a, b: 1.1 * a + jax.nn.relu(b), others)
  )
  pull = jax.jit(lambda c: jax.vjp(lambda x: pool(x, 3, strides=2), image)[1](c)[0])
  calls = {
    "apart": lambda: pull(cotangent(others)),
    "together": jax.jit(lambda others: pull(cotangent(others))),
  }
  calls["together"] = functools.partial(calls["together"], others)
  times = helpers.benchmark("loop").measure(calls, steps=1, repeats=9)
  ratio = statistics.median(times["together"]) / statistics.median(times["apart"])
  assert ratio < 2, times  # it was 7 and 3 as one sum over taps


def test_max_pool_of_negative_and_nan_values():
  image = jnp.array([[-3.0, -1.0], [-2.0, jnp.nan]]).reshape(1, 2, 2, 1)
  assert jnp.isnan(pooling.max_pool(image)).all()
  assert pooling.max_pool(-jnp.ones((1, 2, 2, 1))).item() == -1


@pytest.mark.parametrize("rank", [2, 3])
def test_depth_to_space_after_a_product_is_a_transposed_convolution(rank):
  image, _ = _arrays(rank, 3, 2, np.float32)
  kernel = np.random.default_rng(2).normal(size=(2,) * rank + (3, 5))
  kernel = jnp.asarray(kernel, jnp.float32)
  layout = LAYOUTS[rank]
  want = lax.conv_transpose(
    image, kernel, (2,) * rank, "VALID", dimension_numbers=layout
  )
  # conv_transpose correlates: tap 0 lands on the last pixel of a block
  taps = jnp.flip(kernel, range(rank))
  matrix = jnp.moveaxis(taps, -2, 0).reshape(3, -1)
  got = canonical.depth_to_space(image @ matrix, (2,) * rank)
  helpers.assert_trees_close(got, want, atol=1e-5)
