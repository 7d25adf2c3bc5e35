"""Stopping in order: SIGTERM and SIGINT are noted, and obeyed where nothing is lost.

A loop asks `requested()` after each step, saves its state and calls `check()`, which
raises `Preempted`. A second signal stops the process at once, as without this file.

With several processes one SIGTERM is enough, and SIGINT is not heard: JAX tells the
others, and all of them stop after the same step. It needs all processes to ask equally
often, in the same order.
"""

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

__all__ = ["Preempted", "check", "requested", "watch"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_seen: list[int] = []  # signals are the process's, and so is this
_asked = itertools.count()


class Preempted(Exception):
  """The run was asked to stop and has stored what it can go on from.

  Attributes:
    status: of the process on exit, 128 and the signal's number as in a shell.
  """

  def __init__(self) -> None:
    name = signal.Signals(_seen[0]).name
    super().__init__(f"stopped by {name}; the same command goes on from here")
    self.status = 128 + _seen[0]


@contextlib.contextmanager
def watch() -> Iterator[None]:
  """Notes signals inside the block instead of dying of them."""
  _seen.clear()
  mine = _SIGNALS if jax.process_count() == 1 else ()  # else SIGTERM is JAX's
  before = {number: signal.getsignal(number) for number in mine}

  def note(number, frame):
    del frame
    _seen.append(number)
    for each in mine:
      signal.signal(each, before[each])
    name = signal.Signals(number).name
    # A print could be inside another one.
    os.write(2, f"jaxadv: {name}: stops after this step, again: at once\n".encode())

  for number in mine:
    signal.signal(number, note)
  try:
    yield
  finally:
    for number in mine:
      signal.signal(number, before[number])


def requested() -> bool:
  """Whether to stop now: ask once per step, on every process.

  Example:
    >>> requested()
    False
  """
  if _seen or jax.process_count() == 1:
    return bool(_seen)
  if multihost_utils.reached_preemption_sync_point(next(_asked)):
    _seen.append(signal.SIGTERM)
  return bool(_seen)


def check() -> None:
  """Stops here, where nothing is lost, if that was requested.

  Raises:
    Preempted: then.
  """
  if requested():
    raise Preempted
