"""The scaling benchmark runs in processes and on devices, and its model is arithmetic.

Times depend on the machine, so they are not tested; what a collective carries does not.
"""

import json
import math
import re

import helpers
import pytest

SMALL = ["--side=8", "--net=convnet", "--batch=2", "--total=4", "--repeats=2"]
SMALL += ["--microbatches=2"]
# LLVM in a hurry: these programs run thrice
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.fixture(scope="module")
def scaling():
  return helpers.benchmark("scaling")


@pytest.fixture(scope="module")
def measured(scaling, tmp_path_factory):
  """One and two real processes, and one with two devices: points and tables."""
  path = tmp_path_factory.mktemp("scaling") / "points.json"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", FLAGS)
    words = ["--processes", "1", "2", "--devices", "2", "--rounds=1", f"--out={path}"]
    scaling.main([*words, *SMALL])
  points = json.loads(path.read_text())
  return points, scaling.report(points, bandwidth=1e11, latency=1e-6)


def test_every_set_up_is_measured(measured):
  points, _ = measured
  found = [(point["processes"], point["devices"]) for point in points]
  assert found == [(1, 1), (2, 1), (1, 2)]
  for point in points:
    assert all(len(run["seconds"]) == 2 for run in point["runs"])
    assert all(min(run["seconds"]) > 0 for run in point["runs"])
    assert point["versions"]["jax"]


def test_a_step_reduces_the_gradient_of_one_image_and_pgd_nothing(measured):
  points, _ = measured
  for point in points:
    found = {run["work"]: run["collectives"] for run in point["runs"] if "batch" in run}
    if point["processes"] * point["devices"] == 1:
      assert all(kinds == [] for kinds in found.values())
      continue
    # beside the gradient three means and the sum of the weights
    assert found["universal"] == [["all-reduce", 4 * 8 * 8 * 3 + 4 * 4]]
    assert found["pgd"] == found["no collective"] == []
    assert {kind for kind, _ in found["training"]} == {"all-reduce"}
    # the fixed order gathers every microbatch
    assert {kind for kind, _ in found["fixed order"]} == {"all-gather"}
    carried = sum(size for _, size in found["fixed order"])
    assert carried == 2 * (4 * 8 * 8 * 3 + 4 * 4)


def test_the_tables_are_complete(measured):
  points, text = measured
  for work in ("Universal", "Pgd", "Training"):
    table = text.split(f"### {work}\n")[1].split("###")[0]
    assert table.count("| weak |") == table.count("| strong |") == len(points)
  for name in ("1 process ", "2 processes", "1 x 2 devices"):
    assert f"| {name}" in text
  # with a star where the machine has one core
  assert re.search(r"Fitted to 2 processes\*?: ", text)
  assert re.search(r"Fitted to 1 x 2 devices\*?: ", text)
  projected = text.split("### Projected, not measured")[1]
  assert projected.count("| 256 |") == projected.count("| 4096 |") == 6
  assert "Assumed: 100 GB/s per chip, 1 us per hop" in projected
  assert "nan" not in text
  assert "Commit " in text


def test_one_point_of_a_launcher_makes_a_table_too(scaling, measured, tmp_path, capsys):
  points, _ = measured
  paths = []
  for n, point in enumerate(points):
    paths.append(tmp_path / f"{n}.json")
    paths[-1].write_text(json.dumps([point]))
  scaling.main(["--points", *map(str, paths)])
  assert capsys.readouterr().out.count("| weak |") == 3 * len(points)


def test_rounds_of_one_set_up_are_one_point(scaling):
  def point(processes, seconds):
    run = {"work": "pgd", "batch": 2, "seconds": seconds}
    return {"processes": processes, "devices": 1, "runs": [run]}

  found = scaling.merged([point(1, [1.0]), point(2, [2.0]), point(1, [3.0])])
  assert [p["runs"][0]["seconds"] for p in found] == [[1.0, 3.0], [2.0]]


def test_the_fit_recovers_what_made_the_times(scaling):
  made = {"bandwidth": 2e9, "latency": 3e-5}
  points = [
    (n, size, scaling.allreduce(n, size, **made))
    for n in (2, 4)
    for size in scaling.SIZES
  ]
  bandwidth, latency = scaling.fit(points)
  assert math.isclose(bandwidth, made["bandwidth"], rel_tol=1e-9)
  assert math.isclose(latency, made["latency"], rel_tol=1e-9)


def test_the_model_is_the_formula(scaling):
  cost = {"bandwidth": 1e11, "latency": 1e-6}
  size = 4 * 224 * 224 * 3
  ring = scaling.allreduce(256, size, **cost)
  assert math.isclose(ring, 2 * 255 / 256 * size / 1e11 + 510e-6)
  torus = scaling.allreduce(256, size, shape="torus", **cost)
  assert math.isclose(ring - torus, (510 - 60) * 1e-6)
  assert scaling.hops(256, "tree") == 16
  assert scaling.hops(4096, "torus") == 90


def test_bytes_are_read_from_the_text(scaling):
  text = """
  %a = (f32[8,8,3]{2,1,0}, f32[]) all-reduce(%x, %y), channel_id=1
  %b = bf16[4]{0} all-gather-start(%z), dimensions={0}
  %c = f32[9]{0} add(%z, %z)
  """
  assert scaling.collectives(text) == [["all-reduce", 772], ["all-gather", 8]]
