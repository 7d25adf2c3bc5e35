"""Heat maps, distances in features and loss landscapes, against closed forms."""

import functools

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import compiled

from jaxadv import analysis, losses, models, types
from jaxadv.analysis import heatmaps

RNG = np.random.default_rng(0)
FIRST, HEAD = RNG.normal(size=(2, 5)), RNG.normal(size=(5, 3))


def pooled_and_linear(x):
  """A map, its mean and a dense layer: Grad-CAM is the class activation map there."""
  feature = jnp.tanh(x @ jnp.asarray(FIRST, x.dtype))
  pooled = feature.mean((1, 2))
  logits = pooled @ jnp.asarray(HEAD, x.dtype)
  twice = feature.mean((1, 2))  # the same numbers, which nothing goes on with
  return logits, {"map": feature, "pooled": pooled, "copy": feature + 0, "twice": twice}


def images(n=4, side=6):
  return jnp.asarray(np.random.default_rng(1).uniform(size=(n, side, side, 2)))


def test_grad_cam_before_a_mean_and_a_dense_layer_is_the_activation_map():
  with helpers.x64():
    x, y = images(), jnp.array([0, 1, 2, 1])
    cam = functools.partial(analysis.grad_cam, pooled_and_linear, feature="map")
    got = np.asarray(compiled(cam)(x, y))
    feature = pooled_and_linear(x)[1]["map"]
    cam = jnp.einsum("bhwk,kb->bhw", feature, jnp.asarray(HEAD)[:, y]) / 36
    np.testing.assert_allclose(got, np.maximum(cam, 0), rtol=1e-9, atol=1e-12)
  assert (got > 0).any()
  assert (got == 0).any()


