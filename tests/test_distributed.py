"""Real processes on this machine, joined by gloo: one run, the bits of one process."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import helpers
import numpy as np
import pytest

from jaxadv import cli

UAP = """
import optax
from jaxadv import attacks, training
from jaxadv.experiments import Recipe, UniversalStudy
from jaxadv.models import ConvNet

def get_config(*, quick=False):
  return UniversalStudy(
    victims={"small": Recipe(
      model=ConvNet(num_classes=3, width=4, depth=2), optimizer=optax.adam(1e-2),
      data=("PACK",), loss=training.cross_entropy, train_steps=8, batch_size=12,
      holdout=0.2, checkpoint_every=4, microbatches=4,
    )},
    perturbations={"universal": attacks.universal}, norm="l2", shares=(0.5,),
    craft_steps=6, craft_batch=12, checkpoint_every=3, microbatches=4,
  )
"""
ATTACK = """
import optax
from jaxadv import attacks
from jaxadv.experiments import Experiment
from jaxadv.models import UNet

def get_config(*, quick=False):
  return Experiment(
    model=UNet(num_classes=2, width=4, depth=1), optimizer=optax.adam(1e-2),
    data=("PACK",), train_steps=12, batch_size=8, microbatches=4, num_pairs=7,
    attack_batch=2, max_initial_iou=1.0, gallery=1,
    attacks={"seg_pgd": attacks.seg_pgd(8 / 255, num_steps=3, targeted=True)},
  )
"""

DEFEND = """
import optax
from jaxadv import attacks, defences
from jaxadv.experiments import DefenceStudy, Recipe
from jaxadv.models import ConvNet
from jaxadv.robustness import Effort

def get_config(*, quick=False):
  return DefenceStudy(
    recipe=Recipe(
      model=ConvNet(num_classes=3, width=4, depth=2), optimizer=optax.adam(1e-2),
      data=("PACK",), train_steps=8, batch_size=12, holdout=0.2, checkpoint_every=4,
      monitor=attacks.pgd(0.1, num_steps=2), microbatches=4,
    ),
    defences={"at": defences.adversarial_training(0.1, num_steps=2)}, seeds=(0,),
    eps=0.1, radii=(0.1,), num_images=9, effort=Effort(2, 2, 4, 0.6, 3, 10),
  )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, discs):
  folder = tmp_path_factory.mktemp("distributed")
  pack = helpers.color_pack(folder / "colors.npz", train=36, test=12)
  (folder / "uap.py").write_text(UAP.replace("PACK", str(pack)))
  fast = UAP.replace("microbatches=4,", "").replace("PACK", str(pack))
  (folder / "fast.py").write_text(fast)
  (folder / "defend.py").write_text(DEFEND.replace("PACK", str(pack)))
  (folder / "attack.py").write_text(ATTACK.replace("PACK", str(discs)))
  return folder


@pytest.fixture(scope="module")
def one(folder):
  """The universal run of one process on one device."""
  alone("uap", folder / "uap.py", "--out", folder / "one")
  return folder / "one"


