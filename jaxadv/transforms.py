"""Optax transforms of the cost gradient of ONE image.

They chain with those of optax, which serves `trace` (momentum), `scale_by_sign`,
`scale_by_adam`, schedules and `chain`. Spatial axes are all but the last. A transform
that reads more than the gradient names it: `sample` (the example at this step),
`success` (whether it counts as one) or `project`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxadv import filters
from jaxadv.apgd import scale_by_apgd
from jaxadv.types import Sample, overlap

__all__ = [
  "GiveUp",
  "HomingState",
  "clip_peaks",
  "combine_normalized",
  "for_steps",
  "high_pass",
  "low_pass",
  "masked_by",
  "normalize",
  "scale_by_apgd",
  "scale_by_first_norm",
  "scale_by_mask_iou",
  "scale_by_size",
  "shrink_band",
  "shrink_on_success",
  "sign_step",
  "smooth",
  "sparse_sign",
  "step_to_boundary",
]

# (delta, how much of it, delta at the first success) -> delta; see `shrink_on_success`
GiveUp = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def sign_step(step_size: float | jax.Array) -> optax.GradientTransformation:
  """`-step_size * sign(g)`: the step of FGSM and of PGD in Linf."""
  return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(step_size))


def normalize(ord: Literal[1, 2]) -> optax.GradientTransformation:
  """Divides the gradient by its norm over the whole image; zero stays zero.

  Example:
    >>> g = jnp.array([3.0, -4.0])
    >>> print(normalize(2).update(g, optax.EmptyState())[0].round(3))
    [ 0.6 -0.8]
  """
  return optax.stateless(lambda g, _: _unit(g, ord))


def combine_normalized(
  weights: Sequence[float] | Callable[[int], Sequence[float]],
) -> optax.GradientTransformation:
  """Reduces S stacked gradients to `sum_s w_s g_s / ||g_s||_2`.

  The first link of an attack whose loss returns S values.

  Args:
    weights: S numbers, or a function of S that gives them.

  Example:
    >>> g = jnp.array([[3.0, 4.0], [0.0, 2.0]])
    >>> first = combine_normalized([1.0, 0.5])
    >>> print(first.update(g, optax.EmptyState())[0].round(3))
    [0.6       1.3000001]
  """

  def reduce(gradients, _):
    given = weights(len(gradients)) if callable(weights) else weights
    shares = jnp.asarray(given, gradients.dtype)
    return jax.vmap(lambda g, w: w * _unit(g, 2))(gradients, shares).sum(0)

  return optax.stateless(reduce)


def step_to_boundary(overshoot: float | jax.Array) -> Any:
  """The step to the nearest of S linearised boundaries `loss_k = 0`.

  `(1 + overshoot) |f_k| w_k / ||w_k||^2` for the k with the smallest `|f_k| / ||w_k||`;
  zero where no class has a gradient and a finite loss.

  Args:
    overshoot: share by which the step goes too far.
  """

  def update(g, state, params=None, *, value, **extra):
    del params, extra
    flat = g.reshape(len(value), -1)
    norm = jnp.sqrt(jnp.square(flat).sum(1))
    distance = jnp.abs(value) / jnp.maximum(norm, jnp.finfo(g.dtype).tiny)
    distance = jnp.where((norm > 0) & jnp.isfinite(distance), distance, jnp.inf)
    nearest = jnp.argmin(distance)
    step = -(1 + overshoot) * distance[nearest] * _unit(flat[nearest], 2)
    return jnp.where(distance.min() < jnp.inf, step, 0).reshape(g.shape[1:]), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def sparse_sign(share: float = 0.01) -> optax.GradientTransformation:
  """Steepest step in L1: equal steps in the entries with the largest gradients.

  Keeps the `share` of entries with the largest size, as signs that sum to one.

  Reference: sparse L1 descent, Tramer and Boneh, NeurIPS 2019, arXiv 1904.13000.
  """

  def update(g, _):
    count = max(1, round(share * g.size))
    smallest = jnp.sort(jnp.abs(g).ravel())[-count]
    signs = jnp.sign(g) * (jnp.abs(g) >= smallest)
    return signs / jnp.maximum(jnp.abs(signs).sum(), 1)

  return optax.stateless(update)


def smooth(sigma: float | jax.Array, *, size: int = 15) -> optax.GradientTransformation:
  """Gaussian blur of the gradient (translation invariance, arXiv 1904.02884)."""
  kernel = filters.gaussian_kernel(sigma, size)
  return optax.stateless(lambda g, _: filters.blur(g, kernel.astype(g.dtype)))


def low_pass(cutoff: float) -> optax.GradientTransformation:
  """Keeps the frequencies up to `cutoff` cycles per pixel."""
  return optax.stateless(lambda g, _: filters.low_pass(g, cutoff))


def high_pass(cutoff: float) -> optax.GradientTransformation:
  """Removes the frequencies up to `cutoff` cycles per pixel."""
  return optax.stateless(lambda g, _: g - filters.low_pass(g, cutoff))


def masked_by(name: str) -> optax.GradientTransformationExtraArgs:
  """Moves only where `target[name]` is non-zero; `(H, W)` serves every channel."""

  def update(g, sample):
    mask = jnp.asarray(sample.target[name], g.dtype)
    return g * (mask if mask.ndim == g.ndim else mask[..., None])

  return _with_sample(update)


def for_steps(n: int | jax.Array) -> optax.GradientTransformation:
  """Stands still after `n` steps; `n` may be traced, one per example."""

  def update(g, count, params=None):
    del params
    return jax.tree.map(lambda u: jnp.where(count < n, u, 0), g), count + 1

  return optax.GradientTransformation(lambda _: jnp.int32(0), update)


def scale_by_mask_iou(
  beta: float | jax.Array, tau: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
  """ASMA's multiplier: descends by `(tau + beta * IoU) * g`.

  The IoU is that of this example's current decision with its target mask. A negative
  `beta` makes steps smaller as the mask is reached: `tau = far`, `beta = near - far`.

  Reference: Ozbulak et al., MICCAI 2019, arXiv 1907.13124.
  """
  return _with_sample(lambda g, sample: -(tau + beta * overlap(sample)) * g)


def scale_by_size() -> optax.GradientTransformation:
  """Multiplies by `sqrt(n)` for n values: a unit gradient then has RMS 1."""
  return optax.stateless(lambda g, _: g * jnp.sqrt(g.size).astype(g.dtype))


class FirstNormState(NamedTuple):
  """The norm of the first gradient; 0 before there is one."""

  norm: jax.Array


def scale_by_first_norm() -> optax.GradientTransformation:
  """Divides by the L2 norm of the first gradient: step sizes without model units."""

  def update(g, state, params=None):
    del params
    norm = jnp.where(state.norm > 0, state.norm, jnp.sqrt(jnp.square(g).sum()))
    return g / jnp.maximum(norm, jnp.finfo(g.dtype).tiny), FirstNormState(norm)

  return optax.GradientTransformation(
    lambda params: FirstNormState(jnp.zeros((), params.dtype)), update
  )


class HomingState(NamedTuple):
  """State of `shrink_on_success` for one example.

  Attributes:
    step: size of the next step before the first success.
    first: the perturbation at the first success; 0 before it.
    since: progress at the first success.
  """

  step: jax.Array
  first: jax.Array
  since: jax.Array


def shrink_on_success(
  *,
  first: float | jax.Array = 1e-3,
  growth: float | jax.Array = 1.02,
  longest: float | jax.Array = 1e-2,
  reach: float | jax.Array = 0.1,
  last: float | jax.Array = 0.02,
  shrink: float | jax.Array = 0.1,
  constrain: GiveUp | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Walks down the gradient until the attack succeeds, then walks home.

  Before the first success steps are small and grow: `d <- d - min(first * growth^t,
  longest) * g`. From then on, with `f` the perturbation at that moment and `r` its
  RMS, `a` falling geometrically from 1 to `last` at the end and `b = sqrt(a)`:

      failure:  d <- d - reach * r * a * g
      success:  d <- constrain((1 - shrink * b) * d, b, f)

  so the perturbation crosses the decision back and forth in ever smaller steps, and the
  smallest success meets the threshold exactly. Steps are measured in the perturbation
  itself: no scale of model or image enters but `first`. Chain it behind `normalize(2)`
  and `scale_by_size()`, so that `g` has RMS 1.

  Args:
    first: first step, RMS per value; small, because the path decides where it ends.
    growth: of the steps before the first success, >= 1.
    longest: step before the first success, RMS per value; beyond it hard examples
      would be jumped over, not approached.
    reach: step after a failure as a share of `r`.
    last: what is left of `a` at the end, in (0, 1].
    shrink: share of the perturbation given up by the first success, in [0, 1).
    constrain: `(delta, b, f) -> delta`, what else to give up on success.

  Returns:
    A transform that reads `sample` and `success` and needs the perturbation.
  """

  def init(params):
    zero = jnp.zeros((), params.dtype)
    return HomingState(zero + first, jnp.zeros_like(params), zero)

  def update(g, state, params=None, *, sample, success, **extra):
    del extra
    state = _first_success(state, params, sample.progress, success)
    size = _rms(state.first)
    decay = last ** ((sample.progress - state.since) / (1 - state.since))
    step = jnp.where(size > 0, reach * size * decay, state.step)
    giving = jnp.sqrt(decay)
    home = (1 - shrink * giving) * params
    home = home if constrain is None else constrain(home, giving, state.first)
    updates = jnp.where(success, home - params, -step * g)
    return updates, state._replace(step=jnp.minimum(state.step * growth, longest))

  return optax.GradientTransformationExtraArgs(init, update)


