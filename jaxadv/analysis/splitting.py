"""A model cut at one of its features: what the logits are as a function of it.

`predict` hands its features out, but a gradient with respect to one needs them to come
in. The program that JAX traces of it has both: here the equation that makes the feature
stays, and whatever reads it reads an argument instead. So it works for any
model, in any framework, that returns the very activations it goes on with.
"""

from collections.abc import Callable

import jax
import jax.extend.core

from jaxadv import inputs
from jaxadv.types import Array, Images, Predict, call

__all__ = ["after_feature", "feature_names"]


def after_feature(
  predict: Predict, x: Images, name: str
) -> tuple[Array, Callable[[Array], Array]]:
  """The feature, and the logits as a function of it.

  Ways around the feature (a skip, an attention gate on an earlier map) still start from
  `x`: the derivative is that with respect to this activation alone.

  Args:
    predict: images to `(logits, features)`.
    x: `(B, ..., C)` images.
    name: of the feature.

  Returns:
    `features[name]` `(B, ...)`, and a function from an array of its shape to the logits
    of `predict(x)` with the feature replaced. Differentiate it.

  Raises:
    ValueError: for a name that the model does not have; for a feature that the logits
      do not depend on, such as a copy in another dtype, or one behind the last layer.

  Example:
    >>> def predict(x):
    ...   hidden = x**2
    ...   return hidden @ jax.numpy.array([[1.0], [3.0]]), {"hidden": hidden}
    >>> hidden, rest = after_feature(predict, jax.numpy.array([[1.0, 2.0]]), "hidden")
    >>> hidden.tolist(), rest(hidden).tolist(), rest(2 * hidden).tolist()
    ([[1.0, 4.0]], [[13.0]], [[26.0]])
  """
  _, features = call(predict, x)
  inputs.check_choice("feature", name, sorted(features))
  value = features[name]
  program, (_, made) = _traced(lambda x, value: call(predict, x), x, value)
  rest = jax.extend.core.jaxpr_as_fun(_cut(program, made[name], name))
  return value, lambda value: rest(x, value)[0]


def feature_names(predict: Predict, x: Images) -> list[str]:
  """The names of the features in the order in which the model makes them.

  A compiled `predict` returns them sorted by name.

  Args:
    predict: images to `(logits, features)`.
    x: `(B, ..., C)` images, of which only the shape counts.

  Example:
    >>> def predict(x):
    ...   first = x + 1
    ...   return first, {"second": first**2, "first": first}
    >>> feature_names(jax.jit(predict), jax.numpy.zeros((1, 2)))
    ['first', 'second']
  """
  program, (_, made) = _traced(lambda x: call(predict, x), x)
  variables = [v for equation in program.jaxpr.eqns for v in equation.outvars]
  place = {id(v): k for k, v in enumerate(variables)}
  # the image itself, or a constant, comes first
  return sorted(made, key=lambda name: place.get(id(made[name]), -1))


def _traced(function, *arguments):
  """The program of a function, and its result with the variables in their places.

  Without jit: a compiled model would be a single equation.
  """
  with jax.disable_jit():
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
  return program, jax.tree.unflatten(jax.tree.structure(shapes), program.jaxpr.outvars)


def _cut(program, feature, name):
  """The program, in which whatever reads the feature reads the last argument."""
  jaxpr = program.jaxpr
  argument = jaxpr.invars[-1]
  put = lambda variables: [argument if v is feature else v for v in variables]
  equations = [e.replace(invars=put(e.invars)) for e in jaxpr.eqns]
  jaxpr = jaxpr.replace(eqns=equations, outvars=put(jaxpr.outvars))
  if not _reaches(equations, argument, jaxpr.outvars[0]):
    raise ValueError(
      f"the logits do not depend on the feature {name!r} that `predict` returns; "
      "return the array that the next layer reads, not a copy of it in another dtype."
    )
  return program.replace(jaxpr=jaxpr)


def _reaches(equations, argument, logits):
  """Whether the logits are computed from the argument, along whatever way."""
  found = {id(argument)}
  for equation in equations:
    if any(id(v) in found for v in equation.invars):
      found.update(map(id, equation.outvars))
  return id(logits) in found
