"""Every attack, every promise: the checks each row of `conformance.ROWS` must pass."""

import inspect

import conformance
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import BATCH, ROWS, assert_allowed, assert_same, base
from jax.sharding import NamedSharding, PartitionSpec

import jaxadv
from jaxadv import attacks, masks

each_row = pytest.mark.parametrize("row", ROWS, ids=str)
MASKS = [row for row in ROWS if row.dense]
FAR = ("cos_pgd", "smia")  # on masks: a small ball, and the threshold as it is


def test_every_attack_has_a_row():
  # a universal perturbation is no attack on examples; test_universal.py has its own
  shared = {name for name in attacks.__all__ if name.endswith("universal")}
  assert len(shared) == 4
  assert {row.name for row in ROWS} == set(attacks.__all__) - shared
  assert set(attacks.__all__) <= set(dir(attacks))


@each_row
def test_result_has_the_promised_shapes_and_types(row):
  task, result, *_ = base(row)
  logits = task.predict(task.x)[0]
  attack = row.make(row.size)
  losses = result.losses.shape[2:]  # () or the S losses of one step
  want = {
    "image": (task.x.shape, jnp.float32),
    "delta": (task.x.shape, jnp.float32),
    "score": ((BATCH,), jnp.float32),
    "logits": (logits.shape, jnp.float32),
    "losses": ((attack.num_steps, BATCH, *losses), jnp.float32),
    "success": ((BATCH,), jnp.bool_),
    "steps": ((BATCH,), jnp.int32),
    "nonfinite": ((BATCH,), jnp.int32),
    "forwards": ((BATCH,), jnp.int32),
    "backwards": ((BATCH,), jnp.int32),
  }
  got = {name: (leaf.shape, leaf.dtype) for name, leaf in result._asdict().items()}
  assert got == {name: (shape, jnp.dtype(kind)) for name, (shape, kind) in want.items()}
  assert result.robust.shape == (BATCH,)
  assert all(np.isfinite(leaf).all() for leaf in result)
  np.testing.assert_array_equal(result.nonfinite, 0)
  assert (result.steps >= 1).all()
  assert (result.steps <= attack.num_steps).all()
  assert attack.can_stop or (result.steps == attack.num_steps).all()
  per_step = 2 if row.name in ("asma", "smia") else 1
  np.testing.assert_array_equal(result.forwards, per_step * result.steps)
  gradients = 0 if row.name == "square" else int(np.prod(losses))
  np.testing.assert_array_equal(result.backwards, gradients * result.steps)
  assert gradients == {"msa_literal": 3, "deepfool": 2, "square": 0}.get(row.name, 1)


@each_row
def test_ball_and_bounds(row):
  task, result, *_ = base(row)
  assert_allowed(row, task.x, result.image)


@each_row
def test_ball_and_bounds_notice_an_image_pushed_out(row):
  task, result, *_ = base(row)
  far = {"linf": 2 * row.size, "l2": 2 * row.size, "l1": 2 * row.size, None: 2.0}
  ones = jnp.ones_like(task.x[:1])
  order = {"linf": jnp.inf, "l2": 2, "l1": 1, None: jnp.inf}[row.norm]
  push = far[row.norm] * ones / jnp.linalg.norm(ones.ravel(), order)
  for sign in (1, -1):
    with pytest.raises(AssertionError, match=r"range|ball"):
      assert_allowed(row, task.x, result.image + sign * push)
  if row.bits is not None:
    with pytest.raises(AssertionError, match="grid"):
      assert_allowed(row, task.x, jnp.clip(result.image + 0.001, 0, 1))


@each_row
def test_logits_score_and_success_are_those_of_the_returned_image(row):
  task, result, *_ = base(row)
  np.testing.assert_allclose(result.logits, task.predict(result.image)[0], atol=1e-5)
  added = jnp.clip(task.x + result.delta, 0, 1)
  atol = 1e-6 if row.bits is None else 0.5 / 255 + 1e-6
  np.testing.assert_allclose(result.image, added, atol=atol)
  label = task.y["label"] if isinstance(task.y, dict) else task.y
  decided = jnp.argmax(result.logits, -1)
  if row.task == "class":
    np.testing.assert_array_equal(result.success, decided != label)
  elif row.task == "set":
    flipped = (result.logits > 0) != label
    np.testing.assert_array_equal(result.success, flipped.any(1))
  else:
    overlap = (decided & label).sum((1, 2)) / (decided | label).sum((1, 2))
    below = overlap < 0.5
    reached = overlap >= (0.95 if row.name in FAR else 0.8)
    np.testing.assert_array_equal(
      result.success, below if row.name == "seg_pgd" else reached
    )


