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
    model=UNet(num_classes=2, width=4, depth=2), optimizer=optax.adam(1e-2),
    data=("PACK",), holdout=0.2, train_steps=30, batch_size=8, checkpoint_every=15,
    defence=Defence((combine.identity, view), mean), monitor=view,
  )
"""


def test_attacks_harm_the_plain_model_and_more_with_the_radius(discs, tmp_path, capsys):
  config = tmp_path / "discs.py"
  config.write_text(CONFIG.replace("PACK", str(discs)))
  words = ["--config", str(config), "--out", str(tmp_path / "run"), "--quick"]
  words += ["--seeds", "0", "--radii", "0", "60"]
  run = helpers.benchmark("segmentation_defence").main
  run(words)
  table = capsys.readouterr().out
  lines = [line for line in table.splitlines() if "|" in line]
  rows = {line.split("|")[1].strip(): line for line in lines}
  numbers = [int(n) for n in re.findall(r"\b\d+\b", rows["standard"])]
  clean, nothing, attacked = numbers[0], numbers[1:4], numbers[4:]
  assert clean > 50
  assert nothing == [clean] * 3
  assert max(attacked) < clean
  assert len(re.findall(r"\b\d+\b", rows["SegPGD"])) == 7
  run(words)
  assert capsys.readouterr().out == table
