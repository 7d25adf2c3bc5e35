"""Shapes, sizes and refusals of the classifiers; their numbers are in test_convert."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import models
from jaxadv.models import layers, preprocessing

# model with 1000 classes, its parameters as published, its smallest side
PUBLISHED = {
  "resnet18": (models.resnet18, {}, 11_689_512, 1),
  "resnet50": (models.resnet50, {}, 25_557_032, 1),
  "resnet50 of Keras": (models.resnet50, {"variant": "keras"}, 25_583_592, 1),
  "vgg16": (models.vgg16, {"head": "dense"}, 138_357_544, 32),
  "vgg19": (models.vgg19, {"head": "dense"}, 143_667_240, 32),
  # VGG16-BN without its dense layers, two gates (two projections and phi), one layer
  "attn_vgg": (
    models.AttnVGG,
    {},
    14_723_136
    + (256 * 256 + 512 * 256 + 257)
    + (512 * 256 + 512 * 256 + 257)
    + (1280 * 1000 + 1000),
    32,
  ),
  "densenet121": (models.densenet121, {}, 7_978_856, 29),
  "densenet169": (models.densenet169, {}, 14_149_480, 29),
  # torchvision's without its auxiliary head of 3,326,696
  "inception_v3": (models.InceptionV3, {}, 27_161_264 - 3_326_696, 75),
  # Keras leaves out the scale of 30,272 normed channels
  "inception_resnet_v2": (models.InceptionResNetV2, {}, 55_813_192 + 30_272, 75),
  "efficientnet_lite0": (models.EfficientNetLite0, {}, 4_652_008, 1),
}
SMALL = {
  "resnet18": models.ResNet(3, (1, 1, 1, 1), bottleneck=False, width=0.125),
  "resnet50": models.ResNet(3, (1, 1, 1, 1), width=0.125),
  "vgg": models.VGG(3, (1, 1, 1, 1, 1), width=0.125, head="dense"),
  "attn_vgg": models.AttnVGG(3, width=0.125),
  "densenet": models.DenseNet(3, (1, 1, 1, 1), width=0.25),
  "inception_v3": models.InceptionV3(3, width=0.125, padding="SAME"),
  "efficientnet_lite0": models.EfficientNetLite0(3, width=0.25),
}


def _shapes(model, side, channels=3, batch=2):
  image = jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32)
  return jax.eval_shape(model.init_with_output, jax.random.key(0), image)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_number_of_parameters(name):
  build, options, count, side = PUBLISHED[name]
  (logits, features), variables = _shapes(build(1000, **options), max(side, 32))
  assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
  assert logits.shape == (2, 1000)
  assert features["pooled"].ndim == 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_smallest_side_is_taken_and_one_less_refused(name):
  build, options, _, side = PUBLISHED[name]
  model = build(3, width=0.125, **options)
  (logits, features), _ = _shapes(model, side, channels=1)
  assert logits.shape == (2, 3)
  assert all(0 not in feature.shape for feature in features.values())
  if side > 1:
    with pytest.raises(ValueError, match=f"this network needs {side} at least"):
      _shapes(model, side - 1)


@pytest.mark.parametrize("build", [models.InceptionV3, models.InceptionResNetV2])
def test_padding_everywhere_takes_any_side(build):
  (_, features), _ = _shapes(build(3, width=0.125, padding="SAME"), 64)
  sides = [features[f"stage{k}"].shape[1] for k in (1, 2, 3)]
  assert sides == [8, 4, 2]
  _shapes(build(3, width=0.125, padding="SAME"), 1)


def _init(model, side, channels=1):
  """Random variables of the right shapes; compiling `init` would take longer."""
  _, shapes = _shapes(model, side, channels)
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    drawn = np.asarray(rng.normal(size=leaf.shape), np.float32)
    if jax.tree_util.keystr(path).endswith(("['scale']", "['var']")):
      return 1 + 0.1 * np.abs(drawn)
    return drawn * np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))

  return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_training_moves_only_statistics_of_batch_norm(norm):
  model = models.ResNet(3, (1, 1), bottleneck=False, width=0.125, norm=norm)
  images = jax.random.uniform(jax.random.key(0), (4, 16, 16, 1))
  variables = _init(model, 16)
  train = lambda v, x: model.apply(v, x, True, mutable=["batch_stats"])
  (busy, _), moved = jax.jit(train)(variables, images)
  calm, _ = jax.jit(model.apply)(variables, images)
  assert (jnp.abs(busy - calm).max() > 1e-3) == (norm == "batch")
  assert bool(moved) == (norm == "batch")


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_inside_and_float32_out(name):
  model = SMALL[name].clone(dtype=jnp.bfloat16, norm="group")
  (logits, features), variables = _shapes(model, 32)
  assert logits.dtype == jnp.float32
  assert {feature.dtype for feature in features.values()} == {jnp.dtype(jnp.bfloat16)}
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_preprocessing_of_grey_and_of_colour():
  pixel = jnp.array([0.0, 0.5, 1.0]).reshape(1, 1, 1, 3)
  wanted = {
    "none": [0.0, 0.5, 1.0],
    "tf": [-1.0, 0.0, 1.0],
    "caffe": [255 - 103.939, 127.5 - 116.779, -123.68],
    "torch": [-0.485 / 0.229, 0.044 / 0.224, 0.594 / 0.225],
    "lite": [-127 / 128, 0.5 / 128, 1.0],
  }
  for name, values in wanted.items():
    got = preprocessing.preprocess(pixel, name)
    helpers.assert_trees_close(got[0, 0, 0], jnp.array(values), atol=1e-5)
  grey = preprocessing.preprocess(pixel[..., :1], "torch")
  helpers.assert_trees_close(
    grey, preprocessing.preprocess(pixel[..., [0, 0, 0]], "torch"), atol=0
  )


@pytest.mark.parametrize(
  ("model", "shape", "message"),
  [
    (models.ResNet(), (64, 64, 3), r"Write x\[None\]"),
    (models.ResNet(), (1, 3, 64, 64), r"Write x.transpose\(0, 2, 3, 1\)"),
    (models.ResNet(norm="layer"), (1, 32, 32, 3), "`norm` is 'layer'"),
    (models.ResNet(variant="jax"), (1, 32, 32, 3), "`variant` is 'jax'"),
    (models.VGG(head="flat"), (1, 32, 32, 3), "`head` is 'flat'"),
    (models.VGG(preprocess="keras"), (1, 32, 32, 3), "`preprocess` is 'keras'"),
    (models.InceptionV3(padding="same"), (1, 75, 75, 3), "`padding` is 'same'"),
  ],
)
def test_what_does_not_fit_is_refused(model, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_widths_are_multiples_of_eight():
  assert [layers.scaled(64, w) for w in (0.01, 0.25, 1.0, 1.1)] == [8, 16, 64, 72]


def test_a_width_that_is_none_is_refused():
  with pytest.raises(ValueError, match=r"`width` is 0; write a factor above 0"):
    _shapes(models.resnet18(3, width=0), 32)
