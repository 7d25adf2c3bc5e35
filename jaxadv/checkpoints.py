"""Checkpoints of any state pytree through Orbax: asynchronous, atomic, self-checking.

One folder per saved step. A checkpoint either exists whole or not at all: it is written
aside and renamed, so a killed process leaves nothing that `latest` would find. Beside
the arrays lie what the run is, the shapes of the leaves and a checksum of every file,
by which a foreign or torn checkpoint is told before Orbax reads it.

With several processes all of them call everything here, at the same point of the run,
on one file system: each writes its shards, process 0 does the rest and decides.
"""

import concurrent.futures
import contextlib
import errno
import logging
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxadv import distributed, manifests, preemption, sharding

__all__ = ["SaveError", "Saver", "latest", "restore", "save"]

State = TypeVar("State")
PathLike = str | os.PathLike[str]

_log = logging.getLogger(__name__)
_OVERHEAD = 2**20  # bytes of Orbax's own files, and more
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class SaveError(OSError):
  """A state that cannot be stored; the message says where and why in one line."""


class Saver(contextlib.AbstractContextManager):
  """Saves while the run goes on.

  `save` returns once the state is copied. Writing ends in the background; the next
  `save`, `wait` and the end of the block wait for it and raise what went wrong.

  Example:
    >>> folder = tempfile.mkdtemp()
    >>> with Saver(folder, {"w": jnp.ones(3)}) as saver:
    ...   for step in (1, 2, 3):
    ...     saver.save({"w": jnp.full(3, step)}, step=step)
    >>> latest(folder)
    3
  """

  def __init__(
    self,
    directory: PathLike,
    like: Any,
    *,
    keep: int = 2,
    settings: Mapping[str, Any] | None = None,
  ) -> None:
    """Checks that there is room, before any work is done that could be lost.

    Args:
      directory: folder of the run; made when missing.
      like: a state, or its shapes: what is going to be saved.
      keep: checkpoints to keep, 1 or more.
      settings: flat, of JSON values: what the state depends on.

    Raises:
      SaveError: when the folder cannot be written, or is too small.
      ValueError: for `keep < 1`.
    """
    if keep < 1:
      raise ValueError(f"`keep` is {keep}; write 1 or more.")
    self._directory = pathlib.Path(directory).absolute()
    self._keep, self._settings = keep, dict(settings or {})
    _check_room(self._directory, _size(like), keep)
    self._orbax = ocp.StandardCheckpointer()
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._pending: concurrent.futures.Future | None = None
    self._step = 0  # of the last save

  def save(self, state: Any, *, step: int) -> None:
    """Copies `state`, to be written as step `step`; then all but the newest go.

    Args:
      state: pytree of arrays and typed keys; its memory may be given away at once.
      step: number of steps taken, 0 or more. Saving a step again replaces it.

    Raises:
      SaveError: when this save, or the one before it, cannot be written.
      ValueError: for a negative `step`.
    """
    if step < 0:
      raise ValueError(f"`step` is {step}; write 0 or more.")
    self.wait()
    self._step = step
    aside = self._directory / "unfinished"
    if jax.process_index() == 0:  # the others wait for it inside Orbax
      shutil.rmtree(aside, ignore_errors=True)
    with self._explained(step):
      self._orbax.save(aside / "state", state)
    leaves = manifests.leaves(state)
    self._pending = self._thread.submit(self._finish, aside, step, leaves)

  def wait(self) -> None:
    """Returns when what was saved is on disk.

    Raises:
      SaveError: when it cannot be written, here or on another process.
    """
    if self._pending is None:
      return
    pending, self._pending = self._pending, None
    with self._explained(self._step):
      failure = pending.exception()
      if jax.process_count() > 1:  # process 0 may rename after the others are done
        failed = multihost_utils.process_allgather(np.bool_(failure is not None))
        if failure is None and failed.any():
          failure = OSError("another process could not write it")
      if failure is not None:
        raise failure

  def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
    """Waits for the last save, but after an error not for other processes."""
    try:
      if kind in (None, preemption.Preempted) or jax.process_count() == 1:
        self.wait()
    finally:
      self._thread.shutdown()
      with self._explained(self._step):  # Orbax may raise a second time
        self._orbax.close()

  def _finish(self, aside, step, leaves):
    self._orbax.wait_until_finished()
    if jax.process_index():
      return
    manifests.write(aside, leaves, self._settings)
    folder = _folder(self._directory, step)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    # What is later than this step was torn, and is made anew.
    steps = _steps(self._directory)
    newest = [each for each in steps if each <= step][-self._keep :]
    for old in set(steps) - set(newest):
      shutil.rmtree(_folder(self._directory, old))

  @contextlib.contextmanager
  def _explained(self, step):
    """One line for whatever a full or broken disk makes Orbax raise."""
    try:
      yield
    except Exception as error:
      # Half a checkpoint is of no use, and the room may be needed.
      if distributed.is_first():
        shutil.rmtree(self._directory / "unfinished", ignore_errors=True)
      left = (_steps(self._directory) or [None])[-1]
      kept = "no checkpoint is left" if left is None else f"step {left} is kept"
      raise SaveError(
        f"cannot save step {step} in {self._directory}: {_reason(error)}; {kept}."
      ) from error


