"""One mesh, from one core to a pod: batches cut over devices, states on all of them.

    mesh = sharding.mesh()
    state = sharding.put(mesh, uap.init(key, image))
    step = jax.jit(functools.partial(uap.step, predict))
    for batch in sharding.feed(mesh, batches):
      state, metrics = step(state, batch)  # the compiler adds the one reduction

The same code runs on one device, on eight and, after `jax.distributed.initialize()`, in
many processes, each of which brings its own rows of a batch. `data_parallel` is the
other form of a step, made with `axis_name`; it is what `microbatches` needs.

Several devices simulated on a CPU need more threads than XLA takes by itself, one per
core, or a reduction can wait for devices that have none: set `$NPROC` to some times
their number before JAX starts.
"""

import collections
import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = [
  "AXIS",
  "collect",
  "current",
  "data_parallel",
  "feed",
  "fitting",
  "local",
  "mesh",
  "put",
  "scatter",
  "share",
  "spread",
  "unbound",
  "use",
]

AXIS = "data"  # the name of the axis that rows of a batch are cut over
Tree = TypeVar("Tree")
Batch = Mapping[str, Any]
_USED = contextvars.ContextVar[Mesh | None]("mesh", default=None)


def mesh(
  devices: Sequence[jax.Device] | None = None, *, groups: int | None = None
) -> Mesh:
  """Devices in a row, or in groups that each work on something of their own.

  Args:
    devices: all devices of all processes by default; put in order of the processes.
    groups: with it, the first of two axes, `"group"`; a leading axis of several states
      (seeds, radii, targets, victims) is cut over it.

  Returns:
    A mesh with the axis `"data"`.

  Raises:
    ValueError: for groups that do not divide the devices.

  Example:
    >>> dict(mesh(jax.devices()[:8], groups=2).shape)
    {'group': 2, 'data': 4}
  """
  given = jax.devices() if devices is None else devices
  found = np.array(sorted(given, key=lambda device: (device.process_index, device.id)))
  if groups is None:
    return Mesh(found, (AXIS,))
  if groups < 1 or len(found) % groups:
    raise ValueError(
      f"{len(found)} devices make no {groups} groups; write a divisor of {len(found)}."
    )
  return Mesh(found.reshape(groups, -1), ("group", AXIS))


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
  """Makes a mesh the one that jobs, and loops over images, work on inside the block.

  Args:
    mesh: of all processes, each with as many devices; `None`, or a single device, for
      no mesh at all.

  Example:
    >>> with use(mesh()):
    ...   current().size == jax.device_count()
    True
  """
  token = _USED.set(mesh if mesh is not None and mesh.size > 1 else None)
  try:
    yield
  finally:
    _USED.reset(token)


def current() -> Mesh | None:
  """The mesh in use; `None` where one device does everything."""
  return _USED.get()


def fitting(rows: int, *, microbatches: int | None = None) -> Mesh | None:
  """The mesh in use, with the most of its devices that cut a batch evenly.

  Args:
    rows: of the whole batch.
    microbatches: that divide it, if it is cut into some.

  Returns:
    A mesh with as many devices of every process, or `None` for a single device.

  Raises:
    ValueError: for a batch that the processes cannot share.

  Example:
    >>> with use(mesh(jax.devices()[:4])):
    ...   fitting(6).size
    3
  """
  whole = current()
  if whole is None:
    return None
  parts = rows if microbatches is None else microbatches
  each, left = divmod(parts, jax.process_count())
  if left:
    what = "rows" if microbatches is None else "microbatches"
    raise ValueError(
      f"{parts} {what} cannot be cut evenly over {jax.process_count()} processes; "
      "write a multiple of that number."
    )
  own = len(whole.local_devices)
  count = max(n for n in range(1, own + 1) if each % n == 0)
  places = [n for n in range(whole.size) if n % own < count]
  return None if len(places) == 1 else Mesh(whole.devices.ravel()[places], (AXIS,))


def put(mesh: Mesh, tree: Tree, *, axis: str | None = None) -> Tree:
  """What every process has whole, on the devices of a mesh; typed keys too.

  Args:
    mesh: of all processes.
    tree: arrays, the same in every process.
    axis: of the mesh, which the leading axis of every leaf is cut over; by default
      every device gets the whole.

  Example:
    >>> put(mesh(), jax.numpy.ones(3)).sharding.is_fully_replicated
    True
  """
  where = NamedSharding(mesh, P() if axis is None else P(axis))
  if mesh.is_multi_process:
    return jax.jit(lambda leaves: leaves, out_shardings=where)(tree)
  return jax.device_put(tree, where)