def start(processes, *words):
  """`jaxadv WORDS` on so many processes of this machine."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  started = []
  for process in range(processes):
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(process)}
    told |= {"JAX_NUM_PROCESSES": str(processes)}
    started.append(
      subprocess.Popen(
        [sys.executable, "-m", "jaxadv", *map(str, words), "--no-progress"],
        env=os.environ | told,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return started


def finish(started, *, seconds=300):
  """Status, output and errors of each; none may outlive the others."""
  deadline, ended = time.monotonic() + seconds, []
  try:
    for process in started:
      out = process.communicate(timeout=max(1, deadline - time.monotonic()))
      ended.append((process.returncode, *out))
  finally:
    for process in started:
      process.kill()
  return ended


def alone(*words):
  """`jaxadv WORDS` in this process."""
  assert cli.main([*map(str, words), "--no-progress"]) == 0


@pytest.mark.parametrize(
  "processes", [2, pytest.param(4, marks=pytest.mark.long)], ids=str
)
def test_a_universal_run_of_several_processes_has_the_bits_of_one(
  folder, one, processes
):
  many = folder / f"uap-{processes}"
  ended = finish(start(processes, "uap", folder / "uap.py", "--out", many))
  assert [status for status, *_ in ended] == [0] * processes, ended
  assert "results: " in ended[0][1]
  assert not any("results" in out for _, out, _ in ended[1:])
  assert same(one, many, "perturbations/small/*/*/uap.npy") == 3
  assert same(one, many, "perturbations/small/*/per_image.json") == 1
  assert same(one, many, "victims/small/results.json") == 1
  assert same(one, many, "perturbations/small/*/*/outcome.json", lacking="seconds") == 3
  assert (many / "report.html").read_text().count("<figure>") == 3


def same(one, other, pattern, lacking=None):
  """How many files there are, equal in both folders."""
  names = [path.relative_to(one) for path in sorted(one.glob(pattern))]
  for name in names:
    if lacking is None:
      assert (one / name).read_bytes() == (other / name).read_bytes(), name
    else:
      found = [json.loads((place / name).read_text()) for place in (one, other)]
      assert found[0].pop(lacking) > 0
      assert found[1].pop(lacking) > 0
      assert found[0] == found[1], name
  return len(names)


def rows(path):
  with path.open(newline="") as file:
    return [
      {k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)
    ]


def test_every_process_writes_its_own_rows_and_they_are_those_of_one(folder):
  one, two = folder / "attack-one", folder / "attack-two"
  alone("attack", folder / "attack.py", "--out", one)
  ended = finish(start(2, "attack", folder / "attack.py", "--out", two))
  assert [status for status, *_ in ended] == [0, 0], ended
  shards = [rows(two / name) for name in ("rows.csv", "rows-0001.csv")]
  assert [len(shard) for shard in shards] == [4, 3]
  every = sorted(shards[0] + shards[1], key=lambda row: int(row["pair"]))
  assert every == rows(one / "rows.csv")
  assert same(one, two, "images/*/*.png") == 7
  results = [json.loads((place / "results.json").read_text()) for place in (one, two)]
  assert results[0]["attacks"].keys() == results[1]["attacks"].keys()
  assert results[1]["pairs"] == 7
  # One process finishes what two began.
  (two / "rows-0001.csv").write_text((two / "rows-0001.csv").read_text()[:-30])
  alone("attack", folder / "attack.py", "--out", two)
  again = rows(two / "rows.csv") + rows(two / "rows-0001.csv")
  assert sorted(again, key=lambda row: int(row["pair"])) == rows(one / "rows.csv")


def test_the_fast_sum_of_two_processes_ends_near_that_of_one(folder):
  """The last bits may differ; a pattern of other images' gradients would be far off."""
  places = [folder / "fast-one", folder / "fast-two"]
  alone("uap", folder / "fast.py", "--out", places[0])
  ended = finish(start(2, "uap", folder / "fast.py", "--out", places[1]))
  assert [status for status, *_ in ended] == [0, 0], ended
  found = [sorted(place.glob("perturbations/*/*/*/uap.npy")) for place in places]
  assert len(found[0]) == len(found[1]) == 3
  for pair in zip(*found, strict=True):
    one, two = map(np.load, pair)
    assert np.abs(one - two).max() < 1e-3 * np.abs(one).max()


@pytest.mark.long
def test_models_are_defended_attacked_and_looked_into_by_two_processes(folder):
  one, two = folder / "defend-one", folder / "defend-two"
  words = ["analyse", folder / "defend.py", "--out"]
  alone(*words, one)
  ended = finish(start(2, *words, two))
  assert [status for status, *_ in ended] == [0, 0], ended
  assert "results: " in ended[0][1]
  assert "results" not in ended[1][1]
  assert same(one, two, "victims/*/results.json") == 2
  assert same(one, two, "attacked/*/*.npz") == 2
  results = [json.loads((place / "results.json").read_text()) for place in (one, two)]
  assert results[0]["rows"] == results[1]["rows"]
  assert results[0]["checks"] == results[1]["checks"]
  assert same(one, two, "analysis/**/*.png") == 8


