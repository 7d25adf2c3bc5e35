"""Weights of Keras and torchvision give the same logits and gradients here."""

import os
import pathlib
import sys

import flax
import foreign
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import models
from jaxadv.models import convert, names

CLASSES = 5

# Keras 3.15 with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")


def _shapes(model, side):
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), image)


def _inputs(side):
  rng = np.random.default_rng(1)
  return rng.uniform(size=(2, side, side + 1, 3)), rng.normal(size=(2, CLASSES))


def _check(model, path, side, theirs, **options):
  """Converted, ours agrees with `(logits, gradient)` of theirs."""
  images, weights = _inputs(side)
  variables = convert.load(path, model, _shapes(model, side), **options)
  variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)

  def loss(images, variables):
    logits, _ = model.apply(variables, images)
    return (logits * weights).sum(), logits

  gradient, logits = foreign.compiled(jax.grad(loss, has_aux=True))(images, variables)
  assert logits.dtype == gradient.dtype == np.float64
  for got, want in zip((logits, gradient), theirs, strict=True):
    want = np.asarray(want)
    assert np.abs(want).max() > 1e-3
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < 1e-6, error


KERAS = {
  "resnet50": (models.resnet50, "ResNet50", 32),
  "densenet121": (models.densenet121, "DenseNet121", 32),
  "inception_v3": (models.InceptionV3, "InceptionV3", 75),
  "inception_resnet_v2": (models.InceptionResNetV2, "InceptionResNetV2", 75),
  "vgg16": (models.vgg16, "VGG16", 32),
  "vgg19": (models.vgg19, "VGG19", 32),
}


LARGE = ("densenet121", "inception_resnet_v2")  # a minute each to compile twice


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=pytest.mark.long if n in LARGE else ()) for n in KERAS],
)
def test_keras_weights_give_the_same_logits_and_gradients(name, tmp_path):
  ours, theirs, side = KERAS[name]

  def build(keras):  # as in transfer learning: VGG then has a head like ours
    base = getattr(keras.applications, theirs)(
      weights=None, include_top=False, input_shape=(side, side + 1, 3), pooling="avg"
    )
    logits = keras.layers.Dense(CLASSES, name="predictions")(base.output)
    return keras.Model(base.input, logits)

  variant = {} if name == "inception_resnet_v2" else {"variant": "keras"}
  with helpers.x64():
    network = foreign.random_keras(build)
    path = tmp_path / "theirs.weights.h5"
    network.save_weights(path)
    results = foreign.keras_results(network, *_inputs(side))
    _check(ours(CLASSES, **variant), path, side, results)


def test_the_layers_of_densenet169_of_keras(tmp_path):
  """Its blocks are those of DenseNet-121: that every array has its place is enough."""
  network = foreign.random_keras(
    lambda keras: keras.applications.DenseNet169(weights=None, classes=CLASSES)
  )
  path = tmp_path / "theirs.weights.h5"
  network.save_weights(path)
  model = models.densenet169(CLASSES, variant="keras")
  variables = convert.load(path, model, _shapes(model, 32))
  got = variables["batch_stats"]["stage4_layer32"]["conv2"]["norm"]["BatchNorm_0"][
    "var"
  ]
  want = network.get_layer("conv5_block32_1_bn").moving_variance
  np.testing.assert_array_equal(got, np.asarray(want, np.float32))


def test_the_dense_layers_of_vgg_of_keras(tmp_path):
  """Those of `include_top=True`, on a map of 7 x 7 made by one convolution a stage."""

  def build(keras):
    layers = keras.layers
    x = inputs = layers.Input((224, 225, 3))
    for stage, channels in enumerate((8, 16, 32, 64, 64), 1):
      conv = layers.Conv2D(channels, 3, padding="same", name=f"block{stage}_conv1")
      x = layers.MaxPooling2D()(layers.ReLU()(conv(x)))
    x = layers.Flatten()(x)
    for name in ("fc1", "fc2"):
      x = layers.Dense(512, activation="relu", name=name)(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="predictions")(x))

  options = {"width": 1 / 8, "head": "dense", "variant": "keras"}
  with helpers.x64():
    network = foreign.random_keras(build)
    path = tmp_path / "theirs.weights.h5"
    network.save_weights(path)
    model = models.VGG(CLASSES, (1, 1, 1, 1, 1), **options)
    _check(model, path, 224, foreign.keras_results(network, *_inputs(224)))


