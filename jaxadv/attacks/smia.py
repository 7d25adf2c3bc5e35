"""SMIA: a gradient attack that keeps to what a smoothed perturbation also achieves."""

import functools
from typing import Literal

from jaxadv import forwards, inputs, losses, threats, transforms
from jaxadv.attacks.parts import Bounds, Keep, Scalar
from jaxadv.engine import Attack, gradient_attack
from jaxadv.types import Objective, SuccessFn, fooled, reached

__all__ = ["smia"]


def smia(
  eps: Scalar,
  *,
  step_size: Scalar | None = None,
  num_steps: int = 20,
  weight: Scalar = 1.0,
  smooth: Literal["perturbation", "image"] = "perturbation",
  reference: Literal["soft", "hard"] = "soft",
  sigma: Scalar = 1.0,
  size: int = 3,
  targeted: bool = False,
  random_start: bool = False,
  keep: Keep = "last",
  stop: SuccessFn | None = None,
  bounds: Bounds = (0.0, 1.0),
) -> Attack:
  """Stabilized medical image attack, for classes, label sets, masks and volumes.

  Our **reconstruction**: the text of the paper was not available. Its abstract and the
  released code fix the two terms and their signs; the soft reference, what is smoothed,
  the projection and all defaults are choices of ours.

      J(x') = L(y, p) - weight * CE(q, p)
      x'   <- project(x' + step_size * sign(grad J))

  with `p` the prediction for `x'`, `q` that for its smoothed twin as a constant (see
  `forwards.smoothed_twin`) and `L` the cross-entropy, binary for label sets, over
  pixels a mean. Two forward passes and one backward pass per step.

  In the logits of a class the gradient is `(1 - weight) p + weight q - Y`, with `Y` the
  one-hot label. So `weight=0` is PGD, at `weight=1` the moving prediction drops out,
  and the first step from the clean image is PGD's for every weight. **For one label of
  two classes the gradient is a positive multiple of PGD's and the path is the same**: a
  gain over PGD shows only for 3 classes and more, masks and label sets.

  Args:
    eps: Linf radius; 1 to 8 / 255.
    step_size: default `eps / 4`.
    num_steps: steps; 10 to 50.
    weight: of the agreement with the twin, in [0, 1]; may be traced.
    smooth: the perturbation, so that the anatomy stays sharp, or the whole image.
    reference: `"soft"` for the twin's probabilities, `"hard"` for its decision, used
      from the second step on. While that is the label, the hard gradient is
      `(1 - weight) (p - Y)`: at `weight=1` nothing moves again.
    sigma: of the Gaussian in pixels, > 0; `size / 3` for wider kernels.
    size: odd number of its taps; 3, 5, 7 or 15.
    targeted: `y` is what the attacker wants, `L` is lowered; the agreement is still
      raised, and holds the attack back where the twin has not followed.
    random_start: start anywhere in the ball.
    keep: which point to return; the best has the largest `L` (smallest if targeted).
    stop: freezes an example, for instance `jaxadv.types.fooled`; by default all go on,
      as the method's claim is about the whole path.
    bounds: valid range of images.

  Returns:
    An `Attack`.

  Raises:
    ValueError: for a weight outside [0, 1], which could turn the attack around, a
      negative radius or step, `sigma` not above 0, an even size, and unknown words.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> weights = jnp.array([[1.0, -1.0, 0.0], [0.5, -0.5, 0.0]])
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> result = smia(0.1)(jax.random.key(0), lambda x: x @ weights, x, y)
    >>> print(result.image.round(2), result.forwards, result.backwards)
    [[0.39999998 0.39999998]] [40] [20]

  Differs from the released code, which steps by `eps` without projection or range, so
  that its budget is up to `num_steps * eps`; whose stabilization is off by default and
  takes its reference from the step before, as a hard label; and whose filter is
  one-sided and mixes channels instead of smoothing. There `weight=1` never moves after
  the first step.

  Reference: Qi et al., ICLR 2021, arXiv 2103.05232.
  """
  inputs.check_share("weight", weight)
  inputs.check_choice("reference", reference, ("soft", "hard"))
  inputs.check_positive("eps", eps)
  step_size = eps / 4 if step_size is None else step_size
  inputs.check_positive("step_size", step_size)
  objective = Objective(
    functools.partial(
      losses.smoothed_agreement, weight=weight, reference=reference, targeted=targeted
    ),
    score=losses.negate(losses.task_loss) if targeted else losses.task_loss,
    forward=forwards.smoothed_twin(sigma, size=size, smooth=smooth, bounds=bounds),
    success=reached if targeted else fooled,
  )
  return gradient_attack(
    objective,
    threats.linf(eps, bounds=bounds),
    transforms.sign_step(step_size),
    num_steps=num_steps,
    random_start=random_start,
    keep=keep,
    stop=stop,
  )