def test_sigterm_to_one_process_stops_both_and_one_goes_on(folder):
  """The one that is not asked hears of it, and both stop after the same step."""
  one, place = folder / "term-one", folder / "term"
  words = ["train", folder / "uap.py", "--steps", "160", "--out"]
  started = start(2, *words, place)
  wait_for(place / "victims" / "small" / "checkpoints" / "step_00000004", started)
  started[1].send_signal(signal.SIGTERM)
  ended = finish(started, seconds=120)
  assert [status for status, *_ in ended] == [143, 143], ended
  for _, _, error in ended:
    assert "stopped by SIGTERM; the same command goes on from here" in error
    assert "Traceback" not in error
  alone(*words, place)
  alone(*words, one)
  assert same(one, place, "victims/small/results.json") == 1


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_process_that_dies_ends_the_other_and_the_run_goes_on(folder, one, killed):
  """Both are killed once, in training; two started anew end with the bits of one."""
  place = folder / f"killed-{killed}"
  started = start(2, "uap", folder / "uap.py", "--out", place)
  wait_for(place / "victims" / "small" / "checkpoints" / "step_00000004", started)
  started[killed].kill()
  began = time.monotonic()
  status, _, error = finish(started, seconds=90)[1 - killed]
  assert time.monotonic() - began < 60
  if status != -signal.SIGABRT or killed == 1:  # the first keeps JAX's own service
    assert status == 70, error
    assert "another one is gone" in error
    assert "Traceback" not in error
  ended = finish(start(2, "uap", folder / "uap.py", "--out", place))
  assert [status for status, *_ in ended] == [0, 0], ended
  assert same(one, place, "perturbations/small/*/*/uap.npy") == 3


def wait_for(path, started):
  deadline = time.monotonic() + 120
  while not path.exists():
    assert all(process.poll() is None for process in started)
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_what_the_first_process_refuses_ends_all_of_them(folder):
  place = folder / "other"
  place.mkdir()
  (place / "settings.json").write_text('{"seed": 3}')
  ended = finish(start(2, "uap", folder / "uap.py", "--out", place), seconds=120)
  assert [status for status, *_ in ended] == [2, 2], ended
  assert "holds another run" in ended[0][2]
  assert "the first process refused" in ended[1][2]


def test_a_batch_that_the_processes_cannot_share_is_refused(folder):
  words = ["train", folder / "uap.py", "--out", folder / "uneven", "--train-batch", "9"]
  ended = finish(start(2, *words, "--microbatches", "3"), seconds=120)
  assert [status for status, *_ in ended] == [2, 2], ended
  for _, _, error in ended:
    assert "cannot be cut evenly over 2 processes" in error


def test_a_process_that_finds_no_others_says_what_to_set(monkeypatch):
  for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    monkeypatch.delenv(name, raising=False)
  script = "import sys; from jaxadv import cli; sys.exit(cli.main(sys.argv[1:]))"
  words = ["train", "none.py", "--distributed"]
  done = subprocess.run(
    [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
  )
  assert done.returncode == 2
  assert "Set $JAX_COORDINATOR_ADDRESS" in done.stderr
  assert "Traceback" not in done.stderr


def test_more_devices_than_there_are_are_refused(folder, capsys):
  words = ["train", str(folder / "uap.py"), "--devices", "9"]
  assert cli.main([*words, "--out", str(folder / "nine")]) == 2
  assert "`devices` is 9; this process has 8" in capsys.readouterr().err


def test_a_universal_run_on_eight_devices_has_the_bits_of_one(folder, one):
  """Batches of 12 in 4 microbatches use 4 of them for a step, and all to look."""
  eight = folder / "eight"
  alone("uap", folder / "uap.py", "--out", eight, "--devices", "8")
  assert same(one, eight, "perturbations/small/*/*/uap.npy") == 3
  assert same(one, eight, "victims/small/results.json") == 1
