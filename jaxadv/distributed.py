"""Several processes, one run: each runs the same program, the first writes.

What is read from a folder while the run goes on is read by the first process, and told
to the others, so that no two decide differently.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxadv import sharding

__all__ = [
  "Refused",
  "barrier",
  "by_first",
  "guarded",
  "is_first",
  "mesh",
  "one_speaks",
  "start",
  "wanted",
]

_SECONDS = 30  # in which a process that is gone, or hangs, is noticed by the others
_LOST = 70  # exit status of a process that stops because another one is gone
_SIGNS = ("Gloo", "UNAVAILABLE", "heartbeat", "Connection", "barrier", "coordination")


class Refused(ValueError):
  """A run that cannot begin or go on with several processes, or devices."""


def wanted() -> bool:
  """Whether the environment says that this is one process of several.

  `$JAX_NUM_PROCESSES` above one, or the hosts of a TPU pod slice.

  Raises:
    Refused: for a variable that is no number.
  """
  hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
  return (_number("JAX_NUM_PROCESSES") or 1) > 1 or "," in hosts


def start() -> None:
  """Joins the other processes of the run; before anything is computed.

  On TPU pods, Slurm and Open MPI JAX finds the others itself; elsewhere it is told by
  `$JAX_COORDINATOR_ADDRESS` (`host:port` of the first process), `$JAX_NUM_PROCESSES`
  and `$JAX_PROCESS_ID`.

  Raises:
    Refused: where the others cannot be found.
  """
  try:
    jax.distributed.initialize(
      num_processes=_number("JAX_NUM_PROCESSES"),
      process_id=_number("JAX_PROCESS_ID"),
      heartbeat_timeout_seconds=_SECONDS,
      shutdown_timeout_seconds=_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    raise Refused(
      f"cannot join the other processes: {error} Set $JAX_COORDINATOR_ADDRESS, "
      "$JAX_NUM_PROCESSES and $JAX_PROCESS_ID, or leave out --distributed."
    ) from error
  # Gloo gives them half a minute to find each other: while all of them are here.
  barrier("started")


def _number(name):
  value = os.environ.get(name)
  if value is not None and not value.isdecimal():
    raise Refused(f"${name} is {value!r}; write a number.")
  return None if value is None else int(value)


def mesh(devices: int | None = None) -> Mesh:
  """The devices that a command works on.

  Args:
    devices: of each process; by default all, but of CPUs one, as several are a
      simulation that shares the same cores.

  Returns:
    A mesh over all processes.

  Raises:
    Refused: for more devices than there are.

  Example:
    >>> mesh().size, mesh(2).size
    (1, 2)
  """
  if devices is not None:  # of CPUs; see `jaxadv.sharding`
    os.environ.setdefault("NPROC", str(4 * devices))
  own = len(jax.local_devices())
  usual = 1 if jax.default_backend() == "cpu" else own
  count = usual if devices is None else devices
  if not 1 <= count <= own:
    raise Refused(f"`devices` is {count}; this process has {own}.")
  chosen = [
    device
    for process in range(jax.process_count())
    for device in [d for d in jax.devices() if d.process_index == process][:count]
  ]
  return sharding.mesh(chosen)


def barrier(name: str) -> None:
  """Waits until all processes are here."""
  multihost_utils.sync_global_devices(name)


def is_first() -> bool:
  """Whether this process writes files and speaks to the user."""
  return jax.process_index() == 0


@contextlib.contextmanager
def guarded() -> Iterator[None]:
  """Inside the block a process that meets the end of another one ends, with one line.

  An orderly end would wait for the dead. Where JAX notices first, it aborts the process
  with a long message of its own: at once when the first process is gone, which keeps
  its service, and after half a minute when one hangs.
  """
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    reason = str(error)
    if jax.process_count() == 1 or not any(sign in reason for sign in _SIGNS):
      raise
    line = (
      f"jaxadv: process {jax.process_index()} stops, another one is gone "
      f"({reason.strip().splitlines()[0][:160]}); the same command goes on from here\n"
    )
    os.write(2, line.encode())  # a print could wait for a lock
    os._exit(_LOST)


@contextlib.contextmanager
def one_speaks() -> Iterator[None]:
  """Inside the block only the first process prints results."""
  with contextlib.ExitStack() as stack:
    if not is_first():
      nowhere = stack.enter_context(open(os.devnull, "w"))
      stack.enter_context(contextlib.redirect_stdout(nowhere))
    yield


def by_first(function: Callable[..., Any], *arguments: Any) -> Any:
  """What `function` returns in the first process, in all of them.

  Args:
    function: called there only, and without a mesh in use.
    *arguments: of it.

  Returns:
    A JSON value.

  Raises:
    Refused: in the other processes, for any error in the first.

  Example:
    >>> by_first(max, 2, 3)
    3
  """
  with sharding.use(None):
    if jax.process_count() == 1:
      return function(*arguments)
    said: dict[str, Any] = {}
    if is_first():
      try:
        said = {"value": function(*arguments)}
        json.dumps(said)
      except Exception:
        _told({})  # the others wait for a word
        raise
  heard = _told(said)
  if "value" not in heard:
    raise Refused("the first process refused to go on; it says why.")
  return heard["value"]


def _told(said):
  """What the first process says, in every process."""
  words = np.frombuffer(json.dumps(said).encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(words))))
  sent = np.resize(words, length)  # only its length matters elsewhere
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(sent)).decode())
