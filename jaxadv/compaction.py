"""Attacks on data sets: examples that are done make room for those that wait.

Examples wait on the host. They pass three compiled programs, each of which sees a full
bucket of them: the start of the attack, some of its steps, again and again, and its
end. After each turn those that are through leave, and others take their places.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import inputs, stepping
from jaxadv.engine import Attack
from jaxadv.types import Array, AttackResult, Predict, example_keys

__all__ = ["attack_dataset"]

Batch = Mapping[str, Any]
# number of the batch, row in it, rows it has
Place = tuple[int, int, int]
# where an example belongs, and what is known of it: NumPy leaves without a batch axis
Row = tuple[Place, Any]


def attack_dataset(
  attack: Attack,
  key: Array,
  predict: Predict,
  batches: Iterable[Batch],
  *,
  bucket: int = 16,
  smallest: int | None = None,
  chunk: int = 4,
) -> Iterator[AttackResult]:
  """Attacks a stream of batches, and spends no steps on examples that are done.

  A batch in one compiled loop runs until its last example has stopped. Here examples of
  all batches share a bucket, which takes `chunk` steps at a time; those that have
  stopped, or taken all steps, then make room for the next ones of the stream. With an
  attack that does not stop early nothing is saved.

  An example's key is `fold_in(key, id)`, and the model always sees `bucket` images. So
  on CPU no bit of a result depends on batches, order, neighbours or `chunk`, and these
  are the bits of

      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["id"])
      jax.jit(lambda keys, x, y: attack(keys, predict, x, y))(keys, x, y)

  on batches of `bucket` images, where XLA compiles the parts of an attack alike by
  themselves and as a whole. It does for most; the losses of `mafl_linf` differ in their
  last bits. For other numbers of images it adds up in another order, and results agree
  up to rounding and what follows from it. That is why the bucket does not shrink by
  itself: at the end of the stream, empty places repeat an example, for the steps of one
  bucket at most.

  Args:
    attack: from `jaxadv.attacks` or `gradient_attack`; one with `stop` is worth it.
    key: one typed key.
    predict: images to logits or `(logits, features)`, in evaluation mode, such as
      `jaxadv.freeze(predict, x)`. Programs are compiled for the last few pairs of
      attack and model: pass the same objects again, and they are there. Its weights are
      constants in them: pass a new function when they change.
    batches: mappings with `image (B, ..., C)` and `label`, as `jaxadv.data.batches`
      yields them; B may change. `label` may be all the attack takes as `y`, a mapping
      with `"label"`; other entries, such as `mask`, join it. `id (B,)` is the number in
      the stream by default. `weight` is not looked at: images that fill up a batch are
      attacked like the others.
    bucket: images per model call, a power of two.
    smallest: bucket that suffices when the stream is at its end, a power of two: fewer
      places are left empty, and the last bits of the last examples may change. By
      default `bucket`.
    chunk: steps between two looks at who is done.

  Yields:
    For each batch, in order, an `AttackResult` of NumPy arrays with a row for each of
    its own, as soon as all of them are done. Meanwhile the stream is read ahead, by
    `bucket * (num_steps / chunk + 4)` images and a batch at most.

  An error of the stream comes when it is read, before the results of the batches that
  are still on their way.

  Raises:
    TypeError, ValueError: at once for an attack without steps, a key that is not one
      typed key, a model that cannot be hashed, and numbers that do not fit; when its
      turn comes, for a batch without images or labels, or of other shapes than the
      first, and for all that `attack` refuses.

  Example:
    >>> from jaxadv import attacks, types
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> x = np.array([[0.5, 0.5], [0.9, 0.9], [0.05, 0.05]], np.float32)
    >>> stream = [{"image": x[:2], "label": np.zeros(2, int)},
    ...           {"image": x[2:], "label": np.zeros(1, int)}]
    >>> attack = attacks.pgd(1.0, step_size=0.2, random_start=False,
    ...   stop=types.fooled, bounds=(-1.0, 1.0))
    >>> key, predict = jax.random.key(0), lambda x: x @ weights
    >>> for result in attack_dataset(attack, key, predict, stream, bucket=2):
    ...   print(result.success, result.steps)
    [ True  True] [3 5]
    [ True] [1]
  """
  smallest = bucket if smallest is None else smallest
  _check(attack, key, predict, bucket, smallest, chunk)
  start, advance, finish = _programs(attack, predict, chunk)
  known = jax.jit(lambda x: predict(x))  # traced once for all checks
  size = functools.partial(_size, bucket, smallest)
  check = functools.partial(_check_target, known)
  rows = _in_blocks(start, _read(attack, key, known, batches), bucket, size, check)
  through = _in_turns(advance, rows, bucket, size, attack.num_steps)
  return _in_order(_in_blocks(finish, through, bucket, size))


class _Running(NamedTuple):
  """Examples on their way.

  Attributes:
    x: clean images.
    target: what `Attack.init` made of the labels.
    state: of the attack, keys as `_Key`.
    losses: `(B, num_steps, ...)`, of the steps so far.
    steps: `(B,)` loop steps so far.
  """

  x: Any
  target: Any
  state: Any
  losses: Any
  steps: Any


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["impl"]
)
@dataclasses.dataclass(frozen=True)
class _Key:
  """Typed keys as NumPy can hold them."""

  data: Any
  impl: Any


def _raw(tree):
  """The tree with its typed keys as `_Key`."""
  is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  raw = lambda leaf: _Key(jax.random.key_data(leaf), jax.random.key_impl(leaf))
  return jax.tree.map(lambda leaf: raw(leaf) if is_key(leaf) else leaf, tree)


def _typed(tree):
  is_key = lambda leaf: isinstance(leaf, _Key)
  typed = lambda leaf: jax.random.wrap_key_data(leaf.data, impl=leaf.impl)
  return jax.tree.map(
    lambda leaf: typed(leaf) if is_key(leaf) else leaf, tree, is_leaf=is_key
  )


@functools.lru_cache(maxsize=4)  # they hold on to models
def _programs(attack, predict, chunk):
  """The compiled parts of an attack: its start, some steps, its end."""
  parts = _start, functools.partial(_advance, chunk), _finish
  return [jax.jit(functools.partial(part, attack, predict)) for part in parts]


def _start(attack, predict, given):
  """Keys, images and labels to `_Running`."""
  keys, x, y = _typed(given)
  state, target = attack.init(keys, predict, x, y)
  _, loss = jax.eval_shape(lambda s: attack.step(predict, x, target, s), state)
  losses = jnp.zeros((len(x), attack.num_steps, *loss.shape[1:]), loss.dtype)
  return _raw(_Running(x, target, state, losses, jnp.zeros(len(x), jnp.int32)))


def _advance(chunk, attack, predict, running):
  """Takes some steps; who has taken all of them stays where it is."""
  x, target, state, losses, steps = _typed(running)

  followed = attack.followed(predict, x)

  def step(state, n):
    moved, loss = attack.step(followed, x, target, state)
    runs = steps + n < attack.num_steps
    return jax.vmap(_select)(runs, moved, state), loss

  state, found = jax.lax.scan(step, state, jnp.arange(chunk))
  note = jax.vmap(lambda row, n, new: row.at[n + jnp.arange(chunk)].set(new))
  losses = note(losses, steps, jnp.moveaxis(found, 1, 0))  # what is too much, is cut
  steps = jnp.minimum(steps + chunk, attack.num_steps)
  return _raw(_Running(x, target, state, losses, steps))


def _finish(attack, predict, running):
  """`_Running` to results, whose losses lead with the batch."""
  x, target, state, losses, steps = _typed(running)
  stand = jax.vmap(lambda row, n: row[jnp.minimum(jnp.arange(len(row)), n - 1)])
  losses = jnp.moveaxis(stand(losses, steps), 1, 0)  # still, from the stop on
  followed = attack.followed(predict, x)
  result = attack.finish(predict, x, target, state, losses, followed)
  return result._replace(losses=jnp.moveaxis(result.losses, 1, 0))


def _select(condition, new, old):
  return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def _in_blocks(program, rows, bucket, size, check=None):
  """Rows through a program, a bucket at a time; `check` sees what comes out of it."""
  while block := list(itertools.islice(rows, bucket)):
    yield from _call(program, block, size(len(block)), check)


def _check_target(known, running):
  """Refuses labels outside the classes, as they are known now."""
  stepping.check_target(known, running.x, running.target)


def _in_turns(program, rows, bucket, size, num_steps):
  """Rows through the steps, in the order in which they are done."""
  running = list(itertools.islice(rows, bucket))
  while running:
    moved = _call(program, running, size(len(running)))
    over = [bool(row.state.done | (row.steps >= num_steps)) for _, row in moved]
    yield from itertools.compress(moved, over)
    running = [row for row, is_over in zip(moved, over, strict=True) if not is_over]
    running += itertools.islice(rows, bucket - len(running))


def _in_order(rows):
  """One result per batch, in the order of the batches."""
  found: dict[int, list[Any]] = {}
  turn = 0
  for (batch, row, count), result in rows:
    found.setdefault(batch, [None] * count)[row] = result
    while turn in found and all(one is not None for one in found[turn]):
      whole = jax.tree.map(lambda *leaves: np.stack(leaves), *found.pop(turn))
      yield whole._replace(losses=np.moveaxis(whole.losses, 1, 0))
      turn += 1


def _call(program: Any, rows: Sequence[Row], size: int, check: Any = None) -> list[Row]:
  """Rows through a program of `size` rows, filled up with the last one."""
  places, trees = zip(*rows, strict=True)
  filled = trees + trees[-1:] * (size - len(rows))
  found = program(jax.tree.map(lambda *leaves: np.stack(leaves), *filled))
  if check is not None:
    check(found)
  return _rows(places, found)


def _rows(places: Iterable[Place], tree: Any) -> list[Row]:
  tree = jax.tree.map(np.asarray, tree)
  # copies, as a view would keep all rows alive
  alone = lambda n: jax.tree.map(lambda leaf: np.array(leaf[n]), tree)
  return [(place, alone(n)) for n, place in enumerate(places)]


def _size(bucket, smallest, count):
  """The smallest bucket that holds so many rows."""
  return min(bucket, max(smallest, 1 << (count - 1).bit_length()))


def _read(attack, key, known, batches):
  """Rows of keys, images and labels, of batches that the attack does not refuse."""
  first, like = 0, None
  for n, batch in enumerate(batches):
    x, y, ids = _parts(n, batch, first)
    now = jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype.name), (x, y))
    like = now if like is None else like
    if now != like:
      raise ValueError(
        f"image and labels of batch {n} are {now}, those of the first {like}; make one "
        "call for each shape."
      )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(ids))
    # refuses images by their values too, which a compiled program cannot see
    jax.eval_shape(functools.partial(_accept, attack, known, x, y), keys)
    places = [(n, row, len(x)) for row in range(len(x))]
    yield from _rows(places, _raw((keys, x, y)))
    first += len(x)


def _accept(attack, predict, x, y, keys):
  return attack.init(keys, predict, x, y)


def _parts(n, batch, first):
  """Images, what the attack takes as `y`, and ids of a batch."""
  if not isinstance(batch, Mapping) or not {"image", "label"} <= set(batch):
    got = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise TypeError(f'batch {n} is {got}; write {{"image": x, "label": y}}.')
  label = batch["label"]
  y = dict(label) if isinstance(label, Mapping) else {"label": label}
  others = set(batch) - {"image", "label", "id", "weight"}
  x, y = jax.tree.map(np.asarray, (batch["image"], y | {k: batch[k] for k in others}))
  inputs.check_batch(x, y, None)
  ids = np.asarray(batch.get("id", np.arange(first, first + len(x))))
  if ids.shape != (len(x),):
    raise ValueError(f"`id` of batch {n} has shape {ids.shape}; write ({len(x)},).")
  return x, y, ids


def _check(attack, key, predict, bucket, smallest, chunk):
  if not isinstance(attack, Attack):
    raise TypeError(
      f"`attack` is a {type(attack).__name__} without steps to look between; pass what "
      "jaxadv.attacks or gradient_attack return. Others, compiled or made of several "
      "attacks, run on one batch at a time: attack(key, predict, x, y)."
    )
  example_keys(key, getattr(key, "size", 1))  # refuses what is not a typed key
  if key.shape != ():
    raise ValueError(
      f"`key` has shape {key.shape}; write one key, to which ids are added."
    )
  if not callable(predict) or not _can_be_hashed(predict):
    raise TypeError(
      f"`predict` is a {type(predict).__name__}; write a function of images, such as "
      "lambda x: model.apply(variables, x)."
    )
  for name, value in (("bucket", bucket), ("smallest", smallest)):
    if not _is_count(value) or value & (value - 1):
      raise ValueError(f"`{name}` is {value!r}; write a power of two, such as 16.")
  if smallest > bucket:
    raise ValueError(f"`smallest` is {smallest}; write at most `bucket`, {bucket}.")
  if not _is_count(chunk):
    raise ValueError(f"`chunk` is {chunk!r}; write a number of steps, 1 or more.")


def _can_be_hashed(value):
  try:  # a class may say so, and its attributes not
    hash(value)
  except TypeError:
    return False
  return True


def _is_count(value):
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1