def save(
  directory: PathLike,
  state: Any,
  *,
  step: int,
  keep: int = 2,
  settings: Mapping[str, Any] | None = None,
) -> None:
  """Writes `state` as step `step` and waits for it, as a `Saver` with one save.

  Args:
    directory: folder of the run; made when missing.
    state: pytree of arrays and typed keys.
    step: number of steps taken, 0 or more.
    keep: checkpoints to keep, 1 or more.
    settings: as of a `Saver`.

  Raises:
    SaveError: when it cannot be written.
    ValueError: for a negative `step` or `keep < 1`.
  """
  with Saver(directory, state, keep=keep, settings=settings) as saver:
    saver.save(state, step=step)


def latest(directory: PathLike) -> int | None:
  """The newest finished step in `directory`, or `None`; it may be torn.

  Example:
    >>> print(latest("no-such-folder"))
    None
  """
  return distributed.by_first(lambda: (_steps(directory) or [None])[-1])


def restore(
  directory: PathLike,
  like: State,
  *,
  step: int | None = None,
  settings: Mapping[str, Any] | None = None,
) -> State:
  """Reads a state back, onto the devices of `like`, however many wrote it.

  What is bound to no device there is bound to none here, as in a fresh state: beside a
  bound array the results are bound, and a loop would compile its second step anew.

  Args:
    directory: folder given to `save`.
    like: a state of the same structure, shapes and dtypes; its values are not used. Or
      its shapes, `jax.ShapeDtypeStruct`, with shardings or without.
    step: which step; by default the newest that is whole. Newer ones that are torn are
      skipped with a warning in the log.
    settings: what the state must depend on; by default anything.

  Returns:
    The saved state, bit for bit.

  Raises:
    FileNotFoundError: when there is no such checkpoint; of several processes in the
      first one, the others raise `ValueError`.
    ValueError: when the checkpoints are torn, or the one chosen is of other settings or
      holds other leaves than `like`.

  Example:
    >>> folder = tempfile.mkdtemp()
    >>> save(folder, {"w": jax.numpy.ones(3), "key": jax.random.key(0)}, step=7)
    >>> like = {"w": jax.numpy.zeros(3), "key": jax.random.key(1)}
    >>> restore(folder, like)["w"].tolist()
    [1.0, 1.0, 1.0]
  """
  step = distributed.by_first(_newest_whole, directory, step)
  folder = _folder(directory, step)
  manifests.check(folder, manifests.leaves(like), settings)
  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(folder / "state", jax.tree.map(_place, like))
  return jax.tree.map(_bound_as, state, like)


def _newest_whole(directory, step):
  """The newest whole step, or that step if one is given."""
  steps = [n for n in _steps(directory) if step in (None, n)]
  torn: list[str] = []
  for step in reversed(steps):
    damage = manifests.damage(_folder(directory, step))
    if damage is None:
      for line in torn:
        _log.warning("%s; it is skipped, step %d is used", line, step)
      return step
    torn.append(f"checkpoint {_folder(directory, step)} is torn ({damage})")
  if torn:
    raise ValueError(f"{torn[0]}; delete it and run again.")
  raise FileNotFoundError(f"no finished checkpoint in {directory}; found none to read.")


def _is_bound(leaf):
  return getattr(leaf, "committed", getattr(leaf, "sharding", None) is not None)


def _place(leaf):
  """Where Orbax reads a leaf to; its own default is the devices it was saved from."""
  if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
    return leaf
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  sharding = leaf.sharding if _is_bound(leaf) else here
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bound_as(leaf, like):
  if _is_bound(like) or not isinstance(leaf, jax.Array):
    return leaf
  return sharding.unbound(leaf)


def _folder(directory, step):
  return pathlib.Path(directory).absolute() / f"step_{step:08d}"


def _steps(directory):
  folders = pathlib.Path(directory).glob("step_" + "[0-9]" * 8)
  return sorted(int(folder.name[5:]) for folder in folders)


def _size(state):
  """Bytes of the leaves; a key counts its words."""
  leaves = jax.tree.leaves(state)
  return sum(math.prod(jnp.shape(x)) * jnp.result_type(x).itemsize for x in leaves)


def _check_room(directory, size, keep):
  """Writes a byte, and counts those that are free."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
      file.write(b"0")
    free = shutil.disk_usage(directory).free
  except OSError as error:
    raise SaveError(f"cannot write to {directory}: {error.strerror}") from error
  # One more than is kept, while it is written.
  need = (size + _OVERHEAD) * max(1, keep + 1 - len(_steps(directory)))
  if free < need:
    raise SaveError(
      f"{directory} has {free / 1e6:.1f} MB free; checkpoints need {need / 1e6:.1f} MB."
    )


def _reason(error):
  """The system's own words, where they are inside a longer message."""
  for number in _DISK:
    if os.strerror(number) in str(error):
      return os.strerror(number)
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__