def _distance_to_goal(row, task, image):
  """What every attack is for, measured without any of its losses: 0 is there."""
  logits = task.predict(image)[0]
  label = task.y["label"] if isinstance(task.y, dict) else task.y
  if row.task == "set":
    share = jax.nn.sigmoid((2 * label - 1) * logits)
    # square stops at the first label that flips
    return float((share.min(1) if row.name == "square" else share).mean())
  if row.task == "class":
    share = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), label[:, None], 1)
    return float(share.mean())
  overlaps = jax.vmap(lambda a, b: masks.iou(a, b, 2))(jnp.argmax(logits, -1), label)
  return float((overlaps if row.name == "seg_pgd" else 1 - overlaps).mean())


@each_row
def test_it_gets_somewhere(row):
  task, result, *_ = base(row)
  before = _distance_to_goal(row, task, task.x)
  after = _distance_to_goal(row, task, result.image)
  assert after < 0.95 * before, f"{before} -> {after}"
  assert 0 < result.success.mean() <= 1 or row.name in FAR


@each_row
@pytest.mark.parametrize("n", [7, BATCH], ids="batch {}".format)
def test_an_example_does_not_know_its_neighbours(row, n):
  task, result, _, run = base(row)
  index = np.random.default_rng(n).permutation(BATCH)[:n]
  part = task.take(index)
  assert_same(run(part.keys, part.x, part.y), _pick(result, index))


def test_a_model_that_mixes_its_batch_is_noticed():
  row = next(row for row in ROWS if row.name == "pgd")
  task = base(row).problem
  part = task.take(slice(0, 7))

  def mixed(x):  # batch statistics, as of a batch norm left in training mode
    return task.predict(x - x.mean(0, keepdims=True) + 0.5)[0]

  run = jax.jit(lambda keys, x, y: row.make(row.size)(keys, mixed, x, y))
  whole, alone = (run(p.keys, p.x, p.y) for p in (task, part))
  with pytest.raises(AssertionError, match="image"):
    assert_same(alone, _pick(whole, np.arange(7)))


@each_row
def test_eager_and_stepwise_equal_jit(row):
  task, result, *_ = base(row)
  part, attack = task.take(slice(0, 7)), row.make(row.size)
  want = _pick(result, np.arange(7))
  assert_same(attack(part.keys, part.predict, part.x, part.y), want)
  assert_same(attack.run_stepwise(part.keys, part.predict, part.x, part.y), want)


@each_row
def test_eight_devices_equal_one(row):
  task, result, _, run = base(row)
  assert jax.device_count() == 8
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("data"))
  got = run(*jax.device_put((task.keys, task.x, task.y), split))
  assert got.image.sharding.is_equivalent_to(split, got.image.ndim)
  assert_same(got, result)


@each_row
def test_eight_batches_of_one_under_pmap_equal_jit(row):
  task, result, *_ = base(row)
  part = task.take(slice(0, 8))
  data = jax.tree.map(lambda leaf: leaf[:, None], (part.keys, part.x, part.y))
  run = jax.pmap(lambda keys, x, y: row.make(row.size)(keys, task.predict, x, y))
  got = run(*data)
  losses = jnp.moveaxis(got.losses[:, :, 0], 0, 1)  # the history is (T, B)
  got = jax.tree.map(lambda leaf: leaf[:, 0], got._replace(losses=()))
  assert_same(got._replace(losses=losses), _pick(result, np.arange(8)))


@each_row
def test_eight_sizes_under_vmap_trace_the_model_as_often_as_one(row):
  task, result, traces, _ = base(row)
  part = task.take(slice(0, 2))
  counter = helpers.Counter(task.predict)

  @jax.jit
  @jax.vmap
  def sweep(size):
    return row.make(size)(part.keys, counter, part.x, part.y)

  sizes = row.size * jnp.arange(1, 9) / 4  # the fourth is the row's own
  got = sweep(sizes)
  # labels are concrete here, which costs one abstract trace to check them
  assert counter.traces <= traces + 1
  assert_same(jax.tree.map(lambda leaf: leaf[3], got), _pick(result, np.arange(2)))
  moved = jnp.abs(got.image - part.x[None]).reshape(8, -1).sum(1)
  assert (moved > 0).all() or row.bits  # a small size may round to nothing
  assert moved[-1] != moved[0]
  if row.norm is not None:
    assert moved[-1] > moved[0]
    for size, image in zip(sizes, got.image, strict=True):
      assert_allowed(row._replace(size=float(size)), part.x, image)


