"""The comparison of XLA flags runs; its times depend on the machine."""

import numpy as np
import pytest
from helpers import benchmark

from jaxadv import compiling, models


@pytest.fixture(scope="module")
def script():
  return benchmark("cpu_flags")


@pytest.mark.parametrize(
  "model",
  [models.UNet(width=2, depth=1), models.ConvNet(num_classes=3, width=2, depth=1)],
  ids=["masks", "classes"],
)
def test_pgd_is_compiled_and_told_about(script, model):
  call, told = script.program(model, 8, 2, steps=2)
  assert call().shape == (2, 8, 8, 3)
  assert 0 < np.abs(call()).max() <= 8 / 255 + 1e-6
  assert told["compile_s"] > 0
  assert np.isfinite(told["logits"]).all()
  assert np.abs(told["gradient"]).max() > 0


def test_a_row_compares_with_no_flags(script):
  row = {"trace_s": 1.0, "compile_s": 2.0, "logits": [1.0, -4.0], "gradient": [2.0]}
  other = row | {"logits": [1.0, -3.0], "ms": [1.0, 2.0, 3.0]}
  rows = script.summary({"none": row | {"ms": [3, 4, 5]}, "a": other, "bad": None})
  assert rows["bad"] is None
  assert (rows["none"]["ms"], rows["none"]["over_none"]) == (4, 1)
  assert (rows["a"]["over_none"], rows["a"]["logits_error"]) == (0.5, 0.25)
  assert rows["a"]["gradient_error"] == 0


def test_a_flag_that_is_not_known_is_no_measurement(script, monkeypatch):
  monkeypatch.setitem(script.FLAGS, "bad", "--xla_no_such_flag=1")
  assert script.measure("convnet", ["bad"], rounds=1, steps=1) == {"bad": None}


def test_the_flags_of_the_library_are_measured(script):
  known = {word for flags in script.FLAGS.values() for word in flags.split()}
  assert {flag for *_, flags in compiling._MEASURED for flag in flags} <= known
