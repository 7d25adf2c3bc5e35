"""Every config builds, in both forms; bad ones are refused in one line."""

import dataclasses
import pathlib

import optax
import pytest

from jaxadv import combine, config_files, experiments

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
GOOD = """'''Docstring.'''
import optax
from jaxadv import combine
from jaxadv.experiments import Experiment

def get_config(*, quick=False):  # a comment
  return Experiment(model=None, optimizer=optax.sgd(1.0), data=(None,),
                    attacks={'none': combine.identity}, num_pairs=1 if quick else 2)
"""


def test_there_is_a_config_per_paper():
  names = {path.stem for path in CONFIGS}
  papers = {"msa_optic_disc", "mafl_nuclei", "asma_polyp", "smia_nuclei", "uap_blood"}
  assert {"demo", *papers} <= names


def recipes(config):
  built = config.experiment
  return [built] if isinstance(built, experiments.Recipe) else [*built.victims.values()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_and_says_what_it_is(path):
  full = config_files.load_config(path)
  quick = config_files.load_config(path, quick=True)
  for small, large in zip(recipes(quick), recipes(full), strict=False):
    assert small.train_steps < large.train_steps
  assert quick.digest == full.digest
  if isinstance(full.experiment, experiments.Experiment):
    assert quick.experiment.num_pairs <= full.experiment.num_pairs
    assert full.experiment.baseline in full.experiment.attacks
  for word in ("Paper:", "Data:", "Expected:", "Time:"):
    assert word in full.text
  assert "not measured" not in full.text


def test_comments_and_docstring_do_not_make_another_config(tmp_path):
  def digest(text):
    path = tmp_path / "config.py"
    path.write_text(text)
    return config_files.load_config(path).digest

  same = GOOD.replace("Docstring", "Other words").replace("# a comment", "")
  assert digest(GOOD) == digest(same)
  assert digest(GOOD) != digest(GOOD.replace("1.0", "2.0"))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, "cannot read config .*FileNotFoundError"),
    (GOOD[:-20], "cannot read config .*line 7: SyntaxError"),
    ("x = 1", r"has no get_config\(\*, quick=False\)"),
    ("def get_config(*, quick): return 3", "returned int; return a jaxadv"),
    ("def get_config(): pass", "unexpected keyword argument 'quick'"),
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    (GOOD.replace("num_pairs=1 if quick else 2", "num_pairs=0"), "`num_pairs` is 0"),
    (GOOD.replace("num_pairs=", "pears="), "unexpected keyword argument 'pears'"),
  ],
)
def test_bad_configs_are_refused_in_one_line(tmp_path, text, message):
  path = tmp_path / "config.py"
  if text is not None:
    path.write_text(text)
  with pytest.raises(experiments.ConfigError, match=message) as caught:
    config_files.load_config(path)
  assert "\n" not in str(caught.value)
  assert str(path) in str(caught.value)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("train_steps", 0, "write 1 or more"),
    ("threshold", 1.5, r"write a share in \[0, 1\]"),
    ("holdout", 1.0, r"write a share in \[0, 1\)"),
    ("val_split", "test", "which is trained on or attacked"),
    ("val_split", "train", "which is trained on or attacked"),
    ("attacks", {}, "name at least one"),
    ("attacks", {"a/b": combine.identity}, "attacks has 'a/b'"),
    ("baseline", "other", "write one of .'none'."),
  ],
)
def test_numbers_that_cannot_work_are_refused(field, value, message):
  fine = experiments.Experiment(
    model=None,
    optimizer=optax.sgd(1.0),
    data=(None,),
    attacks={"none": combine.identity},
  )
  with pytest.raises(experiments.ConfigError, match=message):
    dataclasses.replace(fine, **{field: value})


def test_two_kinds_of_validation_images_are_refused():
  with pytest.raises(experiments.ConfigError, match="both set; choose one"):
    experiments.Recipe(
      model=None,
      optimizer=optax.sgd(1.0),
      data=(None,),
      val_split="val",
      holdout=0.1,
    )
