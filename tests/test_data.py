import io
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxadv import data

SEGMENTATION = {  # images of the whole pack, classes
  "polyp_kvasir_seg_128": (300, 2),
  "fundus_idrid_optic_disc_128": (54, 2),
  "nuclei_dsb2018_128": (291, 2),
  "wbc_3class_seg_120": (160, 3),
}


def _pack(path, **changes):
  """A small valid pack, with some arrays changed or (`None`) left out."""
  rng = np.random.default_rng(0)
  arrays = {
    "images": rng.integers(0, 256, (10, 8, 8, 3)).astype(np.uint8),
    "masks": rng.integers(0, 2, (10, 8, 8)).astype(np.uint8),
    "split": np.array(["train"] * 7 + ["test"] * 3),
    "ids": np.array([f"case {n}" for n in range(10)]),
    "class_names": np.array(["background", "lesion"]),
  } | changes
  np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
  return path


def _folder(path, *, masks=(0, 255), size=(8, 8), suffix="", count=5):
  for sub in ("images", "masks"):
    (path / sub).mkdir(parents=True)
  for n in range(count):
    pixels = np.full((*size, 3), 10 * n, np.uint8)
    Image.fromarray(pixels).save(path / "images" / f"p{n}.jpg")
    mask = np.full(size, masks[0], np.uint8)
    mask[: size[0] // 2] = masks[-1]
    Image.fromarray(mask).save(path / "masks" / f"p{n}{suffix}.png")
  return path


@pytest.mark.parametrize("name", SEGMENTATION)
def test_real_packs(name):
  try:
    path = data.resolve(name)
  except FileNotFoundError:
    pytest.skip(f"the data pack {name} is not on this machine")
  total, classes = SEGMENTATION[name]
  whole, train = data.load(path), data.load(path, split="train")
  assert whole.images.dtype == np.uint8
  assert (
    whole.labels.shape == whole.images.shape[:-1] == (total, *whole.images.shape[1:3])
  )
  assert len(whole.class_names) == classes == whole.labels.max() + 1
  assert 0 < len(train.images) < total
  np.testing.assert_array_equal(whole.images[train.ids], train.images)
  assert [whole.names[i] for i in train.ids] == train.names


def test_pixels_have_the_same_bits_on_a_device_as_on_the_host():
  """A division by 255 that XLA makes a product of is off in the last bit of half."""
  levels = np.arange(256, dtype=np.uint8)
  wanted = levels.astype(np.float32) / np.float32(255)
  for convert in (data.as_float, jax.jit(data.as_float)):
    np.testing.assert_array_equal(convert(jnp.asarray(levels)), wanted, strict=True)
  product = jax.jit(lambda x: x.astype(jnp.float32) / 255)(jnp.asarray(levels))
  assert (np.asarray(product) != wanted).sum() > 100


def test_real_volume_and_label_set():
  try:
    volume = data.load("vol_pyradiomics_brain1_mri")
    findings = data.load("cxr_nih14_multilabel_128", split="test")
  except FileNotFoundError:
    pytest.skip("the data packs are not on this machine")
  assert volume.images.shape == (1, 128, 128, 25, 1)
  assert volume.labels.shape == (1, 128, 128, 25)
  assert findings.labels.shape == (163, 14)
  assert len(findings.class_names) == 14


def test_a_split_of_a_pack_keeps_ids_and_names(tmp_path):
  dataset = data.load(_pack(tmp_path / "pack.npz"), split="test")
  assert dataset.ids.tolist() == [7, 8, 9]
  assert dataset.names == ["case 7", "case 8", "case 9"]
  assert dataset.class_names == ("background", "lesion")


def test_a_pack_without_words_is_split_by_position(tmp_path):
  path = _pack(tmp_path / "pack.npz", split=None, class_names=None)
  assert data.load(path, split="test").ids.tolist() == [4, 9]
  assert data.load(path, split="train").ids.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
  assert data.load(path).class_names == ("class 0", "class 1")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"masks": np.full((10, 8, 8), 2)}, "label 2, outside its 2 classes"),
    ({"masks": np.full((10, 8, 8), -1)}, "label -1, outside"),
    ({"masks": np.zeros((10, 8, 9), int)}, "mask of its own size"),
    ({"masks": np.zeros((9, 8, 8), int)}, "mask of its own size"),
    ({"masks": np.zeros((10, 8, 8))}, "float64 labels"),
    ({"masks": None}, "a pack needs `images` with `masks`"),
    ({"images": np.full((10, 8, 8, 1), 200.0, np.float32)}, r"\[200, 200\]"),
    ({"images": np.full((10, 8, 8, 1), np.nan, np.float32)}, "nan"),
    ({"images": np.zeros((10, 8, 8, 1), np.int64)}, "int64 images"),
    ({"images": np.zeros((0, 8, 8, 1), np.uint8)}, "N >= 1"),
    ({"split": np.array(["train"] * 9)}, r"10 images but `split` \(9,\)"),
    ({"ids": np.array(["case"] * 11)}, r"10 images but `ids` \(11,\)"),
    ({"split": np.arange(10)}, "`split` of int64; write words"),
    ({"split": np.array([b"train"] * 10)}, r"`split` of \|S5; write words"),
  ],
)
def test_packs_that_do_not_fit_are_refused(tmp_path, changes, message):
  path = _pack(tmp_path / "pack.npz", **changes)
  with pytest.raises(ValueError, match=message) as error:
    data.load(path)
  assert str(path) in str(error.value)


