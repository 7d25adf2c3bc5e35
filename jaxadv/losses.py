"""Losses of ONE example, raised by an attack: `Sample -> scalar`.

Classes `(K,)`, masks and volumes `(..., K)` and label sets `(L,)` go through the same
functions. Losses are means over the valid pixels of the example (sums where a published
formula says so), never over the batch. Logits are cast to the default float first, so a
half-precision model is attacked in single precision. Sums are plain Python:

    lambda s: losses.cross_entropy(s) + 0.1 * losses.feature_cosine("pooled")(s)
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxadv import inputs
from jaxadv import pointwise as pw
from jaxadv.similarity import (
  band_energy,
  feature_cosine,
  feature_distance,
  feature_similarity,
  low_frequency_energy,
  squared_l2,
)
from jaxadv.types import LossFn, Sample, decided, valid_pixels

__all__ = [
  "active_margin",
  "band_energy",
  "binary_cross_entropy",
  "cap",
  "cos_pgd",
  "cross_entropy",
  "dlr",
  "dlr_targeted",
  "feature_cosine",
  "feature_distance",
  "feature_similarity",
  "jensen_shannon",
  "kl_to_target",
  "label_margin",
  "label_ranking",
  "low_frequency_energy",
  "margin",
  "mask_logits",
  "mask_margin",
  "masked_cross_entropy",
  "negate",
  "seg_pgd",
  "smoothed_agreement",
  "squared_l2",
  "task_loss",
  "until_fooled",
  "until_reached",
]


def cross_entropy(sample: Sample) -> jax.Array:
  """Mean cross-entropy `-log p_y`. Logits `(..., K)`, labels `(...)`.

  Example:
    >>> print(cross_entropy(_example([0.0, 0.0], 1)).round(4))
    0.6931
  """
  return pw.mean(pw.cross_entropies(sample), sample)


def masked_cross_entropy(sample: Sample) -> jax.Array:
  """Mean of `1[argmax = y] CE`: the masked loss of SEA (arXiv 2306.12941)."""
  return pw.mean(pw.cross_entropies(sample) * ~pw.wrong(sample), sample)


def binary_cross_entropy(sample: Sample) -> jax.Array:
  """Mean over labels of `-log sigmoid((2y - 1) z)`. Logits and labels `(L,)`."""
  z, label = pw.logits(sample), sample.target["label"]
  return pw.mean(optax.sigmoid_binary_cross_entropy(z, label), sample)


def task_loss(sample: Sample) -> jax.Array:
  """Cross-entropy for classes and masks, binary cross-entropy for label sets.

  Example:
    >>> print(task_loss(_example([0.0, 0.0], 1)), task_loss(_example([0.0], [1])))
    0.6931472 0.6931472
  """
  return pw.mean(pw.log_losses(sample), sample)


def label_margin(
  sample: Sample, *, slack: float | jax.Array = 0.0, threshold: float | jax.Array = 0.0
) -> jax.Array:
  """Mean over labels of `-max((2y - 1) (z - threshold), -slack)`.

  Its gradient is constant until a label has flipped by `slack`, and then 0: confident
  labels, where binary cross-entropy vanishes, are pulled like all others. It leads away
  from labels; towards wanted ones (`targeted=True`) it pulls at none that is missing.

  Args:
    sample: logits and labels `(L,)`.
    slack: how far beyond the threshold a label is pushed, >= 0.
    threshold: logit at which a label is decided.

  Returns:
    A scalar, at most `slack`.

  Example:
    >>> label_margin(_example([2.0, -1.0], [1, 0])).item()
    -1.5
  """
  above = pw.logits(sample) - threshold
  margins = jnp.where(sample.target["label"], above, -above)
  return pw.mean(-jnp.maximum(margins, -slack), sample)


def label_ranking(sample: Sample, *, slack: float | jax.Array = jnp.inf) -> jax.Array:
  """How far the highest absent label stands above the lowest present one.

  `min(max_{y_j = 0} z_j - min_{y_j = 1} z_j, slack)` over the valid labels; 0 where all
  are present or all absent. Positive once the order of the findings is wrong somewhere,
  which no threshold repairs.

  Args:
    sample: logits and labels `(L,)`.
    slack: how far beyond the tie it is raised, >= 0.

  Returns:
    A scalar, at most `slack`.

  Example:
    >>> label_ranking(_example([2.0, -1.0, 0.5], [1, 0, 0])).item()
    -1.5

  Differs from MLAP, whose Rank attacks sort wanted labels: those are `negate` of this.
  """
  if not pw.is_label_set(sample):
    raise ValueError("label_ranking is a loss of label sets; for classes write margin.")
  z, label, valid = pw.logits(sample), sample.target["label"], valid_pixels(sample)
  present, absent = valid & (label == 1), valid & (label == 0)
  highest = jnp.where(absent, z, -jnp.inf).max()
  lowest = jnp.where(present, z, jnp.inf).min()
  gap = jnp.where(present.any() & absent.any(), highest - lowest, 0.0)
  return jnp.minimum(gap, slack)


def smoothed_agreement(
  sample: Sample,
  *,
  weight: float | jax.Array = 1.0,
  reference: Literal["soft", "hard"] = "soft",
  targeted: bool = False,
) -> jax.Array:
  """SMIA: the task loss, less the disagreement with the smoothed twin.

  `L(y, p) - weight * CE(q, p)`, a mean, with `p` the prediction and `q` that for the
  twin of `forwards.smoothed_twin`, a constant of the gradient; for a label set both are
  one Bernoulli per label. Targeted: `-L(y, p) - weight * CE(q, p)`, raised as it is.

  The two are added up before the logarithm: where they cancel, they do so exactly, and
  the sign of a rounding moves nothing.

  Args:
    sample: logits `(K,)`, `(..., K)` or `(L,)`, and the twin's in the features.
    weight: in [0, 1].
    reference: `q` as predicted, or the decision made of it, one-hot. The hard one
      counts from the second step on, as in the released code.
    targeted: the label is what the attacker wants.

  Returns:
    A scalar.

  Raises:
    ValueError: without a twin, and for another word than the two as `reference`.

  Example:
    >>> twin = {"smoothed_logits": jnp.array([0.0, 0.0])}
    >>> sample = _example([1.0, 0.0], 1)._replace(features=twin)
    >>> print(smoothed_agreement(sample).round(4))
    0.5

  Reference: Qi et al., ICLR 2021, arXiv 2103.05232; see `jaxadv.attacks.smia`.
  """
  inputs.check_choice("reference", reference, ("soft", "hard"))
  inputs.check_feature("smoothed_logits", sample.features)
  z, sign = pw.logits(sample), -1 if targeted else 1
  twin = jax.lax.stop_gradient(sample.features["smoothed_logits"].astype(z.dtype))
  if reference == "hard":
    weight = jnp.where(sample.progress == 0, 0, weight)
  if pw.is_label_set(sample):
    q = jax.nn.sigmoid(twin) if reference == "soft" else twin > 0
    y = jnp.asarray(sample.target["label"], z.dtype)
    on, off = sign * y - weight * q, sign * (1 - y) - weight * (1 - q)
    return pw.mean(-on * jax.nn.log_sigmoid(z) - off * jax.nn.log_sigmoid(-z), sample)
  one_hot = functools.partial(jax.nn.one_hot, num_classes=z.shape[-1], dtype=z.dtype)
  q = jax.nn.softmax(twin) if reference == "soft" else one_hot(jnp.argmax(twin, -1))
  agreement = (q * pw.gaps(sample)).sum(-1, where=~pw.one_hot(sample))
  return pw.mean(
    (sign - weight) * pw.cross_entropies(sample) + weight * agreement, sample
  )


def jensen_shannon(sample: Sample) -> jax.Array:
  """Mean Jensen-Shannon divergence of prediction and label; bounded by `log 2`.

  `KL(p || m) / 2 + KL(e_y || m) / 2` with `m = (p + e_y) / 2` (SEA, arXiv 2306.12941).

  Example:
    >>> round(float(jensen_shannon(_example([1.0, 0.0], 1))), 6)
    0.365432
  """
  p = jax.nn.softmax(pw.logits(sample))
  truth = pw.one_hot(sample).astype(p.dtype)
  middle = (p + truth) / 2
  # rel_entr is 0 at 0, where the logarithm is not finite
  terms = jax.scipy.special.rel_entr(p, middle) - truth * jnp.log(
    jnp.where(truth > 0, middle, 1)
  )
  return pw.mean(terms.sum(-1) / 2, sample)


def margin(sample: Sample) -> jax.Array:
  """Mean of `max_{k != y} z_k - z_y`; positive where the decision is not the label.

  Of a label set `max_j (1 - 2 y_j) z_j` over the valid labels: positive where any of
  them is flipped. For as many flipped labels as possible see `label_margin`.

  Example:
    >>> margin(_example([3.0, 1.0, 0.5], 0)).item()
    -2.0
    >>> margin(_example([3.0, -1.0], [1, 0])).item()
    -1.0
  """
  if not pw.is_label_set(sample):
    return pw.mean(-pw.margins(sample), sample)
  z, valid = pw.logits(sample), valid_pixels(sample)
  against = jnp.where(sample.target["label"] == 1, -z, z)
  return jnp.where(valid.any(), jnp.where(valid, against, -jnp.inf).max(), 0.0)


def dlr(sample: Sample) -> jax.Array:
  """Difference of logits ratio: a margin that rescaling the logits cannot change.

  `-(z_y - max_{k != y} z_k) / (z_(1) - z_(3) + 1e-12)` with `z_(i)` the i-th largest.
  Two classes have no third logit, and the ratio would be +-1 with zero gradient: the
  margin is then divided by its mean size on the clean image, `mean |z_1 - z_0|`, read
  from `target["logits"]` (prepare with `targets.clean_logits`).

  Raises:
    ValueError: for two classes without clean logits.

  Example:
    >>> round(dlr(_example([3.0, 1.0, 0.5, -2.0], 0)).item(), 4)
    -0.8

  Differs from AutoAttack, which fails below three classes.

  Reference: Croce and Hein, ICML 2020, arXiv 2003.01690.
  """
  z = pw.logits(sample)
  if z.shape[-1] > 2:
    ordered = jnp.sort(z, -1)
    return pw.mean(
      -pw.margins(sample) / (ordered[..., -1] - ordered[..., -3] + 1e-12), sample
    )
  if "logits" not in sample.target:
    raise ValueError(
      "dlr needs 3 classes, got 2; for 2 the margin is scaled by the clean logits. "
      "Write Objective(..., prepare=targets.clean_logits)."
    )
  clean = sample.target["logits"]
  size = pw.mean(jnp.abs(clean[..., 1] - clean[..., 0]), sample)
  return -pw.mean(pw.margins(sample), sample) / (size + 1e-12)


def dlr_targeted(sample: Sample) -> jax.Array:
  """Targeted difference of logits ratio, raised towards the label.

  `-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)`, with `t` the label the
  attacker wants and `y` the clean decision, read from `target["logits"]`.

  Raises:
    ValueError: below four classes; use `negate(dlr)` there.

  Reference: Croce and Hein, ICML 2020, arXiv 2003.01690.
  """
  z = pw.logits(sample)
  if z.shape[-1] < 4:
    raise ValueError(
      f"dlr_targeted needs 4 classes, got {z.shape[-1]}; use negate(dlr) instead."
    )
  ordered = jnp.sort(z, -1)
  source = jnp.argmax(sample.target["logits"], -1)
  gap = pw.pick(z, source) - pw.pick(z, sample.target["label"])
  scale = ordered[..., -1] - (ordered[..., -3] + ordered[..., -4]) / 2
  return pw.mean(-gap / (scale + 1e-12), sample)


def kl_to_target(sample: Sample) -> jax.Array:
  """Mean `KL(q || p)` from the prediction `q` made of `target["logits"]`.

  One distribution per class decision, or one Bernoulli per label of a set. With
  `targets.clean_logits`, the inner loss of TRADES (arXiv 1901.08573).
  """
  return pw.mean(pw.divergences(sample), sample)


def seg_pgd(sample: Sample, *, targeted: bool = False) -> jax.Array:
  """SegPGD: cross-entropy that shifts from correct to wrong pixels as steps pass.

  `(1 - l) mean_{correct} CE + l mean_{wrong} CE` with `l = t / (2T)`, both means over
  all pixels. Targeted: pixels already at the target weigh `l`, the others `1 - l`;
  negate it.

  Reference: Gu et al., ECCV 2022, arXiv 2207.12391; as in the CosPGD paper and code.
  """
  late = sample.progress / 2
  wrong = pw.wrong(sample)
  weight = jnp.where(wrong != targeted, late, 1 - late)
  return pw.mean(weight * pw.cross_entropies(sample), sample)


def cos_pgd(sample: Sample, *, targeted: bool = False) -> jax.Array:
  """CosPGD: cross-entropy weighted by the alignment of prediction and label.

  `mean w CE`, `w = cos(softmax z, e_y)` untargeted, `1 - w` targeted (negate it).

  Differs from the printed equation: like the released code, the weight is detached.

  Reference: Agnihotri et al., ICML 2024, arXiv 2302.02213.
  """
  p = jax.nn.softmax(pw.logits(sample))
  cosine = pw.pick(p, sample.target["label"]) / jnp.sqrt(jnp.square(p).sum(-1))
  weight = jax.lax.stop_gradient(1 - cosine if targeted else cosine)
  return pw.mean(weight * pw.cross_entropies(sample), sample)


def mask_logits(sample: Sample) -> jax.Array:
  """ASMA's attack term: `sum z_{i, y_i}` over the pixels not yet at their target.

  A sum of raw logits; the active set is a constant of the gradient.

  Reference: Ozbulak et al., MICCAI 2019, arXiv 1907.13124.
  """
  wanted = pw.pick(pw.logits(sample), sample.target["label"])
  return jnp.where(pw.wrong(sample), wanted, 0).sum()


def active_margin(sample: Sample) -> jax.Array:
  """Mean of `z_y - max_{c != y} z_c` over the pixels not yet at their target, or 0."""
  return mask_margin(sample) / jnp.maximum(pw.wrong(sample).sum(), 1)


def mask_margin(sample: Sample) -> jax.Array:
  """`sum z_y - max_{c != y} z_c` over the pixels not yet at their target."""
  return jnp.where(pw.wrong(sample), pw.margins(sample), 0).sum()


def negate(loss: LossFn) -> LossFn:
  """Minus the loss: raise it to lower the loss, for targeted attacks."""
  return lambda sample: -loss(sample)


def cap(loss: LossFn, beta: float) -> LossFn:
  """`min(loss, beta)`: no gradient from an example that is lost already."""
  return lambda sample: jnp.minimum(loss(sample), beta)


def until_fooled(loss: LossFn) -> LossFn:
  """The loss of examples whose decision is still the label; 0 for the others."""
  return lambda sample: jnp.where(pw.wrong(sample).any(), 0.0, loss(sample))


def until_reached(loss: LossFn) -> LossFn:
  """The loss of examples whose decision is not the target yet; 0 for the others."""
  return lambda sample: jnp.where(pw.wrong(sample).any(), loss(sample), 0.0)


def _example(logits, label):
  return decided(jnp.asarray(logits), jnp.asarray(label))
