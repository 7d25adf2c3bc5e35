"""The small classifier: shapes, features, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv.models import ConvNet


@pytest.mark.parametrize(
  ("shape", "norm"),
  [((2, 28, 28, 1), "group"), ((1, 9, 16, 3), "batch"), ((1, 8, 8, 8, 1), "none")],
)
def test_shapes_and_features(shape, norm):
  model = ConvNet(num_classes=5, width=4, depth=3, norm=norm)
  image = jax.random.uniform(jax.random.key(1), shape)
  variables = jax.jit(model.init)(jax.random.key(0), image)
  logits, features = jax.jit(model.apply)(variables, image)
  assert logits.shape == (shape[0], 5)
  assert set(features) == {"stage1", "stage2", "stage3", "pooled"}
  assert features["stage3"].shape == (shape[0], *(n // 4 for n in shape[1:-1]), 16)
  spatial = tuple(range(1, len(shape) - 1))
  np.testing.assert_allclose(
    features["pooled"], features["stage3"].mean(spatial), atol=1e-6
  )
  assert set(variables) == {"params"} | ({"batch_stats"} if norm == "batch" else set())


def test_half_precision_inside_and_float32_logits():
  model = ConvNet(width=4, depth=2, dtype=jnp.bfloat16)
  image = jnp.zeros((1, 8, 8, 1))
  shapes = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), image))
  (logits, features), variables = shapes
  assert logits.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  assert features["stage2"].dtype == jnp.bfloat16


def test_images_that_do_not_fit_are_refused():
  model = ConvNet(depth=4)
  with pytest.raises(ValueError, match="sides of at least 8, or a lower `depth`"):
    model.init(jax.random.key(0), jnp.zeros((1, 7, 20, 1)))
  with pytest.raises(ValueError, match=r"Write x\[None\] for a single image"):
    model.init(jax.random.key(0), jnp.zeros((16, 16, 1)))
