"""The report: self-contained, complete, and right about what it shows."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from jaxadv import report, summaries


def a_row(attack, pair, l2=1.0, success=1):
  columns = dict.fromkeys(report.COLUMNS, 0.5) | {"l2_8bit": l2, "backwards": 20}
  place = {"attack": attack, "pair": pair, "source": 1, "target": 2}
  return place | {"initial_iou": 0.25, "success_8bit": success} | columns


def some_panels(channels=3):
  rng = np.random.default_rng(0)
  for attack in ("asma", "<b>msa</b>"):
    for pair in range(2):
      clean = rng.integers(0, 200, (16, 16, channels), dtype=np.uint8)
      attacked = clean + rng.integers(0, 3, clean.shape, dtype=np.uint8)
      masks = rng.integers(0, 3, (3, 16, 16))
      yield report.Panel(a_row(attack, pair), clean, attacked, *masks)


def some_results(panels):
  rows = [panel.row for panel in panels]
  return rows, {
    "name": "trial",
    "source": "pack.npz",
    "attacks": summaries.summarize(rows, baseline="asma"),
    "baseline": "asma",
    "pairs": 2,
    "threshold": 0.95,
    "victim": {"iou": 0.9, "dice": 0.95, "pixel_accuracy": 0.99, "images": 10},
    "seed": 0,
    "wall_seconds": 1.5,
    "attack_seconds": 1.0,
    "forwards": 80,
    "backwards": 80,
    "config": {"digest": "abc", "text": "x < 1 & y"},
    "versions": {"jaxadv": "0", "jax": "0"},
    "commit": None,
    "machine": "cpu",
  }


class Page(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.links, self.tags = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_is_self_contained_and_complete(channels):
  panels = list(some_panels(channels))
  rows, results = some_results(panels)
  text = report.page(results, rows, panels)
  page = Page(text)
  assert len(page.links) == 6 * len(panels)
  assert all(link.startswith("data:image/png;base64,") for link in page.links)
  assert not re.search(r"url\(|@import|<script|https?:", text)
  assert "<b>msa</b>" not in text
  assert "x &lt; 1 &amp; y" in text
  assert "width=device-width" in text
  attacked = Image.open(io.BytesIO(base64.b64decode(page.links[2].split(",")[1])))
  np.testing.assert_array_equal(
    np.asarray(attacked).reshape(16, 16, channels), panels[0].attacked
  )


def test_the_gallery_shows_every_panel():
  panels = list(some_panels())
  one = Image.open(io.BytesIO(report.gallery(panels[:1])))
  four = Image.open(io.BytesIO(report.gallery(panels)))
  assert one.width == four.width
  assert four.height > 2.5 * one.height


def test_the_perturbation_fills_the_range_and_keeps_its_sign():
  clean = np.full((20, 20, 1), 100, np.uint8)
  attacked = clean.copy()
  attacked[:10], attacked[10:12] = 95, 104
  attacked[0, 0] = 200
  picture, factor = report.amplified(clean, attacked)
  assert factor == 25
  assert picture[[1, 11, 19, 0], [0, 0, 0, 0], 0].tolist() == [3, 228, 128, 255]
  assert report.amplified(clean, clean)[1] == 127


def test_the_table_means_everything_and_pairs_the_ratios():
  rows = [
    a_row("asma", 0, l2=2.0),
    a_row("asma", 1, l2=8.0, success=0),
    a_row("msa", 0, l2=1.0),
    a_row("msa", 1, l2=1.0),
  ]
  attacks = summaries.summarize(rows, baseline="asma")
  heads, lines = report.table({"attacks": attacks, "baseline": "asma"})
  cells = [dict(zip(heads, line, strict=True)) for line in lines]
  assert [c["attack"] for c in cells] == ["asma", "msa"]
  assert [c["success"] for c in cells] == ["0.50", "1.00"]
  assert [c["L2"] for c in cells] == ["5.00", "1.00"]
  assert cells[1]["L2 ratio"] == "0.500 [0.500, 0.500]"
  assert attacks["asma"]["successes"]["l2_8bit"]["mean"] == 2.0
  heads, _ = report.table({"attacks": attacks, "baseline": None})
  assert "L2 ratio" not in heads


def test_no_success_is_a_dash():
  rows = [a_row("asma", 0, success=0), a_row("msa", 0)]
  attacks = summaries.summarize(rows, baseline="asma")
  _, lines = report.table({"attacks": attacks, "baseline": "asma"})
  assert lines[1][-1] == "-"
