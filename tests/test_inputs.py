"""Bad input is refused before the first step: what was got, and what to write."""

import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, combine, inputs, threats, types

MODEL = helpers.convnet()
DENSE = helpers.convnet(classes=2, dense=True)
X = helpers.stripes(2)
Y = jnp.array([0, 2])
MASK = jnp.zeros((2, 8, 8), int).at[:, 2:5].set(1)
KEY = jax.random.key(0)


def refuses(error, message, attack, *, key=KEY, predict=MODEL, x=X, y=Y):
  """The attack raises with this message before or while its first step is traced."""
  counter = helpers.Counter(predict)
  with pytest.raises(error, match=message):
    attack(key, counter, x, y)
  assert counter.traces <= 4  # to prepare, to read the shape of the logits, to trace


PGD = attacks.pgd(0.1, num_steps=2)


@pytest.mark.parametrize(
  ("x", "error", "message"),
  [
    (
      (X * 255).astype(jnp.uint8),
      TypeError,
      r"dtype uint8; .*x.astype\(jnp.float32\) / 255",
    ),
    (X.astype(jnp.bfloat16), TypeError, r"dtype bfloat16.*let `predict` cast"),
    (X.astype(jnp.int32), TypeError, r"dtype int32"),
    ([[0.1, 0.2]], TypeError, r"dtype list"),
    (
      X * 255,
      ValueError,
      r"`x` spans \[\d.*, 20\d.*\], outside the bounds \[0.0, 1.0\]. Divide",
    ),
    (X - 0.5, ValueError, r"`x` spans \[-0.\d+, .*keep mean/std normalisation inside"),
    (X.at[0, 0, 0, 0].set(jnp.nan), ValueError, r"not finite; mend the images"),
    (X[0, 0, 0], ValueError, r"shape \(2,\); attacks need .*Write x\[None\]"),
    (X[:0], ValueError, r"shape \(0, 8, 8, 2\); attacks need a non-empty batch"),
    (X[:1], ValueError, r"`y` has shape \(2,\) but `x` holds 1 images"),
  ],
)
def test_images(x, error, message):
  refuses(error, message, PGD, x=x)


@pytest.mark.parametrize(
  ("y", "error", "message"),
  [
    (None, TypeError, r"`y` holds no labels; write labels, or \{\"label\": labels"),
    ({}, TypeError, r"`y` holds no labels"),
    ({"image": X}, TypeError, r"`y` holds no labels"),
    (jnp.zeros(3, int), ValueError, r"`y` has shape \(3,\) but `x` holds 2 images"),
    (jnp.array([0.0, 1.0]), TypeError, r"labels have dtype float32; write integer"),
    (jnp.array([0, 3]), ValueError, r"label 3 is outside the model's classes 0..2"),
    (jnp.array([0, -1]), ValueError, r"label -1 is outside the model's classes 0..2"),
    (
      jnp.zeros((2, 4), int),
      ValueError,
      r"labels have shape \(2, 4\) and logits \(2, 3\)",
    ),
    (
      jnp.zeros((2, 1), int),
      ValueError,
      r"labels have shape \(2, 1\) and logits \(2, 3\)",
    ),
    (
      {"label": Y, "image": X[:1]},
      ValueError,
      r"`y\['image'\]` has shape \(1, 8, 8, 2\)",
    ),
  ],
)
def test_labels(y, error, message):
  refuses(error, message, PGD, y=y)


def test_masks():
  attack = attacks.asma_calibrated(num_steps=2)
  for bad, message in (
    (MASK[:, :7], r"labels have shape \(2, 7, 8\) and logits \(2, 8, 8, 2\)"),
    (
      MASK.at[0, 0, 0].set(255),
      r"label 255 is outside .*classes 0..1; mark pixels to ig",
    ),
    ({"label": MASK, "mask": MASK[:1] > 0}, r"`y\['mask'\]` has shape \(1, 8, 8\)"),
  ):
    refuses(ValueError, message, attack, predict=DENSE, y=bad)
  ignored = {"label": MASK.at[0, 0, 0].set(255), "mask": jnp.ones_like(MASK) > 0}
  ignored["mask"] = ignored["mask"].at[0, 0, 0].set(False)
  result = attack(KEY, DENSE, X, ignored)
  assert np.isfinite(result.losses).all()


