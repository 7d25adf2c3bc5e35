"""Published radii in normalized units, and what they are in pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, budgets

# What the three tasks of Xu et al. divide their images by, and 2/255 of theirs in ours.
PUBLISHED = {
  "melanoma": ([0.0942, 0.1331, 0.1521], [0.1884, 0.2662, 0.3042]),
  "Messidor": ([0.2023, 0.1994, 0.2010], [0.4046, 0.3988, 0.4020]),
  "ChestX-ray14": ([0.229, 0.224, 0.225], [0.458, 0.448, 0.450]),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_two_grey_levels_of_the_published_tasks(task):
  std, want = PUBLISHED[task]
  got = 255 * budgets.in_pixels(2 / 255, std)
  np.testing.assert_allclose(got, want, rtol=1e-12)
  back = budgets.normalized(budgets.in_pixels(2 / 255, std), std)
  np.testing.assert_allclose(back, 2 / 255, rtol=1e-12)


def test_the_published_vector():
  assert 255 * budgets.in_pixels(2 / 255, 0.0942) == pytest.approx(0.1884, rel=1e-12)
  assert budgets.normalized(0.1884 / 255, 0.0942) == pytest.approx(2 / 255, rel=1e-12)


@pytest.mark.parametrize(
  ("eps", "std", "text"),
  [
    (2 / 255, PUBLISHED["melanoma"][0], "2/255 normalized (0.19, 0.27, 0.30 /255"),
    (2 / 255, PUBLISHED["ChestX-ray14"][0], "2/255 normalized (0.46, 0.45, 0.45 /255"),
    (2.55 / 255, 0.5, "2.55/255 normalized (1.27 /255"),
    (np.array([4, 2]) / 255, [0.5, 0.25], "4, 2/255 normalized (2.00, 0.50 /255"),
  ],
)
def test_the_line_of_a_report(eps, std, text):
  assert budgets.described(eps, std) == f"{text} in pixels)"


def test_an_attack_takes_one_radius_per_channel():
  std = PUBLISHED["melanoma"][0]
  eps = budgets.in_pixels(2 / 255, std).reshape(1, 1, 3).astype(np.float32)
  predict = lambda x: jnp.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], -1)
  x, y = jnp.full((2, 4, 4, 3), 0.5), jnp.array([0, 1])
  found = attacks.pgd(eps, num_steps=5)(jax.random.key(0), predict, x, y)
  moved = jnp.abs(found.image - x).max((0, 1, 2))
  np.testing.assert_allclose(moved, eps.ravel(), atol=1e-7)


def test_a_radius_may_be_traced():
  convert = jax.jit(lambda eps: budgets.in_pixels(eps, 0.5))
  assert convert(0.25).item() == 0.125


@pytest.mark.parametrize(("eps", "std"), [(-0.1, 0.5), (0.1, 0.0), (0.1, [0.5, -1.0])])
@pytest.mark.parametrize("convert", [budgets.in_pixels, budgets.normalized])
def test_a_radius_below_zero_or_a_std_that_is_not_above_is_refused(convert, eps, std):
  with pytest.raises(ValueError, match="it must be a number"):
    convert(eps, std)
