"""The comparison with other libraries: our part of it, timed, and what it refuses."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
OURS = ("bare", "plain", "flax", "frozen")
# a program of another library -> its package
THEIRS = {
  "torch": "torch",
  "torchattacks": "torchattacks",
  "foolbox jax": "foolbox",
  "art": "art",
}
pytestmark = pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="about the fast path of XLA for CPU"
)


@pytest.fixture(scope="module")
def peers():
  sys.path.insert(0, str(BENCHMARKS))  # its helpers lie beside it
  try:
    return helpers.benchmark("peers")
  finally:
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  """Of a small U-Net, from a process of its own, which pins itself to a core."""
  out = tmp_path_factory.mktemp("peers") / "peers.json"
  missing = [
    n for n, package in THEIRS.items() if not importlib.util.find_spec(package)
  ]
  command = [sys.executable, BENCHMARKS / "peers.py", "--work", "tiny", "--out", out]
  command += ["--steps", "4", "--repeats", "3", "--programs", *OURS, *missing]
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(out.read_text()), missing, done.stdout


def test_a_step_costs_in_the_loop_what_it_costs_outside(report):
  """The ratios are of one run; Flax's own convolutions show that they can be bad."""
  programs = report[0]["rows"]["tiny"]["programs"]
  ratios = {name: programs[name]["over bare"]["medians"] for name in OURS}
  assert ratios["plain"] <= 1.35
  assert ratios["frozen"] <= 1.35
  assert ratios["flax"] > 2


def test_programs_attack_the_same_network(report):
  programs = report[0]["rows"]["tiny"]["programs"]
  assert all(programs[name]["difference"] < 1e-5 for name in OURS)
  assert len({programs[name]["fooled"] for name in ("plain", "flax", "frozen")}) == 1
  assert programs["plain"]["fooled"] > 0
  row = report[0]["rows"]["tiny"]
  assert row["gflop"] == pytest.approx(1.5, rel=0.1)
  share = row["gflop"] / programs["plain"]["ms"] * 1e3 / row["peak"]["product of jax"]
  assert 0.1 < share < 1.2  # a small network on a matrix product's peak
  assert {*row["peak"]} <= {"product of jax", "product of torch"}


def test_what_is_not_installed_is_listed_with_its_error(report):
  stored, missing, text = report
  for name in missing:
    error = stored["rows"]["tiny"]["programs"][name]["error"]
    assert error.startswith("ModuleNotFoundError: No module named")
    assert f"- tiny, {name}: {error}" in text
  assert "| loop / bare, ours <= 1.0 | tiny |" in text


def test_another_network_is_refused(peers):
  program = peers.peer_attacks.Program(lambda: 0.0, np.ones((1, 2)))
  assert peers._difference(program, np.ones((1, 2)), "same") == 0
  with pytest.raises(AssertionError, match="other has another network"):
    peers._difference(program, np.array([[1.0, 1.01]]), "other")


def test_eight_radii_are_one_compilation(peers):
  predict = lambda x: (x - 0.2).mean((1, 2)) @ jnp.array([[1.0, -1.0]] * 2)
  x, y = np.full((3, 4, 4, 2), 0.5, np.float32), np.zeros(3, int)
  networks = peers.peer_networks.Networks(predict, predict, None, x, y)
  run, traces = peers.peer_attacks.radii(networks, 200)
  fooled = [float(run(radius / 8)) for radius in range(8)]
  assert fooled == [0, 0, 0, 1, 1, 1, 1, 1]
  assert len(traces) == 1
  run(jnp.ones(()))  # another type of number, so that the count can be more
  assert len(traces) == 2


def test_on_an_accelerator_steps_are_shares_of_its_own_peaks(peers):
  """By the wall's clock; a step may cost 3 % more in the loop there, and no more."""
  quartiles = {"quartiles_ms": [1.0, 1.0]}
  programs = {"bare": {"ms": 1.0}, "plain": {"ms": 1.04}, "bf16": {"ms": 0.5}}
  row = {
    **peers.Work("unet32", 128, 1, 40)._asdict(),
    "gflop": 26.0,
    "gbyte": 0.3,
    "peak": {"product of jax": 1e5},
    "others": {"product in bf16": 2e5, "copy": 1e3},
    "programs": {name: found | quartiles for name, found in programs.items()},
  }
  about = {"versions": {}, "xla_flags": "", "keeps_memory": False, "device": "H100"}
  text = peers.peer_report.markdown({"settings": about, "rows": {"unet32": row}})
  assert "Wall ms per step" in text
  for line in (
    "| ours, of it | 25% |",
    "| ours in bf16, of it | 26% |",
    "| bare, of it | 30% |",
    "| loop / bare, ours <= 1.03 | unet32 | 1.040 | **no** |",
  ):
    assert line in text


def test_the_flag_for_accelerators_is_refused_on_a_cpu(tmp_path):
  command = [sys.executable, BENCHMARKS / "peers.py", "--accelerator"]
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [*command, "--out", tmp_path / "a"], env=env, capture_output=True, text=True
  )
  assert done.returncode == 1
  assert "JAX_PLATFORMS=cpu" in done.stderr
