"""Training: one step for any model and any loss written for ONE example.

A model enters as `apply(params, extra, images, train) -> (logits, extra)`; `extra`
holds what is not trained by gradients (batch statistics), or `{}`. Losses and
augmentations see one example, without a batch axis; the step maps them and averages
with the weights of the batch, so padding (weight 0) changes nothing, but for batch
statistics: these are taken over every image that passes the model.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxadv import inputs, reduction
from jaxadv.outer_losses import (
  ExampleLoss,
  OuterLoss,
  binary_cross_entropy,
  cross_entropy,
  dice_cross_entropy,
  focal,
  mean_cross_entropy,
  mean_over_views,
  misclassification_aware,
  soft_dice,
  task_loss,
  trades,
)
from jaxadv.types import AttackFn

__all__ = [
  "ApplyFn",
  "AugmentFn",
  "ExampleLoss",
  "OuterLoss",
  "TrainState",
  "WeightAttack",
  "adversarial_step",
  "adversarial_weights",
  "binary_cross_entropy",
  "cross_entropy",
  "dice_cross_entropy",
  "flips",
  "focal",
  "init_state",
  "mean_cross_entropy",
  "mean_over_views",
  "misclassification_aware",
  "soft_dice",
  "task_loss",
  "trades",
  "train_step",
  "truth",
]

Array = jax.Array
Batch = Mapping[str, Any]
# (params, extra, images (B, ...), train) -> (logits (B, ...), extra)
ApplyFn = Callable[[Any, Any, Array, bool], tuple[Array, Any]]
# ONE example: (key, image, label) -> (image, label)
AugmentFn = Callable[[Array, Array, Array], tuple[Array, Array]]

# (params, gradient of the loss) -> params where the step's gradient is taken
WeightAttack = Callable[[Any, Any], Any]

_VIEW_STREAM = 2**32 - 1  # no step is that late: augmentations never draw these keys


class TrainState(NamedTuple):
  """Everything the next training step needs; every leaf is an array.

  Attributes:
    step: int32, steps taken.
    params: what is trained.
    extra: batch statistics, or `{}`.
    opt_state: state of the optax transform.
    key: typed key; step `t` of example `i` draws from `fold_in(fold_in(key, t), i)`.
  """

  step: Array
  params: Any
  extra: Any
  opt_state: Any
  key: Array


def init_state(
  key: Array, params: Any, extra: Any, tx: optax.GradientTransformation
) -> TrainState:
  """The state before the first step.

  Example:
    >>> init_state(jax.random.key(0), jnp.ones(3), {}, optax.sgd(0.1)).step.item()
    0
  """
  return TrainState(jnp.int32(0), params, extra, tx.init(params), key)


def flips(key: Array, image: Array, label: Array) -> tuple[Array, Array]:
  """Mirrors ONE image and its mask along each spatial axis with probability 1/2.

  Args:
    key: typed key of this example at this step.
    image: `(H, W, C)` or `(D, H, W, C)`.
    label: a mask of the image's spatial shape, or a class `()`, which stays as it is.

  Example:
    >>> image = jnp.arange(4.0).reshape(2, 2, 1)
    >>> flipped, mask = flips(jax.random.key(3), image, image[..., 0])
    >>> bool((flipped[..., 0] == mask).all())
    True
  """
  is_mask = label.shape == image.shape[:-1]
  for axis, flip in enumerate(jax.random.bernoulli(key, shape=(image.ndim - 1,))):
    image = jnp.where(flip, jnp.flip(image, axis), image)
    if is_mask:
      label = jnp.where(flip, jnp.flip(label, axis), label)
  return image, label


def train_step(
  apply: ApplyFn,
  tx: optax.GradientTransformation,
  loss: ExampleLoss = dice_cross_entropy,
  *,
  augment: AugmentFn | None = None,
  microbatches: int | None = None,
  axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """One optimizer step on the weighted mean of the examples' losses.

      sum_i weight_i * loss(logits_i, label_i) / sum_i weight_i

  Masks, classes or label sets: only `loss` differs (`dice_cross_entropy`,
  `cross_entropy`, `binary_cross_entropy`).

  Args:
    apply: `(params, extra, images, train) -> (logits, extra)`.
    tx: optax transform that lowers the loss.
    loss: one example's `(logits, label) -> scalar`.
    augment: one example's `(key, image, label) -> (image, label)`, for instance
      `flips`. Its key depends on the example's `id` and the step, not on its place in
      the batch.
    microbatches: as for `adversarial_step`.
    axis_name: as for `adversarial_step`.

  Returns:
    `step(state, batch) -> (state, {"loss", "grad_norm"})`, to be jitted by the caller.
    `batch` holds `image (B, ..., C)`, `label (B, ...)`, and optionally `weight (B,)`,
    `id (B,)` and `mask (B, ...)`, the labels or pixels that are known.

  Raises:
    ValueError: for `augment` beside a mask of pixels.

  Example:
    >>> apply = lambda params, extra, x, train: (x @ params, extra)
    >>> step = jax.jit(train_step(apply, optax.sgd(1.0), cross_entropy))
    >>> state = init_state(jax.random.key(0), jnp.zeros((3, 2)), {}, optax.sgd(1.0))
    >>> batch = {"image": jnp.eye(3), "label": jnp.array([0, 1, 1])}
    >>> state, metrics = step(state, batch)
    >>> print(metrics["loss"].round(4), state.step)
    0.6931 1
  """

  def first(logits, label):
    return loss(logits[0], label)

  return adversarial_step(
    apply,
    tx,
    (),
    first,
    augment=augment,
    microbatches=microbatches,
    axis_name=axis_name,
  )


def adversarial_step(
  apply: ApplyFn,
  tx: optax.GradientTransformation,
  views: Sequence[AttackFn],
  outer: OuterLoss,
  *,
  augment: AugmentFn | None = None,
  weights: WeightAttack | None = None,
  microbatches: int | None = None,
  axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """One optimizer step on several views of the images, each made by an attack.

      sum_i weight_i outer((f(view_1(x_i)), ..., f(view_V(x_i))), y_i) / sum_i weight_i

  The views are made with the present parameters, in evaluation mode: they never touch
  the batch statistics. Then all V * B images pass the model together, in train mode.

  Args:
    apply: `(params, extra, images, train) -> (logits, extra)`.
    tx: optax transform that lowers the loss.
    views: attacks, called with the labels of the batch; `combine.identity` is the clean
      view. None at all means the clean images.
    outer: one example's `(logits (V, ...), label) -> scalar`, such as
      `mean_over_views(cross_entropy)`.
    augment: as for `train_step`; comes before the views.
    weights: where the gradient of the step is taken instead of at the parameters, such
      as `adversarial_weights()`; costs one more forward and backward pass.
    microbatches: equal parts of a batch, over all devices, that pass the model one
      after another and are added up in order, see `jaxadv.reduction`. Batch statistics
      are then taken over each part, and their mean is kept.
    axis_name: of the mapped axis of devices, under `pmap` or `shard_map`.

  Returns:
    As `train_step`.

  Example:
    >>> from jaxadv import attacks, combine
    >>> apply = lambda params, extra, x, train: (x @ params, extra)
    >>> views = (combine.identity, attacks.pgd(0.1, num_steps=3))
    >>> outer = mean_over_views(cross_entropy)
    >>> step = jax.jit(adversarial_step(apply, optax.sgd(1.0), views, outer))
    >>> state = init_state(jax.random.key(0), jnp.zeros((3, 2)), {}, optax.sgd(1.0))
    >>> batch = {"image": jnp.eye(3), "label": jnp.array([0, 1, 1])}
    >>> state, metrics = step(state, batch)
    >>> print(metrics["loss"].round(4), state.step)
    0.6931 1

  Reference: Madry et al., ICLR 2018, arXiv 1706.06083, for `(pgd,)`.
  """
  add = functools.partial(
    reduction.total, microbatches=microbatches, axis_name=axis_name
  )
  each = functools.partial(
    reduction.each, microbatches=microbatches, axis_name=axis_name
  )
  ids = functools.partial(_ids, axis_name)

  def cost(state, total, params, rows):
    seen, label, weight = rows
    seen = jnp.moveaxis(seen, 1, 0)
    flat = seen.reshape((-1, *seen.shape[2:]))
    logits, extra = apply(params, state.extra, flat, True)
    logits = logits.reshape((*seen.shape[:2], *logits.shape[1:]))
    losses = jax.vmap(outer, (1, 0))(logits, label)
    return (weight * losses).sum() / jnp.maximum(total, 1e-6), extra

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    number = ids(batch)
    image, label = _augmented(augment, state, batch, number)
    weight = batch.get("weight", jnp.ones(image.shape[:1]))
    seen = image[:, None]
    if views:
      show = functools.partial(_views, apply, views, state)
      seen = each(show, (image, label, number))
    rows, total = (seen, label, weight), add(jnp.sum, weight)

    def slope(place):
      at = functools.partial(cost, state, total)
      return add(lambda r: jax.value_and_grad(at, has_aux=True)(place, r), rows)

    place = state.params
    if weights is not None:
      place = weights(place, slope(place)[1])
    (value, extra), grad = slope(place)
    parts = reduction.count(microbatches, axis_name)
    if parts > 1:
      extra = jax.tree.map(lambda total: (total / parts).astype(total.dtype), extra)
    updates, opt_state = tx.update(grad, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(state.step + 1, params, extra, opt_state, state.key)
    return state, {"loss": value, "grad_norm": optax.tree.norm(grad)}

  return step


def adversarial_weights(gamma: float | Array = 0.005) -> WeightAttack:
  """AWP: weights moved up the loss, each tensor by a share of its own norm.

      w + gamma * ||w|| g / ||g||    for tensors with more than one axis

  Args:
    gamma: 0.01 for adversarial training, 0.005 for TRADES and MART.

  Returns:
    `(params, gradient) -> params`, for `adversarial_step(weights=...)`.

  Raises:
    ValueError: for a negative `gamma`.

  Example:
    >>> moved = adversarial_weights()(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0]]))
    >>> print(moved)
    [[3.    4.025]]

  Differs from the released code, which walks a copy of the model by a step of SGD and
  takes the difference: of its length, and of the step, nothing is left after scaling.

  Reference: Wu, Xia, Wang, NeurIPS 2020, arXiv 2004.05884.
  """
  inputs.check_positive("gamma", gamma)

  def unit(g):
    g = g / jnp.maximum(jnp.abs(g).max(), jnp.finfo(g.dtype).tiny)  # squares underflow
    return g / jnp.maximum(_norm(g), 1)

  def move(w, g):
    return w if w.ndim < 2 else w + gamma * _norm(w) * unit(g)

  return lambda params, gradient: jax.tree.map(move, params, gradient)


def truth(batch: Batch) -> Any:
  """What views are asked for and losses compare with: the label, or label and mask.

  Example:
    >>> sorted(truth({"label": jnp.zeros(2, int), "mask": jnp.ones(2, bool)}))
    ['label', 'mask']
  """
  label = jnp.asarray(batch["label"])
  return {"label": label, "mask": batch["mask"]} if "mask" in batch else label


def _norm(values):
  return jnp.sqrt(jnp.square(values).sum())


def _augmented(augment, state, batch, ids):
  """Images and labels of the step; a mask of labels that count is not moved."""
  image, label = jnp.asarray(batch["image"]), jnp.asarray(batch["label"])
  if augment is not None:
    if "mask" in batch and label.ndim == image.ndim - 1:
      raise ValueError(
        "`augment` would move images and not the `mask` of their pixels."
      )
    keys = _keys(state.key, state.step, ids)
    image, label = jax.vmap(augment)(keys, image, label)
  return image, truth({**batch, "label": label})


def _views(apply, views, state, rows):
  """`(B, V, ...)`: what each view shows."""
  image, label, ids = rows
  root = jax.random.fold_in(state.key, _VIEW_STREAM)
  keys = _keys(root, state.step, ids)

  def predict(x):
    return apply(state.params, state.extra, x, False)[0]

  def show(n, view):
    key = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
    return view(key, predict, image, label).image

  shown = [show(*item) for item in enumerate(views)]
  return jax.lax.stop_gradient(jnp.stack(shown, 1))


def _ids(axis_name, batch):
  return batch.get("id", reduction.places(len(batch["image"]), axis_name))


def _keys(key, step, ids):
  """One key per example, of its id and the step and not of its place in the batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), ids)
