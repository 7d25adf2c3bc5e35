"""Networks of Keras and torchvision with random weights, for the parity tests.

Weights and statistics are all drawn, so that no scale, bias, mean or variance hides at
its initial value. They are representable in float32; everything computes in float64,
where a relu does not flip by rounding.
"""

import importlib
import os
import sys

import jax
import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")

__all__ = ["drawn", "keras_results", "random_keras", "random_torch", "torch_results"]


def drawn(rng, shape, *, positive=False):
  """He-normal kernels; norms near one where `positive`; small everything else."""
  size = int(np.prod(shape))
  # a network may have 10^8 weights: a short random sequence, repeated, is random enough
  values = np.resize(rng.normal(size=min(size, 100_003)), size).reshape(shape)
  if positive:
    return (1 + 0.1 * np.abs(values)).astype(np.float32)
  scale = np.sqrt(2 / np.prod(shape[:-1])) if len(shape) > 1 else 0.1
  return (scale * values).astype(np.float32)


def random_keras(build):
  """`build(keras)` with drawn weights, in float64."""
  keras = pytest.importorskip("keras")
  if keras.backend.backend() != "jax":
    pytest.skip("Keras runs on another backend; KERAS_BACKEND=jax was not set first")
  rng = np.random.default_rng(0)
  initializers = keras.initializers
  before = keras.config.floatx()
  with pytest.MonkeyPatch.context() as patch:
    # drawing through Keras would compile a program per shape
    for kind, positive in (("GlorotUniform", False), ("Zeros", False), ("Ones", True)):
      draw = lambda self, shape, dtype=None, positive=positive: drawn(
        rng, shape, positive=positive
      )
      patch.setattr(getattr(initializers, kind), "__call__", draw)
    try:
      _keras_precision(keras, "float64")
      return build(keras)
    finally:
      _keras_precision(keras, before)


def _keras_precision(keras, name):
  keras.config.set_floatx(name)
  keras.config.set_dtype_policy(name)  # which keeps to the precision of its first use


def random_torch(build):
  """`build(torchvision.models)` with drawn weights, in float64 and evaluation mode."""
  torch = pytest.importorskip("torch")
  zoo = _torchvision(torch).models
  with torch.device("meta"):  # no time spent on initial weights
    model = build(zoo)
  model = model.to_empty(device="cpu")
  rng = np.random.default_rng(0)
  for name, tensor in model.state_dict().items():
    scale = name.endswith(("weight", "running_var")) and tensor.ndim == 1
    if tensor.is_floating_point():
      shape = (
        (*tensor.shape[2:], *tensor.shape[1::-1]) if tensor.ndim > 1 else tensor.shape
      )
      values = drawn(rng, tuple(shape), positive=scale)
      values = np.moveaxis(values, (-2, -1), (1, 0)) if tensor.ndim > 1 else values
      tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))
  return model.double().eval()


def _torchvision(torch):
  """Its classifiers need no compiled part, which may be of another build of torch."""
  try:
    return pytest.importorskip("torchvision")
  except RuntimeError:
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
      del sys.modules[name]
    for name in ("nms", "qnms"):  # of detectors; only declared
      schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
      torch.library.define(f"torchvision::{name}", schema)
    return importlib.import_module("torchvision")


def keras_results(model, images, weights):
  """Logits and the gradient of `sum(weights * logits)` in the images."""

  def loss(images, variables):
    logits, _ = model.stateless_call(*variables, images, training=False)
    return (logits * weights).sum(), logits

  trained = [v.value for v in model.trainable_variables]
  kept = [v.value for v in model.non_trainable_variables]
  with jax.numpy_rank_promotion("allow"):
    gradient, logits = compiled(jax.grad(loss, has_aux=True))(images, (trained, kept))
  return logits, gradient


def torch_results(model, images, weights):
  """As `keras_results`, for images `(B, H, W, C)`."""
  import torch

  x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
  x.requires_grad_()
  logits = model(x)
  (gradient,) = torch.autograd.grad((logits * torch.from_numpy(weights)).sum(), x)
  return logits.detach().numpy(), np.moveaxis(gradient.numpy(), 1, -1)


def compiled(function):
  """Jitted, with LLVM in a hurry: these programs run once."""
  return jax.jit(function, compiler_options=FAST)


FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
