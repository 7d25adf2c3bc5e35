"""What the layers of our classifiers are called where their weights come from.

A layer enters by its path among our variables, such as `stage1_block2/conv3/norm`.
"""

import functools
import re
from collections.abc import Callable

import flax.linen as nn

from jaxadv.models import (
  attn_vgg,
  densenet,
  efficientnet,
  inception,
  inception_resnet,
  resnet,
  vgg,
)

__all__ = ["head_name", "keras_namer", "npz_namer", "torch_namer"]

Namer = Callable[[str], str]


def keras_namer(model: nn.Module) -> Namer:
  """From our path of a layer to its name in the Keras application.

  Raises:
    ValueError: for a model that Keras applications do not have.

  Example:
    >>> keras_namer(resnet.resnet50(variant="keras"))("stage1_block2/conv3/norm")
    'conv2_block2_3_bn'
  """
  match model:
    case resnet.ResNet(bottleneck=True):
      return _resnet_keras
    case vgg.VGG():
      return lambda path: path.split("/")[0].replace("stage", "block")
    case densenet.DenseNet():
      return _densenet_keras
    case inception.InceptionV3():
      return functools.partial(_numbered, inception.layer_names())
    case inception_resnet.InceptionResNetV2():
      return functools.partial(_numbered, inception_resnet.layer_names(model.repeats))
  raise ValueError(f"Keras applications have no {_described(model)}.")


def torch_namer(model: nn.Module) -> Namer:
  """From our path of a layer to its name in the state dict of torchvision.

  That of an `AttnVGG` is its authors'.

  Raises:
    ValueError: for a model that torchvision does not have.

  Example:
    >>> torch_namer(resnet.resnet50())("stage1_block2/conv3/norm")
    'layer1.1.bn3'
  """
  match model:
    case resnet.ResNet():
      return _resnet_torch
    case vgg.VGG():
      return lambda path: _vgg_torch(model, path)
    case attn_vgg.AttnVGG():
      return _attn_vgg_torch
    case densenet.DenseNet():
      return _densenet_torch
    case inception.InceptionV3():
      return lambda path: path.replace("/norm", "/bn").replace("/", ".")
  raise ValueError(f"torchvision has no {_described(model)}.")


def npz_namer(model: nn.Module) -> Namer:
  """From our path of a layer to its name in a `.npz` file of EfficientNet-Lite0.

  Raises:
    ValueError: for another model.

  Example:
    >>> npz_namer(efficientnet.EfficientNetLite0())("block03/depthwise/norm")
    'block03/depthwise_bn'
  """
  if isinstance(model, efficientnet.EfficientNetLite0):
    return _lite_npz
  raise ValueError(f"a .npz file has EfficientNet-Lite0, not {_described(model)}.")


def head_name(model: nn.Module, framework: str) -> str:
  """The published name of the last dense layer.

  Example:
    >>> head_name(vgg.vgg16(), "torch"), head_name(vgg.vgg16(), "keras")
    ('classifier.6', 'predictions')
  """
  if framework == "keras":
    return "predictions"
  if framework == "npz":
    return "fc"
  if isinstance(model, vgg.VGG):
    return "classifier.6"
  if isinstance(model, attn_vgg.AttnVGG):
    return "cls"
  return "classifier" if isinstance(model, densenet.DenseNet) else "fc"


def _described(model):
  small = isinstance(model, resnet.ResNet) and not model.bottleneck
  return "ResNet-18" if small else type(model).__name__


def _groups(pattern, path):
  found = re.fullmatch(pattern, path)
  if found is None:
    raise ValueError(f"{path!r} is no layer of this network.")
  return found.groups()


def _resnet_keras(path):
  unit, kind = path.rsplit("/", 1)
  kind = {"conv": "conv", "norm": "bn"}[kind]
  if unit == "stem":
    return f"conv1_{kind}"
  stage, block, name = _groups(r"stage(\d)_block(\d+)/(\w+)", unit)
  position = 0 if name == "shortcut" else name.removeprefix("conv")
  return f"conv{int(stage) + 1}_block{block}_{position}_{kind}"


def _resnet_torch(path):
  unit, kind = path.rsplit("/", 1)
  if unit == "stem":
    return {"conv": "conv1", "norm": "bn1"}[kind]
  stage, block, name = _groups(r"stage(\d)_block(\d+)/(\w+)", unit)
  if name == "shortcut":
    name = {"conv": "downsample.0", "norm": "downsample.1"}[kind]
  elif kind == "norm":
    name = name.replace("conv", "bn")
  return f"layer{stage}.{int(block) - 1}.{name}"


def _vgg_torch(model, path):
  """Layers of a `Sequential` are numbered, with relu and pool among them."""
  if path in ("fc1", "fc2"):
    return {"fc1": "classifier.0", "fc2": "classifier.3"}[path]
  stage, k, kind = _groups(r"stage(\d)_conv(\d)/(\w+)", path)
  before = sum(model.convolutions[: int(stage) - 1]) + int(k) - 1
  each = 2 if model.norm == "none" else 3
  return f"features.{each * before + int(stage) - 1 + (kind == 'norm')}"


def _attn_vgg_torch(path):
  """One `Sequential` per stage, numbered anew; the parts of a gate have names."""
  if path.startswith("gate"):
    gate, part = _groups(r"gate(\d)/(local|global|phi)", path)
    theirs = {"local": "W_l", "global": "W_g", "phi": "phi"}
    return f"attn{gate}.{theirs[part]}"
  stage, k, kind = _groups(r"stage(\d)_conv(\d)/(\w+)", path)
  return f"conv_block{stage}.{3 * (int(k) - 1) + (kind == 'norm')}"


def _densenet_keras(path):
  unit, _, kind = path.rpartition("/")
  if unit == "stem":
    return {"conv": "conv1_conv", "norm": "conv1_bn"}[kind]
  if path == "norm":
    return "bn"
  if unit.startswith("transition"):
    stage = int(unit.removeprefix("transition"))
    return f"pool{stage + 1}_{'bn' if kind == 'norm' else 'conv'}"
  stage, layer, k = _groups(r"stage(\d)_layer(\d+)/conv(\d)", unit)
  # the norm comes before its convolution, and Keras counts it with the one before
  last = f"{int(k) - 1}_bn" if kind == "norm" else f"{k}_conv"
  return f"conv{int(stage) + 1}_block{layer}_{last}"


def _numbered(order, path):
  """Keras counts the layers that its code does not name, in the order it makes them."""
  unit, kind = path.rsplit("/", 1)
  if unit in order:
    return {"conv": "conv2d", "norm": "batch_normalization"}[
      kind
    ] + f"_{order.index(unit)}"
  if kind == "norm":
    return "conv_7b_bn"
  if kind == "conv":
    return "conv_7b"
  # the convolution `up` of a residual block
  return f"{unit}_conv"


def _densenet_torch(path):
  unit, _, kind = path.rpartition("/")
  if unit == "stem":
    return f"features.{kind}0"
  if path == "norm":
    return "features.norm5"
  if unit.startswith("transition"):
    return f"features.{unit}.{kind}"
  stage, layer, k = _groups(r"stage(\d)_layer(\d+)/conv(\d)", unit)
  return f"features.denseblock{stage}.denselayer{layer}.{kind}{k}"


def _lite_npz(path):
  unit, kind = path.rsplit("/", 1)
  if unit in ("stem", "last"):
    kind = {"conv": "conv", "norm": "bn"}[kind]
    return f"{unit.replace('last', 'head')}/{kind}"
  return f"{unit}_bn" if kind == "norm" else unit
