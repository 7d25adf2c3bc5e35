"""A state on several devices, and what each of two processes does with it.

Run as `python sharded.py PORT PROCESS FOLDER WHAT` it is one of the two processes.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def make():
  """Every kind of leaf there is in a state."""
  return {
    "rows": jax.random.normal(jax.random.key(2), (16, 3)),
    "half": jnp.arange(8, dtype=jnp.bfloat16),
    "step": jnp.int32(7),
    "key": jax.random.key(5),
    "keys": jax.random.split(jax.random.key(1), 8),
  }


def shardings(devices):
  """Some leaves split over a mesh, some on all of it; and the latter sharding."""
  mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)
  split = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  kinds = {"rows": split, "half": whole, "step": whole, "key": whole, "keys": split}
  return kinds, whole


def shapes(kinds):
  bind = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(bind, jax.eval_shape(make), kinds)


def plain(state, whole=None):
  """As NumPy arrays, keys as their words."""

  def words(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x

  gather = jax.jit(lambda tree: jax.tree.map(words, tree), out_shardings=whole)
  return jax.tree.map(np.asarray, gather(state))


def _save(folder, me):
  from jaxadv import checkpoints

  kinds, _ = shardings(jax.devices())
  state = jax.jit(make, out_shardings=kinds)()
  assert checkpoints.latest(folder) is None
  with checkpoints.Saver(folder, state, settings={"seed": 0}) as saver:
    for step in (1, 2, 3):
      saver.save(state, step=step)
  assert checkpoints.latest(folder) == 3


def _restore(folder, me):
  from jaxadv import checkpoints

  kinds, whole = shardings(jax.devices())
  fresh = checkpoints.restore(folder, jax.eval_shape(make), settings={"seed": 0})
  assert fresh["rows"].is_fully_addressable
  back = checkpoints.restore(folder, shapes(kinds), settings={"seed": 0})
  assert len(back["rows"].sharding.device_set) == 4
  back = {k: v.astype(np.float64) for k, v in plain(back, whole).items()}
  np.savez(f"{folder}/{me}.npz", **back)


def _train(folder, me):
  """Steps until one of the two processes is told to stop."""
  from jaxadv import checkpoints, loops, preemption

  kinds, _ = shardings(jax.devices())
  state = jax.jit(make, out_shardings=kinds)()

  def add(state, batch):
    return {**state, "step": state["step"] + state["rows"].size}, {}

  def on_step(n, state, metrics):
    time.sleep(0.02 * (1 + me))
    if n == 5:
      pathlib.Path(folder, f"ready{me}").touch()
    if preemption.requested():
      checkpoints.save(folder, state, step=n)
      raise preemption.Preempted

  step = jax.jit(add, out_shardings=(kinds, {}))
  try:
    with preemption.watch():
      loops.fit(step, state, [{}] * 10_000, num_steps=10_000, on_step=on_step)
  except preemption.Preempted as stop:
    print(stop, "at", checkpoints.latest(folder), flush=True)
    return stop.status


def main(port, me, folder, what):
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  address = f"127.0.0.1:{port}"
  jax.distributed.initialize(address, 2, int(me), heartbeat_timeout_seconds=60)
  return {"save": _save, "restore": _restore, "train": _train}[what](folder, int(me))


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
