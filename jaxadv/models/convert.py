"""Weights of Keras applications and torchvision as variables of our classifiers.

    model = models.resnet50(1000, variant="keras", preprocess="caffe")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    variables = convert.load("resnet50.weights.h5", model, shapes)

Files are only read, never executed; `.pth` goes through `weights_only=True`.
"""

import importlib
import io
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np

from jaxadv.models import names

__all__ = ["load", "read_keras", "read_npz", "read_torch"]

# name of a layer -> name of an array in our words (kernel, mean, ...) -> array
Layers = dict[str, dict[str, np.ndarray]]
# Where Keras keeps the layers of a model in a file, now and formerly.
_LAYERS = ("layers", "_layer_checkpoint_dependencies")


def load(
  path: str | os.PathLike,
  model: nn.Module,
  variables: Mapping[str, Any],
  *,
  head: bool | str = True,
) -> dict[str, Any]:
  """The variables of `model` with the values of a file.

  Args:
    path: `.weights.h5`, `.keras` or `.h5` of a Keras application; `.safetensors`,
      `.pth` or `.pt` with a state dict of torchvision; `.npz` of EfficientNet-Lite0.
    model: one of our classifiers, with the `variant` that the file is of.
    variables: of `model`, from `init` or as shapes from `jax.eval_shape(model.init,
      ...)`.
    head: `True` reads the last dense layer under its published name, a string under
      that name; `False` keeps the one in `variables`, for another number of classes,
      and needs values there.

  Returns:
    The tree of `variables`, with NumPy arrays of the same dtypes.

  Raises:
    ValueError: for another kind of file, for a file of the other framework, and where
      an array is missing, too many or of another shape: its name and both shapes.
    ImportError: when the package that reads the file is not installed.

  Example:
    >>> load("weights.bin", None, {})
    Traceback (most recent call last):
    ...
    ValueError: 'weights.bin' is no file of weights; write one that ends in ...
  """
  framework, read = _reader(path)
  namer = {
    "keras": names.keras_namer,
    "torch": names.torch_namer,
    "npz": names.npz_namer,
  }[framework](model)
  _check_variant(path, model, framework)
  layers = _read(read, path)
  dense = head if isinstance(head, str) else _head(layers, model, framework)
  return _fill(variables, layers, namer, dense, keep_head=head is False)


def read_keras(path: str | os.PathLike) -> Layers:
  """Every layer with weights in a `.weights.h5`, `.keras` or old `.h5` file, by name.

  Needs h5py (`pip install jaxadv[convert]`).
  """
  h5py = _import("h5py")
  path = pathlib.Path(path)
  source: Any = path
  if path.suffix == ".keras":
    with zipfile.ZipFile(path) as archive:
      source = io.BytesIO(archive.read("model.weights.h5"))
  with h5py.File(source) as file:
    root = file.get("model_weights", file)
    arrays = _legacy_arrays(root) if "layer_names" in root.attrs else _arrays(file)
    layers = {name: _named(found) for name, found in arrays.items() if found}
  return _renumbered(layers)


def read_torch(path: str | os.PathLike) -> Layers:
  """Every module with weights in a state dict, by name.

  Needs safetensors for `.safetensors` (`pip install jaxadv[convert]`), else torch.
  """
  if pathlib.Path(path).suffix == ".safetensors":
    state = _import("safetensors.numpy").load_file(path)
  else:
    torch = _import("torch")
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    others = [name for name, value in loaded.items() if not hasattr(value, "numpy")]
    if others:
      raise ValueError(f"{others[0]!r} is no array; save the model's state_dict().")
    state = {name: tensor.numpy() for name, tensor in loaded.items()}
  layers: Layers = {}
  for name, array in state.items():
    layer, _, kind = name.rpartition(".")
    # the published DenseNets still have the names of an older torchvision
    layer = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])$", r"\1\2", layer)
    if kind != "num_batches_tracked":
      layers.setdefault(layer, {}).update(_from_torch(kind, array))
  return layers


def read_npz(path: str | os.PathLike) -> Layers:
  """Every layer in a `.npz` file with arrays called `layer/w`, `layer/mean`, ..."""
  kinds = {"w": "kernel", "b": "bias"}
  layers: Layers = {}
  with np.load(path, allow_pickle=False) as file:
    for key in file.files:
      layer, _, kind = key.rpartition("/")
      if layer:  # what is not in a layer says how the file was made
        layers.setdefault(layer, {})[kinds.get(kind, kind)] = file[key]
  return layers


def _reader(path) -> tuple[str, Callable]:
  suffix = pathlib.Path(path).suffix
  if suffix in (".h5", ".keras"):
    return "keras", read_keras
  if suffix in (".safetensors", ".pth", ".pt"):
    return "torch", read_torch
  if suffix == ".npz":
    return "npz", read_npz
  raise ValueError(
    f"{os.fspath(path)!r} is no file of weights; write one that ends in .weights.h5, "
    ".keras, .h5, .safetensors, .pth, .pt or .npz."
  )


def _read(read, path) -> Layers:
  """The layers of a file; whatever its reader raises, the message names the file."""
  try:
    return read(path)
  except (ImportError, FileNotFoundError):
    raise
  except Exception as error:  # every format has errors of its own
    reason = f"{type(error).__name__}: {error}"
    raise ValueError(
      f"{os.fspath(path)!r} is torn or no file of weights ({reason})."
    ) from error


