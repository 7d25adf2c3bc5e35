"""`freeze`: any JAX model whose parameters are constants, fast inside compiled loops.

A model is traced once, and its program rewritten in passes:

- what does not depend on the image is computed now, outside of any loop;
- on CPU, convolutions take over what scales or shifts their channels (`folding`);
- where asked for, products go to bfloat16 (`narrowing`);
- what `frozen_rules` has for the backend runs faster. All else stays as it was.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxadv import folding, frozen_rules, narrowing
from jaxadv.folding import Step, Unknown

__all__ = ["freeze"]

Predict = Callable[[Any], Any]
_SMALL = 1 << 10  # values: what is no larger may grow when it is computed now


class _Passes(NamedTuple):
  """Which rewrite a program."""

  rules: Mapping[str, frozen_rules.Rule]
  fold: bool
  bf16: bool


def freeze(
  predict: Predict, x: Any, *, bf16: bool = False, once: bool = False
) -> Predict:
  """The same model with an input gradient that is fast, on CPU inside loops, too.

  Value and input gradient are those of `predict` up to rounding. Parameters are
  constants: no gradient reaches them. Convolutions run in the form that XLA is fast
  at, strided and transposed ones phase by phase, 3x3 ones of many channels by Winograd,
  kernels are laid out once, few rows become the right factor of a product, pools do
  without `select_and_scatter`, and norms in evaluation mode go into the convolution
  before them. On a GPU only what measured faster there: one-pixel kernels and those
  larger than the map become products, depthwise convolutions sums, blocks dense
  layers, and pools of windows that do not overlap comparisons. On a TPU, where nothing
  was measured, `predict` comes back as it is. Models of `jaxadv.models` are fast
  without it.

  Args:
    predict: images to any tree of arrays, with its parameters bound, in evaluation
      mode; Flax, NNX, Equinox, Keras on JAX or plain JAX.
    x: images of the shape that will be attacked, or their `ShapeDtypeStruct`. For
      images of another shape the program is rewritten when they come.
    bf16: convolutions and matrix products of float32 in bfloat16, on any backend; for
      gradients, see `jaxadv.combine.bf16`.
    once: the program takes one gradient, as a step of crafting does, so that kernels
      which are its arguments do not pay for a layout that many would share.

  Returns:
    A function of images, for reverse mode: `jax.jvp` is refused by JAX.

  Raises:
    Exception: what `predict` raises for such images.

  Example:
    >>> import flax.linen as nn
    >>> import jax.numpy as jnp
    >>> model, x = nn.Conv(2, (3, 3)), jnp.ones((1, 4, 4, 1))
    >>> variables = model.init(jax.random.key(0), x)
    >>> predict = lambda x: model.apply(variables, x)
    >>> frozen = freeze(predict, x)
    >>> bool(jnp.allclose(frozen(x), predict(x)))
    True
  """
  rules = frozen_rules.ONCE if once else frozen_rules.RULES
  backend = jax.default_backend()
  passes = _Passes(rules.get(backend, {}), backend == "cpu", bf16)
  if not (passes.rules or bf16):
    return predict
  predict = getattr(predict, "frozen_from", predict)

  def program(like):
    closed, out = jax.make_jaxpr(predict, return_shape=True)(like)
    run, tree = _program(passes, closed, [Unknown(like)]), jax.tree.structure(out)
    return lambda image: jax.tree.unflatten(tree, run(image))

  shape, dtype = x.shape, x.dtype
  usual = program(jax.ShapeDtypeStruct(shape, dtype))

  def frozen(image):
    if (image.shape, image.dtype) == (shape, dtype):
      return usual(image)
    return program(jax.ShapeDtypeStruct(image.shape, image.dtype))(image)

  # where freezing it once more starts from, so that bfloat16 reaches all of it
  frozen.frozen_from = predict  # type: ignore[attr-defined]
  return frozen


def _program(passes, closed, arguments):
  """A function of the unknown arguments of a jaxpr, to the list of its outputs."""
  steps: list[Step] = []
  outputs = _flatten(closed, arguments, steps)
  steps = folding.fold(steps, outputs) if passes.fold else steps
  steps = narrowing.narrow(steps) if passes.bf16 else steps
  calls = [(_rewritten(passes, step), step) for step in steps]
  given = [value for value in arguments if isinstance(value, Unknown)]

  def run(*values):
    env = dict(zip(given, values, strict=True))
    read = lambda value: env[value] if isinstance(value, Unknown) else value
    for call, step in calls:
      found = call(*map(read, step.inputs))
      env.update(zip(step.outputs, found, strict=True))
    return list(map(read, outputs))

  return run


def _flatten(closed, arguments, steps):
  """Appends the steps of a jaxpr, calls inlined, and returns its outputs."""
  jaxpr = closed.jaxpr
  env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  env |= dict(zip(jaxpr.invars, arguments, strict=True))
  read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]
  for eqn in jaxpr.eqns:
    name, inputs = eqn.primitive.name, list(map(read, eqn.invars))
    if (called := _called(eqn)) is not None:
      found = _flatten(called, inputs, steps)
    elif _is_known(eqn, inputs):
      found = _bound(jaxpr, eqn)(*inputs)
    else:
      found = [Unknown(var.aval) for var in eqn.outvars]
      steps.append(Step(name, eqn.params, inputs, found, _bound(jaxpr, eqn)))
    env.update(zip(eqn.outvars, found, strict=True))
  return list(map(read, jaxpr.outvars))


def _called(eqn):
  """The program of a call whose gradient is that of its program, else `None`."""
  name, params = eqn.primitive.name, eqn.params
  if name == "custom_vjp_call":
    program = params["call_jaxpr"]
    return program if _is_product(program.jaxpr) else None
  return params[_CALLS[name]] if name in _CALLS else None


_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}


def _is_product(jaxpr):
  """Whether it is a convolution of our own, whose gradient is its own for speed alone.

  Depthwise ones are sums of shifted images there, for which there is no rule.
  """
  source = jaxpr.debug_info.func_src_info
  own = source.startswith(_OWN) and "jaxadv" in source
  return own and any(name in _PRODUCTS for name in _primitives(jaxpr))


def _primitives(jaxpr):
  """Names of the primitives, those of calls inside included."""
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    if eqn.primitive.name in _CALLS:
      yield from _primitives(eqn.params[_CALLS[eqn.primitive.name]].jaxpr)


_OWN = ("_convolve at ", "_linear at ", "times at ")
_PRODUCTS = ("conv_general_dilated", "dot_general")


def _is_known(eqn, inputs):
  """Whether to compute it now: no image in it, not much larger than its parts."""
  if eqn.effects or any(isinstance(value, Unknown) for value in inputs):
    return False
  size = sum(var.aval.size for var in eqn.outvars)
  return size <= max(_SMALL, *(2 * jnp.size(value) for value in inputs), 0)


def _bound(jaxpr, eqn):
  """An equation as a function of its inputs, literals among them, to a list."""
  places = {v: k for k, v in enumerate(eqn.invars) if isinstance(v, jex.Var)}
  given = {"constvars": [], "invars": list(places), "outvars": eqn.outvars}
  alone = jaxpr.replace(**given, eqns=[eqn], effects=eqn.effects)
  call = jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))
  return lambda *inputs: call(*(inputs[place] for place in places.values()))


def _rewritten(passes, step):
  """The call of a step, by the rule for its primitive where that has one."""
  if step.name in _HOLDERS:
    return _HOLDERS[step.name](step, functools.partial(_inner, passes))
  rule = passes.rules.get(step.name) if step.unknown else None
  return (rule and rule(step)) or step.call


def _inner(passes, jaxpr, inputs):
  """The program of a jaxpr inside a step, as a function of all of its inputs."""
  run = _program(passes, jaxpr, inputs)
  unknown = [isinstance(value, Unknown) for value in inputs]
  return lambda *values: run(*itertools.compress(values, unknown))


def _checkpoint(step, inner):
  params = step.params
  run = inner(jex.ClosedJaxpr(params["jaxpr"], ()), step.inputs)
  kept = {name: params[name] for name in ("policy", "prevent_cse")}
  return jax.checkpoint(run, **kept)


def _cond(step, inner):
  branches = [inner(branch, step.inputs[1:]) for branch in step.params["branches"]]
  return lambda index, *values: lax.switch(index, branches, *values)


def _scan(step, inner):
  """What a pass starts from and goes through is unknown inside, whatever it is here."""
  params, jaxpr = step.params, step.params["jaxpr"]
  consts, _, _ = _parts(params, step.inputs)
  within = [Unknown(aval) for aval in jaxpr.in_avals[len(consts) :]]
  body = inner(jaxpr, [*consts, *within])
  how = {name: params[name] for name in ("length", "reverse", "unroll")}

  def call(*inputs):
    consts, carry, xs = _parts(params, inputs)

    def one(carry, x):
      found = body(*consts, *carry, *x)
      return found[: len(carry)], found[len(carry) :]

    start = [  # a number has to have its type at once
      value if isinstance(value, jax.Array) else jnp.asarray(value, like.aval.dtype)
      for value, like in zip(carry, within, strict=False)
    ]
    carry, stacked = lax.scan(one, start, xs, **how)
    return [*carry, *stacked]

  return call


def _parts(params, inputs):
  """Constants, carry, and what a scan goes through."""
  if "ft_in" in params:  # from JAX 0.11.2 on
    return map(list, params["ft_in"].update(inputs).unpack())
  first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
  return list(inputs[:first]), list(inputs[first:last]), list(inputs[last:])


# Steps that hold a program of their own.
_HOLDERS = {
  "checkpoint": _checkpoint,
  "cond": _cond,
  "remat2": _checkpoint,
  "scan": _scan,
}