def test_a_mask_that_ignores_every_pixel_of_an_image_has_nothing_to_attack():
  nothing = {"label": MASK, "mask": (MASK >= 0).at[1].set(False)}
  attack = attacks.asma_calibrated(num_steps=2)
  refuses(ValueError, r"mask", attack, predict=DENSE, y=nothing)


@pytest.mark.parametrize(
  ("key", "error", "message"),
  [
    (
      jax.random.PRNGKey(0),
      TypeError,
      r"`key` is uint32, not a typed key; write jax.random.key",
    ),
    (0, TypeError, r"`key` is int, not a typed key"),
    (None, TypeError, r"`key` is NoneType, not a typed key"),
    (
      jax.random.key(0, impl="rbg"),
      ValueError,
      r"rbg, which mixes examples .*threefry2x32",
    ),
    (
      jax.random.split(KEY, 3),
      ValueError,
      r"`key` has shape \(3,\); write one key, or \(2,\) keys",
    ),
    (jax.random.split(KEY, (2, 1)), ValueError, r"`key` has shape \(2, 1\)"),
  ],
)
def test_keys(key, error, message):
  refuses(error, message, PGD, key=key)
  refuses(error, message, combine.identity, key=key)
  refuses(error, message, combine.with_restarts(PGD, 2), key=key)


def test_one_key_per_example_or_one_for_all():
  keys = types.example_keys(KEY, 2)
  assert keys.shape == (2,)
  np.testing.assert_array_equal(
    jax.random.key_data(keys[1]), jax.random.key_data(jax.random.fold_in(KEY, 1))
  )
  np.testing.assert_array_equal(
    jax.random.key_data(types.example_keys(keys, 2)), jax.random.key_data(keys)
  )
  one, each = PGD(KEY, MODEL, X, Y), PGD(keys, MODEL, X, Y)
  np.testing.assert_array_equal(one.image, each.image)


def test_features():
  y = {"label": MASK, "image": X}
  message = r"no feature 'enc9'; it has bottleneck, hidden"
  refuses(
    ValueError, message, attacks.mafl(num_steps=2, feature="enc9"), predict=DENSE, y=y
  )
  refuses(
    ValueError, message, attacks.msa(num_steps=2, taps=("enc9",)), predict=DENSE, y=y
  )
  for attack in (attacks.mafl(), attacks.msa(), attacks.msa_literal()):
    refuses(
      ValueError,
      r"reads features; write a predict that returns \(logits, features\)",
      attack,
      predict=lambda x: DENSE(x)[0],
      y=y,
    )


