"""Does training on universal perturbations help against fresh ones?

    jaxadv uap configs/uap_blood.py --out runs/uap_blood
    python benchmarks/retraining.py configs/uap_blood.py --out runs/uap_blood

Takes the trained victims of the study. Each goes through rounds of two arms: the
published retraining on stored perturbations, and universal adversarial training; both
at every one of the `--rates`: by default the last learning rate of the seven victims of
`studies.universal_grid`, as published, and their first one. After each
round: clean accuracy, fooling by a fresh perturbation, by the one that was crafted
before the first round, and by the random sign control; on test images as stored in 8
bits. Every finished victim and arm stays; a second call goes on with the next.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxadv import (
  attacks,
  outcomes,
  progress,
  records,
  retraining,
  subjects,
  universal_job,
  victims,
)

HEADS = ("victim", "arm", "rate", "round", "accuracy", "fresh", "first", "sign")


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("config")
  parser.add_argument("--out", required=True, help="folder of the study's run")
  parser.add_argument("--quick", action="store_true", help="the config's quick form")
  parser.add_argument("--victims", nargs="+", help="all of the study by default")
  parser.add_argument("--share", type=float, default=0.04)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--epochs", type=int, default=5, help="per round")
  parser.add_argument("--pool", type=int, default=10)
  parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 5e-2])
  options = parser.parse_args(arguments)
  run = universal_job.prepare(
    options.config, quick=options.quick, out=options.out, progress=progress.terminal
  )
  print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
  for name in options.victims or run.study.victims:
    subject = universal_job.subject(run, name)
    for rate in options.rates:
      for arm in retraining.ARMS:
        for row in _rows(run, name, subject, arm, rate, options):
          cells = [name, arm, f"{rate:g}", str(row["round"])]
          cells += [f"{row[head]:.3f}" for head in HEADS[4:]]
          print("| " + " | ".join(cells) + " |", flush=True)


def _rows(run, name, subject, arm, rate, options):
  """The rows of one arm, from its file where it is finished."""
  settings = f"{options.share:g} {rate:g} {options.rounds} {options.epochs}"
  # universal_job.subject has seen that the folder holds this very study
  file = run.folder / "retraining" / name / f"{arm} {settings} {options.pool}.json"
  if not file.exists():
    schedule = _schedule(run.victims.tasks[name], run.study, rate, options)
    rows = list(_measured(run, subject, arm, schedule, options))
    file.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(file, rows)
  return json.loads(pathlib.Path(file).read_text())


def _schedule(task, study, rate, options):
  recipe, images = task.recipe, len(task.parts.train.images)
  return retraining.Schedule(
    apply=victims.flax_apply(recipe.model),
    tx=optax.sgd(rate, momentum=0.9, nesterov=True),
    augment=recipe.augment,
    balance=recipe.balance,
    steps=max(1, options.epochs * images // recipe.batch_size),
    batch=recipe.batch_size,
    moving=functools.partial(attacks.universal, norm=study.norm),
    pool=options.pool,
  )


def _measured(run, subject, arm, schedule, options):
  study, name = run.study, next(iter(run.study.perturbations))
  eps = universal_job.radius(run, options.share)
  control = attacks.random_universal(eps, norm=study.norm, kind="sign")
  image = jnp.zeros(subject.train.dataset.images.shape[1:])
  sign = control.init(jax.random.key(study.seed), image).delta
  first = None
  for done in retraining.rounds(
    retraining.ARMS[arm],
    subject,
    schedule,
    run.plans[name],
    eps=eps,
    count=options.rounds,
  ):
    first = done.delta if first is None else first
    tables = {
      view: subjects.measure(done.subject, delta)["test"]["stored"]
      for view, delta in (("fresh", done.delta), ("first", first), ("sign", sign))
    }
    rates = {view: outcomes.rates(np.asarray(table)) for view, table in tables.items()}
    yield {"round": done.number, "accuracy": 1 - rates["fresh"]["clean_error"]} | {
      view: found["fooling"] for view, found in rates.items()
    }


if __name__ == "__main__":
  main()