def _pooled(network, torch):
  """With a head as in transfer learning: VGG then has no hidden layers."""
  network.avgpool = torch.nn.AdaptiveAvgPool2d(1)
  network.classifier = torch.nn.Linear(512, CLASSES)
  return network


# ours, its options, side, and options of theirs
TORCH = {
  "resnet18": (models.resnet18, {}, 32, {}),
  "resnet50": (models.resnet50, {}, 32, {}),
  "vgg16": (models.vgg16, {"head": "dense"}, 32, {}),
  "vgg19": (models.vgg19, {}, 32, {}),
  "densenet121": (models.densenet121, {}, 32, {}),
  "densenet169": (models.densenet169, {}, 32, {}),
  "inception_v3": (models.InceptionV3, {}, 75, {"init_weights": False}),
}


@pytest.mark.parametrize("name", TORCH)
def test_torchvision_weights_give_the_same_logits_and_gradients(name, tmp_path):
  ours, options, side, theirs = TORCH[name]
  torch = pytest.importorskip("torch")
  safetensors = pytest.importorskip("safetensors.torch")
  pooled = name == "vgg19"

  def build(zoo):
    network = getattr(zoo, name)(num_classes=CLASSES, **theirs)
    return _pooled(network, torch) if pooled else network

  network = foreign.random_torch(build)
  path = tmp_path / "theirs.safetensors"
  safetensors.save_file(network.state_dict(), path)
  results = foreign.torch_results(network, *_inputs(side))
  head = "classifier" if pooled else True
  with helpers.x64():
    _check(ours(CLASSES, **options), path, side, results, head=head)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_every_file_of_keras_holds_the_same(tmp_path):
  def build(keras):
    layers = keras.layers
    inputs = layers.Input((8, 8, 3))
    x = layers.BatchNormalization(scale=False)(layers.Conv2D(4, 3)(inputs))
    x = layers.Dense(3, name="predictions")(layers.Conv2D(4, 3)(x))
    return keras.Model(inputs, x)

  network = foreign.random_keras(build)
  network.save_weights(tmp_path / "a.weights.h5")
  network.save(tmp_path / "b.keras")
  network.save(tmp_path / "c.h5")
  first, *others = (convert.read_keras(path) for path in sorted(tmp_path.iterdir()))
  assert set(first) == {"conv2d_0", "conv2d_1", "batch_normalization_0", "predictions"}
  assert (first["batch_normalization_0"]["scale"] == 1).all()
  assert first["predictions"]["kernel"].shape == (4, 3)
  for other in others:
    helpers.assert_trees_equal(other, first)


def test_a_checkpoint_of_torch_is_read_without_running_it(tmp_path):
  torch = pytest.importorskip("torch")
  safetensors = pytest.importorskip("safetensors.torch")
  state = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5), torch.nn.BatchNorm2d(4))
  state = state.state_dict()
  torch.save(state, tmp_path / "a.pth")
  safetensors.save_file(state, tmp_path / "b.safetensors")
  layers = convert.read_torch(tmp_path / "a.pth")
  assert layers["0"]["kernel"].shape == (5, 5, 3, 4)
  assert set(layers["1"]) == {"scale", "bias", "mean", "var"}
  helpers.assert_trees_equal(convert.read_torch(tmp_path / "b.safetensors"), layers)
  torch.save(pathlib.PurePosixPath("code"), tmp_path / "c.pth")
  with pytest.raises(ValueError, match=r"torn or no file .*(?i:weights.only)"):
    convert.load(tmp_path / "c.pth", models.resnet18(), {})
  torch.save({"state_dict": state, "epoch": 3}, tmp_path / "d.pth")
  with pytest.raises(ValueError, match=r"'state_dict' is no array; save the model's"):
    convert.load(tmp_path / "d.pth", models.resnet18(), {})


