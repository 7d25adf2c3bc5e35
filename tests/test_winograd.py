"""3x3 convolutions by tiles: those of `lax`, and where they are taken."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxadv
from jaxadv import canonical, winograd
from jaxadv.convolving import Spec


def _lax(kernel, padding):
  return functools.partial(
    lax.conv_general_dilated,
    rhs=kernel,
    window_strides=(1, 1),
    padding=padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _check(sides, pads, given=None):
  """Value, gradient and its gradient in float64, for random images and kernels."""
  rng = np.random.default_rng(sum(sides))
  with helpers.x64():
    image = jnp.asarray(rng.normal(size=(2, *sides, 5)))
    kernel = jnp.asarray(rng.normal(size=(3, 3, 5, 4)))
    both = winograd.layout(kernel), winograd.layout(canonical.turned(kernel, 1))
    own = lambda x: winograd.convolve(x, both, winograd.How(given or pads))
    other = _lax(kernel, pads)
    for order in range(3):
      got, want = own(image), other(image)
      np.testing.assert_allclose(got, want, atol=1e-9, err_msg=f"order {order}")
      own, other = (
        jax.grad(lambda x, f=f: (f(x) ** 2).sum() / 100) for f in (own, other)
      )


@pytest.mark.parametrize(
  "pads",
  [
    ((1, 1), (1, 1)),
    ((0, 0), (0, 0)),
    ((2, 1), (0, 3)),
    ((4, 0), (1, 1)),
    ((-1, 1), (1, -2)),
  ],
)
@pytest.mark.parametrize("sides", [(8, 8), (7, 9), (5, 6)])
def test_it_is_the_convolution(sides, pads):
  _check(sides, pads)


def test_a_wrong_padding_is_noticed():
  with pytest.raises(AssertionError, match="order 0"):
    _check((8, 8), ((1, 1), (2, 0)), given=((1, 1), (1, 1)))


@pytest.mark.parametrize(
  ("shape", "change", "taken"),
  [
    ((3, 3, 80, 80), {}, True),
    ((3, 3, 79, 79), {}, False),
    ((3, 3, 64, 256), {}, True),
    ((3, 3, 3, 256), {}, False),
    ((3, 5, 80, 80), {}, False),
    ((3, 80, 80), {"strides": (1,), "dilation": (1,)}, False),
    ((3, 3, 3, 80, 80), {"strides": (1,) * 3, "dilation": (1,) * 3}, False),
    ((3, 3, 80, 80), {"strides": (1, 2)}, False),
    ((3, 3, 80, 80), {"dilation": (2, 1)}, False),
    ((3, 3, 80, 160), {"groups": 2}, False),
  ],
)
def test_for_which_convolutions_it_is(shape, change, taken):
  spec = Spec((1, 1), ((1, 1), (1, 1)), (1, 1))._replace(**change)
  assert winograd.pays(shape, spec, 100) is taken
  assert not winograd.pays(shape, spec, 2**23 // 160 + 1)  # maps too large for a cache


@pytest.mark.parametrize(
  ("dtype", "side", "dots"),
  [(jnp.float32, 9, 32), (jnp.bfloat16, 9, 0), (jnp.float32, 5, 2)],
)
def test_freeze_takes_it(dtype, side, dots):
  """Not in bfloat16, nor where a product of few rows is faster still."""
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 96, 80)) / 30, dtype)
  x = jnp.asarray(rng.normal(size=(2, side, side, 96)), dtype)
  predict = _lax(kernel, "SAME")
  loss = lambda predict: lambda x: (predict(x) ** 2).sum()
  plain, frozen = loss(predict), loss(jaxadv.freeze(predict, x))
  assert str(jax.make_jaxpr(jax.grad(frozen))(x)).count("dot_general") == dots
  tolerance = 1e-4 if dtype == jnp.float32 else 0.1
  np.testing.assert_allclose(jax.grad(frozen)(x), jax.grad(plain)(x), atol=tolerance)


def test_bfloat16_starts_from_the_model_itself():
  kernel, x = jnp.ones((3, 3, 96, 80)), jnp.ones((2, 9, 9, 96))
  predict = _lax(kernel, "SAME")
  narrow = jaxadv.freeze(jaxadv.freeze(predict, x), x, bf16=True)
  text = str(jax.make_jaxpr(narrow)(x))
  assert text.count("conv_general_dilated[") == 1
  assert "bf16[3,3,96,80]" in text


@pytest.mark.parametrize(  # 16 products and one for the layout, in both directions
  ("traced", "once", "dots"), [(True, True, 0), (True, False, 34), (False, True, 34)]
)
def test_one_gradient_does_not_pay_for_the_layout_of_its_arguments(traced, once, dots):
  kernel, x = jnp.ones((3, 3, 96, 80)), jnp.ones((2, 9, 9, 96))

  def gradient(kernel, x):
    frozen = jaxadv.freeze(_lax(kernel, "SAME"), x, once=once)
    return jax.grad(lambda x: (frozen(x) ** 2).sum())(x)

  if not traced:
    gradient = functools.partial(gradient, kernel)
  text = str(jax.make_jaxpr(gradient)(*((kernel, x) if traced else (x,))))
  assert text.count("dot_general") == dots
