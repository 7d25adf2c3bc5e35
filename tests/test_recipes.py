"""Every block of docs/recipes.md runs, and what it makes attacks."""

import pathlib
import re

import helpers
import jax
import jax.numpy as jnp
import optax
import pytest

from jaxadv import (
  Objective,
  attacks,
  augment,
  budgets,
  combine,
  defences,
  forwards,
  free_training,
  gradient_attack,
  losses,
  threats,
  training,
  transforms,
)

PAGE = (pathlib.Path(__file__).parents[1] / "docs/recipes.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SETS = PAGE[PAGE.index("## Label sets") : PAGE.index("## Defences")]
KEY, EPS = jax.random.key(0), 0.1
X = helpers.stripes(4)
NAMES = {
  "Objective": Objective,
  "attacks": attacks,
  "augment": augment,
  "apply": lambda params, extra, x, train: (helpers.convnet()(x + params)[0], extra),
  "budgets": budgets,
  "combine": combine,
  "defences": defences,
  "dense": lambda params, extra, x, train: (
    helpers.convnet(classes=2, dense=True)(x + params)[0],
    extra,
  ),
  "eps": EPS,
  "f": lambda x: helpers.convnet()(x)[0],
  "forwards": forwards,
  "free_training": free_training,
  "g": lambda x: helpers.convnet()(x)[0] ** 3,
  "gradient_attack": gradient_attack,
  "jnp": jnp,
  "key": KEY,
  "losses": losses,
  "threats": threats,
  "state": training.init_state(KEY, jnp.zeros(()), {}, optax.sgd(0.1)),
  "training": training,
  "transforms": transforms,
  "tx": optax.sgd(0.1),
  "x": X,
  "y": jnp.arange(4) % 3,
}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_recipe_attacks(number):
  names, block = dict(NAMES), BLOCKS[number]
  exec(block, names)
  made = {name: names[name] for name in names.keys() - NAMES.keys() - {"__builtins__"}}
  predict = made.pop("predict", NAMES["f"])
  logits = predict(X)
  sets = block in SETS
  labels = (logits > 0).astype(int) if sets else logits.argmax(-1)
  found = {name: thing for name, thing in made.items() if hasattr(thing, "score")}
  single = ("attack", "weak", "strong", "any_one", "order")
  for name in (*single, "two_classes", "more_classes"):
    if name in made:
      found[name] = jax.jit(lambda x, y, a=made[name]: a(KEY, predict, x, y))(X, labels)
  for name, result in found.items():
    moved = jnp.abs(result.image - X).max()
    # an attack towards what is decided already may stay where it is
    towards = sets and name == "attack" and "targeted" in block
    assert towards or 0 < moved <= EPS + 1e-6, name
  for name, label in (("step", labels), ("masks", jnp.zeros(X.shape[:3], int))):
    if name in made:
      state = training.init_state(KEY, jnp.zeros(()), {}, NAMES["tx"])
      after, _ = jax.jit(made[name])(state, {"image": X, "label": label})
      found[name] = after
      assert after.params != 0
  if names["state"] is not NAMES["state"]:  # the block has trained by itself
    found["state"] = names["state"]
    assert names["state"].params != 0
  for name in ("carried", "pattern"):
    if name in made:
      assert 0 < jnp.abs(made[name].delta).max() <= EPS + 1e-6
  assert found or "predict" in names


def test_label_sets_reach_what_is_wanted():
  """Where every label looks at pixels of its own, every wish comes true."""
  weights = jnp.eye(3)[jnp.arange(X[0].size) % 3]
  shift = (X.reshape(len(X), -1) @ weights).mean(0, keepdims=True)
  linear = lambda x: x.reshape(len(x), -1) @ weights - shift
  (block,) = (block for block in BLOCKS if "hidden" in block)
  names = dict(NAMES) | {"f": linear, "eps": 0.5}
  exec(block, names)
  before = linear(X) > 0
  assert before.any()
  assert not before.all()
  assert not (names["hidden"].logits > 0).any()
  assert ((names["inverse"].logits > 0) != before).all()
  assert ((names["invented"].logits > 0) == before.at[:, 0].set(True)).all()
  for name in ("hidden", "inverse", "invented"):
    assert names[name].success.all()


def test_classes_and_sets_are_not_confused():
  """A loss of classes on a label set is refused, with what to write."""
  labels = (NAMES["f"](X) > 0).astype(int)
  with pytest.raises(ValueError, match="label sets"):
    attacks.pgd(EPS, loss=losses.cross_entropy)(KEY, NAMES["f"], X, labels)
