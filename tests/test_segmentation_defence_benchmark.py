"""The table of defended masks: trained, attacked, read again."""

import re

import helpers

CONFIG = """
import optax
from jaxadv import attacks, combine, training
from jaxadv.defences import Defence
from jaxadv.experiments import Recipe
from jaxadv.models.unet import UNet

def get_config(*, quick=False):
  view = attacks.seg_pgd(0.1, num_steps=2)
  mean = training.mean_over_views(training.dice_cross_entropy)
  return Recipe(
    model=UNet(num_classes=2, width=4, depth=1), optimizer=optax.adam(1e-2),
    data=("PACK",), holdout=0.2, train_steps=30, batch_size=8, checkpoint_every=15,
    defence=Defence((combine.identity, view), mean), monitor=view,
  )
"""


def test_attacks_harm_the_plain_model_and_a_second_run_reads(discs, tmp_path, capsys):
  config = tmp_path / "discs.py"
  config.write_text(CONFIG.replace("PACK", str(discs)))
  words = ["--config", str(config), "--out", str(tmp_path / "run"), "--quick"]
  words += ["--seeds", "0", "--radii", "60"]
  run = helpers.benchmark("segmentation_defence").main
  run(words)
  table = capsys.readouterr().out
  lines = [line for line in table.splitlines() if "|" in line]
  rows = {line.split("|")[1].strip(): line for line in lines}
  numbers = [int(n) for n in re.findall(r"\b\d+\b", rows["standard"])]
  clean, *attacked = numbers
  assert clean > 50
  assert max(attacked) < clean
  assert len(re.findall(r"\b\d+\b", rows["SegPGD"])) == 4
  run(words)
  assert capsys.readouterr().out == table


def test_each_doubt_has_its_own_cause():
  doubts = helpers.benchmark("segmentation_defence").doubts
  sound = {"noise": 80, "FGSM": 40, "PGD 8": 30, "PGD long": 30, "PGD huge": 0}
  assert doubts(sound, "PGD 8") == []
  for change, cause in (
    ({"noise": 20}, "noise does more harm"),
    ({"FGSM": 20}, "FGSM does more harm"),
    ({"PGD long": 40}, "more steps do less harm"),
    ({"PGD huge": 50}, "masks survive"),
  ):
    (doubt,) = doubts(sound | change, "PGD 8")
    assert cause in doubt
