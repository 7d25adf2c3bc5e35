"""The profile of a step: what it counts, and that times are found for it."""

import pathlib

import helpers
import jax
import jax.numpy as jnp
import pytest
from jax import lax


@pytest.fixture(scope="module")
def profile():
  with pytest.MonkeyPatch.context() as patch:  # its helpers lie beside it
    patch.syspath_prepend(pathlib.Path(__file__).parents[1] / "benchmarks")
    return helpers.benchmark("profile_step")


def test_every_product_is_counted_and_timed(profile):
  kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 40))
  matrix = jax.random.normal(jax.random.key(1), (256, 50))

  def step(_, x):
    layout = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)
    z = x.reshape(-1, 256) @ matrix  # not of `y`: they would be one operation
    return x + jnp.tanh(y).mean() + jnp.tanh(z).mean()

  x = jnp.ones((2, 32, 32, 8))
  run = jax.jit(lambda x: lax.fori_loop(0, 3, step, x)).lower(x).compile()
  work, times = profile.products(run.as_text()), profile.durations(run, x)
  table = {row[0]: row for row in profile.rows(times, work, 100.0)}
  pixels = 2 * 16 * 16
  wanted = {
    "convolution 2x32x32x8 . 3x3x8x40, stride 2x2": 2 * pixels * 9 * 8 * 40 / 1e9,
    "dot 64x256 . 256x50": 2 * 64 * 256 * 50 / 1e9,
  }
  for kind, gflop in wanted.items():
    assert kind in table
    _, count, ms, speed, lost = table[kind]
    assert count == 1
    assert ms * speed / 1e3 == pytest.approx(gflop)
    assert lost == pytest.approx(ms - gflop * 10)
  assert table["the rest"][2] > 0


def test_what_is_not_shown_is_added_up(profile):
  table = [
    ("a", 1, 2.0, 50.0, 1.0),
    ("b", 3, 4.0, 25.0, 0.5),
    ("c", 2, 1.0, 100.0, 0.0),
  ]
  rest = ("the rest", 9, 5.0, 0.0, 5.0)
  got = profile.shortened([*table, rest], 1)
  assert got == [table[0], ("other products", 5, 5.0, 40.0, 0.5), rest]
  assert profile.shortened([*table, rest], 3) == [*table, rest]
