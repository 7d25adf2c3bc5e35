"""Products in bfloat16: half the bytes, and the fast units of newer processors.

    conv(x, K)  ->  float32(conv(bfloat16(x), bfloat16(K)))

Convolutions and matrix products are all that changes; what is between them stays in
float32, where sums of squares and exponentials need it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from jaxadv.folding import Step, Unknown

__all__ = ["narrow"]

_PRODUCTS = {p.name: p for p in (lax.conv_general_dilated_p, lax.dot_general_p)}
_WIDE, _HALF = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def narrow(steps: Sequence[Step]) -> list[Step]:
  """The program with the float32 products among its steps in bfloat16.

  Args:
    steps: in order.

  Returns:
    Steps with the same outputs up to the rounding of bfloat16, 8 bits.
  """
  return [part for step in steps for part in _parts(step)]


def _parts(step):
  """A product becomes casts of its inputs, the product, and the cast of its result."""
  values = [*step.inputs, *step.outputs]
  if step.name not in _PRODUCTS or {_dtype(v) for v in values} != {_WIDE}:
    return [step]
  inputs = [_narrow(value) for value in step.inputs]
  casts = [
    _cast(wide, half)
    for wide, half in zip(step.inputs, inputs, strict=True)
    if isinstance(wide, Unknown)
  ]
  (output,) = step.outputs
  product = _product(step, inputs, _narrow(output))
  return [*casts, product, _cast(product.outputs[0], output)]


def _dtype(value):
  return (value.aval if isinstance(value, Unknown) else jnp.asarray(value)).dtype


def _narrow(value):
  if isinstance(value, Unknown):
    return Unknown(value.aval.update(dtype=_HALF))
  return jnp.asarray(value, _HALF)


def _cast(before, after):
  call = lambda value: [value.astype(after.aval.dtype)]
  return Step("convert_element_type", {}, [before], [after], call)


def _product(step, inputs, output):
  primitive = _PRODUCTS[step.name]
  # sums are in float32 inside, whatever is said here; both gradients want one type
  given = {"precision": None, "preferred_element_type": _HALF}
  params = {**step.params, **given}
  return Step(
    step.name,
    params,
    inputs,
    [output],
    lambda *values: [primitive.bind(*values, **params)],
  )
