"""Adversarial training against universal perturbations, in rounds.

After every round a FRESH perturbation is crafted against the new weights: one crafted
before says how well the network remembers it, not how robust it is.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxadv import combine, crafting, data, loops, subjects, threats, training
from jaxadv.crafting import Plan, Subject
from jaxadv.engine import Universal
from jaxadv.training import TrainState

__all__ = ["ARMS", "Round", "Schedule", "rounds"]

Arm = Callable[..., TrainState]


class Schedule(NamedTuple):
  """How a victim is trained on.

  Attributes:
    apply: of the model, for training.
    tx: optax transform.
    augment: of one example, before the perturbation, or `None`.
    balance: oversample rare classes.
    steps: optimizer steps per round.
    batch: images per step.
    moving: `eps -> Universal` that takes turns with the weights.
    pool: perturbations crafted per round, for the arm that stores them.
  """

  apply: training.ApplyFn
  tx: optax.GradientTransformation
  augment: training.AugmentFn | None
  balance: bool
  steps: int
  batch: int
  moving: Callable[[float], Universal]
  pool: int = 10


class Round(NamedTuple):
  """A victim after a round.

  Attributes:
    number: from 0, the victim as it came.
    subject: the victim with its present weights.
    delta: of the fresh perturbation against it.
  """

  number: int
  subject: Subject
  delta: jax.Array


def rounds(
  arm: Arm, subject: Subject, schedule: Schedule, plan: Plan, *, eps: float, count: int
) -> Iterator[Round]:
  """Yields the victim as it came, and after each of `count` rounds.

  Args:
    arm: one of `ARMS`.
    subject: a trained victim.
    schedule: of the training.
    plan: of the perturbations; its seed is that of the fresh ones.
    eps: radius.
    count: of the rounds.

  Yields:
    `Round`, each with a fresh perturbation.
  """
  for number in range(count + 1):
    if number:
      seed = plan.seed + 1000 * number
      state = _fresh(subject, schedule, seed)
      batches = data.batches(
        subject.train.dataset, schedule.batch, seed=seed, balance=schedule.balance
      )
      state = arm(subject, schedule, plan._replace(seed=seed), eps, state, batches)
      parts = subject.train.dataset, subject.test.dataset
      subject = subjects.subject(subject.predict, _variables(state), *parts)
    yield Round(number, subject, crafting.craft(plan, subject, eps).delta)


def retraining(subject, schedule, plan, eps, state, batches) -> TrainState:
  """A pool of perturbations, then training where half of the images get one of them.

  Differs from the published procedure as it is recalled, which draws the moved half
  once per round: each image draws anew in each step.
  Reference: Hirano et al., BMC Medical Imaging 21:9 (2021).
  """
  seeds = range(plan.seed + 1, plan.seed + 1 + schedule.pool)
  pool = jnp.stack(
    [crafting.craft(plan._replace(seed=seed), subject, eps).delta for seed in seeds]
  )
  step = functools.partial(_descend, schedule, pool)
  return loops.fit(step, state, batches, num_steps=schedule.steps)


def universal_training(subject, schedule, plan, eps, state, batches) -> TrainState:
  """Universal adversarial training: the weights and ONE perturbation take turns.

      w <- w - lr grad L(w; clip(x + v)),  v <- one crafting step on the same batch

  The weights see augmented images, the perturbation the plain ones, with the truth as
  label; it starts from zero in every round.

  Differs from the low-cost form, which takes both gradients from one backward pass.
  Reference: Shafahi et al., AAAI 2020, arXiv 1811.11304.
  """
  uap = schedule.moving(eps)
  image = jnp.zeros(subject.train.dataset.images.shape[1:])
  states = state, _own(uap.init(jax.random.key(plan.seed), image))
  step = functools.partial(_alternate, schedule, subject.predict, eps)
  state, _ = loops.fit(step, states, batches, num_steps=schedule.steps)
  return state


ARMS: dict[str, Arm] = {
  "retraining": retraining,
  "universal adversarial training": universal_training,
}


# Compiled once for all rounds: what changes from round to round is an argument. The
# memory of a state is the next one's.


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _descend(schedule, pool, state, batch):
  return _step(schedule, combine.one_of(threats.box(), pool))(state, batch)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _alternate(schedule, predict, eps, states, batch):
  state, moving = states
  descend = _step(schedule, combine.fixed(threats.box(), moving.delta))
  state, metrics = descend(state, batch)
  own = functools.partial(predict, _variables(state))
  truth = {**batch, "decision": batch["label"]}
  moving, _ = schedule.moving(eps).step(own, moving, truth)
  return (state, moving), metrics


def _step(schedule, view):
  outer = training.mean_over_views(training.cross_entropy)
  return training.adversarial_step(
    schedule.apply, schedule.tx, (view,), outer, augment=schedule.augment
  )


def _fresh(subject, schedule, seed):
  extra = dict(subject.variables)
  params = extra.pop("params")
  state = training.init_state(jax.random.key(seed), params, extra, schedule.tx)
  return _own(state)


def _own(tree):
  """A copy, each leaf in memory of its own, that a step may take."""
  return jax.tree.map(jnp.copy, tree)


def _variables(state):
  return {"params": state.params, **state.extra}