@each_row
def test_the_model_is_traced_a_bounded_number_of_times(row):
  traces = base(row).traces
  assert 2 <= traces <= 8, traces


@each_row
def test_every_float_may_be_traced(row):
  task, attack = base(row).problem, getattr(attacks, row.name)
  floats = {
    name: parameter.default
    for name, parameter in inspect.signature(attack).parameters.items()
    if isinstance(parameter.default, float)
  }
  radius = () if row.norm is None else (row.size,)
  bounds = (0.0, 1.0)

  def run(radius, floats, bounds):
    made = attack(*radius, **floats, bounds=bounds)
    return made(task.keys, task.predict, task.x, task.y)

  got = jax.eval_shape(run, radius, floats, bounds)
  assert got.image.shape == task.x.shape
  assert got.image.dtype == task.x.dtype


@each_row
def test_broken_examples_stay_finite_are_counted_and_harm_nobody(row):
  """A model that is NaN for dark images and constant for bright ones."""
  task, result, *_ = base(row)
  part = task.take(slice(0, 8))
  x = part.x.at[6].set(0.1).at[7].set(0.9)

  def predict(x):
    level = jax.lax.stop_gradient(x.mean(tuple(range(1, x.ndim))))
    factor = jnp.where(level < 0.15, jnp.nan, jnp.where(level > 0.85, 0.0, 1.0))

    def spoil(leaf):
      return leaf * factor.reshape(-1, *(1,) * (leaf.ndim - 1))

    return jax.tree.map(spoil, task.predict(x))

  attack = row.make(row.size)
  got = jax.jit(lambda keys, x, y: attack(keys, predict, x, y))(part.keys, x, part.y)
  begin = x[6:]
  # they start anywhere
  if row.name in ("pgd", "apgd", "seg_pgd", "cos_pgd", "square"):
    start, _ = attack.init(part.keys[6:], predict, x[6:], part.y[6:])
    begin = jnp.clip(x[6:] + start.delta, 0, 1)
  if row.bits is not None:
    begin = jnp.round(begin * 255) / 255
  # healthy neighbours
  assert_same(_pick(got, np.arange(6)), _pick(result, np.arange(6)))
  # not a number: unmoved, on record, neither fooled nor robust
  assert got.nonfinite[6] >= attack.num_steps
  assert not got.success[6]
  assert not got.robust[6]
  # constant: nothing to follow, nothing moved, nothing invented
  assert got.nonfinite[7] == 0
  assert np.isfinite(got.losses[:, 7]).all()
  np.testing.assert_allclose(got.image[6:], begin, atol=1e-6)
  assert_allowed(row, x, got.image)


@each_row
def test_a_half_precision_model_leaves_the_state_in_single_precision(row):
  task = base(row).problem.take(slice(0, 4))

  def predict(x):
    return jax.tree.map(
      lambda leaf: leaf.astype(jnp.bfloat16), task.predict(x.astype(jnp.bfloat16))
    )

  attack = row.make(row.size)
  state, _ = jax.eval_shape(
    lambda *data: attack.init(data[0], predict, *data[1:]), task.keys, task.x, task.y
  )
  got = jax.jit(lambda keys, x, y: attack(keys, predict, x, y))(
    task.keys, task.x, task.y
  )
  assert got.logits.dtype == jnp.bfloat16
  for leaf in jax.tree.leaves((state, got._replace(logits=()))):
    assert leaf.dtype != jnp.bfloat16
    assert leaf.dtype != jnp.float16
  assert {got.image.dtype, got.losses.dtype, got.score.dtype} == {jnp.dtype("float32")}
  assert_allowed(row, task.x, got.image)
  before = _distance_to_goal(row, task, task.x)
  assert _distance_to_goal(row, task, got.image) < before


@pytest.mark.parametrize("row", MASKS, ids=str)
def test_volumes_are_attacked_like_images(row):
  task = conformance.problem(row, (4, 6, 6), 3)
  got = jax.jit(lambda k, x, y: row.make(row.size)(k, task.predict, x, y))(
    task.keys, task.x, task.y
  )
  assert got.image.shape == (3, 4, 6, 6, 2)
  assert got.logits.shape == (3, 4, 6, 6, 2)
  assert_allowed(row, task.x, got.image)
  before = _distance_to_goal(row, task, task.x)
  assert _distance_to_goal(row, task, got.image) < 0.97 * before


def test_the_package_offers_the_attacks():
  assert jaxadv.attacks is attacks


def _pick(result, index):
  picked = jax.tree.map(lambda leaf: leaf[index], result._replace(losses=()))
  return picked._replace(losses=result.losses[:, index])
