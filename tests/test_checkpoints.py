"""Checkpoints: bit-exact, atomic, and refused when torn or of another state."""

import errno
import os
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxadv
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
  with pytest.raises(ValueError, match="`step` is -1; write 0 or more"):
    checkpoints.save(tmp_path, {}, step=-1)
  with pytest.raises(ValueError, match="`keep` is 0; write 1 or more"):
    checkpoints.save(tmp_path, {}, step=1, keep=0)


def test_a_state_may_be_given_away_while_it_is_being_written(tmp_path):
  """As a training step does, whose state's memory the next one takes over."""
  spoil = jax.jit(lambda x: {"x": x["x"] * 0}, donate_argnums=0)
  with checkpoints.Saver(tmp_path, {"x": jnp.ones(1_000_000)}, keep=9) as saver:
    for step in range(1, 5):
      state = {"x": jnp.full(1_000_000, step, jnp.float32)}
      saver.save(state, step=step)
      jax.block_until_ready(spoil(state))
  for step in range(1, 5):
    back = checkpoints.restore(tmp_path, {"x": jnp.zeros(1_000_000)}, step=step)
    assert (np.asarray(back["x"]) == step).all()


def test_saving_returns_before_the_checkpoint_is_there(tmp_path, monkeypatch):
  """The training goes on while checksums are made; the end of the block waits."""
  go_on = threading.Event()
  write = checkpoints.manifests.write

  def late(*arguments):
    assert go_on.wait(60)
    write(*arguments)

  monkeypatch.setattr(checkpoints.manifests, "write", late)
  with checkpoints.Saver(tmp_path, a_state()) as saver:
    saver.save(a_state(), step=1)
    assert checkpoints.latest(tmp_path) is None
    go_on.set()
  assert checkpoints.latest(tmp_path) == 1


@pytest.mark.parametrize("late", ["the next save", "wait", "the end of the block"])
def test_what_goes_wrong_in_the_background_is_raised(tmp_path, monkeypatch, late):
  checkpoints.save(tmp_path, a_state(), step=1)

  def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

  def run():
    with checkpoints.Saver(tmp_path, a_state()) as saver:
      saver.save(a_state(), step=2)
      if late == "the next save":
        saver.save(a_state(), step=3)
      elif late == "wait":
        saver.wait()

  monkeypatch.setattr(checkpoints.manifests, "write", full)
  line = rf"cannot save step 2 in {tmp_path}: No space left on device; step 1 is kept"
  with pytest.raises(checkpoints.SaveError, match=line):
    run()
  assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
  checkpoints.restore(tmp_path, a_state())


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_torn_checkpoint_is_skipped_for_the_newest_whole_one(
  tmp_path, damage, caplog
):
  for step in (1, 2, 3):
    checkpoints.save(tmp_path, {"x": jnp.float32(step)}, step=step, keep=3)
  like = {"x": jnp.float32(0)}
  for step, name in ((3, "state/_METADATA"), (2, "about.json")):
    path = tmp_path / f"step_{step:08d}" / name
    spoil(path, path.read_bytes(), damage)
  assert checkpoints.restore(tmp_path, like)["x"] == 1
  assert len(caplog.messages) == 2
  for step, line in zip((3, 2), caplog.messages, strict=True):
    assert f"step_{step:08d} is torn" in line
    assert "step 1 is used" in line
    assert "\n" not in line
  # a torn step is not taken for one of those that are kept
  checkpoints.save(tmp_path, like, step=2)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "step_00000001",
    "step_00000002",
  ]


def test_another_run_is_refused_and_the_difference_named(tmp_path, caplog):
  settings = {"eps": 0.1, "seed": 0, "targets": (1, 2)}
  checkpoints.save(tmp_path, a_state(), step=1, settings=settings)
  checkpoints.restore(tmp_path, a_state(), settings=settings)
  checkpoints.restore(tmp_path, a_state())
  other = {"eps": 0.2, "seed": 0, "targets": (1, 2), "more": 1}
  line = (
    "is of another run: eps: checkpoint has 0.1, this run needs 0.2; "
    "more: checkpoint has nothing, this run needs 1"
  )
  with pytest.raises(ValueError, match=line):
    checkpoints.restore(tmp_path, a_state(), settings=other)
  assert not caplog.messages


def test_another_version_is_told_of(tmp_path, caplog, monkeypatch):
  checkpoints.save(tmp_path, a_state(), step=1)
  monkeypatch.setattr(jaxadv, "__version__", "99.0")
  checkpoints.restore(tmp_path, a_state())
  (line,) = caplog.messages
  assert "this is 99.0: bits may differ" in line


def test_a_folder_without_room_is_refused_before_anything_is_computed(
  tmp_path, monkeypatch
):
  (tmp_path / "file").write_text("")
  with pytest.raises(checkpoints.SaveError, match=r"cannot write to .*/file/runs: Not"):
    checkpoints.Saver(tmp_path / "file" / "runs", a_state())
  usage = checkpoints.shutil.disk_usage(tmp_path)
  state = {"x": jnp.zeros(1_000_000)}
  monkeypatch.setattr(
    checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=14_000_000)
  )
  line = r"has 14.0 MB free; checkpoints need 15.1 MB"
  with pytest.raises(checkpoints.SaveError, match=line):
    checkpoints.Saver(tmp_path, state)
  checkpoints.save(tmp_path, state, step=1, keep=1)
  checkpoints.Saver(tmp_path, state)  # what is there already needs no room
