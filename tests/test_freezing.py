"""`freeze`: the same value and input gradient, by other operations."""

import functools
import re

import flax.linen as nn
import foreign  # noqa: F401  chooses the backend of Keras
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxadv
from jaxadv import canonical, frozen_rules, models
from jaxadv.models import convolution

# Random networks: a layer is `(rng, image) -> image`, channels last. What it draws are
# constants, as the parameters of a trained model are.


def _weights(rng, *shape):
  return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])))


def _pick(rng, *values):
  return values[rng.integers(len(values))]


def _convolution(rng, x, *, spread=False):
  rank, channels = x.ndim - 2, x.shape[-1]
  groups = _pick(rng, 1, 1, 2, channels)
  window = [_pick(rng, 1, 2, 3, 4) for _ in range(rank)]
  dilation = [_pick(rng, 1, 1, 2, 3) for _ in range(rank)]
  reach = [(n - 1) * d + 1 for n, d in zip(window, dilation, strict=True)]
  # a window that is larger than a side needs room
  pads = [(_pick(rng, n // 2, n), n) for n in reach]
  steps = [_pick(rng, 1, 2, 3) for _ in range(rank)]
  kernel = _weights(rng, *window, channels // groups, channels)
  # any order of the axes: batch, channels and space, of images and of kernels
  orders = [rng.permutation(rank + 2) for _ in range(3)]
  letters = ("N" + "DHW"[3 - rank :] + "C", "DHW"[3 - rank :] + "IO")
  names = ["".join(letters[n == 1][k] for k in order) for n, order in enumerate(orders)]
  found = lax.conv_general_dilated(
    x.transpose(orders[0]),
    kernel.transpose(orders[1]),
    (1,) * rank if spread else steps,
    pads,
    lhs_dilation=steps if spread else None,
    rhs_dilation=dilation,
    dimension_numbers=tuple(names),
    feature_group_count=groups,
  )
  return found.transpose(np.argsort(orders[2])) if found.size else x


def _norm(rng, x):
  mean, scale, shift = _vectors(rng, x, 3)
  return (x - mean) / 1.5 * scale + shift


def _turned(rng, x):
  """A vector on the left, and one value for all channels."""
  return 0.5 - (_vectors(rng, x, 1)[0] - x)


def _vectors(rng, x, n):
  return jnp.asarray(rng.normal(size=(n, *(1,) * (x.ndim - 1), x.shape[-1])))


def _product(rng, x):
  return x @ _weights(rng, x.shape[-1], x.shape[-1])


def _pool(rng, x, pool):
  rank = x.ndim - 2
  window = tuple(_pick(rng, 1, 2, 3) for _ in range(rank))
  steps = tuple(_pick(rng, 1, 2) for _ in range(rank))
  return pool(x, window, steps, _pick(rng, "SAME", "VALID"))


LAYERS = {
  "convolution": _convolution,
  "transposed": functools.partial(_convolution, spread=True),
  "norm": _norm,
  "turned": _turned,
  "product": _product,
  "max pool": functools.partial(_pool, pool=nn.max_pool),
  "mean pool": functools.partial(_pool, pool=nn.avg_pool),
  "relu": lambda rng, x: nn.relu(x),
  "tanh": lambda rng, x: jnp.tanh(x),
}


def _network(seed):
  """A random network, and images for it."""
  rng = np.random.default_rng(seed)
  rank = 1 + seed % 3
  names = [
    _pick(rng, "convolution", "convolution", "transposed", *LAYERS) for _ in range(7)
  ]

  def predict(x):
    draws = np.random.default_rng(seed)
    features = {}
    for n, name in enumerate(names):
      if min(x.shape[1:-1]) >= 3 or name not in ("max pool", "mean pool"):
        x = LAYERS[name](draws, x[tuple(slice(0, 12) for _ in range(x.ndim - 1))])
      features[f"{n} {name}"] = x
    return x.mean(range(1, x.ndim - 1)), features

  sides = rng.integers(4, 8, rank)
  return predict, jnp.asarray(rng.normal(size=(2, *sides, 4)))


def _value_and_gradient(predict, x):
  """All outputs, and the gradient of a random cotangent."""

  @jax.jit
  def both(x):
    out, pull = jax.vjp(predict, x)
    rng = np.random.default_rng(0)
    return out, pull(jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), out))

  return jax.tree.leaves(both(x))


def _check(predict, x, tolerance=1e-11):
  got = _value_and_gradient(jaxadv.freeze(predict, x), x)
  for a, b in zip(got, _value_and_gradient(predict, x), strict=True):
    largest = np.abs(b).max(initial=1)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("seed", range(24))
def test_random_networks_keep_value_and_gradient(seed):
  with helpers.x64():
    _check(*_network(seed))


def test_a_wrong_rule_is_noticed(monkeypatch):
  """The test above can fail: without the flip of the kernels it does."""
  turned = canonical.turned
  flipped = lambda kernel: jnp.flip(kernel, range(kernel.ndim - 2))
  monkeypatch.setattr(canonical, "turned", lambda k, groups: turned(flipped(k), groups))
  monkeypatch.setattr(frozen_rules, "_layouts", canonical.layouts)  # compiled before
  with helpers.x64(), pytest.raises(AssertionError, match="Not equal"):
    _check(*_network(0))


class Net(nn.Module):
  """What Flax's own layers make of a small network."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), strides=2)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.ConvTranspose(8, (2, 2), (2, 2))(x)
    x = nn.relu(nn.GroupNorm(2)(x))
    x = nn.Dense(8, use_bias=False)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
    return nn.Dense(3)(nn.avg_pool(x, (3, 3), (1, 1), "SAME").mean((1, 2)))


def _bound(model, x):
  """The model with random variables, running statistics included."""
  variables = jax.jit(model.init)(jax.random.key(0), x)
  leaves, tree = jax.tree.flatten(variables)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  moved = [
    a + 0.3 * jax.random.uniform(k, a.shape) for a, k in zip(leaves, keys, strict=True)
  ]
  variables = jax.tree.unflatten(tree, moved)
  return lambda x: model.apply(variables, x)


@pytest.fixture(scope="module")
def flax():
  x = jax.random.uniform(jax.random.key(2), (2, 16, 16, 3))
  return _bound(Net(), x), x


def _primitives(function, *arguments):
  """Names of the primitives, those inside others included."""
  return re.findall(r"\b([a-z_]+\d*)\[", str(jax.make_jaxpr(function)(*arguments)))


def test_norms_go_into_the_layer_before_them(flax):
  predict, x = flax
  _check(predict, x, 1e-5)
  plain, frozen = (
    str(jax.make_jaxpr(f)(x)) for f in (predict, jaxadv.freeze(predict, x))
  )
  # of the group norm's, one subtraction stays for the mean and one for the variance
  assert (plain.count(" sub "), frozen.count(" sub ")) == (4, 2)
  assert frozen.count(" rsqrt ") == plain.count(" rsqrt ") - 2


def test_a_value_that_is_used_twice_is_not_folded_away():
  kernel = jax.random.normal(jax.random.key(0), (4, 4))

  def predict(x):
    y = x @ kernel
    return y * 2, y, y + 1

  _check(predict, jnp.ones((2, 4)), 1e-6)


def _slow_in_a_loop(predict, x):
  """How many operations of its gradient are off the fast path there."""

  def step(x, _):
    return x + jax.grad(lambda x: predict(x).sum())(x), None

  loop = jax.jit(lambda x: lax.scan(step, x, length=3)[0])
  slow = r"select-and-scatter\(|dim_labels=\S*_01oi->|lhs_dilate"
  return len(re.findall(slow, loop.lower(x).compile().as_text()))


def test_no_gradient_scatters_or_reverses_inside_a_loop(flax):
  predict, x = flax
  assert _slow_in_a_loop(predict, x) >= 3
  assert _slow_in_a_loop(jaxadv.freeze(predict, x), x) == 0


@pytest.mark.parametrize("width", [4, 32])
def test_none_of_our_own_models_does(width):
  x = jnp.ones((2, 16, 16, 3))
  predict = _bound(models.UNet(num_classes=2, width=width, depth=2, norm="batch"), x)
  logits = lambda model: lambda x: model(x)[0]
  assert _slow_in_a_loop(logits(predict), x) == 0
  assert _slow_in_a_loop(logits(jaxadv.freeze(predict, x)), x) == 0


class Deep(nn.Module):
  """A map of few pixels and large kernels."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
    x = nn.relu(nn.Conv(128, (3, 3), strides=(2, 1))(x))
    return nn.Dense(600)(x).max((1, 2))


@pytest.mark.parametrize(("batch", "products"), [(1, 0), (4, 4), (9, 0)])
def test_few_rows_become_the_right_factor_of_a_product(batch, products):
  """Of a convolution, a dense layer and their gradients; 8 and 72 pixels do not."""
  model = Deep()
  x = jax.random.normal(jax.random.key(0), (batch, 8, 8, 3))
  variables = model.init(jax.random.key(1), x)
  predict = lambda x: model.apply(variables, x)
  _check(predict, x, 1e-4)
  frozen = jaxadv.freeze(predict, x)
  loss = lambda x: (frozen(x) ** 2).sum()
  assert str(jax.make_jaxpr(jax.grad(loss))(x)).count("optimization_barrier") == (
    2 * products
  )
  mapped = jax.vmap(jax.grad(loss))(jnp.stack([x, 2 * x]))
  np.testing.assert_allclose(mapped[1], jax.grad(loss)(2 * x), atol=1e-3)


@pytest.mark.parametrize(
  ("spec", "shapes", "barriers"),
  [
    ("bk,kn->bn", ((32, 300), (300, 310)), 2),
    ("bk,nk->bn", ((32, 300), (310, 300)), 2),
    ("bik,kn->bin", ((4, 8, 300), (300, 310)), 2),
    ("bk,kn->bn", ((8, 300), (300, 310)), 0),  # too few, and too many
    ("bk,kn->bn", ((80, 300), (300, 310)), 0),
    ("kb,kn->bn", ((300, 32), (300, 310)), 0),
    ("bij,ij->b", ((32, 270, 270), (270, 270)), 0),
    ("bi,jk->bijk", ((32, 2), (300, 310)), 0),
    ("bk,bkn->bn", ((32, 30), (32, 30, 300)), 0),
    ("bk,kn->bn", ((0, 300), (300, 310)), 0),
    ("bk,kn->bn", ((32, 300), (300, 0)), 0),
  ],
)
def test_which_products_are_those_of_few_rows(spec, shapes, barriers):
  rng = np.random.default_rng(0)
  x, matrix = (jnp.asarray(rng.normal(size=shape), np.float32) for shape in shapes)
  predict = lambda x: jnp.einsum(spec, x, matrix)
  _check(predict, x, 1e-3)
  frozen = jaxadv.freeze(predict, x)
  assert str(jax.make_jaxpr(frozen)(x)).count("optimization_barrier") == barriers


@pytest.mark.parametrize("frozen_before", [False, True])
def test_bfloat16_reaches_products_of_few_rows(frozen_before):
  matrix, x = jnp.ones((300, 300)), jnp.ones((32, 300))
  predict = lambda x: x @ matrix
  if frozen_before:
    predict = jaxadv.freeze(predict, x)
  narrow = jaxadv.freeze(predict, x, bf16=True)
  assert _products(narrow, x) == {"bf16"}
  gradient = jax.grad(lambda x: narrow(x).sum())(x)
  np.testing.assert_array_equal(gradient, 300)


@pytest.mark.parametrize("channels", [(64, 3), (256, 12)])
def test_few_features_of_our_own_stay_fast_when_frozen(channels):
  """The gradient of a sum of shifted products would be dozens of pads."""
  x = jnp.ones((2, 16, 16, channels[0]))
  kernel = jnp.ones((5, 5, *channels))
  own = lambda x: convolution.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  frozen = jaxadv.freeze(own, x)
  _check(own, x, 1e-3)
  gradient = jax.grad(lambda x: (frozen(x) ** 2).sum())
  assert _primitives(gradient, x).count("pad") == 0


@pytest.mark.parametrize(
  ("window", "channels", "side", "stride"),
  [
    (3, (96, 96), 9, 1),  # by Winograd
    (3, (96, 96), 3, 1),  # few rows
    (3, (16, 16), 16, 2),
    (7, (3, 64), 32, 2),  # a stem
    (1, (16, 16), 16, 2),  # three phases without taps
  ],
)
def test_every_way_follows_a_batch_over_explicit_axes(window, channels, side, stride):
  kernel = jax.random.normal(jax.random.key(0), (window, window, *channels)) / 30
  x = jax.random.normal(jax.random.key(1), (4, side, side, channels[0]))
  conv = lambda x: lax.conv_general_dilated(
    x, kernel, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  frozen = jaxadv.freeze(conv, x)
  gradient = jax.jit(jax.grad(lambda x: (frozen(x) ** 2).sum()))
  kind = jax.sharding.AxisType.Explicit
  mesh = jax.make_mesh((2,), ("batch",), (kind,), devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    found = gradient(jax.device_put(x, split))
  assert found.sharding.spec[0] == "batch"
  np.testing.assert_allclose(found, gradient(x), atol=1e-4)


def test_what_needs_no_image_is_left_alone():
  """Its result is too large to be computed beforehand."""
  image, kernel = jnp.ones((1, 40, 40, 1)), jnp.ones((3, 3, 1, 64))
  add = lambda x: (
    x
    + lax.conv(
      image.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "SAME"
    )
  )
  _check(add, jnp.ones((1, 64, 40, 40)), 1e-6)


def test_products_of_few_rows_have_second_derivatives():
  rng = np.random.default_rng(0)
  matrix = jnp.asarray(rng.normal(size=(300, 300)) / 17)
  frozen = jaxadv.freeze(lambda x: jnp.tanh(x @ matrix), jnp.ones((32, 300)))
  x = jnp.asarray(rng.normal(size=(32, 300)))

  def curvature(predict):
    slope = lambda x: (jax.grad(lambda x: predict(x).sum())(x) ** 2).sum()
    return jax.grad(slope)(x)

  want = curvature(lambda x: jnp.tanh(x @ matrix))
  np.testing.assert_allclose(curvature(frozen), want, atol=1e-4)


def test_an_attack_finds_what_it_finds_on_the_plain_model(flax):
  predict, x = flax
  attack = jaxadv.attacks.pgd(8 / 255, num_steps=5)
  y = predict(x).argmax(-1)
  run = lambda predict: attack(jax.random.key(0), predict, x, y)
  plain, frozen = run(predict), run(jaxadv.freeze(predict, x))
  np.testing.assert_allclose(frozen.losses, plain.losses, rtol=1e-4)
  assert (jnp.abs(frozen.image - plain.image) < 1e-6).mean() > 0.99


def test_variables_may_be_traced_and_nothing_leaks(flax):
  _, x = flax
  model = Net()
  variables = model.init(jax.random.key(0), x)

  @jax.jit
  def gradient(variables, x):
    predict = jaxadv.freeze(functools.partial(model.apply, variables), x)
    return jax.grad(lambda x: predict(x).sum())(x), predict(x[:1])

  with jax.checking_leaks():
    found, one = gradient(variables, x)
  plain = functools.partial(model.apply, variables)
  want = jax.grad(lambda x: plain(x).sum())(x)
  np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
  np.testing.assert_allclose(one, plain(x[:1]), atol=1e-5)


def test_images_of_another_shape_inside_and_outside_of_jit(flax):
  predict, x = flax
  frozen = jaxadv.freeze(predict, jax.ShapeDtypeStruct(x.shape, x.dtype))
  for images in (x[:1], x[:, :8], jnp.concatenate([x, x])):
    for run in (jax.jit(frozen), frozen, jax.jit(frozen)):
      np.testing.assert_allclose(run(images), predict(images), atol=1e-5)


def test_a_model_is_traced_once_for_a_shape(flax):
  predict, x = flax
  seen = []

  def counted(x):
    seen.append(x.shape)
    return predict(x)

  frozen = jaxadv.freeze(counted, x)
  for radius in (1 / 255, 2 / 255, 4 / 255):
    attack = jaxadv.attacks.pgd(radius, num_steps=2)
    jax.jit(functools.partial(attack, jax.random.key(0), frozen))(x, jnp.zeros(2, int))
  assert seen == [x.shape]


def test_blocks_in_a_scan_a_branch_or_a_checkpoint_are_rewritten_too():
  kernels = jax.random.normal(jax.random.key(0), (3, 3, 3, 4, 4)) / 6
  layout = ("NHWC", "HWIO", "NHWC")

  def block(x, kernel):
    x = lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)
    x = nn.max_pool(jnp.tanh(x), (2, 2), (1, 1), "SAME")
    return x.repeat(2, 1).repeat(2, 2)

  def predict(x):
    wide = lambda x: jax.checkpoint(block)(x, kernels[0])
    x = lax.cond(x.sum() > 0, wide, lambda x: x * 2, x)
    x, seen = lax.scan(lambda x, k: (block(x, k), x.mean()), x, kernels)
    shared = lambda x, _: (block(x, kernels[1]), None)
    return lax.scan(shared, x, length=2)[0], seen

  for sign in (1, -1):
    x = sign * jax.random.uniform(jax.random.key(1), (2, 8, 8, 4))
    _check(predict, x, 1e-5)
  frozen = jaxadv.freeze(predict, x)
  gradient = jax.grad(lambda x: frozen(x)[0].sum())
  assert "select_and_scatter" not in str(jax.make_jaxpr(gradient)(x))
  assert {"scan", "cond", "remat2"} <= set(_primitives(frozen, x))


def test_what_has_a_gradient_of_its_own_keeps_it():
  """Relu has none at 0, where the maximum that it is made of has a half."""
  frozen = jaxadv.freeze(lambda x: nn.relu(x @ jnp.eye(3)), jnp.zeros((1, 3)))
  assert not jax.grad(lambda x: frozen(x).sum())(jnp.zeros((1, 3))).any()


@pytest.mark.parametrize("name", ["unet", "resnet", "vgg", "efficientnet"])
def test_our_own_models(name):
  x = jax.random.uniform(jax.random.key(0), (1, 32, 32, 3))
  model = {
    "unet": models.UNet(num_classes=2, width=4, depth=2, norm="batch"),
    "resnet": models.ResNet(num_classes=3, width=0.125),
    "vgg": models.VGG(num_classes=3, convolutions=(1,) * 5, width=0.125),
    "efficientnet": models.EfficientNetLite0(num_classes=3, width=0.25),
  }[name]
  predict = _bound(model, x)
  got, want = jax.jit(jaxadv.freeze(predict, x))(x), jax.jit(predict)(x)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def _products(predict, x):
  """Types of the operands of convolutions and products, gradients among them."""
  gradient = jax.grad(lambda x: sum(a.sum() for a in jax.tree.leaves(predict(x))))
  program = jax.jit(gradient).lower(x).as_text()
  product = r"stablehlo\.(?:convolution|dot_general)\b.*"
  return set(re.findall(r"x(f32|bf16)>", " ".join(re.findall(product, program))))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_in_bfloat16_every_product_is_and_nothing_else(flax, backend, monkeypatch):
  predict, x = flax
  own = _bound(models.UNet(num_classes=2, width=4, depth=2, norm="batch"), x)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  for model in (predict, own):
    narrow = jaxadv.freeze(model, x, bf16=True)
    assert (_products(model, x), _products(narrow, x)) == ({"f32"}, {"bf16"})
    got, want = (jax.tree.leaves(f(x)) for f in (narrow, model))
    for a, b in zip(got, want, strict=True):
      assert a.dtype == jnp.float32
      np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max())
    assert np.abs(got[0] - want[0]).max() > 1e-4 * np.abs(want[0]).max()


def test_bfloat16_reaches_what_was_frozen_before_and_what_is_in_a_scan(flax):
  predict, x = flax
  layers = lambda x: lax.scan(lambda x, _: (x + jnp.tanh(x @ kernel), None), x, None, 2)
  kernel = jax.random.normal(jax.random.key(0), (3, 3))
  model = lambda x: layers(predict(x))[0]
  twice = jaxadv.freeze(jaxadv.freeze(model, x), x, bf16=True)
  assert _products(twice, x) == {"bf16"}


def test_bfloat16_reaches_our_convolutions_under_vmap(flax):
  _, x = flax
  model = models.UNet(num_classes=2, width=4, depth=2)
  predict = _bound(model, x[:1])
  alone = lambda x: jax.vmap(lambda image: predict(image[None])[0][0])(x)
  assert _products(jaxadv.freeze(alone, x, bf16=True), x) == {"bf16"}


def test_our_depthwise_convolutions_keep_their_gradient(flax):
  """Their program is a sum of shifted images, whose own gradient is slow in a loop."""
  kernel = jax.random.normal(jax.random.key(0), (3, 3, 1, 3))

  def predict(x):
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 3}
    return convolution.conv_general_dilated(x, kernel, (2, 2), "SAME", **layout)

  _, x = flax
  once = jaxadv.freeze(predict, x)
  for frozen in (once, jaxadv.freeze(once, x), jaxadv.freeze(predict, x, bf16=True)):
    assert "custom_vjp_call" in _primitives(frozen, x)
  _check(predict, x, 1e-6)


def test_bfloat16_leaves_other_types_alone():
  with helpers.x64():
    predict, x = _network(0)
    once, narrow = jaxadv.freeze(predict, x), jaxadv.freeze(predict, x, bf16=True)
    for a, b in zip(*(jax.tree.leaves(f(x)) for f in (once, narrow)), strict=True):
      np.testing.assert_array_equal(a, b)


def test_nnx_and_channels_first():
  rngs = nnx.Rngs(0)
  conv, norm = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
  norm.eval()
  kernel = jax.random.normal(jax.random.key(0), (5, 4, 3, 3))
  scale = jax.random.uniform(jax.random.key(1), (1, 5, 1, 1))

  def predict(x):
    x = nnx.softplus(norm(conv(x))).transpose(0, 3, 1, 2)
    return lax.conv(x, kernel, (2, 2), "SAME") * scale - 1

  x = jax.random.uniform(jax.random.key(2), (2, 16, 16, 3))
  _check(predict, x, 1e-5)
  after = str(jax.make_jaxpr(jaxadv.freeze(predict, x))(x)).split("custom_vjp_call")[-1]
  assert " mul " not in after


@jax.numpy_rank_promotion("allow")
def test_keras():
  keras = pytest.importorskip("keras")
  if keras.backend.backend() != "jax":
    pytest.skip("Keras runs on another backend; KERAS_BACKEND=jax was not set first")
  layers = keras.layers
  model = keras.Sequential(
    [
      keras.Input((16, 16, 3)),
      layers.Conv2D(8, 3, strides=2, padding="same"),
      layers.BatchNormalization(),
      layers.ReLU(),
      layers.DepthwiseConv2D(3),
      layers.MaxPooling2D(2),
      layers.Conv2DTranspose(4, 2, strides=2),
      layers.UpSampling2D(2, interpolation="bilinear"),
      layers.GlobalAveragePooling2D(),
      layers.Dense(3),
    ]
  )
  trained = [v.value for v in model.trainable_variables]
  state = [0.5 + v.value for v in model.non_trainable_variables]
  predict = lambda x: model.stateless_call(trained, state, x, training=False)[0]
  x = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
  _check(predict, x, 1e-5)
  gradient = jax.grad(lambda x: jaxadv.freeze(predict, x)(x).sum())
  assert "select_and_scatter" not in str(jax.make_jaxpr(gradient)(x))


def test_ensembles_map_over_a_frozen_model(flax):
  predict, x = flax
  frozen = jaxadv.freeze(predict, x)
  many = jnp.stack([x, x[::-1]])
  gradient = lambda predict: jax.vmap(jax.grad(lambda x: predict(x).sum()))(many)
  np.testing.assert_allclose(gradient(frozen), gradient(predict), atol=1e-6)


def test_other_primitives_pass_untouched():
  """Sorting, indexing, randomness, a callback, and a kernel made of the image."""
  seen = []

  def predict(x):
    jax.debug.callback(lambda v: seen.append(float(v)), x.sum())
    noise = jax.random.normal(jax.random.key(0), x.shape)
    own = lax.conv_general_dilated(
      x,
      x[0, :3, :3, :, None] + noise[0, :3, :3, :, None],
      (1, 1),
      "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return (
      jnp.sort(own, 1)[:, ::2],
      lax.top_k(x[..., 0], 2),
      lax.reduce_window(x, 1.0, lax.mul, (1, 2, 2, 1), (1, 1, 1, 1), "VALID"),
    )

  x = jax.random.uniform(jax.random.key(2), (2, 6, 6, 2))
  frozen = jaxadv.freeze(predict, x)
  assert not seen
  for a, b in zip(jax.tree.leaves(frozen(x)), jax.tree.leaves(predict(x)), strict=True):
    np.testing.assert_array_equal(a, b)
  jax.effects_barrier()
  assert len(seen) == 2


def test_an_empty_map_stays_empty():
  kernel = jnp.ones((3, 3, 2, 2))

  def predict(x):
    layout = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=layout)
    return y, x.sum()

  _check(predict, jnp.ones((1, 2, 5, 2)))


