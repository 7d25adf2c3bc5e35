"""The same networks in PyTorch and in JAX, with the same weights, for `peers.py`.

Classifiers are torchvision's with random weights, their norms set to the statistics of
one batch, and come to JAX through `jaxadv.models.convert`. The U-Net is made here and
goes the other way. Without PyTorch ours have random weights of their own.
"""

import contextlib
import copy
import functools
import importlib
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import loop
import numpy as np

from jaxadv import models
from jaxadv.models import convert

__all__ = [
  "Networks",
  "build",
  "device",
  "exact",
  "for_jax",
  "for_torch",
  "import_advlib",
  "import_torch",
  "import_torchvision",
  "once",
  "torch_form",
]

CLASSES = 1000
# LLVM in a hurry, for programs that run once
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# form of a PyTorch network -> mode of its compiler
COMPILED = {"compiled": "default", "graphs": "reduce-overhead"}
# name of a network -> ours, that of torchvision, and options of theirs
CLASSIFIERS = {
  "resnet50": (models.resnet50, "resnet50", {}),
  "vgg16": (functools.partial(models.vgg16, norm="batch"), "vgg16_bn", {}),
  "densenet121": (models.densenet121, "densenet121", {}),
  "inception_v3": (
    models.InceptionV3,
    "inception_v3",
    {"init_weights": False, "aux_logits": False},
  ),
}


class Networks(NamedTuple):
  """One network in every form, with images and what it says of them.

  Attributes:
    ours: images `(B, H, W, 3)` to logits `(B, K)`; per pixel for masks.
    flax: the same on the convolutions and pools of Flax.
    theirs: makes the PyTorch module, or raises ImportError.
    x: images.
    y: decisions on them.
    apply: `(variables, images)` to the logits of `ours`.
    variables: of it.
  """

  ours: Callable[[jax.Array], Any]
  flax: Callable[[jax.Array], Any]
  theirs: Callable[[], Any]
  x: np.ndarray
  y: np.ndarray
  apply: Callable[[Any, jax.Array], Any] | None = None
  variables: Any = None


def build(name: str, *, side: int, batch: int, masks: bool = False) -> Networks:
  """A network by name: `unet<width>` or one of `CLASSIFIERS`."""
  rng = np.random.default_rng(0)
  x = rng.uniform(size=(batch, side, side, 3)).astype(np.float32)
  if name.startswith("unet"):
    model = models.UNet(width=int(name.removeprefix("unet")), norm="batch")
    forward = once(model.apply)
    variables, theirs = _unet(model, forward, x, masks)
    # a decision on the image, for peers that know no masks: the mean over the pixels
    whole = (lambda out: out) if masks else (lambda out: out[0].mean((1, 2)))
  else:
    model, variables, theirs = _classifier(name, x)
    forward, whole = once(model.apply), lambda out: out[0]
  out = whole(forward(variables, x))
  apply = lambda variables, x: whole(model.apply(variables, x))
  return Networks(
    functools.partial(apply, variables),
    lambda x: whole(loop.OnFlax(model).apply(variables, x)),
    theirs,
    x,
    np.asarray((out[0] if masks else out).argmax(-1)),
    apply,
    variables,
  )


def once(function):
  """Jitted, for a program that runs once and is not timed."""
  return jax.jit(function, compiler_options=FAST)


def _unet(model, forward, x, masks):
  variables = once(model.init)(jax.random.key(0), x[:1])
  rng = np.random.default_rng(1)

  def drawn(path, leaf):  # so that folding has something to fold
    near = 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
    return 1 + abs(near) if path[-1].key in ("var", "scale") else near

  moved = jax.tree_util.tree_map_with_path(drawn, variables["batch_stats"])
  variables = {"batch_stats": moved, "params": variables["params"]}
  logits, _ = forward(variables, x)
  # close decisions: half of the pixels, or of the images, are of each class
  lead = logits[..., 1] - logits[..., 0]
  bias = jnp.array([jnp.median(lead if masks else lead.mean((1, 2))), 0.0])
  variables["params"]["head"]["bias"] += bias
  return variables, lambda: _torch_unet(variables, model.width, masks)


def _classifier(name, x):
  make, published, options = CLASSIFIERS[name]
  model = make(CLASSES)
  start = functools.partial(model.init, jax.random.key(0), x[:1])
  try:
    network = _torchvision_network(published, options, x.shape[1])
  except ImportError as error:
    reason = error
    return model, once(start)(), lambda: _raise(reason)
  return model, for_jax(network, model, x.shape[1]), lambda: network


def _raise(error):
  raise error


def for_jax(network, model, side, *, head=None):
  """The weights of a torchvision network as variables of our model."""
  save = importlib.import_module("safetensors.torch").save_file
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  pooled = isinstance(model, models.VGG)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "network.safetensors"
    save(network.state_dict(), path)
    return convert.load(path, model, shapes, head="classifier" if pooled else True)


def _torchvision_network(name, options, side):
  torch = import_torch()
  torch.manual_seed(0)
  network = getattr(import_torchvision().models, name)(num_classes=CLASSES, **options)
  if name.startswith("vgg"):  # the head of transfer learning, which ours has
    network.avgpool = torch.nn.AdaptiveAvgPool2d(1)
    network.classifier = torch.nn.Linear(512, CLASSES)
    for layer in network.features:  # a norm follows, and ours have none before it
      if isinstance(layer, torch.nn.Conv2d):
        layer.bias = None
  norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
  for norm in norms:
    norm.momentum = None  # the statistics are those of the one batch below
  with torch.no_grad():
    network.train()(torch.rand(8, 3, side, side))
  return network.eval().requires_grad_(False)


