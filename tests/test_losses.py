"""Losses against the published vectors, computed by hand or in NumPy, in float64."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.spatial.distance
import scipy.special

from jaxadv import filters, losses, types

TIGHT = {"rtol": 0, "atol": 1e-9}

# the published per-pixel model and data: z = (0.5 - x, x - 0.5)
IMAGE = np.array([[0.2, 0.6], [0.9, 0.4]])[..., None]
TARGET = np.array([[1, 1], [0, 0]])


@pytest.fixture(autouse=True)
def float64():
  with helpers.x64():
    yield


def pixels(x=IMAGE, *, clean=IMAGE, **target):
  x = jnp.asarray(x)
  label = target.pop("label", TARGET)
  progress = target.pop("progress", 0.0)
  return helpers.sample(
    helpers.per_pixel(x), label, clean=clean, image=x, progress=progress, target=target
  )


def gradient(loss, **options):
  return jax.grad(lambda x: loss(pixels(x, **options)))(jnp.asarray(IMAGE))[..., 0]


def test_cross_entropy_and_its_gradient():
  values = [1.03748795, 0.59813887, 1.17110067, 0.59813887]
  assert losses.cross_entropy(pixels()) == pytest.approx(np.mean(values), abs=1e-8)
  want = np.array([[-1.29131261, -0.90033201], [1.37994896, 0.90033201]])
  np.testing.assert_allclose(4 * gradient(losses.cross_entropy), want, atol=1e-8)


@pytest.mark.parametrize(("late", "want"), [(0, 0.5521471542), (0.2, 0.5015316102)])
def test_seg_pgd_targeted(late, want):
  sample = pixels(progress=2 * late)
  assert losses.seg_pgd(sample, targeted=True) == pytest.approx(want, abs=1e-9)


def test_seg_pgd_weights_shift_from_correct_to_wrong():
  late = [float(t / 5) / 2 for t in range(5)]
  assert late == [0, 0.1, 0.2, 0.3, 0.4]
  values = np.array([1.0374879504858856, 0.598138869381592])
  label = np.array([1, 1])  # decided 0 and 1: wrong, correct
  for share in late:
    sample = helpers.sample(
      helpers.per_pixel(jnp.asarray(IMAGE[:1])), label[None], progress=2 * share
    )
    want = (share * values[0] + (1 - share) * values[1]) / 2
    assert losses.seg_pgd(sample) == pytest.approx(want, abs=1e-9)


def test_cos_pgd_targeted_and_its_detached_weight():
  assert losses.cos_pgd(pixels(), targeted=True) == pytest.approx(
    0.3750276255, abs=1e-9
  )
  weights = np.array([[0.51888129, 0.22625091], [0.59014440, 0.22625091]])
  slopes = np.array([[-1.29131261, -0.90033201], [1.37994896, 0.90033201]])
  got = gradient(functools.partial(losses.cos_pgd, targeted=True))
  np.testing.assert_allclose(got, weights * slopes / 4, atol=1e-8)


@pytest.mark.parametrize(("label", "want"), [(0, 0.9385078998), (1, 0.3452577617)])
def test_cos_pgd_untargeted_weight(label, want):
  sample = helpers.sample([1.0, 0.0], label)
  weight = losses.cos_pgd(sample) / losses.cross_entropy(sample)
  assert weight == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(("label", "want"), [(0, 0.1036962742), (1, 0.3654317941)])
def test_jensen_shannon(label, want):
  sample = helpers.sample([1.0, 0.0], label)
  assert losses.jensen_shannon(sample) == pytest.approx(want, abs=1e-9)
  p = scipy.special.softmax([1.0, 0.0])
  independent = scipy.spatial.distance.jensenshannon(p, np.eye(2)[label]) ** 2
  assert losses.jensen_shannon(sample) == pytest.approx(independent, abs=1e-9)


def test_jensen_shannon_has_a_finite_gradient_at_certainty():
  def loss(z):
    return losses.jensen_shannon(helpers.sample(z, 0))

  for z in ([800.0, -800.0], [-800.0, 800.0]):
    assert np.isfinite(jax.grad(loss)(jnp.array(z))).all()
  assert loss(jnp.array([-800.0, 800.0])) == pytest.approx(np.log(2), abs=1e-9)


def test_masked_cross_entropy_forgets_pixels_that_are_wrong():
  # of the four pixels the second and fourth are at the label
  want = 2 * 0.5981388693815919 / 4
  assert losses.masked_cross_entropy(pixels()) == pytest.approx(want, abs=1e-9)
  assert losses.masked_cross_entropy(helpers.sample([1.0, 0.0], 1)) == 0


def test_dlr():
  z = [3.0, 1.0, 0.5, -2.0]
  assert losses.dlr(helpers.sample(z, 0)) == pytest.approx(-0.8, abs=1e-9)
  assert losses.dlr(helpers.sample(z, 1)) == pytest.approx(0.8, abs=1e-9)
  scaled = helpers.sample(7 * np.array(z), 0)
  assert losses.dlr(scaled) == pytest.approx(-0.8, abs=1e-9)
  targeted = helpers.sample(
    z, 1, target={"logits": jnp.array(z)}
  )  # y = 0 is the clean decision
  assert losses.dlr_targeted(targeted) == pytest.approx(-0.5333333333, abs=1e-9)


def test_dlr_names_what_it_needs():
  with pytest.raises(ValueError, match=r"dlr needs 3 classes, got 2.*clean_logits"):
    losses.dlr(helpers.sample([1.0, 0.0], 0))
  with pytest.raises(ValueError, match=r"needs 4 classes, got 3; use negate\(dlr\)"):
    losses.dlr_targeted(helpers.sample([1.0, 0.0, 2.0], 0))


def test_asma_objective_and_its_gradient():
  sample = pixels()
  # pixels 0 and 2 are not at their target: z_1 = -0.3 and z_0 = -0.4
  assert losses.mask_logits(sample) == pytest.approx(-0.7, abs=1e-9)
  np.testing.assert_allclose(gradient(losses.mask_logits), [[1, 0], [-1, 0]], **TIGHT)
  assert losses.mask_margin(sample) == pytest.approx(-1.4, abs=1e-9)
  np.testing.assert_allclose(gradient(losses.mask_margin), [[2, 0], [-2, 0]], **TIGHT)
  assert losses.margin(sample) == pytest.approx((0.6 - 0.2 + 0.8 - 0.2) / 4, abs=1e-9)


def test_ignored_pixels_touch_neither_loss_nor_gradient():
  mask = np.array([[True, False], [True, True]])
  label = np.where(mask, TARGET, 255)
  for loss in (
    losses.cross_entropy,
    losses.masked_cross_entropy,
    losses.jensen_shannon,
    losses.margin,
    losses.mask_logits,
    losses.mask_margin,
    losses.active_margin,
    losses.seg_pgd,
    losses.cos_pgd,
  ):
    same = loss(pixels(label=label, mask=mask))
    assert same == pytest.approx(float(loss(pixels(mask=mask))), abs=1e-12)
    slope = gradient(loss, label=label, mask=mask)
    assert slope[0, 1] == 0
    assert np.isfinite(slope).all()
  three = np.array([1.0374879504858856, 1.171100665948777, 0.598138869381592])
  got = losses.cross_entropy(pixels(label=label, mask=mask))
  assert got == pytest.approx(three.mean(), abs=1e-9)


def test_active_margin_is_the_mean_over_the_wrong_pixels():
  # margins z_y - z_other: -0.6, 0.2, -0.8, 0.2
  assert losses.active_margin(pixels()) == pytest.approx(-0.7, abs=1e-9)
  slope = gradient(losses.active_margin)
  np.testing.assert_allclose(slope, [[1, 0], [-1, 0]], **TIGHT)
  done = helpers.sample(10 * np.eye(2)[TARGET], TARGET)
  assert losses.active_margin(done) == 0


def test_multi_scale_vector_of_msa():
  weights = jnp.array([[1.0, 2.0], [0.0, 1.0]])
  x, guide = jnp.array([0.5, 0.25]), jnp.array([0.1, 0.9])

  def sample(x):
    f = weights @ x
    target = {"features": {"scale": weights @ guide}}
    logits = jnp.stack([jnp.zeros(()), f[0] - f[1]])
    return helpers.sample(logits, 1, image=x, features={"scale": f}, target=target)

  distance = losses.feature_distance("scale")
  assert distance(sample(x)) == pytest.approx(0.61625, abs=1e-9)
  np.testing.assert_allclose(
    jax.grad(lambda x: distance(sample(x)))(x), [-0.9, -2.45], **TIGHT
  )
  got = jax.grad(lambda x: losses.cross_entropy(sample(x)))(x)
  np.testing.assert_allclose(got, [-0.320821300825] * 2, atol=1e-11)


@pytest.mark.parametrize(("feature", "want"), [((3.0, 4.0), 0.0), ((4.0, 3.0), 0.12)])
def test_ssah_similarity(feature, want):
  source, target = {"f": jnp.array([1.0, 0.0])}, {"f": jnp.array([0.0, 1.0])}

  sample = helpers.sample(
    [0.0],
    0,
    features={"f": jnp.array(feature)},
    target={"clean_features": source, "features": target},
  )

  def of(kind):
    return float(losses.feature_similarity("f", kind)(sample))

  s, t = feature[0] / 5, feature[1] / 5
  assert of("ssah") == pytest.approx(want, abs=1e-9)
  assert of("src") == pytest.approx(s, abs=1e-9)
  assert of("tgt") == pytest.approx(-t, abs=1e-9)
  assert of("pair") == pytest.approx(s - t, abs=1e-9)


def test_gradient_of_the_cosine():
  def cosine(f):
    target = {"features": {"f": jnp.array([0.0, 1.0])}}
    sample = helpers.sample([0.0], 0, features={"f": f}, target=target)
    return losses.feature_cosine("f")(sample)

  np.testing.assert_allclose(
    jax.grad(cosine)(jnp.array([3.0, 4.0])), [-0.096, 0.072], **TIGHT
  )
  assert np.isfinite(jax.grad(cosine)(jnp.zeros(2))).all()


def test_ssah_gradient_leaves_the_weights_alone():
  def loss(f):
    clean, guide = {"f": jnp.array([1.0, 0.0])}, {"f": jnp.array([0.0, 1.0])}
    target = {"clean_features": clean, "features": guide}
    sample = helpers.sample([0.0], 0, features={"f": f}, target=target)
    return losses.feature_similarity("f")(sample)

  def by_hand(f):  # weights 0.6 and 0.6 at (4, 3)
    size = jnp.sqrt(jnp.square(f).sum())
    return 0.6 * f[0] / size - 0.6 * f[1] / size

  f = jnp.array([4.0, 3.0])
  np.testing.assert_allclose(jax.grad(loss)(f), jax.grad(by_hand)(f), **TIGHT)


FOURIER = functools.partial(filters.low_pass, cutoff=0.25)


@pytest.mark.parametrize(
  ("loss", "project"),
  [
    (losses.low_frequency_energy(0.25), FOURIER),
    (losses.band_energy(filters.haar_low_pass), filters.haar_low_pass),
  ],
  ids=["fourier", "haar"],
)
def test_low_frequency_energy_and_its_analytic_gradient(loss, project):
  delta = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 2)))

  def energy(d):
    return loss(helpers.sample([0.0], 0, clean=jnp.zeros_like(d), image=d))

  want = jnp.square(project(delta)).sum()
  np.testing.assert_allclose(energy(delta), want, rtol=1e-12)
  np.testing.assert_allclose(jax.grad(energy)(delta), 2 * project(delta), **TIGHT)
  automatic = jax.grad(lambda d: jnp.square(project(d)).sum())(delta)
  np.testing.assert_allclose(jax.grad(energy)(delta), automatic, **TIGHT)


def test_kl_against_scipy():
  z, q = np.array([[0.3, -1.0, 2.0]]), np.array([[1.0, 0.2, -0.4]])
  p, truth = scipy.special.softmax(z), scipy.special.softmax(q)
  want = scipy.special.rel_entr(truth, p).sum()
  sample = helpers.sample(z, [0], target={"logits": jnp.asarray(q)})
  assert losses.kl_to_target(sample) == pytest.approx(want, abs=1e-9)


def test_label_sets():
  z, y = jnp.array([2.0, -1.0, 0.3]), jnp.array([1, 0, 1])

  def loss(z):
    return losses.binary_cross_entropy(helpers.sample(z, y))

  want = optax.sigmoid_binary_cross_entropy(z, y).mean()
  assert loss(z) == pytest.approx(float(want), abs=1e-12)
  slopes = [-0.1192029, 0.2689414, -0.4255575]
  np.testing.assert_allclose(3 * jax.grad(loss)(z), slopes, atol=1e-7)


def test_wrappers():
  sample = helpers.sample([1.0, 0.0], 0)
  fooled = helpers.sample([1.0, 0.0], 1)
  ce = losses.cross_entropy
  assert losses.negate(ce)(sample) == -ce(sample)
  assert losses.cap(ce, 0.1)(sample) == pytest.approx(0.1)
  assert losses.cap(ce, 10.0)(sample) == ce(sample)
  assert losses.until_fooled(ce)(sample) == ce(sample)
  assert losses.until_fooled(ce)(fooled) == 0

  def at(z):
    return losses.cap(ce, 0.1)(helpers.sample(z, 0))

  assert not jax.grad(at)(jnp.array([1.0, 0.0])).any()
  moved = helpers.sample([0.0], 0, clean=np.zeros(3), image=np.array([0.1, 0.2, -0.2]))
  assert losses.squared_l2(moved) == pytest.approx(0.09, abs=1e-12)


def test_half_precision_logits_are_computed_in_full():
  z = jnp.array([4.0, 0.0078125], jnp.bfloat16)
  got = losses.cross_entropy(helpers.sample(z, 1))
  assert got.dtype == jnp.float64
  want = np.logaddexp(4.0, 0.0078125) - 0.0078125
  assert got == pytest.approx(want, abs=1e-12)


def test_a_wrong_name_is_refused_with_the_names_there_are():
  sample = helpers.sample([0.0], 0, features={"enc1": jnp.ones(2), "dec1": jnp.ones(2)})
  with pytest.raises(ValueError, match=r"no feature 'bottleneck'; it has dec1, enc1"):
    losses.feature_distance("bottleneck")(sample)
  with pytest.raises(ValueError, match=r"no 'features'.*targets.guide_features"):
    losses.feature_distance("enc1")(sample)
  with pytest.raises(ValueError, match=r"none: predict returns logits only"):
    losses.feature_cosine("enc1")(helpers.sample([0.0], 0))
  with pytest.raises(ValueError, match=r"'both'; write one of ssah, src, tgt, pair"):
    losses.feature_similarity("enc1", "both")


@pytest.mark.parametrize("lead", [1.0, 17.0, 20.0, 60.0])
@pytest.mark.parametrize(
  "loss", [losses.cross_entropy, losses.masked_cross_entropy, losses.task_loss]
)
def test_two_classes_pull_against_each_other_however_sure_the_model_is(loss, lead):
  """In float32; where `p_y` rounds to 1, the label's own entry must not be lost."""

  def one(z):
    return loss(losses._example(z, 0))

  with jax.enable_x64(False):
    gradient = jax.grad(one)(jnp.array([lead, 0.0], jnp.float32))
  want = scipy.special.expit(-lead)
  np.testing.assert_allclose(gradient, [-want, want], rtol=1e-6)
  assert gradient[0] == -gradient[1]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, bool])
