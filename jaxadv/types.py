"""The nouns of jaxadv, and the defaults of an objective.

An attack is any function `attack(key, predict, x, y) -> AttackResult`. Gradient attacks
are built by `jaxadv.engine.gradient_attack` from an `Objective` (what to raise), a
`Threat` (what is allowed) and an optax transform (how to move).

Every part is written for ONE example, without a batch axis, except the two that call
the model (`prepare` and `forward`), which see the batch. Images are float32 (or
float64) inside the bounds of the threat, channels last: `(B, H, W, C)` or `(B, D, H, W,
C)`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxadv import masks

__all__ = [
  "Array",
  "AttackFn",
  "AttackResult",
  "Features",
  "ForwardFn",
  "Images",
  "LossFn",
  "Objective",
  "Perturbation",
  "Predict",
  "PrepareFn",
  "Sample",
  "SuccessFn",
  "Threat",
  "call",
  "decided",
  "example_keys",
  "fooled",
  "labels",
  "overlap",
  "plain",
  "reached",
  "valid_pixels",
]

Array = jax.Array
Images = Array  # (B, ..., C) float
Features = Mapping[str, Array]  # each (B, ...)
Target = Mapping[str, Any]  # each leaf (B, ...); always has "label"

# images (B, ...) -> logits (B, ...) or (logits, features); pure, evaluation mode
Predict = Callable[[Images], Any]
# one example -> scalar, or (S,) for attacks that combine S gradients
LossFn = Callable[["Sample"], Array]
# one example -> bool
SuccessFn = Callable[["Sample"], Array]
# (predict, x, y) -> target, once per call, batched
PrepareFn = Callable[[Predict, Images, Any], dict[str, Any]]
# (predict, keys (B,), image, clean) -> (logits, features), batched
ForwardFn = Callable[[Predict, Array, Images, Images], tuple[Array, Features]]


class Sample(NamedTuple):
  """Everything known about ONE example at one step; what losses and step rules read.

  Attributes:
    clean: `(H, W, C)` float, the image before the attack.
    image: `(H, W, C)` float, the attacked image, inside the valid range.
    delta: the perturbation, an array or a pytree.
    logits: `(K,)`, `(H, W, K)` or `(L,)` for a label set.
    features: named activations; empty when `predict` returns logits only.
    target: always has `"label"`; may have `"features"`, `"logits"`, `"mask"`,
      `"image"`.
    progress: scalar `t / num_steps` in [0, 1).
  """

  clean: Array
  image: Array
  delta: Any
  logits: Array
  features: Features
  target: Mapping[str, Any]
  progress: Array


class Threat(NamedTuple):
  """What is allowed: three functions of one perturbation.

  Attributes:
    init: `(key, image) -> delta`, a random start.
    project: `(delta, image) -> delta`; `image` is `None` for a universal perturbation.
    apply: `(image, delta) -> attacked image` inside the bounds. The attack takes its
      gradient through this function; the threats of `jaxadv.threats` pass it straight
      through their clipping and rounding.
    bounds: the valid range of images, or `None` when it is not known.
  """

  init: Callable[[Array, Array], Any]
  project: Callable[[Any, Array | None], Any]
  apply: Callable[[Array, Any], Array]
  bounds: tuple[Any, Any] | None = None


def labels(predict: Predict, x: Images, y: Any) -> dict[str, Any]:
  """The target as given: `y` if it is a mapping, else `{"label": y}`."""
  del predict, x
  return dict(y) if isinstance(y, Mapping) else {"label": y}


def plain(
  predict: Predict, keys: Array, image: Images, clean: Images
) -> tuple[Array, Features]:
  """One model call on the attacked images."""
  del keys, clean
  return call(predict, image)


def call(predict: Predict, image: Images) -> tuple[Array, Features]:
  """Calls the model and normalises its two return forms to `(logits, features)`.

  Example:
    >>> logits, features = call(lambda x: 2 * x, jnp.ones((1, 3)))
    >>> logits.shape, features
    ((1, 3), {})
  """
  out = predict(image)
  if isinstance(out, tuple):
    logits, features = out
    return logits, dict(features)
  return out, {}


def valid_pixels(sample: Sample) -> Array:
  """Pixels that count: `target["mask"]` where given, every pixel otherwise."""
  label = sample.target["label"]
  return jnp.asarray(sample.target.get("mask", jnp.ones(jnp.shape(label))), bool)


def overlap(sample: Sample) -> Array:
  """IoU of the decided mask with the target mask, over the valid pixels."""
  label = sample.target["label"]
  prediction = masks.decision(sample.logits, label)
  return masks.iou(prediction, label, sample.logits.shape[-1], valid_pixels(sample))


def fooled(sample: Sample, *, threshold: float = 0.5) -> Array:
  """Success of an untargeted attack on one example.

  A class: the decision differs from the label. A label set: so does one of the valid
  ones. A mask: its IoU with the label has fallen below `threshold`.
  """
  if _is_mask(sample):
    return _finite(sample) & (overlap(sample) < threshold)
  label = sample.target["label"]
  wrong = masks.decision(sample.logits, label) != label
  return _finite(sample) & jnp.any(wrong & valid_pixels(sample))


def reached(sample: Sample, *, threshold: float = 0.95) -> Array:
  """Success of a targeted attack on one example.

  A class: the decision equals the label the attacker wants. A label set: so do all
  valid ones. A mask: its IoU with the wanted mask is at least `threshold`.
  """
  if _is_mask(sample):
    return _finite(sample) & (overlap(sample) >= threshold)
  label = sample.target["label"]
  right = masks.decision(sample.logits, label) == label
  return _finite(sample) & jnp.all(right | ~valid_pixels(sample))


def decided(logits: Array, target: Any) -> Sample:
  """ONE example of which only the logits are known, and the label or target of it.

  Enough for every loss and criterion that reads neither images nor features.

  Args:
    logits: `(K,)`, `(..., K)` or `(L,)`.
    target: a label, or a mapping with `"label"`.

  Example:
    >>> fooled(decided(jnp.array([0.2, 0.7]), 0)).item()
    True
  """
  target = dict(target) if isinstance(target, Mapping) else {"label": target}
  nothing = jnp.zeros(())
  return Sample(nothing, nothing, nothing, logits, {}, target, nothing)


def _is_mask(sample):
  label = sample.target["label"]
  return jnp.ndim(label) > 0 and jnp.ndim(sample.logits) == jnp.ndim(label) + 1


def _finite(sample):
  return jnp.isfinite(sample.logits).all()


class Objective(NamedTuple):
  """What an attack raises, and how to prepare targets and call the model.

  Attributes:
    loss: one example -> scalar to raise; `(S,)` asks the engine for S gradients from
      one
      forward pass, stacked on a leading axis for the first link of the transform.
    score: one example -> scalar compared across steps by `keep`; default: the loss.
    prepare: `(predict, x, y) -> target`, once per call, batched.
    forward: `(predict, keys, image, clean) -> (logits, features)`, batched.
    success: one example -> bool, what counts as success.
  """

  loss: LossFn
  score: LossFn | None = None
  prepare: PrepareFn = labels
  forward: ForwardFn = plain
  success: SuccessFn = fooled


class Perturbation(NamedTuple):
  """State of ONE perturbation; an attack carries B of them, every leaf is an array.

  Attributes:
    step: int32, steps taken so far; it stands still once the example is stopped.
    key: typed key of this example's stream.
    delta: the perturbation.
    opt: state of the optax transform.
    best_delta: the perturbation `keep` would return now.
    best_score: what `keep` compared to choose it.
    best_success: bool, whether it was a success.
    done: bool, stopped and frozen.
    nonfinite: int32, evaluations with a non-finite loss or gradient.
  """

  step: Array
  key: Array
  delta: Any
  opt: Any
  best_delta: Any
  best_score: Array
  best_success: Array
  done: Array
  nonfinite: Array


class AttackFn(Protocol):
  """An attack: any function of a key, a model, clean images and labels."""

  def __call__(
    self, key: Array, predict: Predict, x: Images, y: Any, /
  ) -> "AttackResult":
    """Attacks a batch; see `jaxadv.engine.Attack` for the arguments."""


class AttackResult(NamedTuple):
  """Attacked images and the evidence.

  Attributes:
    image: `(B, ...)` inside threat and bounds.
    delta: leaves `(B, ...)`.
    score: `(B,)` at the returned image.
    logits: `(B, ...)` at the returned image.
    losses: `(T, B)` objective along the way, `(T, B, S)` for S losses.
    success: `(B,)` bool at the returned image.
    steps: `(B,)` int32, steps each example took.
    nonfinite: `(B,)` int32, evaluations whose loss or gradient was not finite.
    forwards: `(B,)` int32, images of this example sent through the model by the steps.
    backwards: `(B,)` int32, gradients pulled back for this example by the steps.
  """

  image: Images
  delta: Any
  score: Array
  logits: Array
  losses: Array
  success: Array
  steps: Array
  nonfinite: Array
  forwards: Array
  backwards: Array

  @property
  def robust(self) -> Array:
    """`(B,)` bool: withstood the attack, and every gradient it was shown was finite."""
    return ~self.success & (self.nonfinite == 0)


def example_keys(key: Array, n: int) -> Array:
  """One typed key per example: a scalar key folds in 0..n-1, `(n,)` keys pass through.

  Fold data-set ids into the key yourself to be independent of how the data is batched:
  `jax.vmap(jax.random.fold_in, (None, 0))(key, ids)`.

  Args:
    key: a typed threefry key `()`, or typed keys `(n,)`.
    n: batch size.

  Returns:
    Typed keys `(n,)`.

  Raises:
    TypeError: for raw `uint32` keys, and for anything that is not a key.
    ValueError: for `rbg` keys (under `vmap` they use the first key only, so results
      would depend on the batch) and for a wrong number of keys.

  Example:
    >>> example_keys(jax.random.key(0), 3).shape
    (3,)
  """
  got = getattr(key, "dtype", type(key).__name__)
  if isinstance(got, str) or not jnp.issubdtype(got, jax.dtypes.prng_key):
    raise TypeError(
      f"`key` is {got}, not a typed key; write jax.random.key(seed), or "
      "jax.random.wrap_key_data(key) for an old uint32 key."
    )
  if "threefry" not in str(jax.random.key_impl(key)):
    raise ValueError(
      f"`key` has implementation {jax.random.key_impl(key)}, which mixes examples "
      'under vmap; write jax.random.key(seed, impl="threefry2x32").'
    )
  if key.shape == ():
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
  if key.shape != (n,):
    raise ValueError(f"`key` has shape {key.shape}; write one key, or ({n},) keys.")
  return key
