"""Fixtures shared by the tests of the main job and the command line."""

import pathlib

import jax
import numpy as np
import pytest

# its scripts make stored vectors, with packages the tests do not need
collect_ignore = ["golden"]
MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
  """A compiled program holds five memory maps; at 65530 Linux gives out no more."""
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
    jax.clear_caches()


@pytest.fixture(scope="session")
def discs(tmp_path_factory):
  """A pack of bright discs on a dark ground, 32 pixels: learned in a few steps."""
  path = tmp_path_factory.mktemp("pack") / "discs.npz"
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:32, :32]
  row, column = rng.uniform(8, 24, (2, 32, 1, 1))
  masks = (y - row) ** 2 + (x - column) ** 2 < rng.uniform(4, 8, (32, 1, 1)) ** 2
  images = 80 + 100 * masks + rng.normal(0, 12, masks.shape)
  np.savez(
    path,
    images=images[..., None].clip(0, 255).astype(np.uint8),
    masks=masks.astype(np.uint8),
    split=np.array(["train"] * 24 + ["test"] * 8),
    ids=np.arange(32).astype(str),
    class_names=np.array(["ground", "disc"]),
  )
  return path