def test_label_sets_of_any_integers_and_bits(dtype):
  twin = {"smoothed_logits": jnp.array([0.5, -0.5])}

  def sample(label):
    return losses._example([2.0, -1.0], label)._replace(features=twin)

  got, want = sample(np.array([1, 0], dtype)), sample(np.array([1, 0], int))
  for loss in (
    losses.label_margin,
    losses.binary_cross_entropy,
    functools.partial(losses.smoothed_agreement, targeted=True),
  ):
    np.testing.assert_allclose(loss(got), loss(want), **TIGHT)
  assert losses.label_margin(got) == -1.5


@pytest.mark.parametrize("mask", [[True, False], np.array([1, 0], np.uint8)])
def test_labels_that_do_not_count_end_no_loss(mask):
  unknown = losses._example([2.0, -1.0], [1, 1])
  unknown.target["mask"] = jnp.asarray(mask)
  loss = losses.binary_cross_entropy
  assert losses.until_fooled(loss)(unknown) == loss(unknown) > 0
  assert losses.until_reached(loss)(unknown) == 0
  assert types.reached(unknown)
  assert not types.fooled(unknown)
  known = losses._example([2.0, -1.0], [1, 1])
  assert types.fooled(known)
  assert not types.reached(known)
  assert losses.until_fooled(loss)(known) == 0
  assert losses.until_reached(loss)(known) == loss(known)


def test_a_loss_of_another_task_is_refused():
  classes, labels = helpers.sample(jnp.zeros(3), 0), helpers.sample(jnp.zeros(3), Z3)
  with pytest.raises(ValueError, match="label_ranking is a loss of label sets"):
    losses.label_ranking(classes)
  for loss in (losses.jensen_shannon, losses.cross_entropy, losses.seg_pgd):
    with pytest.raises(ValueError, match="this loss is one of classes"):
      loss(labels)


Z3 = jnp.zeros(3, int)


def test_the_order_of_the_findings():
  """Above 0 where an absent finding stands above a present one."""
  rank = lambda z, y, **target: losses.label_ranking(
    helpers.sample(jnp.array(z), jnp.array(y), target=target), slack=2.0
  )
  assert rank([3.0, -1.0, 1.0], [1, 0, 0]) == -2.0
  assert rank([0.5, -1.0, 1.0], [1, 0, 0]) == 0.5
  assert rank([0.5, -1.0, 9.0], [1, 0, 0]) == 2.0
  assert rank([0.5, -1.0, 9.0], [1, 0, 0], mask=jnp.array([True, True, False])) == -1.5
  assert rank([0.5, -1.0], [1, 1]) == 0.0
