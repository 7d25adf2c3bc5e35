"""The benchmark of bfloat16 tells a narrow verdict from a wide one."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from helpers import benchmark

KERNEL = jnp.array([[1.0, -1.0], [1.0, -1.0]])


def predict(x):
  """Two classes; the first is decided from a sum of 1 on."""
  return (x @ KERNEL) - jnp.array([[1.0, -1.0]])


def test_success_and_verdicts(monkeypatch):
  monkeypatch.setitem(sys.modules, "compaction", benchmark("compaction"))
  script = benchmark("bf16")
  x = np.array([[0.6, 0.6], [0.9, 0.9], [0.5, 0.51]], np.float32)
  batch = {"image": x, "label": np.zeros(3, np.int32)}
  calls = script.programs(predict, x, 0.15, 2)
  assert list(calls) == ["float32", "bf16", "bf16 throughout"]
  judge = jax.jit(lambda x: jnp.argmax(predict(x), -1))
  rows = script.measure(calls, judge, [batch], steps=2, repeats=2)
  found = script.report(rows)
  for row in found.values():
    assert row["of the float32 model"] == 2 / 3
    assert row["other images"] == 0
  for name, row in found.items():
    low, _, high = row["ms"]  # of two turns, an extrapolation may be below zero
    assert 0 < min(rows[name]["ms"]) <= low <= high <= max(rows[name]["ms"])
  assert found["float32"]["wrong verdicts"] == found["bf16"]["wrong verdicts"] == 0

  # rounded to 8 bits, 0.4995 is 0.5: only the narrow model calls it bright
  close = {"image": np.full((1, 2), 0.4995, np.float32), "label": np.ones(1, np.int32)}
  calls = script.programs(predict, close["image"], 0.0, 1)
  rows = script.measure(calls, judge, [close], steps=1, repeats=2)
  assert [r["wrong verdicts"] for r in script.report(rows).values()] == [0, 0, 1]
