"""Two commits in turns, for which the checkout has to be a clone."""

import pathlib
import subprocess

import helpers
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_a_commit_beside_itself(capsys):
  git = ["git", "-C", str(ROOT), "rev-parse", "--verify", "HEAD"]
  if subprocess.run(git, check=False, capture_output=True).returncode:
    pytest.skip("the checkout has no commit to lay out")
  words = ["HEAD", "HEAD", "--network", "unet4", "--side", "32", "--repeats", "5"]
  helpers.benchmark("commits").main(words)
  heads, _, row = capsys.readouterr().out.splitlines()
  assert heads == "| network | HEAD | HEAD | ratio |"
  _, network, old, new, ratio, _ = row.split("|")
  assert network.strip() == "unet4, 32 px, batch 1"
  assert min(float(cell.split()[0]) for cell in (old, new)) > 0
  assert 0.5 < float(ratio) < 2  # both sides are the same program