def _torch_unet(variables, width, masks):
  """Our U-Net with batch norm, in PyTorch."""
  torch = import_torch()
  nn = torch.nn
  flat = flax.traverse_util.flatten_dict(variables, sep="/")
  get = lambda path: torch.from_numpy(np.array(flat[path]))

  def conv(path, k):
    kernel = get(f"params/{path}/Conv_{k}/kernel").permute(3, 2, 0, 1).contiguous()
    layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1, bias=False)
    norm, place = nn.BatchNorm2d(len(kernel)), f"{path}/Norm_{k}/BatchNorm_0"
    layer.weight.data = kernel
    norm.weight.data = get(f"params/{place}/scale")
    norm.bias.data = get(f"params/{place}/bias")
    norm.running_mean = get(f"batch_stats/{place}/mean")
    norm.running_var = get(f"batch_stats/{place}/var")
    return layer, norm, nn.ReLU(inplace=True)

  def up(path):
    kernel = get(f"params/{path}/Dense_0/kernel")
    kernel = kernel.reshape(len(kernel), 2, 2, -1).permute(0, 3, 1, 2).contiguous()
    layer = nn.ConvTranspose2d(kernel.shape[0], kernel.shape[1], 2, 2)
    layer.weight.data, layer.bias.data = kernel, get(f"params/{path}/bias")
    return layer

  block = lambda path: nn.Sequential(*conv(path, 0), *conv(path, 1))
  head = nn.Conv2d(width, 2, 1)
  head.weight.data = get("params/head/kernel").T[:, :, None, None].contiguous()
  head.bias.data = get("params/head/bias")
  steps = range(1, 5)

  class UNet(nn.Module):
    def __init__(self):
      super().__init__()
      self.down = nn.ModuleList([block(f"enc{k}") for k in steps])
      self.bottleneck, self.head = block("bottleneck"), head
      self.up = nn.ModuleList([up(f"up{k}") for k in steps])
      self.across = nn.ModuleList([block(f"dec{k}") for k in steps])

    def forward(self, x):
      skips = []
      for down in self.down:
        x = down(x)
        skips.append(x)
        x = nn.functional.max_pool2d(x, 2)
      x = self.bottleneck(x)
      for up, across in zip(self.up, self.across, strict=True):
        x = across(torch.cat([skips.pop(), up(x)], 1))
      x = self.head(x)
      return x if masks else x.mean((2, 3))

  return UNet().eval().requires_grad_(False)


def torch_form(network, form: str):
  """A copy of a module as `plain`, `channels-last`, `folded`, or in another form.

  Each has what the one before it has. `compiled` is `folded`, too, `graphs` is that
  replayed as CUDA graphs, and `bf16` is `folded` in bfloat16.
  """
  torch = import_torch()
  network = copy.deepcopy(network)
  if form in ("folded", "bf16", *COMPILED):
    network = importlib.import_module("torch.fx.experimental.optimization").fuse(
      network
    )
  network = network.requires_grad_(False).to(device())
  if form != "plain":
    network = network.to(memory_format=torch.channels_last)
  if form in COMPILED:
    return torch.compile(network, mode=COMPILED[form])
  if form == "bf16":
    half = network.to(torch.bfloat16)
    return lambda x: half(x.to(torch.bfloat16)).float()
  return network


def for_torch(networks: Networks, form: str = "plain"):
  """Images in the layout of a form, and decisions, as tensors."""
  torch = import_torch()
  image = torch.from_numpy(networks.x).permute(0, 3, 1, 2)
  layout = torch.contiguous_format if form == "plain" else torch.channels_last
  image = image.contiguous(memory_format=layout)
  return image.to(device()), torch.from_numpy(networks.y).long().to(device())


def import_torch():
  """PyTorch on one thread; on a GPU with products in TF32, as in JAX."""
  torch = importlib.import_module("torch")
  torch.set_num_threads(1)
  _allow_tf32(True)
  return torch


@contextlib.contextmanager
def exact():
  """Products are of float32 inside, on a GPU, too, where TF32 with 10 bits is usual."""
  try:
    _allow_tf32(False)
    with jax.default_matmul_precision("highest"):
      yield
  finally:
    _allow_tf32(True)


def _allow_tf32(allowed):
  torch = sys.modules.get("torch")
  if torch and device() == "cuda":
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def device() -> str:
  """What PyTorch calls the device that JAX runs on."""
  return "cpu" if jax.default_backend() == "cpu" else "cuda"


def import_torchvision():
  """Its classifiers need no compiled part, which may be of another build of torch."""
  torch = import_torch()
  with contextlib.suppress(RuntimeError):
    return importlib.import_module("torchvision")
  for name in [name for name in sys.modules if name.startswith("torchvision.")]:
    del sys.modules[name]
  for name in ("nms", "qnms"):  # of detectors; only declared
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    torch.library.define(f"torchvision::{name}", schema)
  return importlib.import_module("torchvision")


def import_advlib():
  """The segmentation attacks of adv-lib, whose viewer nobody looks at here."""
  import_torchvision()
  sys.modules.setdefault("visdom", types.ModuleType("visdom"))
  return importlib.import_module("adv_lib.attacks.segmentation")
