"""The command line: `jaxadv attack`, `uap`, `defend`, `analyse`, `train`, `build`."""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jaxadv import __version__

__all__ = ["main"]

# Option -> field of the experiment, meaning; all are whole numbers.
_OVERRIDES = {
  "--steps": ("train_steps", "training steps; learning rates keep to the config"),
  "--train-batch": ("batch_size", "images per training step"),
  "--pairs": ("num_pairs", "pairs to attack"),
  "--batch": ("attack_batch", "pairs attacked at once"),
  "--microbatches": ("microbatches", "parts of a training or crafting batch"),
  "--seed": ("seed", "seed of weights, batches, pairs and attacks"),
  "--gallery": ("gallery", "pairs shown per attack"),
}
# What the `report` extra brings.
_NEEDED_TO_BUILD = ("rich",)
_NEEDED = ("jinja2", "matplotlib", "rich", "sklearn", "threadpoolctl")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    arguments: words after the program's name; those of the process by default.

  Returns:
    0 when the command did its work; 2, after one line on stderr, for bad input and for
    a disk that cannot be written; 143 or 130 when it was stopped by SIGTERM or SIGINT
    and has stored what the same command goes on from. Of several processes, those
    that lose another one end with status 70.

  Example:
    >>> main(["attack", "no-such-config.py"])
    2
  """
  options = _parser().parse_args(arguments)
  needed = _NEEDED_TO_BUILD if options.command == "build" else _NEEDED
  missing = [name for name in needed if importlib.util.find_spec(name) is None]
  if missing:
    return _refuse(f"{', '.join(missing)} missing; run: pip install 'jaxadv[report]'")
  # What goes wrong in a save is raised, and told in one line.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  if options.command == "build":
    return _build(options)
  # Imported late: a misspelt option should not wait for jax.
  from jaxadv import (
    checkpoints,
    compiling,
    distributed,
    experiments,
    job,
    preemption,
    records,
    sharding,
  )

  compiled = (compiling.CacheError, compiling.FlagsError)
  refused = (experiments.ConfigError, job.JobError, records.RecordError, *compiled)
  try:
    commands = {"attack": _attack, "uap": _uap, "defend": _defend}
    commands |= {"analyse": _analyse, "train": _train}
    _configure(options)
    if options.distributed or distributed.wanted():
      distributed.start()
    mesh = distributed.mesh(options.devices)
    with (
      preemption.watch(),
      sharding.use(mesh),
      distributed.one_speaks(),
      distributed.guarded(),
    ):
      return commands[options.command](options)
  except (*refused, checkpoints.SaveError, distributed.Refused) as error:
    return _refuse(str(error))
  except preemption.Preempted as stop:
    _refuse(str(stop))
    return stop.status


def _configure(options):
  """What must be said to JAX before it starts."""
  from jaxadv import compiling

  if options.cpu_flags:
    done = compiling.configure_cpu()
    if not done.measured:
      print(f"no flags are measured for jaxlib {done.jaxlib}", file=sys.stderr)
  if options.cache:
    compiling.keep_programs(options.cache)


def _build(options):
  from jaxadv import builders, building, progress

  known = options.source in builders.BUILDERS
  if known != bool(options.manual_dir) or known == bool(options.name):
    return _refuse(
      f"{options.source!r} is {'a' if known else 'no'} builder; write NAME "
      "--manual-dir DIR for a published data set, or FOLDER_OR_PACK --name NAME for "
      f"your own. The builders are {', '.join(builders.BUILDERS)}"
    )
  shown = progress.terminal if options.progress else progress.silent
  settings = {"out": options.out, "progress": shown, "side": options.side}
  try:
    if known:
      built = building.build(options.source, options.manual_dir, **settings)
    else:
      built = building.convert(options.source, options.name, **settings)
  except building.BuildError as error:
    return _refuse(str(error))
  print(", ".join(f"{part} {count}" for part, count in built.counts.items()))
  for part, count in built.left_out.items():
    print(f"left out of {part}: {count} images of patients who are in a later part")
  print(f"load it as: tfds:{built.name}")
  return _done(built.path)


def _attack(options):
  from jaxadv import job, report

  run = job.prepare(options.config, **_settings(options))
  heads, lines = report.table(job.attack(run), intervals=False)
  _show(heads, lines)
  return _done(run.folder / "report.html")


def _train(options):
  from jaxadv import victim_job

  run = victim_job.prepare(options.config, **_settings(options))
  results = victim_job.train_all(run)
  _show(*victim_job.table(results))
  if any(task.recipe.defence for task in run.tasks.values()):
    print(
      "The scores on the test part are of clean images: no defence was put to the test."
    )
  if len(results) > 1:
    return _done(run.folder / "victims")
  (evaluation,), (task,) = results.values(), run.tasks.values()
  if "classes" in evaluation:
    _show(*victim_job.class_table(evaluation))
  return _done(task.folder / "results.json")


def _uap(options):
  from jaxadv import universal_job, universal_report

  run = universal_job.prepare(options.config, **_settings(options))
  _show(*universal_report.table(universal_job.craft(run)))
  return _done(run.folder / "report.html")


def _defend(options):
  from jaxadv import defence_job, defence_report

  run = defence_job.prepare(options.config, **_settings(options))
  results = defence_job.defend(run)
  _show(*defence_report.table(results))
  for model, check, evidence in defence_report.verdicts(results):
    print(f"unreliable: {model} fails {check!r}: {evidence}")
  return _done(run.folder / "report.html")


def _analyse(options):
  from jaxadv import analysis_job, defence_job

  run = defence_job.prepare(options.config, **_settings(options))
  _show(*analysis_job.table(analysis_job.analyse(run)))
  return _done(run.folder / "analysis" / "report.html")


def _settings(options):
  from jaxadv import progress

  return {
    "quick": options.quick,
    "source": options.data,
    "out": options.out,
    "overrides": _overrides(options),
    "progress": progress.terminal if _watched(options) else progress.silent,
  }


def _watched(options):
  from jaxadv import distributed

  return options.progress and distributed.is_first()


def _show(heads, lines):
  from rich import box, console, table

  shown = table.Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
  for i, head in enumerate(heads):
    shown.add_column(head, justify="right" if i else "left", no_wrap=not i)
  for line in lines:
    shown.add_row(*line)
  # A pipe has no width of its own; eighty columns would break the table.
  width = None if sys.stdout.isatty() else 200
  console.Console(width=width).print(shown)


def _done(place):
  print(f"results: {place.resolve()}")
  return 0


def _overrides(options) -> dict[str, Any]:
  fields = {field: getattr(options, field) for field, _ in _OVERRIDES.values()}
  return {field: value for field, value in fields.items() if value is not None}


def _refuse(message: str) -> int:
  print(f"jaxadv: {' '.join(message.split())}", file=sys.stderr)
  return 2


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog="jaxadv",
    description="Adversarial attacks on medical image models.",
    allow_abbrev=False,
  )
  parser.add_argument("--version", action="version", version=f"jaxadv {__version__}")
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  for name, meaning in (
    ("attack", "train the victim or load it, attack it, write the report"),
    ("uap", "craft universal perturbations against classifiers, write the report"),
    ("defend", "train models with and without defences, attack them, write the report"),
    ("analyse", "look at what attacks do inside the models of a `defend` config"),
    ("train", "train and evaluate the victims of any config, and nothing else"),
  ):
    _add_options(commands.add_parser(name, help=meaning, allow_abbrev=False))
  meaning = "turn a download, a folder or a pack into a TFDS data set"
  _add_build_options(commands.add_parser("build", help=meaning, allow_abbrev=False))
  return parser


def _add_build_options(command):
  command.add_argument(
    "source",
    metavar="SOURCE",
    help="such as isic2017_segmentation, or a folder or pack",
  )
  command.add_argument("--manual-dir", help="folder of the unpacked download")
  command.add_argument("--name", help="of the data set that a folder or pack becomes")
  command.add_argument("--out", help="folder of all data sets [$TFDS_DATA_DIR]")
  command.add_argument("--side", type=int, metavar="N", help="stretch images to N x N")
  command.add_argument(
    "--no-progress", dest="progress", action="store_false", help="no progress lines"
  )


def _add_options(command):
  command.add_argument("config", metavar="CONFIG", help="such as configs/demo.py")
  command.add_argument("--data", help="pack, folder, tfds:NAME or phantoms")
  command.add_argument(
    "--out", help="folder of the run [runs/NAME]; an interrupted run resumes"
  )
  command.add_argument(
    "--quick", action="store_true", help="the smallest sensible form"
  )
  command.add_argument(
    "--no-progress", dest="progress", action="store_false", help="no progress lines"
  )
  command.add_argument(
    "--distributed", action="store_true", help="join the other processes of the run"
  )
  command.add_argument(
    "--devices", type=int, metavar="N", help="of each process [all; of CPUs one]"
  )
  command.add_argument(
    "--cache",
    metavar="DIR",
    help="keep all compiled programs there, for the next run",
  )
  command.add_argument(
    "--cpu-flags", action="store_true", help="XLA flags, and memory kept: faster on CPU"
  )
  for option, (field, meaning) in _OVERRIDES.items():
    command.add_argument(option, dest=field, type=int, metavar="N", help=meaning)