def scatter(mesh: Mesh, batch: Tree) -> Tree:
  """The rows of a batch, cut over the devices of the mesh.

  Args:
    mesh: of all processes.
    batch: tree of `(b, ...)`, the rows of this process. Of P processes the first holds
      the first P-th of the batch, and so on.

  Returns:
    Tree of `(B, ...)` over all processes.

  Raises:
    ValueError: for rows that cannot be cut evenly.

  Example:
    >>> batch = scatter(mesh(), {"image": np.zeros((16, 4, 4, 1))})
    >>> batch["image"].shape
    (16, 4, 4, 1)
  """
  where, devices = NamedSharding(mesh, P(AXIS)), len(mesh.local_devices)
  uneven = {len(leaf) for leaf in jax.tree.leaves(batch) if len(leaf) % devices}
  if uneven:
    raise ValueError(
      f"{min(uneven)} rows cannot be cut evenly over {devices} devices; fill the batch "
      "up with rows of weight 0."
    )
  return jax.tree.map(
    lambda leaf: jax.make_array_from_process_local_data(where, np.asarray(leaf)), batch
  )


def feed(mesh: Mesh, batches: Iterable[Batch], *, ahead: int = 2) -> Iterator[Batch]:
  """Batches on their devices, so many ahead that no step waits for a copy.

  Args:
    mesh: of all processes.
    batches: this process's rows of each.
    ahead: batches on the way or waiting when one is asked for.

  Yields:
    What `scatter` makes of each, in order.

  Example:
    >>> rows = ({"label": np.full(8, n)} for n in range(3))
    >>> [int(batch["label"][0]) for batch in feed(mesh(), rows)]
    [0, 1, 2]
  """
  stream = (scatter(mesh, batch) for batch in batches)
  waiting = collections.deque(itertools.islice(stream, ahead))
  while waiting:
    yield waiting.popleft()
    waiting.extend(itertools.islice(stream, 1))


def data_parallel(step: Callable, mesh: Mesh) -> Callable:
  """A step made with `axis_name="data"`, on the rows that each device holds.

  Args:
    step: `(state, batch) -> (state, metrics)`, which adds up over the axis itself.
    mesh: of all processes.

  Returns:
    The same signature, on whole batches; to be jitted by the caller.

  Example:
    >>> add = lambda state, batch: (state + jax.lax.psum(batch.sum(), AXIS), {})
    >>> step = jax.jit(data_parallel(add, mesh()))
    >>> print(step(0, np.arange(8))[0])
    28
  """
  # What is gathered is the same everywhere, which is more than the checker can see.
  return jax.shard_map(
    step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=False
  )


def share() -> tuple[int, int]:
  """This process and how many of them share the work: `(0, 1)` without a mesh.

  Example:
    >>> share()
    (0, 1)
  """
  return (0, 1) if current() is None else (jax.process_index(), jax.process_count())


def collect(part: np.ndarray) -> np.ndarray:
  """What every process found in its rounds, `(rounds, rows, ...)`, in all of them.

  Returns:
    `(rounds, processes, rows, ...)`.
  """
  if share()[1] == 1:
    return part[:, None]
  return np.moveaxis(multihost_utils.process_allgather(part), 0, 1)


def spread(mesh: Mesh, tree: Tree, *, axis: str = AXIS) -> Tree:
  """Shardings for parameters too large for one device, as fully sharded training does.

  Every leaf is cut along its longest axis that the devices divide; what none divides,
  biases and the like, is replicated. The compiler collects a leaf where it is used.

  Args:
    mesh: of all processes.
    tree: parameters, or their shapes.
    axis: of the mesh.

  Returns:
    A tree of shardings, for `jax.device_put` or `jax.jit`.

  Example:
    >>> spread(mesh(), {"kernel": np.zeros((3, 3, 16, 64))})["kernel"].spec
    P(None, None, None, 'data')
  """
  devices = mesh.shape[axis]

  def place(leaf):
    fits = [n for n, size in enumerate(leaf.shape) if size % devices == 0]
    longest = max(fits, key=lambda n: leaf.shape[n], default=None)
    spec = [axis if n == longest else None for n in range(len(leaf.shape))]
    return NamedSharding(mesh, P(*spec))

  return jax.tree.map(place, tree)


def local(tree: Tree) -> Tree:
  """This process's copy of what is replicated, bound to none of its devices.

  Without a mesh in use, the tree as it is.
  """
  return tree if current() is None else jax.tree.map(unbound, tree)


def unbound(leaf: jax.Array) -> jax.Array:
  """A copy of a replicated array, or of typed keys, that is bound to no device.

  Example:
    >>> unbound(put(mesh(), jnp.ones(2))).committed
    False
  """
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    data = unbound(jax.random.key_data(leaf))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
  return jnp.asarray(np.asarray(leaf))
