import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv.models import UNet, asma_unet, layers


def _init(model, shape):
  """Random variables of the right shapes; compiling `init` would take longer."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    drawn = np.asarray(rng.normal(size=leaf.shape), np.float32)
    name = jax.tree_util.keystr(path)
    if name.endswith(("['scale']", "['var']")):
      return 1 + 0.1 * np.abs(drawn)
    return drawn * np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))

  return jax.tree_util.tree_map_with_path(fill, shapes)


def _count(variables):
  return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def _random(shape, seed=1):
  return jax.random.uniform(jax.random.key(seed), shape)


def test_asma_network_has_the_published_shapes_and_parameters():
  model = asma_unet()
  image = jax.ShapeDtypeStruct((1, 572, 572, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  logits, features = jax.eval_shape(model.apply, variables, image)
  assert _count(variables) == 7_760_130
  assert logits.shape == (1, 388, 388, 2)
  sides = {name: feature.shape[1] for name, feature in features.items()}
  encoder = {"enc1": 568, "enc2": 280, "enc3": 136, "enc4": 64, "bottleneck": 28}
  assert sides == encoder | {"dec1": 52, "dec2": 100, "dec3": 196, "dec4": 388}
  assert features["bottleneck"].shape[-1] == 512


FLAT, VOLUME = (2, 16, 24, 3), (1, 8, 16, 8, 1)


@pytest.mark.parametrize(
  ("norm", "shape"),
  [("group", FLAT), ("batch", FLAT), ("none", FLAT), ("group", VOLUME)],
)
def test_shapes_taps_and_dtypes(norm, shape):
  model = UNet(num_classes=3, width=4, depth=2, norm=norm)
  variables = _init(model, shape)
  logits, features = jax.jit(model.apply)(variables, _random(shape))
  assert logits.shape == (*shape[:-1], 3)
  assert logits.dtype == jnp.float32
  assert set(features) == {"enc1", "enc2", "bottleneck", "dec1", "dec2"}
  assert features["bottleneck"].shape == (shape[0], *(n // 4 for n in shape[1:-1]), 16)
  assert features["dec2"].shape == (*shape[:-1], 4)
  assert all((feature >= 0).all() for feature in features.values())


def test_bfloat16_computes_in_half_precision_and_answers_in_float32():
  shape = (1, 16, 16, 1)
  variables = _init(UNet(width=4, depth=1), shape)
  exact, _ = jax.jit(UNet(width=4, depth=1).apply)(variables, _random(shape))
  half = UNet(width=4, depth=1, dtype=jnp.bfloat16)
  logits, features = jax.jit(half.apply)(variables, _random(shape))
  assert logits.dtype == jnp.float32
  assert features["bottleneck"].dtype == jnp.bfloat16
  assert 0 < jnp.abs(logits - exact).max() < 0.1 * jnp.abs(exact).max()


def test_float64_images_are_computed_in_float64():
  with helpers.x64():
    model = UNet(width=4, depth=1)
    variables = _init(model, (1, 8, 8, 1))
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float64)
    logits, features = jax.eval_shape(model.apply, variables, image)
    assert logits.dtype == features["bottleneck"].dtype == jnp.float64


def test_an_image_does_not_see_its_neighbours():
  model = UNet(width=4, depth=2)
  images = _random((3, 16, 16, 2))
  variables = _init(model, images.shape)
  many, _ = jax.jit(model.apply)(variables, images)
  alone, _ = jax.jit(model.apply)(variables, images[1:2])
  helpers.assert_trees_close(many[1:2], alone, atol=1e-5)


def test_batch_norm_follows_the_batch_only_in_training():
  model = UNet(width=4, depth=1, norm="batch")
  images = _random((4, 8, 8, 1))
  variables = _init(model, images.shape)
  train = lambda v, x: model.apply(v, x, True, mutable=["batch_stats"])
  (busy, _), moved = jax.jit(train)(variables, images)
  calm, _ = jax.jit(model.apply)(variables, images)
  assert jnp.abs(busy - calm).max() > 1e-3
  before, after = variables["batch_stats"], moved["batch_stats"]
  assert jax.tree.structure(before) == jax.tree.structure(after)
  assert any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), before, after)))


def test_every_parameter_and_pixel_has_a_gradient():
  model = UNet(width=4, depth=2)
  image = _random((1, 16, 16, 1))
  variables = _init(model, image.shape)
  weights = _random((1, 16, 16, 2), seed=2)
  loss = lambda variables, image: (model.apply(variables, image)[0] * weights).sum()
  gradients = jax.jit(jax.grad(loss, (0, 1)))(variables, image)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_upsample_has_the_parameters_of_a_transposed_convolution():
  module = layers.Upsample(5)
  image = _random((1, 3, 4, 6))
  variables = module.init(jax.random.key(0), image)
  assert module.apply(variables, image).shape == (1, 6, 8, 5)
  assert _count(variables) == 6 * 2 * 2 * 5 + 5


@pytest.mark.parametrize(
  ("model", "shape", "message"),
  [
    (UNet(depth=4), (1, 40, 64, 1), r"\(40, 64\) are not multiples of 16"),
    (UNet(), (64, 64, 1), r"Write x\[None\]"),
    (UNet(padding="VALID"), (1, 64, 64, 1), "too small"),
    (UNet(padding="same"), (1, 64, 64, 1), 'write "SAME" or "VALID"'),
    (UNet(norm="layer"), (1, 16, 16, 1), "`norm` is 'layer'"),
  ],
)
def test_input_that_does_not_fit_is_refused(model, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
