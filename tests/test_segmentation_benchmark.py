"""The tables of the docs: who wins, on which pairs, against what."""

import csv

import pytest
from helpers import benchmark

COLUMNS = ("l2_8bit", "linf_8bit", "psnr_8bit", "ssim_8bit", "low_band_8bit")


def a_run(folder, wins):
  """A folder whose rows have `l2` for each pair that an attack wins, `None` if not."""
  folder.mkdir()
  with (folder / "rows.csv").open("w", newline="") as file:
    names = ["attack", "pair", "success_8bit", "backwards", *COLUMNS]
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    for attack, pairs in wins.items():
      for pair, l2 in enumerate(pairs):
        values = (l2 or 9.0, 0.5, 40.0 - (l2 or 0.0), 0.5, 0.25)
        row = {"attack": attack, "pair": pair, "success_8bit": float(l2 is not None)}
        writer.writerow(
          row | {"backwards": 20} | dict(zip(COLUMNS, values, strict=True))
        )
  return folder


@pytest.fixture
def tables(tmp_path, capsys):
  """Lines of the two tables by attack, of two runs of two pairs each."""
  first = {"asma 1": [2.0, None], "asma 2": [4.0, 8.0], "msa": [1.0, 6.0]}
  second = {"asma 1": [1.0, None], "asma 2": [2.0, None], "msa": [1.0, 5.0]}
  runs = [a_run(tmp_path / "a", first), a_run(tmp_path / "b", second)]
  benchmark("segmentation").main([str(run) for run in runs])
  text = capsys.readouterr().out
  assert "Paired with `asma 2`, the best of its sweep" in text
  return [_cells(part) for part in text.split("| attack | pairs |")]


def _cells(table):
  lines = [
    line.strip("| ").split(" | ") for line in table.splitlines() if "| `" in line
  ]
  return {line[0].strip("`"): line[1:] for line in lines}


def test_means_are_over_the_successes_of_all_runs(tables):
  means, _ = tables
  assert means["asma 2"][:2] == ["3/4", "4.667"]
  assert means["msa"][:2] == ["4/4", "3.250"]


def test_comparisons_are_over_the_pairs_that_both_win(tables):
  _, pairs = tables
  count, l2, _, _, psnr, _, oracle, _ = pairs["msa"]
  assert count == "3"
  assert l2.startswith("0.500 [")  # 1/4, 6/8 and 1/2
  assert psnr.startswith("2.000 [")  # 3, 2 and 1 dB
  assert oracle.startswith("0.750 [")  # 1/2, 6/8 and 1/1
  assert pairs["asma 2"][1] == "1.000 [1.00, 1.00]"
