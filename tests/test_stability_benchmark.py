"""The comparison of SMIA with PGD runs, on classes and masks, and names confounds."""

import json

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

CONFIG = """
import optax
from jaxadv import combine
from jaxadv.experiments import Experiment
from jaxadv.models.unet import UNet

def get_config(*, quick=False):
  return Experiment(model=UNet(num_classes=2, width=2, depth=1), train_steps=30,
                    optimizer=optax.adam(0.03), data=(DATA,),
                    attacks={"none": combine.identity})
"""


@pytest.fixture(scope="module")
def script():
  return helpers.benchmark("stability")


def task(script, classes):
  predict = helpers.convnet(classes=classes)
  x = np.asarray(helpers.stripes(5))
  return script.Task("toy", predict, x, np.asarray(jnp.argmax(predict(x)[0], -1)))


def run(script, classes, weights):
  toy = task(script, classes)
  return script.compare(toy, eps=0.05, num_steps=3, keys=2, batch=2, weights=weights)


def test_classes_are_compared_at_equal_gradients_and_equal_time(script):
  got = run(script, 3, (0.0, 1.0))
  assert list(got.steps) == ["pgd", "smia 0", "smia 1", "pgd, equal time"]
  assert [got.steps[name] for name in ("pgd", "smia 0", "smia 1")] == [3, 3, 3]
  assert all(seconds > 0 for seconds in got.seconds.values())
  for columns in got.columns.values():
    assert {values.shape for values in columns.values()} == {(2, 5)}
  for column, values in got.columns["pgd"].items():
    np.testing.assert_allclose(got.columns["smia 0"][column], values, atol=1e-6)
  assert (
    np.abs(got.columns["smia 1"]["margin"] - got.columns["pgd"]["margin"]).max() > 0
  )
  # an own random start per key and image
  assert len(np.unique(got.columns["pgd"]["l2"])) == 10
  text = script.tables(got)
  assert text.count("| `smia 1` |") == 2
  assert "3 classes or labels" in text
  both = script.over_tasks([got, got])
  assert "| `pgd` | 0.000 [" in both


def test_two_classes_are_marked_as_a_confound(script):
  got = run(script, 2, (1.0,))
  for column, values in got.columns["pgd"].items():
    np.testing.assert_allclose(got.columns["smia 1"][column], values, atol=0.02)
  assert "no gain can show at equal gradients" in script.tables(got)


@pytest.mark.long
def test_the_command_keeps_its_victims_and_comparisons(
  script, discs, tmp_path, capsys, monkeypatch
):
  config = tmp_path / "toy.py"
  config.write_text(CONFIG.replace("DATA", repr(str(discs))))
  words = ["--images", "3", "--steps", "2", "--keys", "2", "--batch", "2"]
  words += ["--out", str(tmp_path / "out")]
  script.main([str(config), *words])
  text = capsys.readouterr().out
  assert "## toy" in text
  assert "3 images, 2 keys. Two classes per pixel" in text
  assert text.count("| `pgd, equal time` |") == 2

  def again(*_, **__):
    raise AssertionError("a finished comparison is made again")

  monkeypatch.setattr(script, "compare", again)
  script.main([str(config), str(config), *words])
  both = capsys.readouterr().out
  title, page = text.split("\n", 1)
  assert both.startswith(f"{title}\n{page}{page}")
  assert "Commit " in page
  gap = text.split("| `smia 0.5` |")[2].split(" |")[0].strip()  # of the harm
  assert both.count(f"| toy | `smia 0.5` | 2 | {gap} |") == 2
  assert "## All tasks" in both


def test_a_direction_without_values_survives_its_file(script):
  columns = {"pgd": {"cosine free": np.array([[0.5, np.nan]])}}
  found = script._arrays(json.loads(json.dumps(script._jsonable(columns))))
  np.testing.assert_array_equal(
    found["pgd"]["cosine free"], columns["pgd"]["cosine free"]
  )
