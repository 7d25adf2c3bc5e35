"""AttnVGG against a plain NumPy gate, and against its layout in PyTorch."""

import foreign
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import models
from jaxadv.models import attn_vgg, convert


def _drawn(model, image):
  """Random variables of the right shapes, in float64."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    positive = jax.tree_util.keystr(path).endswith(("['scale']", "['var']"))
    return foreign.drawn(rng, leaf.shape, positive=positive).astype(np.float64)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def _upsampled(whole, n):
  """Bilinear, half-pixel centres, borders clamped: `align_corners=False`."""

  def matrix(old):
    centres = np.clip((np.arange(n) + 0.5) * old / n - 0.5, 0, old - 1)
    low = np.floor(centres).astype(int)
    high, part = np.minimum(low + 1, old - 1), centres - low
    rows = np.zeros((n, old))
    np.add.at(rows, (np.arange(n), low), 1 - part)
    np.add.at(rows, (np.arange(n), high), part)
    return rows

  rows, columns = (matrix(old) for old in whole.shape[1:3])
  return np.einsum("ph,qw,bhwc->bpqc", rows, columns, whole)


@pytest.mark.parametrize("sides", [(8, 2), (9, 2), (4, 1)])
def test_a_gate_is_its_formula(sides):
  fine, coarse = sides
  rng = np.random.default_rng(1)
  with helpers.x64():
    local = jnp.asarray(rng.normal(size=(2, fine, fine, 6)))
    whole = jnp.asarray(rng.normal(size=(2, coarse, coarse, 5)))
    gate = attn_vgg._Gate(4, None)
    shapes = jax.eval_shape(gate.init, jax.random.key(0), local, whole)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    got = np.asarray(gate.apply(variables, local, whole))
  local, whole = np.asarray(local), np.asarray(whole)
  weights = variables["params"]
  kernel = lambda name: weights[name]["kernel"][0, 0]
  query = _upsampled(whole @ kernel("global"), fine)
  both = np.maximum(local @ kernel("local") + query, 0)
  z = both @ kernel("phi") + weights["phi"]["bias"]
  np.testing.assert_allclose(got, 1 / (1 + np.exp(-z)), rtol=1e-9)
  assert got.shape == (2, fine, fine, 1)


@pytest.fixture(scope="module")
def run():
  """A compiled network and its variables; 32 does not divide the sides."""
  model = models.AttnVGG(3, width=0.125)
  with helpers.x64():
    x = jax.random.uniform(jax.random.key(0), (3, 37, 70, 3), jnp.float64)
    variables, apply = _drawn(model, x), foreign.compiled(model.apply)

  def call(rows):
    with helpers.x64():
      return jax.tree.map(np.asarray, apply(variables, x[np.array(rows)]))

  return call, variables["params"]["head"]


def test_the_dense_layer_sees_the_attended_means(run):
  call, head = run
  logits, features = call([0, 1, 2])
  a1, a2 = features["attention1"], features["attention2"]
  assert a1.shape == (3, 4, 8, 1)
  assert a2.shape == (3, 2, 4, 1)
  for attention in (a1, a2):
    assert 0 < attention.min() < attention.max() < 1

  def pool(image):
    h, w = (n // 2 for n in image.shape[1:3])
    return image[:, : 2 * h, : 2 * w].reshape(3, h, 2, w, 2, -1).max((2, 4))

  parts = [pool(features["stage5"]).mean((1, 2))]
  for attention, stage in ((a1, "stage3"), (a2, "stage4")):
    parts.append((attention * pool(features[stage])).mean((1, 2)))
  pooled = np.concatenate(parts, -1)
  np.testing.assert_allclose(features["pooled"], pooled, rtol=1e-9)
  np.testing.assert_allclose(logits, pooled @ head["kernel"] + head["bias"], rtol=1e-9)


def test_an_example_does_not_depend_on_its_batch(run):
  call, _ = run
  pick = lambda tree, k: jax.tree.map(lambda leaf: leaf[k], tree)
  among_others, among_itself = pick(call([0, 1, 2]), 1), pick(call([1, 1, 1]), 0)
  helpers.assert_trees_close(among_itself, among_others, atol=1e-12)


def _theirs(torch):
  """The authors' network, from its description: names and order of the layers count."""
  nn, functional = torch.nn, torch.nn.functional

  def block(inputs, channels, count):
    layers = []
    for k in range(count):
      conv = nn.Conv2d(inputs if k == 0 else channels, channels, 3, padding=1)
      layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)

  class Gate(nn.Module):
    def __init__(self, channels):
      super().__init__()
      self.W_l = nn.Conv2d(channels, 256, 1, bias=False)
      self.W_g = nn.Conv2d(512, 256, 1, bias=False)
      self.phi = nn.Conv2d(256, 1, 1)

    def forward(self, local, whole):
      query = functional.interpolate(
        self.W_g(whole), size=local.shape[2:], mode="bilinear", align_corners=False
      )
      attention = torch.sigmoid(self.phi(torch.relu(self.W_l(local) + query)))
      return (attention * local).mean((2, 3))

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      plan = [(3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3)]
      for k, sizes in enumerate(plan, 1):
        setattr(self, f"conv_block{k}", block(*sizes))
      self.attn1, self.attn2 = Gate(256), Gate(512)
      self.cls = nn.Linear(1280, 2)

    def forward(self, x):
      pools = []
      for k in range(1, 6):
        x = functional.max_pool2d(getattr(self, f"conv_block{k}")(x), 2)
        pools.append(x)
      first, second = self.attn1(pools[2], x), self.attn2(pools[3], x)
      return self.cls(torch.cat((x.mean((2, 3)), first, second), 1))

  return Network()


def test_weights_of_the_authors_layout_give_the_same_logits_and_gradients(tmp_path):
  torch = pytest.importorskip("torch")
  safetensors = pytest.importorskip("safetensors.torch")
  network = foreign.random_torch(lambda _: _theirs(torch))
  path = tmp_path / "theirs.safetensors"
  safetensors.save_file(network.state_dict(), path)
  rng = np.random.default_rng(1)
  images, weights = rng.uniform(size=(2, 64, 96, 3)), rng.normal(size=(2, 2))
  theirs = foreign.torch_results(network, images, weights)
  model = models.AttnVGG(2)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  variables = convert.load(path, model, shapes)

  def loss(images, variables):
    logits, _ = model.apply(variables, images)
    return (logits * weights).sum(), logits

  with helpers.x64():
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    compiled = foreign.compiled(jax.grad(loss, has_aux=True))
    gradient, logits = compiled(images, variables)
  for got, want in zip((logits, gradient), theirs, strict=True):
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