def _head(layers, model, framework) -> str:
  """The published name of the last dense layer; that of older Keras files differs."""
  name = names.head_name(model, framework)
  if framework == "keras" and name not in layers:
    dense = [k for k, v in layers.items() if v.get("kernel", np.empty(0)).ndim == 2]
    return dense[-1] if dense else name
  return name


def _import(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    package = name.partition(".")[0]
    extra = "torch" if package == "torch" else "'jaxadv[convert]'"
    raise ImportError(
      f"reading this file needs {package}; write `pip install {extra}`."
    ) from error


def _check_variant(path, model, framework):
  if getattr(model, "norm", None) == "group":
    raise ValueError(
      "the model has norm='group', which no published weights have; write norm='batch'."
    )
  variant = getattr(model, "variant", framework)
  if variant != framework:
    raise ValueError(
      f"{os.fspath(path)!r} is of {framework}, and the model has variant={variant!r}; "
      f"write variant={framework!r}."
    )


def _arrays(file):
  """Arrays by the name of their layer, which Keras notes beside them."""
  found = {}

  def visit(path, group):
    top, *inner = path.split("/")
    if top not in _LAYERS or "seed_generator" in inner:
      return  # states of the optimizer, of metrics and of random layers
    if path.endswith("vars") and len(group):
      if "name" not in group.attrs:
        raise ValueError(
          f"{path!r} in the file does not say which layer it is of; save it again with "
          "a newer Keras 3."
        )
      found[group.attrs["name"]] = [np.asarray(group[key]) for key in sorted(group)]

  file.visititems(visit)
  return found


def _legacy_arrays(root):
  decoded = lambda names: [n.decode() if isinstance(n, bytes) else n for n in names]
  return {
    layer.replace("/", "_"): [
      np.asarray(root[layer][n]) for n in decoded(root[layer].attrs["weight_names"])
    ]
    for layer in decoded(root.attrs["layer_names"])
  }


def _renumbered(layers):
  """Layers without a name of their own, numbered from 0 in the order of their making.

  Keras counts them through a whole session: `conv2d`, `conv2d_1`, ...
  """
  counted: dict[str, list[tuple[int, str]]] = {}
  for name in layers:
    found = re.fullmatch(r"(conv2d|batch_normalization)(?:_(\d+))?", name)
    if found:
      counted.setdefault(found[1], []).append((int(found[2] or 0), name))
  new = {
    name: f"{kind}_{k}"
    for kind, numbers in counted.items()
    for k, (_, name) in enumerate(sorted(numbers))
  }
  return {new.get(name, name): arrays for name, arrays in layers.items()}


def _named(arrays):
  """Kernel and bias, or a norm; Keras leaves out the scale of some norms."""
  if arrays[0].ndim > 1:
    return dict(zip(("kernel", "bias"), arrays, strict=False))
  if len(arrays) == 3:
    arrays = [np.ones_like(arrays[0]), *arrays]
  return dict(zip(("scale", "bias", "mean", "var"), arrays, strict=True))


def _from_torch(kind, array):
  if kind == "weight" and array.ndim == 1:
    return {"scale": array}
  if kind == "weight":  # (out, in, ...) to (..., in, out)
    return {"kernel": np.moveaxis(array, (1, 0), (-2, -1))}
  return {{"running_mean": "mean", "running_var": "var"}.get(kind, kind): array}


def _fill(variables, layers, namer, dense, *, keep_head):
  """`variables` with the arrays of `layers`, each used once."""
  flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
  filled, used = {}, set()
  for path, leaf in flat.items():
    _, *modules, kind = path.split("/")
    ours = "/".join(part for part in modules if not part.startswith("BatchNorm_"))
    if ours == "head" and keep_head:
      if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(
          f"head=False keeps {path}, which is a shape without values; write the "
          "variables of model.init(...)."
        )
      filled[path] = leaf
      continue
    theirs = dense if ours == "head" else namer(ours)
    filled[path] = _matching(layers, theirs, kind, path, leaf)
    used.add((theirs, kind))
  _check_all_used(layers, used, keep_head)
  return flax.traverse_util.unflatten_dict(filled, sep="/")


def _matching(layers, theirs, kind, path, leaf):
  array = layers.get(theirs, {}).get(kind)
  got = "nothing" if array is None else f"shape {array.shape}"
  if array is None or array.shape != leaf.shape:
    hint = (
      " Write head=False to keep the head." if path.startswith("params/head/") else ""
    )
    raise ValueError(
      f"{path} has shape {leaf.shape}, and the file has {got} as the {kind} of "
      f"{theirs!r}; the weights are of another network.{hint}"
    )
  return array.astype(leaf.dtype)


def _check_all_used(layers, used, keep_head):
  for name, arrays in layers.items():
    auxiliary = name.startswith("AuxLogits.")  # a head for training only
    replaced = keep_head and arrays.get("kernel", np.empty(0)).ndim == 2
    for kind, array in arrays.items():
      if (name, kind) not in used and not (auxiliary or replaced):
        raise ValueError(
          f"the {kind} of {name!r} in the file, shape {array.shape}, has no place in "
          "the model; the weights are of another network."
        )
