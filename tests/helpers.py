"""Small models and assertions shared by the tests of the core."""

import importlib.util
import inspect
import pathlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.types import Sample

__all__ = [
  "Counter",
  "assert_trees_close",
  "assert_trees_equal",
  "benchmark",
  "color_pack",
  "convnet",
  "linear",
  "per_pixel",
  "positional",
  "sample",
  "stripes",
  "x64",
]


def benchmark(name: str) -> ModuleType:
  """A script of `benchmarks/`, which is no package, as a module."""
  path = pathlib.Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def color_pack(path: pathlib.Path, *, train: int, test: int) -> pathlib.Path:
  """A pack of red, green and blue noise, 8 pixels a side."""
  rng, labels = np.random.default_rng(0), np.arange(train + test) % 3
  tint = 90 * np.eye(3)[labels][:, None, None]
  images = rng.normal(90, 15, (len(labels), 8, 8, 3)) + tint
  np.savez(
    path,
    images=images.clip(0, 255).astype(np.uint8),
    labels=labels.astype(np.int32),
    split=np.array(["train"] * train + ["test"] * test),
    class_names=np.array(["red", "green", "blue"]),
  )
  return path


def x64():
  """Float64 inside a `with` block: published vectors are checked to 1e-9."""
  return jax.enable_x64(True)


def sample(
  logits: Any,
  label: Any,
  *,
  clean: Any = 0.0,
  image: Any = 0.0,
  features: Any = None,
  progress: float = 0.0,
  target: Mapping[str, Any] | None = None,
) -> Sample:
  """One example with only what a test needs."""
  clean, image = jnp.asarray(clean), jnp.asarray(image)
  return Sample(
    clean=clean,
    image=image,
    delta=image - clean,
    logits=jnp.asarray(logits),
    features=features or {},
    target={"label": jnp.asarray(label)} | dict(target or {}),
    progress=jnp.asarray(progress),
  )


def linear(weights: Any, bias: Any = 0.0) -> Callable:
  """`logits = flatten(x) @ weights + bias`."""
  return lambda x: x.reshape(x.shape[0], -1) @ jnp.asarray(weights) + jnp.asarray(bias)


def per_pixel(x: jax.Array) -> jax.Array:
  """The model of the published vectors: `z0 = 0.5 - x`, `z1 = x - 0.5` per pixel."""
  value = x[..., 0]
  return jnp.stack([0.5 - value, value - 0.5], -1)


def convnet(*, classes: int = 3, dense: bool = False, width: int = 4) -> Callable:
  """Two convolutions with fixed random weights, for images and volumes.

  Returns `(logits, features)`: class logits `(B, K)`, or with `dense` one per pixel.
  """

  def predict(x):
    rank, channels = x.ndim - 2, x.shape[-1]
    rng = np.random.default_rng(rank)
    first = _kernel(rng, rank, channels, width)
    second = _kernel(rng, rank, width, classes)
    hidden = jnp.tanh(_convolve(x - 0.5, first))
    out = _convolve(hidden, second)
    spatial = tuple(range(1, out.ndim - 1))
    logits = out if dense else 4 * out.mean(spatial)
    return logits, {"hidden": hidden, "bottleneck": hidden[:, ::2]}

  return predict


def positional(function: Callable) -> list[str]:
  """Names of the arguments that may be given by position."""
  return [
    name
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.KEYWORD_ONLY
  ]


def stripes(n: int, shape: tuple[int, ...] = (8, 8), channels: int = 2):
  """Images `(n, *shape, channels)` inside (0.2, 0.8), no two alike."""
  rng = np.random.default_rng(7)
  return jnp.asarray(rng.uniform(0.2, 0.8, (n, *shape, channels)), jnp.float32)


class Counter:
  """Wraps a model and counts how often it is traced."""

  def __init__(self, predict: Callable):
    self.predict, self.traces = predict, 0

  def __call__(self, x):
    self.traces += 1
    return self.predict(x)


def assert_trees_equal(got: Any, want: Any) -> None:
  """Same structure, dtypes, shapes and bits."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_trees_close(got: Any, want: Any, *, atol: float) -> None:
  """Same structure, dtypes and shapes; values within `atol`, relative above one."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=atol, atol=atol)


def _kernel(rng, rank, inputs, outputs):
  shape = (3,) * rank + (inputs, outputs)
  scale = 1.5 / np.sqrt(np.prod(shape[:-1]))
  return rng.normal(0, scale, shape).astype(np.float32)


def _convolve(x, kernel):
  spatial = "DHW"[-(x.ndim - 2) :]
  layout = ("N" + spatial + "C", spatial + "IO", "N" + spatial + "C")
  kernel = jnp.asarray(kernel, x.dtype)
  ones = (1,) * (x.ndim - 2)
  return jax.lax.conv_general_dilated(x, kernel, ones, "SAME", dimension_numbers=layout)
