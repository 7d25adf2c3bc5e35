"""The comparison of GAP with PGD runs on classes and label sets."""

import helpers
import numpy as np
import pytest

from jaxadv import data
from jaxadv.models import Generator

EPS = 0.05
ROWS = ["none", "random signs", "pgd", "pgd, opposite"]
ROWS += ["gap, opposite", "gap, away", "gap, universal", "universal"]


@pytest.mark.parametrize("kind", ["class", "set"])
def test_every_attack_has_its_row(kind):
  script = helpers.benchmark("gap")
  predict, x = helpers.convnet(), np.asarray(helpers.stripes(5))
  logits = np.asarray(predict(x)[0])
  labels = logits > 0 if kind == "set" else logits.argmax(1)
  images = data.Dataset(
    x, labels.astype(np.int32), np.arange(5), list("abcde"), ("a", "b", "c")
  )
  plan = script.Plan(EPS, Generator(width=2, depth=0), 0.01, 2, 2, 2, 3)
  rows = script.compare(script.Task("toy", predict, images, images), plan)
  assert list(rows) == ROWS + ["pgd, margin", "gap, margin"] * (kind == "set")
  assert rows["none"]["fooled"] == "0.000 [0.000, 0.000]"
  assert rows["pgd"]["fooled"] > rows["none"]["fooled"]
  sizes = {name: float(row["size"]) for name, row in rows.items()}
  # every value of the signs is at the radius, up to the 8 bits and the range
  assert sizes["random signs"] == pytest.approx(255 * EPS, abs=0.5)
  assert all(0 < size <= 255 * EPS + 0.5 for size in list(sizes.values())[1:])
  assert [rows[name].get("gradients") for name in ROWS[2:5]] == ["3", "3", "0"]
  head = {"class": "opposite", "set": "hidden"}[kind]
  assert f"| {head} |" in script.table(rows)