@pytest.mark.parametrize(
  ("make", "error", "message"),
  [
    (lambda: attacks.pgd(-0.1), ValueError, r"`eps` is -0.1; it must be a number >= 0"),
    (lambda: attacks.fgsm(-1), ValueError, r"is -1"),
    (lambda: attacks.apgd(-0.1), ValueError, r"`eps` is -0.1"),
    (lambda: attacks.mi_fgsm(-0.1, step_size=0.1), ValueError, r"`eps` is -0.1"),
    (lambda: attacks.seg_pgd(-0.1), ValueError, r"`eps` is -0.1"),
    (lambda: attacks.cos_pgd(0.1, step_size=-0.1), ValueError, r"`step_size` is -0.1"),
    (lambda: attacks.mafl_linf(-0.1), ValueError, r"`eps` is -0.1"),
    (lambda: attacks.msa_literal(eps=-0.1), ValueError, r"`eps` is -0.1"),
    (lambda: attacks.pgd(0.1, step_size=-0.1), ValueError, r"`step_size` is -0.1"),
    (lambda: attacks.pgd(float("nan")), ValueError, r"`eps` is nan"),
    (
      lambda: attacks.pgd(0.1, norm="l3"),
      ValueError,
      r"`norm` is 'l3'; write one of linf, l2, l1",
    ),
    (
      lambda: attacks.apgd(0.1, norm="l1"),
      ValueError,
      r"`norm` is 'l1'; apgd knows \"linf\" and \"l2\"",
    ),
    (
      lambda: attacks.pgd(0.1, keep="first"),
      ValueError,
      r"`keep` is 'first'; write one of last, best",
    ),
    (
      lambda: attacks.mafl(low_band="dct"),
      ValueError,
      r"`low_band` is 'dct'; write one of fft, haar",
    ),
    (
      lambda: attacks.mafl(similarity="all"),
      ValueError,
      r"`kind` is 'all'; write one of ssah",
    ),
    (
      lambda: attacks.mafl_literal(constraint="x"),
      ValueError,
      r"`constraint` is 'x'; write \"penalty\"",
    ),
    (lambda: attacks.asma(threshold=-1.0), ValueError, r"`threshold` is -1.0"),
    (
      lambda: combine.best_of(),
      ValueError,
      r"got no attacks; write best_of\(first, second\)",
    ),
    (lambda: combine.with_restarts(PGD, 0), ValueError, r"`n` is 0"),
    (lambda: attacks.smia(-0.1), ValueError, r"`eps` is -0.1"),
    (lambda: attacks.di_fgsm(0.1, shrink=-1.0), ValueError, r"`shrink` is -1.0"),
    (
      lambda: attacks.di_fgsm(0.1, probability=3.0),
      ValueError,
      r"`probability` is 3.0; it must be a number in \[0, 1\]",
    ),
    (
      lambda: attacks.universal(0.1, step_size=-0.1),
      ValueError,
      r"`step_size` is -0.1",
    ),
    (
      lambda: attacks.universal(0.1, norm="l1"),
      ValueError,
      r"`norm` is 'l1'; write one of linf, l2",
    ),
  ],
)
def test_numbers_and_names_are_checked_while_building(make, error, message):
  with pytest.raises(error, match=message):
    make()


ENDLESS = {"fgsm", "random_universal", "sequential_universal"}


@pytest.mark.parametrize("name", sorted(set(attacks.__all__) - ENDLESS))
def test_the_number_of_steps(name):
  attack = getattr(attacks, name)
  if name == "targeted_universal":
    attack = functools.partial(attack, target=0)
  radius = () if "eps" not in helpers.positional(attack) else (0.1,)
  for steps in (0, -3):
    with pytest.raises(
      ValueError, match=rf"`num_steps` is {steps}; .* at least 1 step"
    ):
      attack(*radius, num_steps=steps)
  for steps in (2.0, True, jnp.int32(2)):
    with pytest.raises(TypeError, match=r"compiled for a fixed Python int"):
      attack(*radius, num_steps=steps)


def test_checks_that_need_no_values_also_work_while_tracing():
  run = jax.jit(lambda x, y: PGD(KEY, MODEL, x, y))
  with pytest.raises(ValueError, match=r"holds 2 images"):
    run(X, jnp.zeros(3, int))
  with pytest.raises(TypeError, match=r"dtype uint8"):
    run(X.astype(jnp.uint8), Y)
  with pytest.raises(
    ValueError, match=r"labels have shape \(2, 8\) and logits \(2, 3\)"
  ):
    run(X, jnp.zeros((2, 8), int))
  assert run(X, Y).image.shape == X.shape


def test_other_bounds_are_respected():
  hounsfield = 1400 * X - 1000
  attack = attacks.pgd(10.0, num_steps=2, bounds=(-1000.0, 400.0))
  result = attack(KEY, lambda x: MODEL((x + 1000) / 1400), hounsfield, Y)
  moved = jnp.abs(result.image - hounsfield)
  assert 5 < moved.max() <= 10.001
  refuses(ValueError, r"outside the bounds \[0.0, 1.0\]", PGD, x=hounsfield)
  free = threats.linf(0.1)._replace(bounds=None)
  assert free.bounds is None
  inputs.check_batch(hounsfield, Y, free.bounds)


def test_a_rounding_of_the_callers_own_scaling_is_not_an_error():
  inputs.check_batch(jnp.array([[-1e-7, 1 + 1e-7]]), jnp.array([0]), (0.0, 1.0))
  with pytest.raises(ValueError, match=re.escape("outside the bounds")):
    inputs.check_batch(jnp.array([[-1e-3, 1.0]]), jnp.array([0]), (0.0, 1.0))
