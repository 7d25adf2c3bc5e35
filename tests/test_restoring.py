"""Checkpoints move between numbers of devices and of processes, bit for bit."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import sharded
from jax.sharding import NamedSharding, PartitionSpec

from jaxadv import checkpoints


def two_processes(folder, what):
  """Starts two processes with two devices each."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  flags = "--xla_force_host_platform_device_count=2"
  program = [sys.executable, str(pathlib.Path(__file__).with_name("sharded.py"))]
  return [
    subprocess.Popen(
      [*program, str(port), str(me), str(folder), what],
      env={**os.environ, "XLA_FLAGS": flags},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for me in range(2)
  ]


def ended(processes, status=0):
  """What they said."""
  said = [process.communicate(timeout=240)[0] for process in processes]
  assert [process.returncode for process in processes] == [status] * 2, "\n".join(said)
  return said


def truth():
  return sharded.plain(sharded.make())


def assert_equal(found, wanted):
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name].astype(value.dtype), value, err_msg=name)


def saved_by_eight(folder):
  kinds, _ = sharded.shardings(jax.devices())
  state = jax.jit(sharded.make, out_shardings=kinds)()
  checkpoints.save(folder, state, step=7, settings={"seed": 0})


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_what_eight_devices_saved_is_restored_on_others(tmp_path, count):
  saved_by_eight(tmp_path)
  kinds, whole = sharded.shardings(jax.devices()[-count:])
  like = sharded.shapes(kinds)
  back = checkpoints.restore(tmp_path, like)
  for name, leaf in back.items():
    assert leaf.sharding.is_equivalent_to(like[name].sharding, leaf.ndim)
  assert_equal(sharded.plain(back, whole), truth())
  # a state, whose values are not used, is as good as its shapes
  start = jax.device_put(sharded.make(), kinds)
  assert_equal(sharded.plain(checkpoints.restore(tmp_path, start), whole), truth())


def test_on_eight_devices_other_leaves_may_be_split(tmp_path):
  saved_by_eight(tmp_path)
  mesh = jax.make_mesh((2, 4), ("a", "b"))
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  kinds = {"rows": place("a"), "half": place("b"), "step": place(), "keys": place()}
  back = checkpoints.restore(tmp_path, sharded.shapes({**kinds, "key": place()}))
  assert back["half"].sharding.spec == PartitionSpec("b")
  assert_equal(sharded.plain(back, place()), truth())


def test_what_eight_devices_saved_is_bound_to_none_in_a_fresh_state(tmp_path):
  saved_by_eight(tmp_path)
  back = checkpoints.restore(tmp_path, jax.eval_shape(sharded.make))
  assert not any(leaf.committed for leaf in jax.tree.leaves(back))
  assert_equal(sharded.plain(back), truth())


def test_two_processes_restore_what_one_saved(tmp_path):
  saved_by_eight(tmp_path)
  ended(two_processes(tmp_path, "restore"))
  for me in range(2):
    with np.load(tmp_path / f"{me}.npz") as found:
      assert_equal(dict(found), truth())


def test_one_process_and_two_restore_what_two_saved(tmp_path):
  ended(two_processes(tmp_path, "save"))
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ["step_00000002", "step_00000003"]
  like = jax.eval_shape(sharded.make)
  back = checkpoints.restore(tmp_path, like, settings={"seed": 0})
  assert_equal(sharded.plain(back), truth())
  # Process 0 skips what is torn, and both read the same step.
  (tmp_path / "step_00000003" / "about.json").unlink()
  said = ended(two_processes(tmp_path, "restore"))
  assert "step_00000003 is torn (about.json" in said[0]
  assert "torn" not in said[1]
  for me in range(2):
    with np.load(tmp_path / f"{me}.npz") as found:
      assert_equal(dict(found), truth())


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path):
  processes = two_processes(tmp_path, "train")
  deadline = time.monotonic() + 240
  while len(list(tmp_path.glob("ready*"))) < 2:
    assert all(process.poll() is None for process in processes), ended(processes)
    assert time.monotonic() < deadline
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  said = ended(processes, status=143)
  step = checkpoints.latest(tmp_path)
  for text in said:
    assert f"stopped by SIGTERM; the same command goes on from here at {step}" in text
  back = checkpoints.restore(tmp_path, jax.eval_shape(sharded.make))
  assert int(back["step"]) == 7 + step * 48
