"""DI-FGSM and TI-FGSM: MI-FGSM with one part exchanged."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from jaxadv import attacks, filters, losses, threats, transforms
from jaxadv.engine import gradient_attack
from jaxadv.types import Objective

KEY = jax.random.key(0)
MODEL = helpers.convnet()
X = helpers.stripes(6)
Y = jnp.argmax(MODEL(X)[0], -1)


def run(attack):
  return jax.jit(lambda x, y: attack(KEY, MODEL, x, y))(X, Y)


def test_the_kernel_of_ti_fgsm_is_that_of_the_released_code():
  want = scipy.stats.norm.pdf(np.linspace(-3, 3, 15))
  with helpers.x64():
    taps = filters.gaussian_kernel(7 / 3, 15)
    np.testing.assert_allclose(taps, want / want.sum(), atol=1e-12)


def test_ti_fgsm_smooths_the_gradient_before_it_is_normalised():
  parts = (transforms.smooth(1.0, size=3), transforms.normalize(1), optax.trace(0.5))
  step = transforms.sign_step(0.02)
  by_hand = gradient_attack(
    Objective(losses.cross_entropy),
    threats.linf(0.06),
    optax.chain(*parts, step),
    num_steps=3,
    random_start=False,
  )
  got = run(attacks.ti_fgsm(0.06, num_steps=3, decay=0.5, sigma=1.0, size=3))
  np.testing.assert_allclose(got.image, run(by_hand).image, atol=1e-7)
  plain = run(attacks.mi_fgsm(0.06, num_steps=3, decay=0.5))
  assert jnp.abs(got.image - plain.image).max() > 0.03
  # one tap smooths nothing
  single = run(attacks.ti_fgsm(0.06, num_steps=3, decay=0.5, size=1))
  np.testing.assert_array_equal(single.image, plain.image)


def test_di_fgsm_without_diversity_is_mi_fgsm():
  never = run(attacks.di_fgsm(0.06, num_steps=3, probability=0.0))
  plain = run(attacks.mi_fgsm(0.06, num_steps=3))
  np.testing.assert_array_equal(never.image, plain.image)
  always = run(attacks.di_fgsm(0.06, num_steps=3, probability=1.0, shrink=0.7))
  assert jnp.abs(always.image - plain.image).max() > 0.03


def test_di_fgsm_reports_the_image_not_a_copy_of_it():
  got = run(attacks.di_fgsm(0.06, num_steps=3, probability=1.0, shrink=0.5))
  logits = MODEL(got.image)[0]
  np.testing.assert_allclose(got.logits, logits, atol=1e-6)
  np.testing.assert_array_equal(got.success, jnp.argmax(logits, -1) != Y)
  # the first loss, though, is that of a copy of the clean image
  clean = optax.softmax_cross_entropy_with_integer_labels(MODEL(X)[0], Y)
  assert jnp.abs(got.losses[0] - clean).max() > 0.01


@pytest.mark.parametrize("name", ["di_fgsm", "ti_fgsm"])
def test_bad_numbers_are_refused(name):
  with pytest.raises(ValueError, match=r"`eps` is -0.1"):
    getattr(attacks, name)(-0.1)
  with pytest.raises(ValueError, match="`size` is 4"):
    attacks.ti_fgsm(0.1, size=4)


def test_the_margin_of_label_sets_pulls_at_confident_labels():
  z, y = jnp.array([2.0, -30.0, 0.5]), jnp.array([1, 0, 0])

  def slope(z, **options):
    loss = lambda z: losses.label_margin(helpers.sample(z, y), **options)
    return 3 * jax.grad(loss)(z)

  # the third has flipped, and by half a unit
  np.testing.assert_allclose(slope(z), [-1, 1, 0], atol=1e-6)
  np.testing.assert_allclose(slope(z, slack=1.0), [-1, 1, 1], atol=1e-6)
  np.testing.assert_allclose(slope(z, threshold=0.7), [-1, 1, 1], atol=1e-6)
  assert losses.label_margin(helpers.sample(z, y), slack=1.0) == pytest.approx(
    (-2 - 30 + 0.5) / 3
  )
  bce = jax.grad(lambda z: losses.binary_cross_entropy(helpers.sample(z, y)))(z)
  assert abs(bce[1]) < 1e-9