def test_an_unknown_split_is_refused(tmp_path):
  path = _pack(tmp_path / "pack.npz")
  with pytest.raises(ValueError, match="no image in split 'val'; it has test, train"):
    data.load(path, split="val")


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "empty"])
def test_a_torn_pack_is_named(tmp_path, damage):
  path = _pack(tmp_path / "pack.npz")
  content = bytearray(path.read_bytes())
  if damage == "flip":
    content[500] ^= 255
  kept = {"cut": content[:-200], "text": b"not a pack", "empty": b""}
  path.write_bytes(kept.get(damage, content))
  with pytest.raises(ValueError, match=r"pack\.npz is torn or no \.npz pack"):
    data.load(path)


def test_pickled_objects_are_not_read(tmp_path):
  path = _pack(tmp_path / "pack.npz", ids=np.array([{}] * 10, object))
  with pytest.raises(ValueError, match="torn or no"):
    data.load(path)


def test_a_missing_pack_says_where_it_was_looked_for(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXADV_DATA", str(tmp_path / "packs"))
  with pytest.raises(FileNotFoundError, match="looked at") as error:
    data.load("no_such_pack")
  assert str(tmp_path / "packs" / "no_such_pack.npz") in str(error.value)
  with pytest.raises(FileNotFoundError):
    data.load_npz(tmp_path / "gone.npz")


def test_resolve_prefers_given_roots(tmp_path, monkeypatch):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    _pack(tmp_path / name / "pack.npz")
  monkeypatch.setenv("JAXADV_DATA", str(tmp_path / "b"))
  assert data.resolve("pack") == tmp_path / "b" / "pack.npz"
  assert data.resolve("pack.npz", [tmp_path / "a"]) == tmp_path / "a" / "pack.npz"
  assert data.resolve(tmp_path / "a") == tmp_path / "a"


@pytest.mark.parametrize("suffix", ["", "_mask", "_Segmentation"])
def test_a_folder_with_masks_of_0_and_255(tmp_path, suffix):
  dataset = data.load(_folder(tmp_path, suffix=suffix))
  assert dataset.images.shape == (5, 8, 8, 3)
  assert dataset.names == ["p0", "p1", "p2", "p3", "p4"]
  assert dataset.labels[:, :4].min() == dataset.labels.max() == 1
  assert dataset.labels[:, 4:].max() == 0
  assert data.load(tmp_path, split="test").names == ["p4"]


def test_a_folder_with_class_indices_and_split_folders(tmp_path):
  _folder(tmp_path / "train", masks=(0, 2), count=3)
  _folder(tmp_path / "test", masks=(1, 2), count=2)
  assert len(data.load(tmp_path, split="train").class_names) == 3
  assert len(data.load(tmp_path, split="test").images) == 2


def test_a_folder_resized_and_one_of_16_bits(tmp_path):
  folder = _folder(tmp_path / "a")
  Image.new("L", (12, 10)).save(folder / "images" / "p0.jpg")
  Image.new("L", (12, 10)).save(folder / "masks" / "p0.png")
  with pytest.raises(ValueError, match=r"p1\.png is .* load_folder"):
    data.load(folder)
  Image.new("RGB", (12, 10)).save(folder / "images" / "p0.jpg")
  assert data.load_folder(folder, size=16).labels.shape == (5, 16, 16)
  deep = _folder(tmp_path / "b", count=1)
  (deep / "images" / "p0.jpg").unlink()
  pixels = np.full((8, 8), 65535, np.uint16)
  Image.fromarray(pixels).save(deep / "images" / "p0.png")
  assert data.load(deep).images.tolist() == np.ones((1, 8, 8, 1)).tolist()
  (deep / "images" / "p0.png").unlink()
  big_endian = Image.frombytes("I;16B", (8, 8), pixels.astype(">u2").tobytes())
  big_endian.save(deep / "images" / "p0.tif")
  assert data.load(deep).images.tolist() == np.ones((1, 8, 8, 1)).tolist()


def test_folders_that_do_not_fit_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="put pictures into images/"):
    data.load(tmp_path)
  folder = _folder(tmp_path / "a", masks=(0, 87))
  with pytest.raises(ValueError, match="grey values such as 87"):
    data.load(folder)
  (folder / "masks" / "p3.png").unlink()
  with pytest.raises(FileNotFoundError, match=r"p3\.jpg has no mask"):
    data.load(folder)
  folder = _folder(tmp_path / "b")
  torn = folder / "masks" / "p2.png"
  torn.write_bytes(torn.read_bytes()[:40])
  with pytest.raises(ValueError, match=r"p2\.png is torn or no picture"):
    data.load(folder)
  Image.new("RGB", (8, 8)).save(folder / "images" / "p1.tif")
  with pytest.raises(ValueError, match=r"p1\.jpg and \S*p1\.tif have one name"):
    data.load(folder)
  folder = _folder(tmp_path / "c")
  Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "masks" / "p0.png")
  with pytest.raises(ValueError, match=r"p1\.png is"):
    data.load(folder)


