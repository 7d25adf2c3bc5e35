"""Data on disk against the same data in memory: batches, processes, threads, memory."""

import collections
import itertools
import threading
import time
import types
import zlib

import helpers
import numpy as np
import optax
import pytest
from test_data import _numbered, _prepare_tfds

from jaxadv import (
  assessment,
  building,
  data,
  defence_job,
  experiments,
  fingerprints,
  lazy,
  sources,
  streams,
  universal_job,
  victim_job,
  victims,
)
from jaxadv.models import ConvNet

# TFDS and its readers warn on their own account.
pytestmark = pytest.mark.filterwarnings("ignore")

PROCESSES = [1, 2, 3, 4, 8]
COUNT = 37


@pytest.fixture(scope="module")
def script():
  return helpers.benchmark("streaming")


@pytest.fixture(scope="module")
def sets(script, tmp_path_factory):
  """Different pictures in a prepared TFDS data set: read lazily, and in memory."""
  folder = tmp_path_factory.mktemp("tfds")
  script.write(folder, script.pictures(COUNT, 16), COUNT)
  on_disk = data.load_tfds("pictures", data_dir=folder, memory=0)
  return on_disk, data.load_tfds("pictures", data_dir=folder)


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
  folder = tmp_path_factory.mktemp("masks")
  _prepare_tfds(folder, sides=(8,) * 6)
  on_disk = data.load_tfds("tiny", data_dir=folder, memory=0)
  return on_disk, data.load_tfds("tiny", data_dir=folder)


def assert_same(got, want):
  """Streams of the same batches, bit for bit."""
  for a, b in zip(got, want, strict=True):
    helpers.assert_trees_equal(a, b)


def first(stream, n=5):
  return list(itertools.islice(stream, n))


def joined(parts):
  """The batches of all processes, one after the other."""
  for batch in zip(*parts, strict=True):
    yield {name: np.concatenate([part[name] for part in batch]) for name in batch[0]}


def hold(images, **changes):
  """A lazy data set of some images, which tells what was read."""
  read = collections.Counter()

  def rows(places):
    read.update(places.tolist())
    return images[places]

  on_disk = lazy.Rows(rows, images.shape, images.dtype, "test v1")
  n = len(images)
  fields = on_disk, np.arange(n) % 2, np.arange(n), ["x"] * n, ("a", "b")
  return data.Dataset(*fields)._replace(**changes), read


def test_what_is_on_disk_is_what_would_be_in_memory(sets, masks):
  for on_disk, whole in (sets, masks):
    assert isinstance(on_disk.images, lazy.Rows)
    assert isinstance(whole.images, np.ndarray)
    helpers.assert_trees_equal(np.asarray(on_disk.images), whole.images)
    helpers.assert_trees_equal(np.asarray(on_disk.labels), whole.labels)
    assert list(on_disk.names) == whole.names
    assert on_disk.class_names == whole.class_names
    assert on_disk.kind == whole.kind
    np.testing.assert_array_equal(on_disk.ids, whole.ids)
  assert sets[0].names[COUNT - 1] == f"pictures {COUNT - 1}"
  assert isinstance(sets[0].labels, np.ndarray)
  assert isinstance(masks[0].labels, lazy.Rows)


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_lazy_batches_are_those_in_memory(sets, masks, threads):
  options = [{}, {"seed": 3}, {"seed": 3, "balance": True}, {"seed": 0, "start": 4}]
  for on_disk, whole in (sets, masks):
    for how in options[: 2 if whole.kind == "mask" else 4]:
      got = data.batches(on_disk, 12, threads=threads, **how)
      assert_same(first(got, 7), first(data.batches(whole, 12, **how), 7))


@pytest.mark.parametrize("count", PROCESSES)
def test_the_parts_of_all_processes_are_the_batch_of_one(sets, count):
  """In order, shuffled and balanced, from any batch on."""
  for how in ({}, {"seed": 1}, {"seed": 1, "balance": True}):
    for start in (0, 1, 3):
      want = first(data.batches(sets[1], 24, start=start, **how))
      for dataset in sets:
        parts = [
          first(data.batches(dataset, 24, start=start, shard=(k, count), **how))
          for k in range(count)
        ]
        assert parts[0] == [] or len(parts[0][0]["id"]) == 24 // count
        assert_same(joined(parts), want)


