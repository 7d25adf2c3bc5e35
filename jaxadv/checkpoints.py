"""Checkpoints of any state pytree through Orbax: typed keys and named tuples included.

One folder per saved step. A checkpoint either exists whole or not at all: it is written
aside and renamed, so a killed process leaves nothing that `latest` would find. Beside
the arrays lie the shapes of the leaves and a checksum of every file, by which a foreign
or torn checkpoint is refused before Orbax reads it.
"""

import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

__all__ = ["latest", "restore", "save"]

State = TypeVar("State")
PathLike = str | os.PathLike[str]


def save(directory: PathLike, state: Any, *, step: int, keep: int = 2) -> None:
  """Writes `state` as step `step`, then drops all but the `keep` newest.

  Args:
    directory: folder of the run; made when missing.
    state: pytree of arrays and typed keys.
    step: number of steps taken, 0 or more. Saving a step again replaces it.
    keep: checkpoints to keep, 1 or more.

  Raises:
    ValueError: for a negative `step` or `keep < 1`.
  """
  if step < 0 or keep < 1:
    raise ValueError(f"`step` is {step} and `keep` {keep}; write step >= 0, keep >= 1.")
  aside = pathlib.Path(directory).absolute() / "unfinished"
  shutil.rmtree(aside, ignore_errors=True)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(aside / "state", state)
  about = {"leaves": _leaves(state), "files": _checksums(aside / "state")}
  (aside / "about.json").write_text(json.dumps(about, indent=1))
  folder = _folder(directory, step)
  shutil.rmtree(folder, ignore_errors=True)
  aside.rename(folder)
  for old in _steps(directory)[:-keep]:
    shutil.rmtree(_folder(directory, old))


def latest(directory: PathLike) -> int | None:
  """The newest finished step in `directory`, or `None`.

  Example:
    >>> print(latest("no-such-folder"))
    None
  """
  steps = _steps(directory)
  return steps[-1] if steps else None


def restore(directory: PathLike, like: State, *, step: int | None = None) -> State:
  """Reads a state back, onto the devices of `like`.

  What is bound to no device there is bound to none here, as in a fresh state: beside a
  bound array the results are bound, and a loop would compile its second step anew.

  Args:
    directory: folder given to `save`.
    like: a state of the same structure, shapes and dtypes; its values are not used.
    step: which step; the newest by default.

  Returns:
    The saved state, bit for bit.

  Raises:
    FileNotFoundError: when there is no such checkpoint.
    ValueError: when the checkpoint is torn, or holds other leaves than `like`.

  Example:
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save(folder, {"w": jax.numpy.ones(3), "key": jax.random.key(0)}, step=7)
    >>> like = {"w": jax.numpy.zeros(3), "key": jax.random.key(1)}
    >>> restore(folder, like)["w"].tolist()
    [1.0, 1.0, 1.0]
  """
  step = latest(directory) if step is None else step
  if step is None or step not in _steps(directory):
    raise FileNotFoundError(
      f"no finished checkpoint in {directory}; found none to read."
    )
  folder = _folder(directory, step)
  about = _about(folder)
  _check_leaves(folder, about["leaves"], _leaves(like))
  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(folder / "state", like)
  return jax.tree.map(_bound_as, state, like)


def _bound_as(leaf, like):
  bound = getattr(like, "committed", getattr(like, "sharding", None))
  if bound or not isinstance(leaf, jax.Array):
    return leaf
  if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jnp.asarray(np.asarray(leaf))
  data = jnp.asarray(np.asarray(jax.random.key_data(leaf)))
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))


def _folder(directory, step):
  return pathlib.Path(directory).absolute() / f"step_{step:08d}"


def _steps(directory):
  folders = pathlib.Path(directory).glob("step_" + "[0-9]" * 8)
  return sorted(int(folder.name[5:]) for folder in folders)


def _about(folder):
  try:
    about = json.loads((folder / "about.json").read_text())
    found = _checksums(folder / "state")
  except (OSError, ValueError) as error:
    raise ValueError(_torn(folder, error)) from error
  for name in sorted(found.keys() | about["files"].keys()):
    if found.get(name) != about["files"].get(name):
      raise ValueError(_torn(folder, f"{name} is not as it was written"))
  return about


def _torn(folder, reason):
  return f"checkpoint {folder} is torn ({reason}); delete it and run again."


def _checksums(folder):
  files = [path for path in folder.rglob("*") if path.is_file()]
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in files
  }


def _leaves(state):
  """Path, shape and dtype of every leaf, as JSON keeps them."""
  paths, _ = jax.tree.flatten_with_path(state)
  return {
    jax.tree_util.keystr(
      path
    ): f"{jax.numpy.shape(leaf)} {jax.dtypes.result_type(leaf)}"
    for path, leaf in paths
  }


def _check_leaves(folder, found, wanted):
  if found == wanted:
    return
  differing = [
    f"{path}: checkpoint has {found.get(path, 'nothing')}, "
    f"this run needs {wanted.get(path, 'nothing')}"
    for path in sorted(found.keys() | wanted.keys())
    if found.get(path) != wanted.get(path)
  ]
  raise ValueError(
    f"checkpoint {folder} is of another state ({len(differing)} leaves differ): "
    + "; ".join(differing[:3])
  )