def test_a_picture_that_is_too_large_to_read_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
  with pytest.raises(ValueError, match=r"p0\.jpg is torn .*exceeds limit"):
    data.load(_folder(tmp_path))


def _prepare_tfds(folder, sides=(8, 8, 8)):
  """Writes a TFDS data set in array_record format; needs no TensorFlow either."""
  tfds = pytest.importorskip("tensorflow_datasets")

  def stored(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "mask": tfds.features.Image(shape=(None, None, 1)),
      }
      features = tfds.features.FeaturesDict(features)
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
      del manager
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for n, side in enumerate(sides):
        mask = np.zeros((side, side), np.uint8)
        mask[:n] = 1
        image = np.full((side, side, 3), n, np.uint8)
        yield n, {"image": stored(image), "mask": stored(mask)}

  tfds.disable_progress_bar()
  Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()


@pytest.mark.filterwarnings("ignore")  # TFDS and its readers warn on their own account
def test_tfds_is_read_without_tensorflow(tmp_path, monkeypatch):
  _prepare_tfds(tmp_path)
  dataset = data.load_tfds("tiny", data_dir=tmp_path)
  order = dataset.images[:, 0, 0, 0]
  assert sorted(order) == [0, 1, 2]
  np.testing.assert_array_equal(dataset.labels.sum((1, 2)), 8 * order)
  part = data.load_tfds("tiny", data_dir=tmp_path, split="train[:2]")
  np.testing.assert_array_equal(part.images, dataset.images[:2])
  with pytest.raises(ValueError, match="'test'"):
    data.load_tfds("tiny", data_dir=tmp_path, split="test")
  code = (
    "import sys; from jaxadv import data; d = data.load('tfds:tiny', split='train'); "
    "print(d.images.shape, 'tensorflow' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"TFDS_DATA_DIR": str(tmp_path)},
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == "(3, 8, 8, 3) False"


@pytest.mark.filterwarnings("ignore")
def test_tfds_sets_that_cannot_be_read(tmp_path):
  _prepare_tfds(tmp_path, sides=(8, 9))
  with pytest.raises(ValueError, match="bring all to one size"):
    data.load_tfds("tiny", data_dir=tmp_path)
  with pytest.raises(FileNotFoundError, match="TFDS has no data set 'no_such_set'"):
    data.load_tfds("no_such_set", data_dir=tmp_path)
  with pytest.raises(FileNotFoundError, match="no data set 'mnist_corrupted/x'"):
    data.load_tfds("mnist_corrupted/x", data_dir=tmp_path)
  with pytest.raises(FileNotFoundError, match=r"\.download_and_prepare\(\)"):
    data.load_tfds("mnist", data_dir=tmp_path)
  for file in tmp_path.rglob("*.array_record*"):
    file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(ValueError, match="torn"):
    data.load_tfds("tiny", data_dir=tmp_path)


def test_phantoms_are_functions_of_their_number():
  five = data.phantoms(5, size=32, num_classes=3)
  two = data.phantoms(2, size=32, num_classes=3)
  np.testing.assert_array_equal(five.images[:2], two.images)
  assert five.images.dtype == np.uint8
  assert set(np.unique(five.labels)) == {0, 1, 2}
  other = data.phantoms(2, size=32, seed=1, num_classes=3)
  assert (other.images != two.images).mean() > 0.9


def test_phantom_lesions_are_darker_than_skin_and_of_varied_size():
  drawn = data.phantoms(40, size=64)
  inside = np.array([i[m == 1].mean() for i, m in zip(*drawn[:2], strict=True)])
  outside = np.array([i[m == 0].mean() for i, m in zip(*drawn[:2], strict=True)])
  assert (inside < outside - 10).all()
  share = drawn.labels.mean((1, 2))
  assert 0.02 < share.min() < 0.08
  assert 0.2 < share.max() < 0.6


def test_phantom_splits_do_not_overlap():
  train, test = data.load(None, split="train"), data.load(None, split="test")
  assert not set(train.ids) & set(test.ids)
  with pytest.raises(ValueError, match="no split 'dev'"):
    data.load(None, split="dev")
  with pytest.raises(ValueError, match="at least 1, 16 and 2"):
    data.phantoms(0)


def _numbered(n):
  images = np.repeat(np.arange(n, dtype=np.uint8), 4).reshape(n, 2, 2, 1)
  labels = np.zeros((n, 2, 2), np.int32)
  return data.Dataset(images, labels, np.arange(n) + 100, ["x"] * n, ("a", "b"))


def test_one_pass_in_order_with_a_padded_last_batch():
  got = list(data.batches(_numbered(5), 2))
  assert [batch["id"].tolist() for batch in got] == [[100, 101], [102, 103], [104, 104]]
  assert [batch["weight"].tolist() for batch in got] == [[1, 1], [1, 1], [1, 0]]
  assert {batch["image"].shape for batch in got} == {(2, 2, 2, 1)}
  dtypes = {name: value.dtype for name, value in got[0].items()}
  assert dtypes == {"image": "f4", "label": "i4", "weight": "f4", "id": "i4"}
  assert got[2]["image"].max() == pytest.approx(4 / 255)
  assert [b["id"].tolist() for b in data.batches(_numbered(5), 2, start=2)] == [
    [104, 104]
  ]


@pytest.mark.parametrize("size", [2, 7])
def test_shuffled_batches_resume_anywhere_and_repeat_nothing_early(size):
  first = list(itertools.islice(data.batches(_numbered(5), size, seed=3), 10))
  resumed = list(itertools.islice(data.batches(_numbered(5), size, seed=3, start=6), 4))
  for a, b in zip(first[6:], resumed, strict=True):
    np.testing.assert_array_equal(a["id"], b["id"])
    np.testing.assert_array_equal(a["image"], b["image"])
  order = np.concatenate([batch["id"] for batch in first])
  passes = order[: len(order) // 5 * 5].reshape(-1, 5)
  assert (np.sort(passes, 1) == np.arange(100, 105)).all()
  assert (passes[0] != passes[1]).any()
  other = next(data.batches(_numbered(5), 5, seed=4))
  assert (other["id"] != order[:5]).any()


def test_batches_refuses_sizes_before_the_first_batch():
  with pytest.raises(ValueError, match="`batch_size` is 0"):
    data.batches(_numbered(5), 0)
  with pytest.raises(ValueError, match="`start` -1"):
    data.batches(_numbered(5), 2, start=-1)


def _classes(counts, names=None):
  labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
  labels = np.random.default_rng(0).permutation(labels)
  n = len(labels)
  images = np.zeros((n, 2, 2, 1), np.uint8)
  names = names or tuple(f"c{k}" for k in range(len(counts)))
  return data.Dataset(images, labels, np.arange(n) + 100, ["x"] * n, names)


@pytest.mark.parametrize("size", [3, 8])
def test_balanced_batches_hold_every_class_as_often(size):
  """Each class once in every run of K; of a class, every image before any again."""
  dataset = _classes([1, 4, 9])
  got = list(itertools.islice(data.batches(dataset, size, seed=3, balance=True), 24))
  labels = np.concatenate([batch["label"] for batch in got])
  ids = np.concatenate([batch["id"] for batch in got])
  assert (np.sort(labels.reshape(-1, 3), 1) == np.arange(3)).all()
  for k, count in enumerate([1, 4, 9]):
    mine = ids[labels == k]
    passes = mine[: len(mine) // count * count].reshape(-1, count)
    want = dataset.ids[dataset.labels == k]
    assert len(passes) >= 2
    assert (np.sort(passes, 1) == want).all()
  runs = labels.reshape(-1, 3)
  assert (runs != runs[0]).any()


def test_balanced_batches_resume_anywhere():
  dataset = _classes([2, 5])
  whole = list(itertools.islice(data.batches(dataset, 3, seed=1, balance=True), 9))
  rest = data.batches(dataset, 3, seed=1, balance=True, start=6)
  for a, b in zip(whole[6:], rest, strict=False):
    np.testing.assert_array_equal(a["id"], b["id"])
  other = next(data.batches(dataset, 14, seed=2, balance=True))["id"]
  assert (other != np.concatenate([b["id"] for b in whole])[:14]).any()


def test_what_cannot_be_balanced_is_refused_before_the_first_batch():
  with pytest.raises(ValueError, match=r"no image of class b, d; .* or add images"):
    data.batches(_classes([2, 0, 1, 0], tuple("abcd")), 2, seed=0, balance=True)
  with pytest.raises(ValueError, match=r"\(5, 2, 2\); balance needs one class per"):
    data.batches(_numbered(5), 2, seed=0, balance=True)
  with pytest.raises(ValueError, match="write a `seed` too"):
    data.batches(_classes([2, 2]), 2, balance=True)


def test_a_share_of_every_class_is_held_out():
  dataset = _classes([1, 10, 40])
  kept, held = data.hold_out(dataset, 0.2)
  assert np.bincount(held.labels, minlength=3).tolist() == [0, 2, 8]
  assert np.bincount(kept.labels).tolist() == [1, 8, 32]
  assert sorted([*kept.ids, *held.ids]) == dataset.ids.tolist()
  assert (np.diff(kept.ids) > 0).all()
  again = data.hold_out(dataset, 0.2)[1]
  np.testing.assert_array_equal(held.ids, again.ids)
  masks = data.hold_out(_numbered(10), 0.3)
  assert [len(part.images) for part in masks] == [7, 3]


def test_shares_that_hold_nothing_out_are_refused():
  with pytest.raises(ValueError, match=r"is 1\.0; write one in \(0, 1\)"):
    data.hold_out(_numbered(5), 1.0)
  with pytest.raises(ValueError, match=r"0\.3 of 2 images is none"):
    data.hold_out(_classes([1, 1]), 0.3)
  # of every class that has two images, one is held out
  assert len(data.hold_out(_classes([10, 10, 1]), 0.01)[1].images) == 2


def test_resizing_keeps_range_dtype_and_labels():
  rng = np.random.default_rng(0)
  labels, ids = np.arange(3), np.arange(3)
  images = rng.integers(0, 256, (3, 20, 28, 1)).astype(np.uint8)
  stored = data.Dataset(images, labels, ids, ["x"] * 3, ("a", "b", "c"))
  small = data.resize(stored, 7)
  assert small.images.shape == (3, 7, 7, 1)
  assert small.images.dtype == np.uint8
  assert small.labels is labels
  scaled = data.resize(stored._replace(images=(images / np.float32(255))), 7)
  assert scaled.images.dtype == np.float32
  assert 0 <= scaled.images.min() < scaled.images.max() <= 1
  np.testing.assert_allclose(scaled.images, small.images / 255, atol=0.5 / 255 + 1e-6)
  # a second implementation of the same filter
  theirs = Image.fromarray(images[0, ..., 0]).resize((7, 7), Image.Resampling.LANCZOS)
  difference = np.abs(np.asarray(theirs, float) - small.images[0, ..., 0])
  assert difference.max() <= 1
  with pytest.raises(ValueError, match="`side` is 0"):
    data.resize(stored, 0)


@pytest.mark.parametrize("side", [7, 12, 40])
def test_masks_follow_their_resized_images(side):
  whole = data.phantoms(2, size=24)
  small = data.resize(whole, side)
  assert small.kind == "mask"
  assert small.labels.dtype == whole.labels.dtype
  for mask, one in zip(whole.labels, small.labels, strict=True):
    theirs = Image.fromarray(mask.astype(np.uint8)).resize((side, side), Image.NEAREST)
    np.testing.assert_array_equal(one, np.asarray(theirs))


def test_masks_of_volumes_follow_too():
  images = np.zeros((1, 4, 6, 8, 1), np.float32)
  labels = np.arange(4 * 6 * 8, dtype=np.int32).reshape(1, 4, 6, 8) % 3
  volumes = data.Dataset(images, labels, np.arange(1), ["x"], ("a", "b", "c"))
  small = data.resize(volumes, 2)
  assert small.images.shape == (1, 2, 2, 2, 1)
  np.testing.assert_array_equal(small.labels, labels[:, 1::2, 1::3, 2::4])
