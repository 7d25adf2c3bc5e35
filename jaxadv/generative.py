"""GAP, generative adversarial perturbations: a network that writes the perturbations.

The victim behind a generator is one model,

    x -> f(clip(x + rescale(G(x)))),

and GAP is its training towards a target: `gap_step` is `training.train_step` of it, so
`loops.fit`, checkpoints and optimizers are those of any training. What was trained is
an attack of one pass, `gap`, which needs no gradient of the victim.

    step = jax.jit(generative.gap_step(apply, predict, tx, eps))
    state = loops.fit(step, state, batches, num_steps=400)
    attack = generative.gap(generative.generator(apply, state), eps)

A generator is any `apply(params, extra, images, train) -> ((B, ..., C), extra)`;
`models.Generator` is one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxadv import combine, inputs, targets, threats, training
from jaxadv.types import (
  Array,
  AttackFn,
  Images,
  Predict,
  PrepareFn,
  call,
  decided,
  fooled,
  labels,
  reached,
)

__all__ = ["from_noise", "gap", "gap_step", "generator", "rescale"]

Scalar = float | Array
Bounds = tuple[Any, Any]
# images (B, ..., C) -> (B, ..., C): pure, evaluation mode, before `rescale`
Generate = Callable[[Images], Array]

_FLOOR = 1e-12  # its square is no subnormal, so a radius of 0 has a finite gradient


def rescale(delta: Array, eps: Scalar) -> Array:
  """Shrinks every channel of ONE perturbation that is larger than `eps` down to it.

      delta_c * min(1, eps / max |delta_c|)

  Part of the graph: its gradient turns with the perturbation, and where the channel is
  shrunk it is blind to the size of it.

  Args:
    delta: `(..., C)` float.
    eps: radius >= 0 in the units of the image.

  Returns:
    The shape of `delta`; no value is above `eps` by more than a rounding.

  Example:
    >>> print(rescale(jnp.array([[1.0, 0.1], [-0.5, 0.0]]), 0.2))
    [[ 0.2  0.1]
     [-0.1  0. ]]

  Differs from the published form `min(1, mag / (255 std_c) / max |delta_c|)`, which is
  written for normalized images: with `eps = mag / 255` it is the same radius, for every
  channel.
  """
  size = jnp.abs(delta).max(tuple(range(delta.ndim - 1)), keepdims=True)
  return delta * (eps / jnp.maximum(size, jnp.maximum(eps, _FLOOR)))


def from_noise(apply: training.ApplyFn, noise: Array) -> training.ApplyFn:
  """The universal form: a generator that sees one fixed pattern and no image.

  Args:
    apply: of a generator.
    noise: `(..., C)` of the images' shape, for instance uniform in [0, 1].

  Returns:
    A generator that gives every image the same perturbation.

  Example:
    >>> apply = lambda params, extra, x, train: (params * x, extra)
    >>> universal = from_noise(apply, jnp.array([0.5, 1.0]))
    >>> universal(2.0, {}, jnp.zeros((3, 2)), False)[0].tolist()
    [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]

  Reference: Poursaeed et al., CVPR 2018, arXiv 1712.02328.
  """

  def run(params, extra, images, train):
    delta, extra = apply(params, extra, noise[None], train)
    return jnp.broadcast_to(delta, (len(images), *noise.shape)), extra

  return run


def gap_step(
  apply: training.ApplyFn,
  predict: Predict,
  tx: optax.GradientTransformation,
  eps: Scalar,
  *,
  prepare: PrepareFn = targets.least_likely,
  loss: training.ExampleLoss = training.task_loss,
  bounds: Bounds = (0.0, 1.0),
) -> Callable[
  [training.TrainState, training.Batch],
  tuple[training.TrainState, dict[str, Array]],
]:
  """One optimizer step of a generator against a frozen victim.

      min_G  mean_i loss(f(clip(x_i + rescale(G(x_i)))), t_i)

  with `t_i` the least likely class of the clean image, or the opposite of every label
  that is decided.

  Args:
    apply: of the generator, `(params, extra, images, train) -> (delta, extra)`.
    predict: the victim, in evaluation mode.
    tx: optax transform; published: `optax.adam(2e-4)`.
    eps: Linf radius; the clip to the bounds passes the gradient straight through.
    prepare: what the victim is led to, from the images and the batch; costs its forward
      passes. `targets.constant(k)` leads to one class, `jaxadv.types.labels` to
      `batch["label"]`.
    loss: lowered, one example's `(logits, label) -> scalar`. Away from the decision:
      `prepare=targets.predictions` with
      `loss=lambda z, y: -jnp.log(training.task_loss(z, y))`, whose logarithm keeps
      images that are fooled already from leading the others.
    bounds: valid range of images.

  Returns:
    `step(state, batch) -> (state, {"loss", "grad_norm"})` on a `training.TrainState`,
    as of `training.train_step`. `batch["label"]` tells label sets from classes by its
    rank; that is all the default reads of it.

  Raises:
    ValueError: for a negative radius, and a generator of other shapes than the images.

  Example:
    >>> weights = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    >>> predict = lambda x: x @ weights
    >>> apply = lambda params, extra, x, train: (jnp.tanh(x @ params), extra)
    >>> tx = optax.sgd(1.0)
    >>> step = gap_step(apply, predict, tx, 0.2)
    >>> state = training.init_state(jax.random.key(0), 0.1 * jnp.eye(2), {}, tx)
    >>> batch = {"image": jnp.full((4, 2), 0.5), "label": jnp.zeros(4, int)}
    >>> for _ in range(5):
    ...   state, metrics = step(state, batch)
    >>> attack = gap(generator(apply, state), 0.2)
    >>> result = attack(jax.random.key(0), predict, batch["image"], batch["label"])
    >>> print(result.image[0])
    [0.3 0.3]

  Differs from the code of Xu et al., which rescales outside the graph, so that its
  generator sees a gradient of another perturbation, clips to the range of each channel
  over the batch, keeps the epoch of the lowest training accuracy, and takes
  `(G + 1) / 2`, normalized like an image, for the perturbation: minus the mean it is
  off centre, and where channels are dark or bright one sign gets less than the radius.
  Here `G` itself, around 0, is rescaled. The first code of GAP lowers `log` of the
  cross-entropy of the batch, with betas (0.5, 0.999).

  Reference: Poursaeed et al., CVPR 2018, arXiv 1712.02328; Xu et al., "Towards
  evaluating the robustness of deep diagnostic models by adversarial attack", 2021.
  """
  step = training.train_step(_attacked(apply, predict, eps, bounds), tx, loss)

  def towards(state, batch):
    image = jnp.asarray(batch["image"])
    return step(state, {**batch, **prepare(predict, image, batch)})

  return towards


def generator(apply: training.ApplyFn, state: training.TrainState) -> Generate:
  """A trained generator in evaluation mode, `images -> (B, ..., C)`.

  Example:
    >>> apply = lambda params, extra, x, train: (params * x, extra)
    >>> state = training.init_state(jax.random.key(0), 2.0, {}, optax.sgd(0.1))
    >>> generator(apply, state)(jnp.zeros((3, 2))).shape
    (3, 2)
  """
  return lambda images: apply(state.params, state.extra, images, False)[0]


def gap(
  generate: Generate,
  eps: Scalar,
  *,
  targeted: bool = False,
  bounds: Bounds = (0.0, 1.0),
) -> AttackFn:
  """The attack of a trained generator: `clip(x + rescale(G(x)))`, one pass.

  Args:
    generate: images to perturbations of their shape, see `generator`; one that looks at
      its batch makes an attack that does.
    eps: Linf radius; another than that of the training will do, and compiles nothing
      anew where it is traced.
    targeted: `y` is what the attacker wants; it only decides what counts as success.
    bounds: valid range of images.

  Returns:
    An attack without steps and gradients of the victim.

  Raises:
    TypeError, ValueError: for a negative radius, images outside the bounds, and a
      generator of other shapes than the images.

  Example:
    >>> attack = gap(lambda x: jnp.array([[1.0, -0.5]]), 0.25)
    >>> x, y = jnp.array([[0.5, 0.625]]), jnp.array([1])
    >>> result = attack(jax.random.key(0), lambda x: x, x, y)
    >>> print(result.image, result.success)
    [[0.75  0.375]] [ True]

  Reference: Poursaeed et al., CVPR 2018, arXiv 1712.02328.
  """
  judge = reached if targeted else fooled
  threat = threats.linf(eps, bounds=bounds)

  def attack(key, predict, x, y):
    inputs.check_batch(x, y, bounds)
    delta = jax.vmap(threat.project)(_rescaled(generate(x), x, eps), x)
    image = jax.vmap(threat.apply)(x, delta)
    result = combine.identity(key, predict, image, y)
    samples = jax.vmap(decided)(result.logits, labels(predict, x, y))
    result = result._replace(delta=delta, success=jax.vmap(judge)(samples))
    return jax.lax.stop_gradient(result)

  return attack


def _attacked(apply, predict, eps, bounds) -> training.ApplyFn:
  """The victim behind a generator: one model, trained in the generator's place."""
  threat = threats.linf(eps, bounds=bounds)

  def run(params, extra, images, train):
    delta, extra = apply(params, extra, images, train)
    image = jax.vmap(threat.apply)(images, _rescaled(delta, images, eps))
    return call(predict, image)[0], extra

  return run


def _rescaled(delta, x, eps):
  if delta.shape != x.shape:
    raise ValueError(
      f"the generator returned {delta.shape} for images {x.shape}; it must return the "
      "shape of its images, as models.Generator does."
    )
  return jax.vmap(rescale, (0, None))(delta.astype(x.dtype), eps)
