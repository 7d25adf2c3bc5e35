"""Checkpoints: bit-exact, atomic, and refused when torn or of another state."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import checkpoints, training


def a_state(width=64, seed=0):
  key = jax.random.key(seed)
  params = {
    "w": jax.random.normal(key, (width, width)),
    "half": jnp.ones(3, jnp.bfloat16),
  }
  return training.init_state(key, params, {"mean": jnp.ones(2)}, optax.adam(1e-3))


def leaves(state):
  return [
    np.asarray(jax.random.key_data(x))
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    else np.asarray(x)
    for x in jax.tree.leaves(state)
  ]


def test_typed_keys_and_named_tuples_round_trip_bit_for_bit(tmp_path):
  state = a_state()
  checkpoints.save(tmp_path, state, step=3)
  back = checkpoints.restore(tmp_path, a_state(seed=1))
  assert jax.tree.structure(back) == jax.tree.structure(state)
  for got, want in zip(leaves(back), leaves(state), strict=True):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_a_restored_state_is_bound_to_devices_where_the_other_is(tmp_path):
  """Bound beside unbound arrays, the second step of a loop would compile anew."""
  checkpoints.save(tmp_path, a_state(), step=1)
  device = jax.devices()[1]
  shapes = jax.eval_shape(a_state)
  for like in (a_state(), shapes, jax.device_put(a_state(), device)):
    back = jax.tree.leaves(checkpoints.restore(tmp_path, like))
    bound = [getattr(x, "committed", False) for x in jax.tree.leaves(like)]
    assert [x.committed for x in back] == bound
  assert {x.device for x in back} == {device}


def test_only_the_newest_are_kept_and_a_step_can_be_chosen(tmp_path):
  for step in (1, 2, 30):
    checkpoints.save(tmp_path, {"x": jnp.float32(step)}, step=step)
  assert checkpoints.latest(tmp_path) == 30
  assert len(list(tmp_path.iterdir())) == 2
  like = {"x": jnp.float32(0)}
  assert checkpoints.restore(tmp_path, like, step=2)["x"] == 2
  with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
    checkpoints.restore(tmp_path, like, step=1)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
  checkpoints.save(tmp_path, a_state(), step=1)
  (tmp_path / "step_00000001").rename(tmp_path / "unfinished")
  assert checkpoints.latest(tmp_path) is None
  checkpoints.save(tmp_path, a_state(), step=1)
  assert checkpoints.latest(tmp_path) == 1


def test_another_state_is_refused_and_the_difference_named(tmp_path):
  checkpoints.save(tmp_path, a_state(width=64), step=1)
  with pytest.raises(ValueError, match=r"checkpoint has \(64, 64\).*needs \(32, 32\)"):
    checkpoints.restore(tmp_path, a_state(width=32))


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_any_damage_to_any_file_is_refused(tmp_path, damage):
  state = a_state()
  checkpoints.save(tmp_path, state, step=1)
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert len(files) > 5
  for path in files:
    whole = path.read_bytes()
    spoil(path, whole, damage)
    if whole or damage == "remove":
      with pytest.raises(ValueError, match=r"is torn .*; delete it and run again"):
        checkpoints.restore(tmp_path, state)
    path.write_bytes(whole)
  checkpoints.restore(tmp_path, state)


def spoil(path: pathlib.Path, whole: bytes, damage: str) -> None:
  middle = len(whole) // 2
  if damage == "remove":
    path.unlink()
  elif damage == "cut":
    path.write_bytes(whole[:middle])
  else:
    flipped = bytes([whole[middle] ^ 255]) if whole else b""
    path.write_bytes(whole[:middle] + flipped + whole[middle + 1 :])


def test_bad_numbers_are_refused(tmp_path):
  with pytest.raises(ValueError, match="write step >= 0"):
    checkpoints.save(tmp_path, {}, step=-1)