def test_grad_cam_is_the_gradient_that_flax_takes_at_a_perturbed_feature():
  """With a way around the feature, and a layer after it that is not linear."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      first = nn.relu(nn.Conv(4, (3, 3), name="a")(x))
      second = self.perturb("second", nn.tanh(nn.Conv(6, (3, 3), name="b")(first)))
      last = nn.tanh(nn.Conv(4, (3, 3), name="c")(second)) * first
      return nn.Dense(3, name="d")(last.mean((1, 2))), {"second": second}

  with helpers.x64():
    x, y = images(2), jnp.array([1, 1])
    shapes = jax.eval_shape(Net().init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 3)
    params = jax.tree.map(draw, shapes["params"])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes["perturbations"])

    def explained(zeros):
      logits, features = Net().apply({"params": params, "perturbations": zeros}, x)
      return logits[jnp.arange(2), y].sum(), features["second"]

    gradient, feature = compiled(jax.grad(explained, has_aux=True))(zeros)
    weights = gradient["second"].mean((1, 2), keepdims=True)
    want = jnp.maximum((weights * feature).sum(-1), 0)
    predict = lambda x: Net().apply({"params": params}, x)
    for model in (predict, jax.jit(predict)):
      cam = functools.partial(analysis.grad_cam, model, feature="second")
      got = compiled(cam)(x, y)
      np.testing.assert_allclose(got, want, rtol=1e-9)
    assert want.max() > 0


MODELS = {
  "convnet": (models.ConvNet(3, width=8, depth=2), "stage1"),
  "attn_vgg": (models.AttnVGG(3, width=0.125), "stage5"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_rest_of_a_network_goes_on_from_its_feature(name):
  model, feature = MODELS[name]
  x = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.2 + 0.1 * rng.normal(size=leaf.shape), leaf.dtype)
  variables = jax.tree.map(draw, shapes)
  predict = jax.jit(lambda x: model.apply(variables, x))

  def run(x, other):
    value, rest = analysis.after_feature(predict, x, feature)
    return rest(value), rest(other)

  same, moved = compiled(run)(x, predict(x[::-1])[1][feature])
  logits = predict(x)[0]
  np.testing.assert_allclose(same, logits, rtol=1e-5)
  assert not np.allclose(moved, logits, rtol=1e-4)
  if name != "attn_vgg":  # whose gates look at earlier maps, too
    np.testing.assert_allclose(moved, logits[::-1], rtol=1e-5)


def test_features_come_in_the_order_of_the_network():
  model = models.ConvNet(3, width=8, depth=3)
  x = jnp.zeros((1, 8, 8, 1))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
  names = analysis.feature_names(jax.jit(lambda x: model.apply(variables, x)), x)
  assert names == ["stage1", "stage2", "stage3", "pooled"]


@pytest.mark.parametrize(
  ("feature", "message"),
  [
    ("copy", "do not depend on the feature 'copy'"),
    ("twice", "do not depend on the feature 'twice'"),
    ("pooled", r"has shape \(4, 5\), without pixels"),
    ("stage9", r"`feature` is 'stage9'; write one of copy, map, pooled, twice"),
  ],
)
def test_what_grad_cam_cannot_explain_is_refused(feature, message):
  x = images().astype(jnp.float32)
  with pytest.raises(ValueError, match=message):
    analysis.grad_cam(pooled_and_linear, x, jnp.zeros(4, int), feature=feature)


def test_grad_cam_does_not_explain_masks():
  predict = lambda x: (x, {"map": x})
  with pytest.raises(ValueError, match=r"explains logits \(B, K\)"):
    analysis.grad_cam(predict, jnp.ones((1, 2, 2, 2)), jnp.array([0]), feature="map")


def test_an_attention_map_is_the_feature():
  x = images().astype(jnp.float32)
  got = analysis.feature_map(lambda x: (x, {"a": x[..., :1]}), x, feature="a")
  np.testing.assert_array_equal(got, x[..., 0])


def test_the_hottest_fifth_of_two_maps():
  heat = jnp.arange(25.0).reshape(5, 5)  # 20..24 are the hottest
  assert analysis.top_share(heat).sum() == 5
  moved = jnp.where(heat == 24, -1, heat)  # 19..23
  assert analysis.top_share_iou(heat, heat).item() == 1
  assert analysis.top_share_iou(heat, moved).item() == pytest.approx(4 / 6)
  assert analysis.top_share_iou(heat, -heat).item() == 0


def test_zeros_are_not_among_the_hottest():
  sparse = jnp.zeros(10).at[3].set(1.0)
  assert jnp.flatnonzero(analysis.top_share(sparse, share=0.5)).tolist() == [3]
  flat = jnp.ones(10)
  assert not analysis.top_share(flat).any()
  assert analysis.top_share_iou(sparse, flat).item() == 0
  assert jnp.isnan(analysis.top_share_iou(flat, flat))


def test_a_tie_for_the_last_place_is_in_whole():
  heat = jnp.array([0.0, 1.0, 1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
  assert analysis.top_share(heat).sum() == 4


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_the_cosine_distance(scale):
  with helpers.x64():
    a, b = np.random.default_rng(2).normal(size=(2, 3, 4))
    want = 1 - (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    got = analysis.cosine_distance(jnp.asarray(scale * a), jnp.asarray(b))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    opposite = analysis.cosine_distance(jnp.asarray(a), jnp.asarray(-a))
    assert opposite.item() == pytest.approx(2, rel=1e-12)
  zero, one = jnp.zeros(3), jnp.ones(3)
  distances = [analysis.cosine_distance(*pair) for pair in ((zero, zero), (zero, one))]
  assert [value.item() for value in distances] == [0.0, 1.0]


def test_a_small_distance_is_not_lost_in_rounding():
  a = jnp.ones(1000)
  b = a.at[0].add(1e-3)
  got = analysis.cosine_distance(a, b).item()
  assert got == pytest.approx(1e-6 * 999 / 1000 / 2 / 1000, rel=1e-2)


def test_every_layer_has_its_distance():
  x = images().astype(jnp.float32)
  names = ["pooled", "map"]
  got = analysis.layer_distances(pooled_and_linear, x, x[::-1], names=names)
  _, features = pooled_and_linear(x)
  assert got.shape == (4, 2)
  for k, name in enumerate(names):
    a, b = features[name][0].ravel(), features[name][3].ravel()
    want = 1 - a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)
    np.testing.assert_allclose(got[[0, 3], k], want, atol=1e-6)
  with pytest.raises(ValueError, match="`feature` is 'stem'"):
    analysis.layer_distances(pooled_and_linear, x, x, names=["stem"])


def land(x, y, attacked, key=None, **options):
  key = jax.random.key(0) if key is None else key
  call = functools.partial(analysis.landscape, predict=pooled_and_linear, **options)
  return compiled(lambda k, x, y, a: call(k, x=x, y=y, attacked=a))(key, x, y, attacked)


def test_the_landscape_passes_through_both_images():
  with helpers.x64():
    x, y = images(), jnp.array([0, 1, 2, 1])
    attacked = x + 0.1 * jnp.sign(x - 0.5)
    found = land(x, y, attacked)
    s, t = found.along.tolist(), found.across.tolist()
    for image, place in ((x, 0), (attacked, 1)):
      logits, _ = pooled_and_linear(image)
      want = -jax.nn.log_softmax(logits)[jnp.arange(4), y]
      got = found.loss[:, s.index(place), t.index(0)]
      np.testing.assert_allclose(got, want, rtol=1e-9)


def test_the_other_direction_is_as_long_and_at_right_angles():
  with helpers.x64():
    attack = jnp.asarray(np.random.default_rng(3).normal(size=(7, 5)))
    found = analysis.orthogonal(jax.random.key(1), attack)
    assert (found * attack).sum().item() == pytest.approx(0, abs=1e-12)
    lengths = [jnp.linalg.norm(v).item() for v in (found, attack)]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-12)
    assert (analysis.orthogonal(jax.random.key(1), 0 * attack) == 0).all()


def test_a_landscape_of_label_sets_and_of_a_plane():
  """The loss of a linear model that reads the image is linear: the grid is a plane."""
  with helpers.x64():
    x = images(2)
    weights = jnp.asarray(np.random.default_rng(4).normal(size=(72, 3)))
    predict = lambda x: x.reshape(len(x), -1) @ weights
    labels = jnp.array([[1, 0, 1], [0, 0, 1]])
    attacked = x + 0.01
    key = jax.random.key(0)
    options = {"attacked": attacked, "along": (0.0, 1.0, 2.0), "across": (-1.0, 0, 1.0)}
    found = analysis.landscape(
      key, predict, x, labels, loss=lambda s: s.logits[0], **options
    )
    direction = analysis.orthogonal(types.example_keys(key, 2)[1], 0.01 + 0 * x[1])
    plane = lambda s, t: predict((x[1] + s * 0.01 + t * direction)[None])[0, 0]
    want = [[plane(s, t) for t in (-1, 0, 1)] for s in (0, 1, 2)]
    np.testing.assert_allclose(found.loss[1], want, rtol=1e-9)
    sets = analysis.landscape(key, predict, x, labels, **options)
    z, y = predict(x), labels
    want = (jnp.logaddexp(0, z) - y * z).mean(-1)
    np.testing.assert_allclose(sets.loss[:, 0, 1], want, rtol=1e-9)


def test_no_example_depends_on_its_batch():
  x, y = images().astype(jnp.float32), jnp.array([0, 1, 2, 1])
  attacked = x + 0.1 * jnp.sign(x - 0.5)
  keys = types.example_keys(jax.random.key(3), 4)
  pick = slice(1, 3)
  whole = land(x, y, attacked, keys).loss[pick]
  part = land(x[pick], y[pick], attacked[pick], keys[pick]).loss
  np.testing.assert_allclose(part, whole, rtol=1e-5)
  cam = functools.partial(analysis.grad_cam, pooled_and_linear, feature="map")
  cam = compiled(cam)
  np.testing.assert_allclose(cam(x[pick], y[pick]), cam(x, y)[pick], atol=1e-6)
  far = lambda a, b: analysis.layer_distances(pooled_and_linear, a, b, names=["map"])
  np.testing.assert_allclose(
    far(x[pick], attacked[pick]), far(x, attacked)[pick], atol=1e-6
  )


def test_a_landscape_needs_the_same_images():
  x = images().astype(jnp.float32)
  with pytest.raises(ValueError, match=r"`attacked` has shape \(3, 6, 6, 2\)"):
    land(x, jnp.zeros(4, int), x[:3])


def test_a_share_is_one():
  with pytest.raises(ValueError, match=r"`share` is 20; write a number in \(0, 1\]"):
    heatmaps.top_share(jnp.ones(4), share=20)


def test_the_loss_is_ours_by_default():
  x, y = images().astype(jnp.float32), jnp.array([0, 1, 2, 1])
  attacked = x + 0.1
  a, b = (land(x, y, attacked, loss=f) for f in (losses.task_loss, losses.margin))
  assert not np.allclose(a.loss, b.loss)