def _first_success(state, delta, progress, success):
  is_first = success & ~state.first.any()
  return state._replace(
    first=jnp.where(is_first, delta, state.first),
    since=jnp.where(is_first, progress, state.since).astype(state.since.dtype),
  )


def clip_peaks(
  delta: jax.Array,
  share: float | jax.Array,
  *,
  first: jax.Array,
  floor: float | jax.Array,
) -> jax.Array:
  """Clips the largest values, down to a floor relative to the RMS.

      |d| <= max((1 - share) max|d|, floor * rms(d) * max|f| / rms(f))

  Args:
    delta: any shape.
    share: of the largest value to give up, in [0, 1].
    first: `f`, like `delta`, what the floor refers to.
    floor: in [0, 1].

  Example:
    >>> delta = jnp.array([1.0, -0.25])
    >>> for share in (0.25, 0.75):
    ...   print(clip_peaks(delta, share, first=delta, floor=0.5))
    [ 0.75 -0.25]
    [ 0.5  -0.25]
  """
  steepness = jnp.abs(first).max() / _positive(_rms(first))
  peak = (1 - share) * jnp.abs(delta).max()
  peak = jnp.maximum(peak, floor * steepness * _rms(delta))
  return jnp.clip(delta, -peak, peak)


def shrink_band(
  delta: jax.Array,
  band: Callable[[jax.Array], jax.Array],
  share: float | jax.Array,
  *,
  first: jax.Array,
  floor: float | jax.Array,
) -> jax.Array:
  """Gives up a share of one band, down to a floor: `d - (1 - k) B d`.

  `k = max(1 - share, k0)`, at most 1; at `k0` the band holds `floor` times the share of
  the energy that it holds in `first`.

  Args:
    delta: `(..., C)`.
    band: orthogonal projector `B`.
    share: of the band to give up, in [0, 1].
    first: like `delta`, what the floor refers to.
    floor: in [0, 1].

  Example:
    >>> keep_last = lambda d: d * jnp.array([0.0, 1.0])
    >>> delta, first = jnp.array([3.0, 4.0]), jnp.array([1.0, 1.0])
    >>> for share in (0.1, 0.9):  # ||B d||^2 may fall to half of ||d||^2
    ...   print(shrink_band(delta, keep_last, share, first=first, floor=1.0))
    [3.  3.6]
    [3. 3.]
  """
  inside = band(delta)
  wanted = floor * _energy(band(first)) / _positive(_energy(first))
  level = wanted / _positive(1 - wanted) * _energy(delta - inside)
  enough = jnp.sqrt(level / _positive(_energy(inside)))
  return delta - (1 - jnp.clip(enough, 1 - share, 1)) * inside


def _rms(x):
  return jnp.sqrt(jnp.square(x).mean())


def _energy(x):
  return jnp.square(x).sum()


def _positive(x):
  return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def _with_sample(update: Callable[[jax.Array, Sample], jax.Array]) -> Any:
  """A transform without state that reads the example."""

  def apply(g, state, params=None, *, sample, **extra):
    del params, extra
    return update(g, sample), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), apply)


def _unit(g, ord):
  norm = jnp.abs(g).sum() if ord == 1 else jnp.sqrt(jnp.square(g).sum())
  return g / jnp.maximum(norm, jnp.finfo(g.dtype).tiny)
