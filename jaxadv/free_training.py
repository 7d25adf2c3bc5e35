"""Free adversarial training: weights and perturbations moved by one backward pass."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxadv import inputs, training
from jaxadv.types import Array, Threat

__all__ = ["FreeState", "free_step"]


class FreeState(NamedTuple):
  """A training state, and the perturbation of every place of the batch.

  Attributes:
    train: of the model.
    delta: `(B, ..., C)`, carried from batch to batch.
  """

  train: training.TrainState
  delta: Array


def free_step(
  apply: training.ApplyFn,
  tx: optax.GradientTransformation,
  threat: Threat,
  eps: float | Array,
  *,
  loss: training.ExampleLoss = training.task_loss,
) -> Callable[[FreeState, training.Batch], tuple[FreeState, dict[str, Array]]]:
  """Free adversarial training: one backward pass moves weights and perturbations.

      g_w, g_d = grad L(y, f_w(x + d))
      w <- tx(w, g_w),   d <- project(d + eps sign g_d)

  Repeat each batch, 8 times in the paper, and divide the epochs by as many.

  Args:
    apply: `(params, extra, images, train) -> (logits, extra)`.
    tx: optax transform that lowers the loss.
    threat: what is allowed, such as `threats.linf(eps)`.
    eps: length of the perturbations' steps.
    loss: one example's `(logits, label) -> scalar`.

  Returns:
    `step(state, batch) -> (state, {"loss", "grad_norm"})`; start from
    `FreeState(training.init_state(...), jnp.zeros_like(images))`. All batches have one
    size.

  Raises:
    ValueError: for a negative `eps`.

  Example:
    >>> from jaxadv import threats
    >>> apply = lambda params, extra, x, train: (x @ params, extra)
    >>> step = free_step(apply, optax.sgd(0.1), threats.linf(0.1), 0.1)
    >>> train = training.init_state(jax.random.key(0), jnp.eye(2), {}, optax.sgd(0.1))
    >>> x = jnp.full((1, 2), 0.5)
    >>> state, _ = step(FreeState(train, 0 * x), {"image": x, "label": jnp.array([0])})
    >>> print(state.delta.round(2))
    [[-0.09999999  0.09999999]]

  Reference: Shafahi et al., NeurIPS 2019, arXiv 1904.12843.
  """
  inputs.check_positive("eps", eps)

  def step(
    state: FreeState, batch: training.Batch
  ) -> tuple[FreeState, dict[str, Array]]:
    train, x, y = state.train, batch["image"], training.truth(batch)
    weight = batch.get("weight", jnp.ones(len(x)))

    def cost(params, delta):
      shown = jax.vmap(threat.apply)(x, delta)
      logits, extra = apply(params, train.extra, shown, True)
      total = (weight * jax.vmap(loss)(logits, y)).sum()
      return total / jnp.maximum(weight.sum(), 1e-6), extra

    grads = jax.value_and_grad(cost, (0, 1), has_aux=True)
    (value, extra), (grad, up) = grads(train.params, state.delta)
    updates, opt_state = tx.update(grad, train.opt_state, train.params)
    params = optax.apply_updates(train.params, updates)
    delta = jax.vmap(threat.project)(state.delta + eps * jnp.sign(up), x)
    counts = (weight > 0).reshape(-1, *[1] * (x.ndim - 1))
    delta = jnp.where(counts, delta, state.delta)
    train = training.TrainState(train.step + 1, params, extra, opt_state, train.key)
    return FreeState(train, delta), {"loss": value, "grad_norm": optax.tree.norm(grad)}

  return step