def test_a_fitted_model_of_keras_is_read_without_its_optimizer(tmp_path):
  keras = pytest.importorskip("keras")

  def build(keras):
    layers = keras.layers
    inputs = layers.Input((8, 8, 3))
    x = layers.Dropout(0.5)(layers.Flatten()(layers.Conv2D(4, 3)(inputs)))
    return keras.Model(inputs, layers.Dense(3, name="predictions")(x))

  with helpers.x64(), jax.numpy_rank_promotion("allow"):
    network = foreign.random_keras(build)
    network.compile(keras.optimizers.Adam(), "mse", metrics=["accuracy"])
    network.fit(np.zeros((4, 8, 8, 3)), np.zeros((4, 3)), verbose=0)
  network.save(tmp_path / "a.keras")
  network.save_weights(tmp_path / "b.weights.h5")
  for path in tmp_path.iterdir():
    assert set(convert.read_keras(path)) == {"conv2d_0", "predictions"}


def test_the_names_of_older_densenets_are_known(tmp_path):
  safetensors = pytest.importorskip("safetensors.numpy")
  name = "features.denseblock1.denselayer2.norm.1.weight"
  safetensors.save_file({name: np.ones(3, np.float32)}, tmp_path / "a.safetensors")
  found = convert.read_torch(tmp_path / "a.safetensors")
  assert list(found) == ["features.denseblock1.denselayer2.norm1"]


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "keras", "weights.h5"])
def test_a_torn_file_is_named(suffix, tmp_path):
  path = tmp_path / f"a.{suffix}"
  path.write_bytes(b"PK not this")
  variant = "keras" if suffix in ("keras", "weights.h5") else "torch"
  model = LITE if suffix == "npz" else models.resnet50(variant=variant)
  with pytest.raises(ValueError, match=r"a\.\w+.* is torn or no file of weights"):
    convert.load(path, model, {})


def test_group_norm_is_refused(tmp_path):
  with pytest.raises(ValueError, match="write norm='batch'"):
    convert.load("a.pth", models.resnet18(norm="group"), {})


LITE = models.EfficientNetLite0(3, width=0.25)


@pytest.fixture
def lite(tmp_path):
  """A small network in a file like that of the published weights, and its arrays."""
  shapes = _shapes(LITE, 32)
  rng = np.random.default_rng(0)
  arrays = {"block_config": np.zeros((16, 5))}
  for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items():
    _, *modules, kind = path.replace("/BatchNorm_0", "").split("/")
    ours = "/".join(modules)
    name = "fc" if ours == "head" else names.npz_namer(LITE)(ours)
    kind = kind if "norm" in ours else {"kernel": "w", "bias": "b"}[kind]
    arrays[f"{name}/{kind}"] = foreign.drawn(rng, leaf.shape)
  return tmp_path / "lite.npz", shapes, arrays


def test_every_array_is_loaded(lite):
  path, shapes, arrays = lite
  np.savez(path, **arrays)
  variables = convert.load(path, LITE, shapes)
  assert jax.tree.structure(variables) == jax.tree.structure(shapes)
  stem = variables["params"]["stem"]["conv"]["kernel"]
  np.testing.assert_array_equal(stem, arrays["stem/conv/w"])


def test_another_number_of_classes_keeps_the_head(lite):
  path, _, arrays = lite
  np.savez(path, **arrays)
  model = LITE.clone(num_classes=7)
  shapes = _shapes(model, 32)
  with pytest.raises(ValueError, match=r"params/head/.* has shape .*Write head=False"):
    convert.load(path, model, shapes)
  fresh = jax.tree.map(lambda leaf: np.full(leaf.shape, 9, np.float32), shapes)
  variables = convert.load(path, model, fresh, head=False)
  assert (variables["params"]["head"]["kernel"] == 9).all()
  assert (variables["params"]["stem"]["conv"]["kernel"] != 9).all()