@pytest.mark.parametrize("count", PROCESSES)
@pytest.mark.parametrize("total", [1, 5, 24, 37, 96, 100])
def test_no_image_is_lost_or_seen_twice_in_an_epoch(total, count):
  dataset = _numbered(total)
  ids = dataset.ids.tolist()
  parts = [list(data.batches(dataset, 24, shard=(k, count))) for k in range(count)]
  seen = [batch["id"][batch["weight"] > 0] for part in parts for batch in part]
  assert sorted(np.concatenate(seen).tolist()) == ids
  steps = 3 * -(-total // 24)
  streams = [
    first(data.batches(dataset, 24, seed=2, shard=(k, count)), steps)
    for k in range(count)
  ]
  order = np.concatenate([batch["id"] for batch in joined(streams)])
  epochs = order[: len(order) // total * total].reshape(-1, total)
  assert len(epochs) >= 3
  assert (np.sort(epochs, 1) == ids).all()
  if total == 96:  # whole batches: what the processes saw of an epoch is apart
    mine = [{int(n) for batch in part[:4] for n in batch["id"]} for part in streams]
    assert sum(map(len, mine)) == len(set().union(*mine)) == total


def test_shards_that_cannot_be_are_refused_before_the_first_batch():
  with pytest.raises(ValueError, match=r"`shard` is \(2, 2\); write \(index, count\)"):
    data.batches(_numbered(5), 2, shard=(2, 2))
  with pytest.raises(ValueError, match=r"`shard` is \(-1, 2\)"):
    data.batches(_numbered(5), 2, shard=(-1, 2))
  with pytest.raises(ValueError, match="batch of 10 cannot be shared by 4 processes"):
    data.batches(_numbered(5), 10, shard=(0, 4))


def test_a_stream_goes_on_from_any_batch(sets):
  for how in ({"seed": 5}, {"seed": 5, "balance": True}, {}):
    whole = first(data.batches(sets[0], 4, **how), 10)
    for start in range(11):
      rest = data.batches(sets[0], 4, start=start, **how)
      assert_same(first(rest, 10 - start), whole[start:])


def test_a_process_reads_its_own_images_only():
  dataset, read = hold(np.arange(64, dtype=np.uint8).reshape(16, 2, 2, 1))
  stream = data.batches(dataset, 8, shard=(1, 2))
  assert [batch["id"].tolist() for batch in stream] == [[4, 5, 6, 7], [12, 13, 14, 15]]
  assert sorted(read.elements()) == [4, 5, 6, 7, 12, 13, 14, 15]


def test_a_pass_is_shuffled_once_for_all_its_batches(monkeypatch):
  drawn, real = [], np.random.default_rng
  monkeypatch.setattr(np.random, "default_rng", lambda s: drawn.append(s) or real(s))
  first(data.batches(_numbered(30), 4, seed=0), 20)
  assert drawn == [[0, 0], [0, 1], [0, 2]]


@pytest.mark.parametrize("threads", [1, 8])
def test_reading_ahead_keeps_the_order_and_is_bounded(threads):
  started = []

  def read(n):
    started.append(n)
    time.sleep(0.02 * (n % 3 == 0))  # the later ones are ready first
    return n

  stream = streams.prefetch(read, 7, threads=threads)
  assert started == []
  assert first(stream, 20) == list(range(7, 27))
  for _ in range(100):  # until all that may be read ahead is, for five seconds at most
    if len(started) >= 20 + threads:
      break
    time.sleep(0.05)
  time.sleep(0.05)  # no more comes
  assert sorted(started) == list(range(7, 27 + threads))
  assert list(streams.prefetch(lambda n: n, 3, 3)) == []
  assert list(streams.prefetch(lambda n: n, 5, 3)) == []


def _no_threads_are_left():
  for _ in range(100):
    names = [thread.name for thread in threading.enumerate()]
    if not any(name.startswith("grain") for name in names):
      return True
    time.sleep(0.1)
  return False


def test_threads_end_with_their_iterator(sets):
  assert _no_threads_are_left()
  stream = data.batches(sets[0], 4, seed=0)
  next(stream)
  assert any(thread.name.startswith("grain") for thread in threading.enumerate())
  del stream
  assert _no_threads_are_left()
  list(data.batches(sets[0], 4))
  assert _no_threads_are_left()
  broken = streams.prefetch(lambda n: 1 // (5 - n))
  with pytest.raises(ZeroDivisionError):
    list(broken)
  assert _no_threads_are_left()
  next(data.batches(sets[1], 4, seed=0))
  assert not any(thread.name.startswith("grain") for thread in threading.enumerate())


@pytest.mark.parametrize("threads", [0, 4])
def test_a_torn_record_is_named(script, tmp_path, threads):
  files = script.pictures(12, 16)
  files[7] = files[7][:90]
  script.write(tmp_path, files, 12)
  dataset = data.load_tfds("pictures", data_dir=tmp_path, memory=0)
  stream = data.batches(dataset, 3, threads=threads)
  assert len(first(stream, 2)) == 2
  with pytest.raises(ValueError, match=r"set 'pictures' is torn at record 7 .* again"):
    next(stream)
  with pytest.raises(ValueError, match="torn at record 7"):
    data.load_tfds("pictures", data_dir=tmp_path)


def test_a_record_whose_packing_is_torn_is_named(tmp_path):
  images = np.random.default_rng(0).random((4, 6, 6, 5), np.float32)
  np.savez(tmp_path / "pack.npz", images=images, labels=np.arange(4) % 2)
  building.convert(tmp_path / "pack.npz", "mine", out=tmp_path)
  dataset = data.load_tfds("mine", data_dir=tmp_path, memory=0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("zlib.decompress", lambda *_: (_ for _ in ()).throw(zlib.error("x")))
    with pytest.raises(ValueError, match="set 'mine' is torn at record 2"):
      dataset.images[2]


def test_a_damaged_file_is_named(script, tmp_path):
  script.write(tmp_path, script.pictures(40, 16), 40)
  dataset = data.load_tfds("pictures", data_dir=tmp_path, memory=0)
  file = next(tmp_path.rglob("*-00002-of-00004"))
  content = bytearray(file.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 40] = bytes(40)
  file.write_bytes(content)
  with pytest.raises(ValueError, match=r"set 'pictures' is torn at record 2\d of"):
    list(data.batches(dataset, 4))


def test_an_image_of_another_size_is_named_when_it_is_read(script, tmp_path):
  files = script.pictures(9, 16)
  files[5] = script.pictures(1, 20)[0]
  script.write(tmp_path, files, 9)
  dataset = data.load_tfds("pictures", data_dir=tmp_path, memory=0)
  message = (
    r"image of pictures 5 is uint8 \(20, 20, 3\) but .* 0 is uint8 \(16, 16, 3\)"
  )
  with pytest.raises(ValueError, match=message):
    list(data.batches(dataset, 4))


def test_what_does_not_fit_is_refused_when_it_is_loaded(tmp_path):
  images = np.full((3, 4, 4, 1), 0.5, np.float32)
  images[2, 1, 1] = 1.5
  dataset, read = hold(images)
  with pytest.raises(ValueError, match=r"images in \[0\.5, 1\.5\]; scale them"):
    sources.checked("x", dataset.images, dataset.labels, names=["x"] * 3)
  assert sorted(read.elements()) == [0, 1, 2]  # once, for both ends
  images = np.zeros((3, 4, 4, 1), np.uint8)
  labels = lazy.Rows(lambda n: n[:, None, None] + images[n, ..., 0], (3, 4, 4), int, "")
  with pytest.raises(ValueError, match="label 2, outside its 2 classes"):
    sources.checked("x", images, labels, names=["x"] * 3, class_names="ab")
  grey = hold(np.zeros((3, 4, 4), np.uint8))[0]
  found = sources.checked("x", grey.images, grey.labels, names=["x"] * 3)
  assert found.images.shape == found.images[:].shape == (3, 4, 4, 1)
  _prepare_tfds(tmp_path)
  with pytest.raises(ValueError, match=r"no record in split 'train\[:0\]'"):
    data.load_tfds("tiny", data_dir=tmp_path, split="train[:0]")


def test_parts_of_lazy_sets_are_lazy_and_the_same(sets, masks):
  for on_disk, whole in (sets, masks):
    for ours, theirs in zip(
      data.hold_out(on_disk, 0.3), data.hold_out(whole, 0.3), strict=True
    ):
      assert isinstance(ours.images, lazy.Rows)
      helpers.assert_trees_equal(np.asarray(ours.images), theirs.images)
      helpers.assert_trees_equal(np.asarray(ours.labels), theirs.labels)
      assert list(ours.names) == theirs.names
      np.testing.assert_array_equal(ours.ids, theirs.ids)
  dataset, read = hold(np.zeros((20, 2, 2, 1), np.uint8))
  data.hold_out(dataset, 0.5)
  assert not read


@pytest.mark.parametrize("side", [5, 24])
def test_lazy_images_are_resized_as_they_are_read(sets, masks, side):
  for on_disk, whole in (sets, masks):
    small, want = data.resize(on_disk, side), data.resize(whole, side)
    assert isinstance(small.images, lazy.Rows)
    assert_same(
      first(data.batches(small, 5, seed=0)), first(data.batches(want, 5, seed=0))
    )
    assert small.labels.shape == want.labels.shape
  dataset, read = hold(np.zeros((20, 8, 8, 1), np.uint8))
  data.resize(dataset, 4)
  assert set(read) == {0}


def test_fingerprints_of_lazy_sets_read_few_rows(sets, masks):
  for on_disk, _ in (sets, masks):
    assert fingerprints.dataset(on_disk) == fingerprints.dataset(on_disk)
  images = np.zeros((1000, 2, 2, 1), np.uint8)
  dataset, read = hold(images)
  mine = fingerprints.dataset(dataset)
  assert len(read) == 32
  images[999] = 1  # one of those that are looked at
  other = [dataset, data.take(dataset, np.arange(1, 1000)), data.resize(dataset, 3)]
  other.append(dataset._replace(labels=1 - dataset.labels))
  rows = lazy.Rows(dataset.images.read, images.shape, images.dtype, "test v2")
  other.append(dataset._replace(images=rows))
  assert len({mine, *map(fingerprints.dataset, other)}) == 6


def test_a_victim_learns_the_same_from_disk(sets, tmp_path):
  recipe = experiments.Recipe(
    model=ConvNet(num_classes=8, width=4, depth=2),
    optimizer=optax.adam(1e-2),
    data=("x",),
    train_steps=4,
    batch_size=8,
    checkpoint_every=2,
    balance=True,
  )
  found = [
    victims.train(recipe, part, tmp_path / str(n), validation=part)
    for n, part in enumerate(sets)
  ]
  helpers.assert_trees_equal(*found)


def test_models_are_judged_the_same_on_disk(sets, masks):
  for (on_disk, whole), classes in ((sets, 8), (masks, 2)):
    net = helpers.convnet(classes=classes, dense=whole.kind == "mask")
    predict = lambda scale, x, net=net: scale * net(x)[0]
    found = assessment.assess(predict, 1.0, on_disk)
    assert found == assessment.assess(predict, 1.0, whole)
  decided = assessment.predictions(predict, 1.0, on_disk.images)
  assert assessment.evaluate(decided, on_disk) == found
  with pytest.raises(assessment.NotFinite, match="on 6 of 6 images"):
    assessment.assess(predict, np.nan, on_disk)


def test_radius_and_spread_are_those_in_memory(sets):
  """To a last bit: sums over parts round otherwise."""
  for norm, channels in (("l2", "all"), ("linf", "first")):
    study = types.SimpleNamespace(norm=norm, norm_channels=channels)
    runs = [
      types.SimpleNamespace(parts=types.SimpleNamespace(train=part), study=study)
      for part in sets
    ]
    ours, theirs = (universal_job.radius(run, 0.04) for run in runs)
    assert ours == pytest.approx(theirs, rel=1e-6)
  for part in sets:
    task = types.SimpleNamespace(parts=types.SimpleNamespace(train=part))
    run = types.SimpleNamespace(victims=types.SimpleNamespace(tasks={"a": task}))
    want = (sets[1].images / 255).std((0, 1, 2))
    np.testing.assert_allclose(defence_job._spread(run), want, rtol=1e-6)


def test_images_of_two_parts_are_compared_on_disk_too(sets):
  recipe = types.SimpleNamespace(val_split="val")
  train, rest = data.hold_out(sets[0], 0.4)
  parts = victim_job.Parts("x", train, rest, sets[0])
  with pytest.raises(victim_job.JobError, match=f"{len(rest.ids)} validation images"):
    victim_job._check_parts(recipe, parts)
  victim_job._check_parts(recipe, victim_job.Parts("x", sets[0], train, rest))


def test_rows_are_indexed_as_arrays_are():
  stored = np.arange(12).reshape(4, 3)
  rows = lazy.Rows(lambda n: stored[n], stored.shape, stored.dtype, "")
  indices = [2, -1, np.int64(0), slice(1, 3), slice(None, None, -2), [3, 0, 0]]
  for index in [*indices, np.array([], int), []]:
    helpers.assert_trees_equal(rows[index], stored[index])
  helpers.assert_trees_equal(np.stack(list(rows)), stored)
  helpers.assert_trees_equal(np.asarray(rows, np.float32), stored.astype(np.float32))
  assert (rows.ndim, rows.nbytes, rows.min(), rows.max()) == (2, 96, 0, 11)
  for wrong in (4, [-5, 0]):
    with pytest.raises(IndexError, match="of 4 rows; write 0 to 3"):
      rows[wrong]
  for wrong in ((0, 1), [True] * 4, [[0]], [0.5]):
    with pytest.raises(TypeError, match=r"np\.asarray\(rows\) reads all"):
      rows[wrong]
  with pytest.raises(ValueError, match="without a copy"):
    np.asarray(rows, copy=False)
  many = lazy.Rows(lambda n: n, (300,), np.dtype(int), "")
  assert many[np.array([200, 7], np.uint8)].tolist() == [200, 7]
  assert many[np.uint8(255)] == 255
  with pytest.raises(TypeError, match="rows on disk are not compared"):
    assert rows != stored
  assert {rows: 1}[rows] == 1


def test_a_real_pack_survives_the_way_through_tfds(script, tmp_path):
  try:
    pack = data.load("blood_bccd_cells_64")
  except FileNotFoundError:
    pytest.skip("the data packs are not on this machine")
  script.write(tmp_path, [script.png(image) for image in pack.images], len(pack.images))
  dataset = data.load_tfds("pictures", data_dir=tmp_path, memory=0)
  stream = data.batches(dataset, 64, seed=0)
  for ours, theirs in zip(
    stream, first(data.batches(pack, 64, seed=0), 9), strict=False
  ):
    for name in ("image", "id"):
      np.testing.assert_array_equal(ours[name], theirs[name])


def test_memory_does_not_grow_with_the_set(script, tmp_path):
  """Ten times the images, 127 MiB more: held in memory that shows, and lazily not."""
  extra = 2700 * 128**2 * 3 / 2**20
  files, peaks = script.pictures(20, 128), {}
  for number in (300, 3000):
    script.write(tmp_path / str(number), files, number)
  for number, memory in ((300, 0), (3000, 0), (3000, 2**40)):
    found = script.measure(tmp_path / str(number), memory, threads=2)
    peaks[number, memory] = found["peak"]
  assert peaks[3000, 0] - peaks[300, 0] < 0.3 * extra
  assert peaks[3000, 2**40] - peaks[300, 0] > 0.8 * extra
