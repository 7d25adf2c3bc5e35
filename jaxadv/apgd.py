"""Auto-PGD's step rule as an optax transform: the one with a real state machine."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = ["APGDState", "checkpoints", "scale_by_apgd"]


class APGDState(NamedTuple):
  """State of Auto-PGD for one example; costs, so smaller is better.

  Attributes:
    seen: gradients seen.
    step_size: current step.
    previous: the point moved from last.
    best: the point with the smallest cost, with `best_gradient` and `best_cost`.
    last_cost: cost one step ago.
    gains: steps of this window that lowered the cost.
    checked_cost: smallest cost at the last checkpoint.
    just_reduced: whether the last checkpoint halved the step.
  """

  seen: jax.Array
  step_size: jax.Array
  previous: jax.Array
  best: jax.Array
  best_gradient: jax.Array
  best_cost: jax.Array
  last_cost: jax.Array
  gains: jax.Array
  checked_cost: jax.Array
  just_reduced: jax.Array


def checkpoints(num_steps: int) -> tuple[int, ...]:
  """Steps after which the step size is reconsidered.

  The first window is `0.22 N`, each next one `0.03 N` shorter, down to `0.06 N`.

  Example:
    >>> checkpoints(100)
    (22, 41, 57, 70, 80, 87, 93, 99)
  """
  window, shortest, less = (max(int(c * num_steps), 1) for c in (0.22, 0.06, 0.03))
  steps: list[int] = []
  while (steps[-1] if steps else 0) + window <= num_steps:
    steps.append((steps[-1] if steps else 0) + window)
    window = max(window - less, shortest)
  return tuple(steps)


def scale_by_apgd(
  eps: float | jax.Array,
  num_steps: int,
  *,
  norm: Literal["linf", "l2"] = "linf",
  rho: float = 0.75,
) -> optax.GradientTransformationExtraArgs:
  """Auto-PGD: momentum, steps from `2 eps` down, restarts from the best point.

      z     = project(d - s * direction(g))
      d_new = project(d + a (z - d) + (1 - a) (d - d_previous)),   a = 0.75 (1 at first)

  At a checkpoint `s` is halved and the walk restarts from the best point if the loss
  rose in at most `rho` of the window, or if the step was kept last time and the best
  loss has not changed since.

  Args:
    eps: radius of the ball; sets the step size.
    num_steps: steps of the whole attack, static.
    norm: direction of the step, sign or L2-normalised.
    rho: share of rises that counts as progress.

  Returns:
    A transform that reads `value` (the cost) and `project`, and needs the perturbation.

  Differs from the original code in the first comparison of the first window: it always
  counts as a rise, where the code compares with an unwritten zero (no rise for a
  negative loss such as DLR).

  Reference: Croce and Hein, ICML 2020, arXiv 2003.01690.
  """
  stops = checkpoints(num_steps)
  windows = np.zeros(num_steps + 1, np.int32)  # length of the window that ends here
  windows[list(stops)] = np.diff((0, *stops))
  direction = jnp.sign if norm == "linf" else _unit

  def init(params):
    infinite = jnp.full((), jnp.inf, jnp.result_type(float))
    return APGDState(
      seen=jnp.int32(0),
      step_size=jnp.asarray(2 * eps, params.dtype),
      previous=params,
      best=params,
      best_gradient=jnp.zeros_like(params),
      best_cost=infinite,
      last_cost=infinite,
      gains=jnp.int32(0),
      checked_cost=infinite,
      just_reduced=jnp.bool_(True),
    )

  def update(g, state, params=None, *, value, project, **extra):
    del extra
    state = _observe(state, g, params, value)
    window = jnp.asarray(windows)[state.seen]
    state, restart = _check(state, window, rho)
    here = jnp.where(restart, state.best, params)
    g = jnp.where(restart, state.best_gradient, g)
    a = jnp.where(state.seen > 0, 0.75, 1.0).astype(g.dtype)
    z = project(here - state.step_size * direction(g))
    new = project(here + a * (z - here) + (1 - a) * (here - state.previous))
    return new - params, state._replace(seen=state.seen + 1, previous=here)

  return optax.GradientTransformationExtraArgs(init, update)


def _observe(state, gradient, point, cost):
  """Books the cost of the point the last step led to."""
  better = cost < state.best_cost
  return state._replace(
    best=jnp.where(better, point, state.best),
    best_gradient=jnp.where(better, gradient, state.best_gradient),
    best_cost=jnp.where(better, cost, state.best_cost),
    checked_cost=jnp.where(state.seen == 0, cost, state.checked_cost),
    gains=state.gains + ((state.seen > 0) & _rose(state, cost)),
    last_cost=jnp.asarray(cost, state.last_cost.dtype),
    previous=jnp.where(state.seen == 0, point, state.previous),
  )


def _rose(state, cost):
  return (cost < state.last_cost) | (state.seen == 1)


def _check(state, window, rho):
  """At a checkpoint (`window` > 0): halve and restart, or go on."""
  oscillates = state.gains <= rho * window
  stuck = ~state.just_reduced & (state.checked_cost <= state.best_cost)
  at_check = window > 0
  restart = at_check & (oscillates | stuck)
  return state._replace(
    step_size=jnp.where(restart, state.step_size / 2, state.step_size),
    gains=jnp.where(at_check, 0, state.gains),
    checked_cost=jnp.where(at_check, state.best_cost, state.checked_cost),
    just_reduced=jnp.where(at_check, restart, state.just_reduced),
  ), restart


def _unit(g):
  return g / jnp.maximum(jnp.sqrt(jnp.square(g).sum()), jnp.finfo(g.dtype).tiny)