def test_what_the_model_raises_comes_at_once():
  with pytest.raises(TypeError, match="dot_general"):
    jaxadv.freeze(lambda x: x @ jnp.ones((7, 2)), jnp.ones((2, 5)))


def test_where_nothing_was_measured_the_model_is_left_alone(flax, monkeypatch):
  predict, x = flax
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert jaxadv.freeze(predict, x) is predict


@pytest.mark.parametrize("seed", range(6))
def test_by_the_rules_for_a_gpu_random_networks_keep_theirs(seed, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  with helpers.x64():
    _check(*_network(seed))


# layer, side of its image of 8 channels, what its gradient is made of
GPU_LAYERS = {
  "one tap": (nn.Conv(16, (1, 1)), 8, {"dot_general"}),
  "one tap, stride 2": (nn.Conv(16, (1, 1), 2), 8, {"conv_general_dilated"}),
  "small map": (nn.Conv(16, (3, 3)), 2, {"dot_general"}),
  "large map": (nn.Conv(16, (3, 3)), 3, {"conv_general_dilated"}),
  "depthwise": (nn.Conv(8, (3, 3), 2, feature_group_count=8), 8, set()),
  "groups": (nn.Conv(8, (3, 3), feature_group_count=2), 2, {"conv_general_dilated"}),
  "blocks": (
    nn.ConvTranspose(4, (2, 2), (2, 2)),
    8,
    {"dot_general", "conv_general_dilated"},
  ),
  "overlapping": (nn.ConvTranspose(4, (4, 4), (2, 2)), 8, {"conv_general_dilated"}),
  "maxima apart": (lambda x: nn.max_pool(x, (2, 2), (2, 2)), 8, set()),
  "maxima": (lambda x: nn.max_pool(x, (3, 3), (2, 2)), 8, {"select_and_scatter_add"}),
  "norm": (nn.BatchNorm(use_running_average=True), 8, set()),
}


@pytest.mark.parametrize("name", GPU_LAYERS)
def test_on_a_gpu_what_measured_faster_is_rewritten_and_nothing_else(name, monkeypatch):
  layer, side, products = GPU_LAYERS[name]
  x = jax.random.normal(jax.random.key(0), (2, side, side, 8))
  predict = _bound(layer, x) if isinstance(layer, nn.Module) else layer
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  gradient = jax.grad(lambda x: jnp.square(jaxadv.freeze(predict, x)(x)).sum())
  slow = {"conv_general_dilated", "dot_general", "select_and_scatter_add"}
  assert set(_primitives(gradient, x)) & slow == products
  _check(predict, x, 1e-5)


def test_every_rule_is_met_by_the_random_networks():
  met = set()
  for seed in range(24):
    predict, x = _network(seed)
    met |= set(_primitives(predict, x)) & set(frozen_rules.RULES["cpu"])
  assert met == set(frozen_rules.RULES["cpu"])
