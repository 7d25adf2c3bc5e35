"""Targets: what is computed once before the loop."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import losses, targets

X = helpers.stripes(3)
Y = jnp.array([0, 1, 2])
MODEL = helpers.convnet()


def test_decisions_of_the_model_itself():
  logits = np.asarray(MODEL(X)[0])
  got = targets.predictions(MODEL, X, None)["label"]
  np.testing.assert_array_equal(got, logits.argmax(-1))
  got = targets.least_likely(MODEL, X, None)["label"]
  np.testing.assert_array_equal(got, logits.argmin(-1))
  dense = helpers.convnet(dense=True)
  assert targets.predictions(dense, X, None)["label"].shape == (3, 8, 8)


def test_constant():
  assert targets.constant(2)(MODEL, X, None)["label"].tolist() == [2, 2, 2]
  dense = helpers.convnet(dense=True)
  assert targets.constant(1)(dense, X, None)["label"].shape == (3, 8, 8)
  with pytest.raises(ValueError, match=r"label 3 is outside the model's classes 0..2"):
    targets.constant(3)(MODEL, X, None)


def test_clean_logits():
  got = targets.clean_logits(MODEL, X, {"label": Y, "mask": Y > 0})
  assert set(got) == {"label", "mask", "logits"}
  np.testing.assert_array_equal(got["logits"], MODEL(X)[0])


def test_guide_features():
  image = X[::-1]
  got = targets.guide_features(MODEL, X, {"label": Y, "image": image})
  assert set(got) == {"label", "clean_features", "features"}
  for name in ("hidden", "bottleneck"):
    np.testing.assert_array_equal(got["clean_features"][name], MODEL(X)[1][name])
    np.testing.assert_array_equal(got["features"][name], MODEL(image)[1][name])
  assert set(targets.guide_features(MODEL, X, Y)) == {"label", "clean_features"}
  with pytest.raises(ValueError, match=r"reads features; write a predict that returns"):
    targets.guide_features(lambda x: MODEL(x)[0], X, Y)


def test_prototypes_by_hand():
  # 4 x 4 pixels decided as left half 0, right half 1; one feature of 2 x 2 cells
  decided = np.array([[0, 0, 1, 1]] * 4)
  feature = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])[..., None]
  logits = jnp.asarray(np.eye(2)[decided][None])
  wanted = jnp.array([[[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]])
  got = targets.prototypes(
    lambda x: (logits, {"f": feature}), jnp.zeros((1, 4, 4, 1)), wanted
  )
  # prototypes: class 0 the left cells (1 + 3) / 2, class 1 the right ones (2 + 4) / 2
  want = [[3.0, 3.0], [0.75 * 2 + 0.25 * 3, 3.0]]
  np.testing.assert_allclose(got["features"]["f"][0, ..., 0], want, atol=1e-6)
  np.testing.assert_array_equal(got["clean_features"]["f"], feature)


def test_prototypes_of_the_models_own_mask_keep_class_means():
  dense = helpers.convnet(classes=2, dense=True)
  own = jnp.argmax(dense(X)[0], -1)
  got = targets.prototypes(dense, X, own)["features"]["hidden"]
  features = dense(X)[1]["hidden"]
  for k in (0, 1):
    for guide, feature, mask in zip(got, features, own == k, strict=True):
      np.testing.assert_allclose(guide[mask][0], feature[mask].mean(0), atol=1e-5)


def test_prototypes_at_a_size_that_does_not_divide():
  dense = helpers.convnet(classes=2, dense=True)

  def cropped(x):
    logits, features = dense(x)
    return logits, {"odd": features["hidden"][:, :5, :3]}

  own = jnp.argmax(dense(X)[0], -1)
  guide = targets.prototypes(cropped, X, own)["features"]["odd"]
  assert guide.shape == (3, 5, 3, 4)
  assert np.isfinite(guide).all()
  constant = targets.prototypes(
    lambda x: (dense(x)[0], {"odd": jnp.full((3, 5, 3, 1), 7.0)}), X, own
  )
  np.testing.assert_allclose(constant["features"]["odd"], 7.0, rtol=1e-5)


def test_gradient_weights_make_gradients_of_unit_size():
  y = jnp.argmax(MODEL(X)[0], -1)

  def two(sample):
    return jnp.stack([losses.cross_entropy(sample), 50 * losses.margin(sample)])

  target = targets.gradient_weights(two)(MODEL, X, y)
  assert set(target) == {"label", "weights"}
  assert target["weights"].shape == (3, 2)

  def alone(loss, image, label):
    logits = MODEL(image[None])[0][0]
    return loss(helpers.sample(logits, label, clean=image, image=image))

  for n in range(3):
    for s, scale, loss in ((0, 1, losses.cross_entropy), (1, 50, losses.margin)):
      gradient = jax.grad(lambda x, f=loss, n=n: alone(f, x, y[n]))(X[n])
      size = scale * jnp.linalg.norm(gradient.ravel())
      assert target["weights"][n, s] * size == pytest.approx(1, rel=1e-4)
  flat = targets.gradient_weights(lambda s: jnp.zeros(2) * s.image.sum())(MODEL, X, y)
  np.testing.assert_array_equal(flat["weights"], 0)
