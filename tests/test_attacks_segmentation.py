"""The attacks on masks: published vectors in float64, presets, options, volumes."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, engine, losses, masks, threats, transforms, types
from jaxadv.attacks import parts

KEY = jax.random.key(0)
# the published per-pixel model and data
IMAGE = np.array([[0.2, 0.6], [0.9, 0.4]])[None, ..., None]
TARGET = np.array([[1, 1], [0, 0]])[None]

# n, alpha, x after the step (row-major), IoU after it
ASMA = [
  (0.05, (0.25, 0.6, 0.85, 0.4), 1 / 3),
  (0.0833333333, (0.325, 0.6, 0.775, 0.4), 1 / 3),
  (0.0833333333, (0.3875, 0.6, 0.7125, 0.4), 1 / 3),
  (0.0833333333, (0.4395833333, 0.6, 0.6604166667, 0.4), 1 / 3),
  (0.0833333333, (0.4829861111, 0.6, 0.6170138889, 0.4), 1 / 3),
  (0.0833333333, (0.5191550926, 0.6, 0.5808449074, 0.4), 2 / 3),
  (0.1166666667, (0.4446855710, 0.6, 0.5386477623, 0.4), 1 / 3),
]


def walk(attack, predict=helpers.per_pixel, x=IMAGE, y=TARGET, steps=None):
  """States of an attack before the first and after every step."""
  x, y = jnp.asarray(x), jnp.asarray(y)
  state, target = attack.init(KEY, predict, x, y)
  states = [state]
  for _ in range(steps or attack.num_steps):
    state, _ = attack.step(predict, x, target, state)
    states.append(state)
  return states


def overlap(x, y=TARGET):
  decided = masks.decision(helpers.per_pixel(jnp.asarray(x)), jnp.asarray(y))
  return float(jax.vmap(lambda a, b: masks.iou(a, b, 2))(decided, jnp.asarray(y))[0])


def test_asma_step_by_step():
  with helpers.x64():
    states = walk(attacks.asma(tau=0.05, beta=0.1, num_steps=7))
    for n, (alpha, image, iou) in enumerate(ASMA):
      assert states[n].opt.multiplier[0] == pytest.approx(alpha, abs=1e-9)
      x = IMAGE + np.asarray(states[n + 1].delta)
      np.testing.assert_allclose(x.ravel(), image, rtol=0, atol=1e-9)
      assert overlap(x) == pytest.approx(iou, abs=1e-12)


def test_asma_oscillates_the_last_iterate_is_worse_than_the_best():
  with helpers.x64():
    run = functools.partial(attacks.asma, tau=0.05, beta=0.1, num_steps=7)
    data = KEY, helpers.per_pixel, jnp.asarray(IMAGE), jnp.asarray(TARGET)
    last, best = run()(*data), run(keep="smallest", threshold=0.6)(*data)
    assert overlap(last.image) == pytest.approx(1 / 3)
    assert overlap(best.image) == pytest.approx(2 / 3)
    assert best.success.item()
    assert not last.success.item()
    np.testing.assert_allclose(best.image.ravel(), ASMA[5][1], atol=1e-9)
    np.testing.assert_allclose(last.image.ravel(), ASMA[6][1], atol=1e-9)
    assert last.forwards.item() == 14
    assert last.backwards.item() == 7


def test_asma_measures_the_overlap_before_it_clips():
  """A pixel that only the unclipped point turns over still raises the multiplier."""

  def predict(x):  # class 1 iff x > 1.05: out of the range
    value = x[..., 0]
    return jnp.stack([1.05 - value, value - 1.05], -1)

  with helpers.x64():
    x = np.full((1, 1, 2, 1), 0.9)
    attack = attacks.asma(tau=0.2, beta=0.1, num_steps=2)
    states = walk(attack, predict, x, np.array([[[1, 0]]]))
    np.testing.assert_allclose(states[1].delta.ravel(), [0.1, 0], atol=1e-12)
    assert states[1].opt.multiplier[0] == pytest.approx(0.3, abs=1e-12)


def test_asma_reference_constants():
  for decided, alpha in (((0, 0), 1e-7), ((1, 0), 6e-7), ((1, 1), 1.1e-6)):
    sample = helpers.sample(np.eye(2)[list(decided)], [1, 1])
    rule = transforms.scale_by_mask_iou(1e-6, 1e-7)
    move, _ = rule.update(jnp.float32(-1), optax.EmptyState(), None, sample=sample)
    assert float(move) == pytest.approx(alpha, rel=1e-5)
  attack = attacks.asma()
  assert attack.num_steps == 2501
  assert not attack.can_stop


def test_masked_margin_with_normalised_steps():
  with helpers.x64():
    attack = engine.gradient_attack(
      parts.mask_objective(losses.mask_margin, 0.95),
      threats.box(),
      optax.chain(transforms.normalize(2), optax.scale_by_learning_rate(0.2)),
      num_steps=3,
      random_start=False,
    )
    result = attack(KEY, helpers.per_pixel, jnp.asarray(IMAGE), jnp.asarray(TARGET))
    want = (0.6242640687, 0.6, 0.4757359313, 0.4)
    np.testing.assert_allclose(result.image.ravel(), want, atol=1e-9)
    assert jnp.linalg.norm(result.delta.ravel()) == pytest.approx(0.6, abs=1e-9)
    assert result.success.item()


def test_dense_adversary_generation_is_a_chain_of_parts():
  """DAG (specs 9.6): Linf-normalised gradient of the active margins, step 0.12."""

  def largest(g, _):
    return g / jnp.maximum(jnp.abs(g).max(), 1e-30)

  def all_reached(sample):
    return types.overlap(sample) >= 1

  with helpers.x64():
    attack = engine.gradient_attack(
      parts.mask_objective(losses.mask_margin, 1.0),
      threats.box(),
      optax.chain(optax.stateless(largest), optax.scale_by_learning_rate(0.12)),
      num_steps=20,
      random_start=False,
      stop=all_reached,
    )
    want = [(0.32, 0.78), (0.44, 0.66), (0.56, 0.54), (0.56, 0.42), (0.56, 0.42)]
    for state, (first, third) in zip(walk(attack, steps=5)[1:], want, strict=True):
      x = (IMAGE + np.asarray(state.delta)).ravel()
      np.testing.assert_allclose(x, (first, 0.6, third, 0.4), atol=1e-9)
    result = attack(KEY, helpers.per_pixel, jnp.asarray(IMAGE), jnp.asarray(TARGET))
    assert result.steps.item() == 4
    assert jnp.abs(result.delta).max() == pytest.approx(0.48, abs=1e-9)
    assert jnp.linalg.norm(result.delta.ravel()) == pytest.approx(0.6, abs=1e-9)


def test_msa_literal_takes_the_published_step():
  weights = np.array([[1.0, 2.0], [0.0, 1.0]])

  def predict(x):  # one "pixel" per image: logits (B, 1, 2), features (B, 2)
    f = x.reshape(len(x), 2) @ weights.T
    logits = jnp.stack([jnp.zeros(len(x)), f[:, 0] - f[:, 1]], -1)
    return logits[:, None], {"scale": f}

  with helpers.x64():
    x, guide = jnp.array([[[0.5, 0.25]]]), jnp.array([[[0.1, 0.9]]])
    far = 0.1 / np.sqrt(2)  # L2 0.1 over two values; IoU is 1 at x already
    attack = attacks.msa_literal(num_steps=1, omega=0.2, far=far, near=far)
    y = {"label": jnp.array([[1]]), "image": guide}
    states = walk_mapping(attack, predict, x, y)
    got = (x + states[1].delta).ravel()
    np.testing.assert_allclose(got, [0.5655191633, 0.3255462722], atol=1e-9)


def walk_mapping(attack, predict, x, y):
  state, target = attack.init(KEY, predict, x, y)
  return [state, attack.step(predict, x, target, state)[0]]


def test_pgd_seg_pgd_and_cos_pgd_take_the_published_step():
  want = (0.21, 0.61, 0.89, 0.39)
  options = {"num_steps": 1, "targeted": True, "random_start": False}
  for attack in (
    attacks.pgd(0.1, step_size=0.01, **options),
    attacks.cos_pgd(0.1, step_size=0.01, **options),
  ):
    with helpers.x64():
      x = IMAGE + np.asarray(walk(attack)[1].delta)
      np.testing.assert_allclose(x.ravel(), want, rtol=0, atol=1e-12)
  with helpers.x64():
    # the first step of SegPGD (lambda 0) moves only the pixels not at their target
    x = IMAGE + np.asarray(walk(attacks.seg_pgd(0.1, **options))[1].delta)
    np.testing.assert_allclose(x.ravel(), (0.21, 0.6, 0.89, 0.4), rtol=0, atol=1e-12)


DENSE = helpers.convnet(classes=2, dense=True)


def pair(n=4, shape=(8, 8)):
  x = helpers.stripes(n, shape)
  own = jnp.argmax(DENSE(x)[0], -1)
  turned = np.random.default_rng(3).random(own.shape) < 0.2
  return x, {"label": jnp.where(turned, 1 - own, own), "image": jnp.roll(x, 1, 0)}


@pytest.mark.parametrize(
  "attack",
  [
    attacks.msa_literal(num_steps=5, far=0.02, eps=0.03),
    attacks.msa_literal(num_steps=5, far=0.02, taps=("bottleneck",)),
    attacks.msa(num_steps=60, taps=("hidden",), bits=None),
    attacks.mafl(num_steps=60, similarity="pair", low_band="haar"),
    attacks.mafl(num_steps=60, similarity="tgt", feature="hidden"),
    attacks.mafl_literal(num_steps=5, scale=0.03, constraint="project", low_band="fft"),
    attacks.mafl_literal(num_steps=5, scale=0.03, margin=True, similarity="src"),
    attacks.asma_calibrated(num_steps=5, scale=0.01, margin=True, bits=8),
  ],
)
def test_options_lower_the_cross_entropy_to_the_target(attack):
  x, y = pair()
  result = jax.jit(lambda x, y: attack(KEY, DENSE, x, y))(x, y)

  def distance(image):
    logits = DENSE(image)[0]
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, y["label"])
    return float(ce.mean())

  assert distance(result.image) < 0.99 * distance(x)
  assert ((result.image >= 0) & (result.image <= 1)).all()


@pytest.mark.parametrize(
  "attack",
  [
    attacks.msa(num_steps=3),
    attacks.msa_literal(num_steps=3),
    attacks.mafl(num_steps=3),
    attacks.mafl_literal(num_steps=3, scale=0.01),
    attacks.mafl_linf(0.1, num_steps=3),
  ],
)
def test_a_mask_alone_is_enough(attack):
  x, y = pair()
  result = jax.jit(lambda x, y: attack(KEY, DENSE, x, y))(x, y["label"])
  assert jnp.abs(result.delta).max() > 0
  assert np.isfinite(result.losses).all()


def test_msa_literal_stays_in_the_ball_it_is_given():
  x, y = pair()
  free = attacks.msa_literal(num_steps=5, far=0.02)(KEY, DENSE, x, y)
  bound = attacks.msa_literal(num_steps=5, far=0.02, eps=0.02)(KEY, DENSE, x, y)
  assert jnp.abs(bound.image - x).max() <= 0.02 + 1e-6
  assert jnp.abs(free.image - x).max() > 0.04


def test_projected_mafl_has_no_low_band():
  x, y = pair()
  options = {"num_steps": 4, "scale": 0.01, "gain": 0.0, "low_band": "fft"}

  def share(**more):
    attack = attacks.mafl_literal(**options, **more)
    delta = attack(KEY, DENSE, x, y).delta
    low = jax.vmap(lambda d: transforms.low_pass(0.25).update(d, None)[0])(delta)
    return float(jnp.square(low).sum() / jnp.square(delta).sum())

  assert share(constraint="project") < 1e-6
  assert share(penalty=0.0) > 0.05


def test_ignored_pixels_do_not_steer_an_attack():
  x, y = pair()
  valid = jnp.ones_like(y["label"], bool).at[:, :3].set(False)
  attack = attacks.asma_calibrated(num_steps=4, scale=0.01)
  runs = [
    attack(KEY, DENSE, x, {"label": jnp.where(valid, y["label"], fill), "mask": valid})
    for fill in (0, 1)
  ]
  np.testing.assert_array_equal(runs[0].image, runs[1].image)
  np.testing.assert_array_equal(runs[0].success, runs[1].success)
  unmasked = [
    attack(KEY, DENSE, x, jnp.where(valid, y["label"], fill)) for fill in (0, 1)
  ]
  assert jnp.abs(unmasked[0].image - unmasked[1].image).max() > 1e-3


@pytest.mark.parametrize("shape", [(8, 8), (3, 6, 6)])
def test_attacks_on_classes_attack_masks_and_volumes_as_they_are(shape):
  x = helpers.stripes(3, shape)
  y = jnp.argmax(DENSE(x)[0], -1)
  before = (jnp.argmax(DENSE(x)[0], -1) == y).mean()
  for attack in (
    attacks.fgsm(0.2),
    attacks.mi_fgsm(0.2, num_steps=4),
    attacks.pgd(0.2, num_steps=4),
    attacks.pgd(2.0, norm="l2", num_steps=4),
    attacks.apgd(0.2, num_steps=6),
    attacks.apgd(0.2, num_steps=6, loss=losses.dlr),
    attacks.seg_pgd(0.2, step_size=0.1, num_steps=4),
    attacks.cos_pgd(0.2, step_size=0.1, num_steps=4),
  ):
    result = jax.jit(lambda x, y, attack=attack: attack(KEY, DENSE, x, y))(x, y)
    after = (jnp.argmax(result.logits, -1) == y).mean()
    assert after < before - 0.2
    assert result.image.shape == x.shape


def test_a_label_set_is_attacked_by_the_same_functions():
  rng = np.random.default_rng(0)
  model = helpers.linear(rng.normal(size=(128, 5)).astype(np.float32))
  x = helpers.stripes(6)
  y = (model(x) > 0).astype(jnp.int32)
  attack = attacks.pgd(0.1, num_steps=5, loss=losses.binary_cross_entropy)
  result = attack(KEY, model, x, y)
  assert result.success.all()
  wish = 1 - y
  wanted = attacks.pgd(
    0.3, num_steps=20, loss=losses.binary_cross_entropy, targeted=True
  )(KEY, model, x, wish)
  assert wanted.success.mean() > 0.5
  np.testing.assert_array_equal(wanted.success, ((wanted.logits > 0) == wish).all(-1))
