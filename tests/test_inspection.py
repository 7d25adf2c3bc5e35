"""What is seen inside a model: which of its maps, and scores that are not defined."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import analysis, analysis_job, data, inspection, models

RNG = np.random.default_rng(0)
WEIGHTS = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
BRIGHT = np.full((6, 8, 8, 3), 0.5, np.float32) + RNG.uniform(0, 0.1, (6, 1, 1, 1))
ENDS = ("clean", "attacked", "distance")


def dataset(labels, *, side=8):
  labels = np.asarray(labels, np.int32)
  n, names = len(labels), ("a", "b", "c")
  images = RNG.uniform(size=(n, side, side, 3)).astype(np.float32)
  return data.Dataset(images, labels, np.arange(n), ["x"] * n, names)


def predict(scale, x):
  """A map, its mean, and three logits."""
  feature = jnp.tanh(x @ WEIGHTS)
  pooled = feature.mean((1, 2))
  return scale * pooled[:, :3], {"map": feature, "pooled": pooled}


def test_grad_cam_is_of_the_last_stage_of_a_network_with_attention():
  model = models.AttnVGG(3, width=1 / 16)
  image = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
  chosen = inspection._features(functools.partial(model.apply, variables), image)
  assert chosen["names"][-4:] == ("stage5", "attention1", "attention2", "pooled")
  assert chosen["map"] == "stage5"
  assert chosen["attention"] == ("attention1", "attention2")
  assert chosen["pooled"] == "pooled"


def test_attention_is_looked_at_beside_grad_cam():
  def gated(scale, x):
    logits, features = predict(scale, x)
    gate = jax.nn.sigmoid(features["map"] @ WEIGHTS.T[:, :1])
    pooled = (gate * features["map"]).mean((1, 2))
    return logits + pooled[:, :3], features | {"gate": gate, "pooled": pooled}

  seen = inspection.subject(gated, 1.0, dataset([0, 1, 2, 0, 1]), 0.1)
  assert 0 < np.abs(seen.attacked - seen.clean).max() <= 0.1 + 1e-6
  found, pictures = inspection.look(seen)
  assert [p.name for p in pictures][:3] == ["heat_maps", "map_gate", "embedding"]
  maps = [gated(1.0, x)[1]["gate"][..., 0] for x in (seen.clean, seen.attacked)]
  overlap = jax.vmap(analysis.top_share_iou)(*maps)
  assert found["iou of gate"] == pytest.approx(float(overlap.mean()), abs=1e-6)
  assert found["iou of gate"] < 1
  heads, ((_, *cells),) = analysis_job.table({"analysis": {"plain": found}})
  assert heads[1:3] == ["IoU of Grad-CAM", "IoU of gate"]
  assert cells[1] == f"{found['iou of gate']:.2f}"


@pytest.mark.parametrize(
  ("labels", "defined"),
  [
    ([0, 0, 1, 1, 2, 2], {"silhouette", "probe"}),
    ([0, 0, 1, 1, 2, 1], {"silhouette"}),  # a class with one image
    ([1, 1, 1, 1, 1, 1], set()),
    (np.eye(3)[[0, 1, 2, 0, 1, 2]], {"correlation"}),  # a finding on every image
  ],
)
def test_scores_that_the_images_do_not_define_are_none(labels, defined):
  found, _ = inspection.look(inspection.subject(predict, 1.0, dataset(labels), 0.1))
  scores = {name: found[name] for name in found if name.partition("_")[2] in ENDS}
  assert len(scores) == (4 if np.ndim(labels) == 1 else 7)
  known = {name.split("_")[0] for name, score in scores.items() if score is not None}
  assert known == defined
  _, ((_, *cells),) = analysis_job.table({"analysis": {"plain": found}})
  assert cells.count("-") == sum(score is None for score in scores.values())


def test_saturated_estimates_have_no_correlation():
  labels = np.eye(3)[[0, 1, 2, 0, 1, 2]]
  sure = lambda scale, x: (jnp.full((len(x), 3), 1e4), predict(scale, x)[1])
  with pytest.raises(ValueError, match="do not depend on the feature 'map'"):
    inspection.look(inspection.subject(sure, 1.0, dataset(labels), 0.1))
  found, pictures = inspection.look(
    inspection.subject(predict, 1e9, dataset(labels)._replace(images=BRIGHT), 0.1)
  )
  assert found["correlation_distance"] is None
  assert "correlations" not in [picture.name for picture in pictures]


def test_features_that_are_not_finite_are_refused():
  nan = lambda scale, x: jax.tree.map(lambda v: v * jnp.nan, predict(scale, x))
  seen = inspection.subject(nan, 1.0, dataset([0, 1, 2, 0, 1, 2]), 0.1)
  with pytest.raises(ValueError, match="not all finite"):
    inspection._separability(seen)


def test_a_model_without_a_map_is_refused():
  flat = lambda scale, x: (predict(scale, x)[0], {"pooled": x.mean((1, 2))})
  with pytest.raises(ValueError, match="needs one with pixels and several channels"):
    inspection.subject(flat, 1.0, dataset([0, 1, 2]), 0.1)
