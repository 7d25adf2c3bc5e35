"""What an epoch of images on disk takes: memory, and images/s.

    python benchmarks/streaming.py

Writes two prepared TFDS data sets of PNG pictures, one a hundred times the other, and
goes through an epoch of each, shuffled: read lazily, by the training loop itself and
ahead by threads, and held in memory. Each row is a process of its own. `peak` is the
largest resident set of the process, `beyond` what of it came after the imports.
`loading` is the time before the first batch, in which a lazy set reads its labels. That
every image came exactly once is checked by the ids.
"""

import argparse
import io
import itertools
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from PIL import Image

from jaxadv import data, summaries

BATCH = 64
CLASSES = 8


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=200_000, help="of the larger set")
  parser.add_argument("--side", type=int, default=64, help="of an image, in pixels")
  parser.add_argument("--threads", type=int, default=4, help="that read ahead")
  options = parser.parse_args(arguments)
  ways = {"lazy": (0, 0), f"lazy, {options.threads} threads": (0, options.threads)}
  ways["in memory"] = (2**62, 0)
  heads = ["data", "images", "decoded MiB", "loading s", "images/s", "peak MiB"]
  heads.append("beyond MiB")
  print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
  with tempfile.TemporaryDirectory() as folder:
    for number in (options.images // 100, options.images):
      place = pathlib.Path(folder) / str(number)
      write(place, pictures(1000, options.side), number)
      for name, (memory, threads) in ways.items():
        found = measure(place, memory, threads)
        decoded = number * options.side**2 * 3 / 2**20
        cells = [decoded, found["loading"], found["speed"], found["peak"]]
        cells.append(found["peak"] - found["imports"])
        row = [name, f"{number:,}", *(f"{cell:,.0f}" for cell in cells)]
        print("| " + " | ".join(row) + " |", flush=True)
  packages = ("grain", "array_record", "tensorflow-datasets", "pillow")
  readers = ", ".join(f"{name} {version(name)}" for name in packages)
  print(f"\n{summaries.signature(summaries.origin())} Read by {readers}.")


def pictures(number: int, side: int) -> list[bytes]:
  """Smooth random colour pictures as PNG."""
  coarse = np.random.default_rng(0).integers(0, 256, (number, 8, 8, 3), np.uint8)
  smooth = (Image.fromarray(pixels).resize((side, side)) for pixels in coarse)
  return [png(np.asarray(picture)) for picture in smooth]


def png(image: np.ndarray) -> bytes:
  """An image `(H, W, 3)` as a PNG file."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG", compress_level=1)
  return file.getvalue()


def write(folder: pathlib.Path, files: Sequence[bytes], number: int) -> None:
  """A prepared TFDS data set `pictures`, of some PNG files again and again.

  Of your own pictures, `jaxadv build` makes one; here each file is written many times.
  """
  import tensorflow_datasets as tfds
  from array_record.python.array_record_module import ArrayRecordWriter

  side, place, shards, size = _side(files[0]), folder / "pictures" / "1.0.0", 4, 0
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(side, side, 3)),
      "label": tfds.features.ClassLabel(num_classes=CLASSES),
    }
  )
  place.mkdir(parents=True)
  ends = [number * k // shards for k in range(shards + 1)]
  for k, (start, stop) in enumerate(itertools.pairwise(ends)):
    name = f"pictures-train.array_record-{k:05d}-of-{shards:05d}"
    writer = ArrayRecordWriter(str(place / name), "group_size:1")
    for n in range(start, stop):
      example = {"image": files[n % len(files)], "label": n % CLASSES}
      record = features.serialize_example(features.encode_example(example))
      size += len(record)
      writer.write(record)
    writer.close()
  tfds.folder_dataset.write_metadata(
    data_dir=str(place),
    features=features,
    split_infos=[
      tfds.core.SplitInfo(
        name="train", shard_lengths=np.diff(ends).tolist(), num_bytes=size
      )
    ],
    filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    check_data=False,
  )


def measure(folder: pathlib.Path, memory: int, threads: int) -> dict[str, float]:
  """What `epoch` finds, in a process of its own."""
  settings = json.dumps({"folder": str(folder), "memory": memory, "threads": threads})
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.streaming", settings],
    cwd=pathlib.Path(__file__).parents[1],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout)


def epoch(folder: str, memory: int, threads: int) -> dict[str, float]:
  """Goes once through the set of a folder; MiB, seconds and images/s."""
  import grain  # noqa: F401 (what is imported here does not count)
  import tensorflow_datasets  # noqa: F401

  imports, started = _peak(), time.perf_counter()
  dataset = data.load_tfds("pictures", data_dir=folder, split="train", memory=memory)
  loaded, total = time.perf_counter(), len(dataset.images)
  stream = data.batches(dataset, BATCH, seed=0, threads=threads)
  seen = [b["id"] for b in itertools.islice(stream, math.ceil(total / BATCH))]
  seconds = time.perf_counter() - loaded
  if sorted(np.concatenate(seen)[:total].tolist()) != list(range(total)):
    raise RuntimeError("an image is missing from the epoch, or came twice.")
  speed = len(seen) * BATCH / seconds
  found = {"imports": imports, "loading": loaded - started, "speed": speed}
  return found | {"peak": _peak()}


def _peak():
  """Largest resident set of this program, MiB; `getrusage` counts its starter's too."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _side(file):
  with Image.open(io.BytesIO(file)) as picture:
    return picture.size[0]


if __name__ == "__main__":
  if sys.argv[1:] and sys.argv[1].startswith("{"):  # a process started by `measure`
    print(json.dumps(epoch(**json.loads(sys.argv[1]))))
  else:
    main()