def test_the_first_array_that_does_not_fit_is_named(lite):
  path, shapes, arrays = lite
  wrong = arrays | {"stem/conv/w": np.zeros((5, 5, 3, 8))}
  np.savez(path, **wrong)
  message = r"params/stem/conv/kernel has shape \(3, 3, 3, 8\), .* \(5, 5, 3, 8\)"
  with pytest.raises(ValueError, match=message):
    convert.load(path, LITE, shapes)
  missing = {name: a for name, a in arrays.items() if name != "stem/bn/mean"}
  np.savez(path, **missing)
  with pytest.raises(ValueError, match="the file has nothing as the mean of 'stem/bn'"):
    convert.load(path, LITE, shapes)
  np.savez(path, **arrays, **{"block16/expand/w": np.zeros((1, 1, 8, 8))})
  with pytest.raises(ValueError, match="'block16/expand' in the file"):
    convert.load(path, LITE, shapes)


@pytest.mark.parametrize(
  ("path", "model", "message"),
  [
    ("a.bin", models.ResNet(), "write one that ends in .weights.h5"),
    ("a.keras", models.ResNet(), "write variant='keras'"),
    ("a.pth", models.vgg16(variant="keras"), "write variant='torch'"),
    ("a.h5", models.resnet18(), "Keras applications have no ResNet-18"),
    ("a.pth", models.InceptionResNetV2(), "torchvision has no InceptionResNetV2"),
    ("a.npz", models.ResNet(), "EfficientNet-Lite0, not ResNet"),
  ],
)
def test_a_file_of_another_kind_is_refused(path, model, message):
  with pytest.raises(ValueError, match=message):
    convert.load(path, model, {})


@pytest.mark.parametrize("name", ["h5py", "safetensors.numpy", "torch"])
def test_a_missing_package_is_named(name, monkeypatch):
  monkeypatch.setitem(sys.modules, name, None)
  suffix = {"h5py": "h5", "safetensors.numpy": "safetensors", "torch": "pth"}[name]
  model = models.resnet50(variant="keras" if name == "h5py" else "torch")
  with pytest.raises(ImportError, match=r"needs (\w+); write `pip install"):
    convert.load(f"a.{suffix}", model, {})


def test_efficientnet_lite0_reproduces_its_reference():
  weights = _weights("efficientnet_lite0_imagenet_fp16.npz")
  reference = np.load(_weights("efficientnet_lite0_imagenet_ref.npz"))
  model = models.EfficientNetLite0(1000, preprocess="lite")
  variables = convert.load(weights, model, _shapes(model, 224))
  images = reference["images"].astype(np.float32) / 255
  logits, _ = foreign.compiled(model.apply)(variables, images)
  np.testing.assert_allclose(logits, reference["logits"], rtol=1e-4, atol=1e-4)
  assert logits.argmax(-1).tolist() == reference["expected_top1"].tolist()


def _weights(name):
  """A file of the weights pack, in `$JAXADV_WEIGHTS` or `../shared/weights`."""
  beside = pathlib.Path(__file__).parents[2] / "shared/weights"
  path = pathlib.Path(os.environ.get("JAXADV_WEIGHTS", beside)) / name
  if not path.exists():
    pytest.skip(f"no {name} in $JAXADV_WEIGHTS or ../shared/weights")
  return path


def test_a_head_that_is_kept_needs_values():
  """Shapes from `jax.eval_shape` would fail later, inside the model."""
  weights = _weights("efficientnet_lite0_imagenet_fp16.npz")
  model = models.EfficientNetLite0(3, preprocess="lite")
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  with pytest.raises(ValueError, match=r"head=False keeps params/head/.*model\.init"):
    convert.load(weights, model, shapes, head=False)
