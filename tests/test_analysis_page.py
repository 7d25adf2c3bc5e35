"""The blocks of docs/analysis.md run one after the other and draw their pictures."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import models

PAGE = (pathlib.Path(__file__).parents[1] / "docs/analysis.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_block_runs():
  model = models.ConvNet(2, width=8, depth=2)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.uniform(size=(8, 8, 8, 1)), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)
  names = {
    "predict": jax.jit(lambda x: model.apply(variables, x)),
    "x": x,
    "attacked": x + 0.1 * jnp.sign(x - 0.5),
    "y": np.arange(8) % 2,
  }
  pictures = []
  for block in BLOCKS:
    exec(block, names)
    pictures.append(names.pop("picture", b""))
  drawn = [picture for picture in pictures if picture]
  assert len(drawn) == len(BLOCKS) - 1 == 5
  assert all(picture.startswith(b"\x89PNG") for picture in drawn)
  assert names["names"] == ["stage1", "stage2", "pooled"]
  assert names["distances"].shape == (8, 3)
  assert names["found"].known.all()
