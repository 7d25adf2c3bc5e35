"""What training lowers: losses of ONE example, and outer losses of its several views.

An outer loss sees the logits `(V, ...)` of the V views of one example, the clean one
first where it needs one, and its label. Label sets, classes, masks and volumes go
through the same functions, as in `jaxadv.losses`; `jaxadv.training` offers all of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxadv import inputs
from jaxadv import pointwise as pw
from jaxadv.types import decided

__all__ = [
  "ExampleLoss",
  "OuterLoss",
  "binary_cross_entropy",
  "cross_entropy",
  "dice_cross_entropy",
  "focal",
  "mean_cross_entropy",
  "mean_over_views",
  "misclassification_aware",
  "soft_dice",
  "task_loss",
  "trades",
]

Array = jax.Array
# ONE example: (logits, label) -> scalar to lower
ExampleLoss = Callable[[Array, Any], Array]
# ONE example: (logits (V, ...) of its V views, label) -> scalar to lower; the label is
# an array, or `{"label": ..., "mask": ...}` with the labels or pixels that count
OuterLoss = Callable[[Array, Any], Array]


def cross_entropy(logits: Array, label: Any) -> Array:
  """Softmax cross-entropy of ONE example, averaged over its pixels if it has any.

  Args:
    logits: `(K,)` or `(..., K)` float.
    label: `()` or `(...)` int in [0, K).

  Returns:
    A scalar.

  Example:
    >>> print(cross_entropy(jnp.zeros((5, 5, 2)), jnp.ones((5, 5), int)).round(4))
    0.6931
  """
  sample = decided(logits, label)
  values = optax.softmax_cross_entropy_with_integer_labels(
    pw.logits(sample), sample.target["label"]
  )
  return pw.mean(values, sample)


def binary_cross_entropy(logits: Array, label: Any) -> Array:
  """Sigmoid cross-entropy of ONE label set, averaged over its findings.

  Args:
    logits: `(L,)` float.
    label: `(L,)` of 0 and 1.

  Returns:
    A scalar.

  Example:
    >>> print(binary_cross_entropy(jnp.zeros(3), jnp.array([0, 1, 1])).round(4))
    0.6931
  """
  sample = decided(logits, label)
  values = optax.sigmoid_binary_cross_entropy(pw.logits(sample), sample.target["label"])
  return pw.mean(values, sample)


def soft_dice(logits: Array, label: Any, *, smooth: float = 1.0) -> Array:
  """One minus the soft Dice overlap of ONE mask, averaged over the foreground classes.

      1 - (2 <p, q> + smooth) / (|p|_1 + |q|_1 + smooth)

  with `p` the softmax probabilities and `q` the one-hot label of one class.

  Args:
    logits: `(..., K)` float; class 0 is the background.
    label: `(...)` int in [0, K).
    smooth: keeps an empty class harmless.

  Returns:
    A scalar in [0, 1].

  Example:
    >>> label = jnp.array([[0, 1], [1, 1]])
    >>> print(soft_dice(100 * jax.nn.one_hot(label, 2), label).round(4))
    0.0

  Reference: Milletari et al., V-Net, arXiv:1606.04797 (there with squared terms).
  """
  sample = decided(logits, label)
  label, valid = sample.target["label"], sample.target.get("mask")
  probability = jax.nn.softmax(pw.logits(sample))[..., 1:]
  wanted = jax.nn.one_hot(label, logits.shape[-1])[..., 1:]
  if valid is not None:
    probability, wanted = (v * valid[..., None] for v in (probability, wanted))
  pixels = tuple(range(label.ndim))
  overlap = (probability * wanted).sum(pixels)
  size = probability.sum(pixels) + wanted.sum(pixels)
  return 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


def dice_cross_entropy(logits: Array, label: Any) -> Array:
  """`soft_dice + cross_entropy` of ONE mask: the usual segmentation loss.

  Example:
    >>> label = jnp.array([[0, 1], [1, 1]])
    >>> print(dice_cross_entropy(jnp.zeros((2, 2, 2)), label).round(4))
    1.0265
  """
  return soft_dice(logits, label) + cross_entropy(logits, label)


def focal(gamma: float | Array = 2.0) -> ExampleLoss:
  """Focal loss `(1 - p)^gamma * -log p` of the truth's probability, averaged.

  Over pixels, or over the labels of a set, of ONE example. At `gamma=0` it is the
  cross-entropy.

  Args:
    gamma: >= 0; larger turns away from what is decided surely.

  Returns:
    `(logits, label) -> scalar`.

  Raises:
    ValueError: for a negative `gamma`.

  Example:
    >>> print(focal()(jnp.zeros(2), jnp.int32(1)).round(4))
    0.1733

  Reference: Lin et al., ICCV 2017, arXiv 1708.02002.
  """
  inputs.check_positive("gamma", gamma)

  def loss(logits, label):
    sample = decided(logits, label)
    surprise = pw.log_losses(sample)
    tiny = jnp.finfo(surprise.dtype).tiny  # a power below 1 has no slope at 0
    unsure = jnp.maximum(-jnp.expm1(-surprise), tiny)
    return pw.mean(unsure**gamma * surprise, sample)

  return loss


def mean_over_views(loss: ExampleLoss) -> OuterLoss:
  """The mean of a loss over the views of ONE example.

  Example:
    >>> print(mean_over_views(cross_entropy)(jnp.zeros((4, 2)), jnp.int32(1)).round(4))
    0.6931
  """

  def outer(logits, label):
    return jax.vmap(loss, (0, None))(logits, label).mean()

  return outer


def task_loss(logits: Array, label: Any) -> Array:
  """The loss of ONE example whatever its task: `cross_entropy`, or binary for a set.

  Example:
    >>> print(task_loss(jnp.zeros(3), jnp.array([0, 1, 1])).round(4))
    0.6931
  """
  sample = decided(logits, label)
  return pw.mean(pw.log_losses(sample), sample)


def mean_cross_entropy(logits: Array, label: Any) -> Array:
  """The mean over the views of the (binary) cross-entropy: adversarial training.

  Args:
    logits: `(V, K)`, `(V, ..., K)`, or `(V, L)` for a label set.
    label: `()`, `(...)` or `(L,)` int.

  Returns:
    A scalar.

  Example:
    >>> print(mean_cross_entropy(jnp.zeros((4, 2)), jnp.int32(1)).round(4))
    0.6931

  Reference: Madry et al., ICLR 2018, arXiv 1706.06083, with one attacked view.
  """
  return mean_over_views(task_loss)(logits, label)


def trades(beta: float | Array = 6.0) -> OuterLoss:
  """TRADES: the clean loss, and how far the attack moves the prediction.

      -log p_y + beta * KL(p || p')

  with `p` the clean and `p'` the attacked prediction, both followed by the gradient,
  averaged over pixels or labels.

  Args:
    beta: >= 0.

  Returns:
    An outer loss of two views, clean and attacked. The attack is meant to raise
    `losses.kl_to_target` with `targets.clean_logits`.

  Raises:
    ValueError: for a negative `beta`, and for another number of views.

  Example:
    >>> same = jnp.zeros((2, 3))
    >>> print(trades()(same, jnp.int32(1)).round(4))
    1.0986

  Reference: Zhang et al., ICML 2019, arXiv 1901.08573.
  """
  inputs.check_positive("beta", beta)

  def outer(logits, label):
    clean, attacked = _clean_and_attacked(logits, label)
    losses = pw.log_losses(clean) + beta * pw.divergences(attacked)
    return pw.mean(losses, clean)

  return outer


def misclassification_aware(beta: float | Array = 6.0) -> OuterLoss:
  """MART: a boosted loss of the attack, and its drift where the clean image is unsure.

      -log p'_y - log(1.0001 - max_{k != y} p'_k) + beta * (1 - p_y) * KL(p || p')

  with `p` the clean and `p'` the attacked prediction, both followed by the gradient,
  averaged over pixels. A label of a set has one rival, its own opposite: its terms are
  `-2 log p'_y + beta (1 - p_y) KL`, averaged over the labels.

  Args:
    beta: >= 0; 5 in the paper, 6 in its code, 8 for fundus images in that of MAAdvT.

  Returns:
    An outer loss of two views, clean and attacked.

  Raises:
    ValueError: for a negative `beta`, and for another number of views.

  Example:
    >>> same = jnp.zeros((2, 2))
    >>> print(misclassification_aware()(same, jnp.int32(1)).round(3))
    1.386

  Differs from the released code of MAAdvT: it clamps attacked images to [0, 1] after
  they have been normalised, which destroys them; here models normalise inside. The form
  for label sets is ours.

  Reference: Wang et al., ICLR 2020 (MART); Xu et al., "Towards evaluating the
  robustness of deep diagnostic models by adversarial attack", 2021 (MAAdvT).
  """
  inputs.check_positive("beta", beta)

  def outer(logits, label):
    clean, attacked = _clean_and_attacked(logits, label)
    unsure = 1e-7 - jnp.expm1(-pw.log_losses(clean))  # the published 1.0000001 - p_y
    drift = beta * unsure * pw.divergences(attacked)
    return pw.mean(pw.log_losses(attacked) + _rival(attacked) + drift, clean)

  return outer


def _rival(sample):
  """`-log` of what the strongest wrong class leaves; its floor is the published one."""
  if pw.is_label_set(sample):
    return pw.log_losses(sample)
  p = jax.nn.softmax(pw.logits(sample))
  return -jnp.log(1.0001 - jnp.where(pw.one_hot(sample), 0, p).max(-1))


def _clean_and_attacked(logits, label):
  if len(logits) != 2:
    raise ValueError(
      f"this loss compares 2 views, got {len(logits)}; write views=(combine.identity, "
      "attack)."
    )
  clean, attacked = (decided(view, label) for view in logits)
  return clean, attacked._replace(target={**attacked.target, "logits": logits[0]})
