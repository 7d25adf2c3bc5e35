"""SMIA: the vectors of the specification in float64, and what each weight must do."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, filters, forwards, losses, stability

KEY = jax.random.key(0)
WEIGHTS = (0.0, 0.25, 0.5, 1.0)
# sigma of the 3 taps (1/4, 1/2, 1/4)
BINOMIAL = 1 / np.sqrt(2 * np.log(2))

THREE = helpers.linear(
  np.array([(-1.0, 1, 3), (3, 0, -3), (-1, 2, 2)]).T, np.array([[1.0, 0, -1]])
)
TWO = helpers.linear(
  np.array([(0.6, -0.4, 0.2), (-0.5, 0.3, 0.7)]).T, np.array([[0.1, -0.1]])
)
X3 = np.array([0.2, 0.6, 0.3])[None, :, None]
X2 = np.array([0.5, 0.2, 0.4])[None, :, None]
ZERO = np.array([0])


@pytest.fixture(autouse=True)
def float64():
  with helpers.x64():
    yield


def walk(attack, predict, x, y=ZERO):
  """Images before each step and after the last, losses, and the gradients followed."""
  watched = jax.jit(lambda x, y: stability.watch(attack)(KEY, predict, x, y))
  result, path = watched(jnp.asarray(x), jnp.asarray(y))
  images = np.concatenate([x + path.delta[0], result.image])
  flat = lambda values: np.asarray(values).reshape(len(values), -1)
  return flat(images), np.asarray(result.losses[:, 0]), flat(path.gradient[0])


three = functools.partial(attacks.smia, 0.3, step_size=0.1, num_steps=3, sigma=BINOMIAL)
two = functools.partial(attacks.smia, 0.15, step_size=0.05, num_steps=4, sigma=BINOMIAL)


def test_vector_1_the_kernel_is_centred():
  taps = filters.gaussian_kernel(1.0, 3)
  np.testing.assert_allclose(taps, [0.2740686, 0.4518628, 0.2740686], atol=5e-8)
  # that of the released code is one half of a wider kernel
  half = filters.gaussian_kernel(1.0, 5)[2:]
  released = half / half.sum()
  np.testing.assert_allclose(released, [0.5740970, 0.3482074, 0.0776956], atol=5e-8)
  impulse = jnp.zeros((1, 5, 5, 1)).at[0, 2, 2].set(1.0)
  seen = twin(impulse, jnp.zeros_like(impulse))
  np.testing.assert_allclose(seen[0, 1:4, 1:4, 0], np.outer(taps, taps), atol=1e-12)
  assert seen.sum() == pytest.approx(1, abs=1e-12)


SLOPES = {
  0.0: [
    (0.23635995, 0.08624793, -0.49987783),
    (0.51979441, 0.02877098, -0.9384112),
    (1.04382184, -0.10267797, -1.72401024),
  ],
  1.0: [
    (0.23635995, 0.08624793, -0.49987783),
    (0.33892147, 0.06584656, -0.65895913),
    (0.47998044, 0.03408166, -0.87404744),
  ],
}
ENDS = {
  0.0: ((0.5, 0.7, 0), (0.38133145, 0.51474361, 0.10392494)),
  1.0: ((0.5, 0.9, 0), (0.41016521, 0.45330266, 0.13653214)),
}


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_vector_2_three_classes_part_from_pgd(weight):
  images, _, slopes = walk(three(weight=weight), THREE, X3)
  path = [(0.2, 0.6, 0.3), (0.3, 0.7, 0.2), (0.4, 0.8, 0.1), ENDS[weight][0]]
  np.testing.assert_allclose(images, path, rtol=0, atol=1e-9)
  np.testing.assert_allclose(slopes, SLOPES[weight], rtol=0, atol=5e-9)
  p = jax.nn.softmax(THREE(images[-1:]))[0]
  np.testing.assert_allclose(p, ENDS[weight][1], rtol=0, atol=5e-9)


def test_vector_2_prediction_and_reference_before_the_last_step():
  image = jnp.array([0.4, 0.8, 0.1])[None, :, None]
  forward = forwards.smoothed_twin(BINOMIAL)
  logits, features = forward(THREE, None, image, jnp.asarray(X3))
  p, q = jax.nn.softmax(logits)[0], jax.nn.softmax(features["smoothed_logits"])[0]
  np.testing.assert_allclose(p, [0.58076705, 0.26095546, 0.15827749], atol=5e-9)
  np.testing.assert_allclose(q, [0.72592812, 0.11999511, 0.15407677], atol=5e-9)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_vector_3_two_classes_follow_pgd(weight):
  images, values, _ = walk(two(weight=weight), TWO, X2)
  path = [(0.5, 0.2, 0.4), (0.45, 0.25, 0.45), (0.4, 0.3, 0.5)] + [
    (0.35, 0.35, 0.55)
  ] * 2
  np.testing.assert_allclose(images, path, rtol=0, atol=1e-9)
  p = jax.nn.softmax(TWO(images[-1:]))[0, 0]
  assert p == pytest.approx(0.5162442811, abs=1e-10)
  if weight == 1:
    assert values[0] == pytest.approx(-0.1635539697, abs=1e-10)


def test_vector_4_the_hard_reference_has_a_dead_zone():
  images, values, slopes = walk(two(weight=1.0, reference="hard"), TWO, X2)
  path = [(0.5, 0.2, 0.4)] + [(0.45, 0.25, 0.45)] * 4
  np.testing.assert_allclose(images, path, rtol=0, atol=1e-9)
  assert values[0] > 0
  np.testing.assert_array_equal(values[1:], 0)
  np.testing.assert_array_equal(slopes[1:], 0)
  # soft, it moves on; at a smaller weight the hard one is PGD
  soft, _, _ = walk(two(weight=1.0), TWO, X2)
  np.testing.assert_allclose(soft[2], [0.4, 0.3, 0.5], rtol=0, atol=1e-9)
  half, _, slopes = walk(two(weight=0.5, reference="hard"), TWO, X2)
  _, _, pgd = walk(two(weight=0.0), TWO, X2)
  np.testing.assert_allclose(half, soft, rtol=0, atol=1e-9)
  np.testing.assert_allclose(slopes[1:], pgd[1:] / 2, rtol=0, atol=1e-9)


def test_vector_5_the_gradient_in_the_logits():
  def objective(z):
    twin = {"smoothed_logits": jnp.array([0.1, 0.4, 0.2])}
    return losses.smoothed_agreement(helpers.sample(z, 1, features=twin), weight=0.7)

  got = jax.grad(objective)(jnp.array([0.3, -0.2, 0.9]))
  np.testing.assert_allclose(got, [0.29010119, -0.67344409, 0.38334291], atol=5e-9)


def twin(image, clean, **options):
  """The image on which the reference is taken."""
  echo = lambda x: x
  forward = forwards.smoothed_twin(**options)
  return forward(echo, None, image, clean)[1]["smoothed_logits"]


def network(classes, seed=0):
  """A small network that is not linear, and images for it."""
  rng = np.random.default_rng(seed)
  first, second = rng.normal(size=(12, 16)), rng.normal(size=(16, classes))

  def predict(x):
    return jnp.tanh((x.reshape(len(x), -1) - 0.5) @ first) @ second

  x = jnp.asarray(rng.uniform(0.1, 0.9, (40, 4, 3, 1)))
  return predict, x, jnp.argmax(predict(x), -1)


def run(attack, predict, x, y):
  return jax.jit(lambda x, y: attack(KEY, predict, x, y))(x, y)


def attacked(predict, x, y, **options):
  attack = attacks.smia(0.1, step_size=0.02, num_steps=12, **options)
  return run(attack, predict, x, y)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_weight_0_is_pgd_bit_for_bit(random_start, targeted):
  predict, x, y = network(4)
  options = {"random_start": random_start, "targeted": targeted}
  got = attacked(predict, x, y, weight=0.0, **options)
  pgd = run(attacks.pgd(0.1, step_size=0.02, num_steps=12, **options), predict, x, y)
  for name in ("image", "delta", "logits", "success", "score", "losses"):
    np.testing.assert_array_equal(getattr(got, name), getattr(pgd, name), name)
  np.testing.assert_array_equal(got.backwards, pgd.backwards)
  np.testing.assert_array_equal(got.forwards, 2 * pgd.forwards)


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0])
def test_two_classes_go_where_pgd_goes_and_more_do_not(weight):
  def gap(classes):
    data = network(classes)
    got, pgd = (attacked(*data, weight=w).image for w in (weight, 0.0))
    return jnp.abs(got - pgd).max()

  assert gap(2) == 0
  assert gap(5) > 0.03


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_two_classes_follow_pgd_in_float32_too_however_sure_the_model_is(weight):
  """Margins up to 60; from 17 on the probability of the label rounds to 1."""
  rng = np.random.default_rng(0)
  with jax.enable_x64(False):
    weights = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
    x = jnp.asarray(rng.uniform(size=(64, 6, 1)), jnp.float32)
    predict = lambda image: 50 * image[..., 0] @ weights
    y = jnp.argmax(predict(x), -1)
    sizes = jnp.abs(jnp.diff(predict(x)))
    assert sizes.max() > 40
    options = {"step_size": 0.01, "random_start": False, "num_steps": 8}
    pgd = attacks.pgd(0.05, **options)(KEY, predict, x, y).image
    smia = attacks.smia(0.05, weight=weight, **options)(KEY, predict, x, y).image
    margins = attacks.pgd(0.05, loss=losses.margin, **options)(KEY, predict, x, y).image
  np.testing.assert_array_equal(smia, pgd)
  np.testing.assert_array_equal(margins, pgd)


def test_the_first_step_from_the_clean_image_is_that_of_pgd():
  predict, x, y = network(5)

  def slopes(weight, steps, **options):
    attack = attacks.smia(0.3, num_steps=steps, weight=weight, **options)
    return walk(attack, predict, x[:1], y[:1])[2]

  got, pgd = slopes(1.0, 2), slopes(0.0, 2)
  np.testing.assert_allclose(got[0], pgd[0], rtol=0, atol=1e-12)
  assert np.abs(got[1] - pgd[1]).max() > 1e-3
  # with a random start, or the image smoothed, there is a twin from the beginning
  for options in ({"random_start": True}, {"smooth": "image"}):
    got, pgd = (slopes(w, 1, **options) for w in (1.0, 0.0))
    assert np.abs(got - pgd).max() > 1e-3


def test_weight_1_drops_the_moving_prediction():
  """The gradient in the logits is `q - Y`, whatever `p`; for label sets likewise."""
  rng = np.random.default_rng(3)
  twin = {"smoothed_logits": jnp.asarray(rng.normal(size=4))}

  def slope(z, y, weight):
    def objective(z):
      sample = helpers.sample(z, y, features=twin)
      return losses.smoothed_agreement(sample, weight=weight)

    return jax.grad(objective)(z)

  classes, labels = jax.nn.softmax, jax.nn.sigmoid
  for z in jnp.asarray(rng.normal(size=(3, 4))):
    want = classes(twin["smoothed_logits"]) - np.eye(4)[2]
    np.testing.assert_allclose(slope(z, 2, 1.0), want, atol=1e-12)
    assert np.abs(slope(z, 2, 0.5) - want).max() > 1e-3
    y = np.array([1, 0, 0, 1])
    q, p = labels(twin["smoothed_logits"]), labels(z)
    np.testing.assert_allclose(4 * slope(z, y, 1.0), q - y, atol=1e-12)
    mixed = 0.3 * p + 0.7 * q - y
    np.testing.assert_allclose(4 * slope(z, y, 0.7), mixed, atol=1e-12)


@pytest.mark.parametrize("targeted", [False, True])
def test_the_loss_is_that_of_the_formula_and_its_reference_a_constant(targeted):
  predict, x, y = network(3)
  image = x[:1] + 0.05 * jnp.sign(jnp.sin(100 * x[:1]))
  forward = forwards.smoothed_twin()

  def loss(image, y, **options):
    logits, features = forward(predict, None, image, x[:1])
    feature = {"smoothed_logits": features["smoothed_logits"][0]}
    sample = helpers.sample(logits[0], y, features=feature, progress=0.5)
    return losses.smoothed_agreement(sample, weight=0.3, targeted=targeted, **options)

  reference = forward(predict, None, image, x[:1])[1]["smoothed_logits"][0]
  sign = -1 if targeted else 1

  def classes(image, q):
    log_p = jax.nn.log_softmax(predict(image)[0])
    return -sign * log_p[y[0]] + 0.3 * (q * log_p).sum()

  def label_set(image, q):
    z, y = predict(image)[0], jnp.array([1, 0, 1])
    on, off = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    task = -(y * on + (1 - y) * off).mean()
    return sign * task + 0.3 * (q * on + (1 - q) * off).mean()

  several = jnp.array([1, 0, 1])
  hard = jnp.eye(3)[jnp.argmax(reference)]
  for by_hand, label, kind, q in (
    (classes, y[0], "soft", jax.nn.softmax(reference)),
    (classes, y[0], "hard", hard),
    (label_set, several, "soft", jax.nn.sigmoid(reference)),
    (label_set, several, "hard", reference > 0),
  ):
    value, slope = jax.value_and_grad(loss)(image, label, reference=kind)
    want, want_slope = jax.value_and_grad(by_hand)(image, q)
    assert value == pytest.approx(float(want), abs=1e-12)
    np.testing.assert_allclose(slope, want_slope, atol=1e-12)


def test_what_is_smoothed():
  rng = np.random.default_rng(1)
  clean = jnp.asarray(rng.uniform(0.3, 0.7, (2, 6, 5, 3)))
  image = jnp.clip(clean + rng.normal(0, 0.2, clean.shape), 0, 1)
  taps = filters.gaussian_kernel(0.8, 5)
  blur = jax.vmap(lambda x: filters.blur(x, taps))
  got = twin(image, clean, sigma=0.8, size=5)
  want = jnp.clip(clean + blur(image - clean), 0, 1)
  np.testing.assert_allclose(got, want, atol=1e-12)
  np.testing.assert_array_equal(twin(clean, clean), clean)
  # a narrow range clips the twin
  assert twin(image, clean, bounds=(0.4, 0.6)).max() <= 0.6
  whole = twin(image, clean, sigma=0.8, size=5, smooth="image")
  np.testing.assert_allclose(whole[:, 2:-2, 2], blur(image)[:, 2:-2, 2], atol=1e-12)
  # the border of a flat image is not darkened
  flat = jnp.full((1, 4, 4, 1), 0.6)
  np.testing.assert_allclose(twin(flat, flat, smooth="image"), 0.6, atol=1e-12)
  # the channels are left apart, and a volume is smoothed along three axes
  one = jnp.zeros((1, 5, 5, 5, 2)).at[0, 2, 2, 2, 0].set(1.0)
  seen = twin(one, jnp.zeros_like(one))[0]
  assert not seen[..., 1].any()
  assert (seen[..., 0] > 0).sum() == 27


def test_a_step_is_two_forwards_and_one_backward_and_keeps_the_features():
  model, x = helpers.convnet(), helpers.stripes(5)
  y = jnp.argmax(model(x)[0], -1)
  result = run(attacks.smia(0.1, num_steps=3), model, x, y)
  np.testing.assert_array_equal(result.forwards, 6)
  np.testing.assert_array_equal(result.backwards, 3)
  _, features = forwards.smoothed_twin()(model, None, x, x)
  assert set(features) == {"hidden", "bottleneck", "smoothed_logits"}
  shapes = []

  def seen(x):
    shapes.append(x.shape)
    return model(x)

  forwards.smoothed_twin()(seen, None, x, x)
  assert shapes == [x.shape] * 2


def label_sets():
  predict, x, _ = network(5)
  return predict, x, (predict(x) > 0).astype(jnp.int32)


def test_label_sets_are_attacked():
  predict, x, y = label_sets()
  got, pgd = attacked(predict, x, y), attacked(predict, x, y, weight=0.0)
  assert ((got.logits > 0) == y).mean() < 0.7
  assert got.success.mean() > 0.8
  assert np.abs(got.image - pgd.image).max() > 0.01  # one label of many: no confound
  reach = attacked(predict, x, 1 - y, targeted=True)
  assert ((reach.logits > 0) == 1 - y).mean() > 0.2  # 0 on the clean images
  options = {"loss": losses.binary_cross_entropy, "random_start": False}
  bce = attacks.pgd(0.1, step_size=0.02, num_steps=12, **options)
  np.testing.assert_array_equal(pgd.image, run(bce, predict, x, y).image)


def test_masks_part_from_pgd_also_with_two_classes():
  model, x = helpers.convnet(classes=2, dense=True), helpers.stripes(6)
  y = jnp.argmax(model(x)[0], -1)
  got, pgd = (run(attacks.smia(0.05, weight=w), model, x, y) for w in (1.0, 0.0))
  assert np.abs(got.image - pgd.image).max() > 0.01
  wrong = (jnp.argmax(got.logits, -1) != y).mean()
  assert wrong > 0.2


def test_pixels_that_do_not_count_pull_at_nothing():
  model, x = helpers.convnet(classes=2, dense=True), helpers.stripes(3)
  y = jnp.argmax(model(x)[0], -1)
  mask = jnp.broadcast_to(jnp.arange(8) < 4, y.shape)
  whole = {"label": y, "mask": mask}
  other = {"label": jnp.where(mask, y, 255), "mask": mask}
  attack = attacks.smia(0.05, num_steps=4)
  got, want = (run(attack, model, x, y) for y in (other, whole))
  np.testing.assert_array_equal(got.image, want.image)
  assert not (got.image - x)[:, :, 6:].any()  # beyond the reach of two convolutions


def test_weights_are_swept_in_one_program():
  predict, x, y = network(3)
  counter = helpers.Counter(predict)
  sweep = jax.jit(jax.vmap(lambda w: attacked(counter, x, y, weight=w).image))
  images = sweep(jnp.array(WEIGHTS))
  assert counter.traces <= 8
  for weight, image in zip(WEIGHTS, images, strict=True):
    alone = attacked(predict, x, y, weight=weight).image
    np.testing.assert_allclose(image, alone, atol=1e-12)
  assert len(np.unique(images.sum((1, 2, 3, 4)).round(9))) == 4


def test_the_best_point_is_that_of_the_largest_task_loss():
  predict, x, y = network(3)
  last, best = (attacked(predict, x, y, keep=keep) for keep in ("last", "best"))
  assert (best.score >= last.score).all()
  assert (best.score > last.score).any()
  np.testing.assert_allclose(
    best.score, -jnp.log(jax.nn.softmax(best.logits)[jnp.arange(40), y]), atol=1e-9
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"weight": 1.5}, r"`weight` is 1.5; it must be a number in \[0, 1\]"),
    ({"weight": -0.1}, r"`weight` is -0.1"),
    ({"weight": np.nan}, r"`weight` is nan"),
    ({"smooth": "direction"}, "`smooth` is 'direction'; write one of perturbation, im"),
    ({"reference": "mean"}, "`reference` is 'mean'; write one of soft, hard"),
    ({"sigma": 0.0}, "`sigma` is 0.0; it must be a number > 0"),
    ({"sigma": -1.0}, "`sigma` is -1.0"),
    ({"size": 4}, "`size` is 4; a centred kernel"),
    ({"step_size": -0.1}, "`step_size` is -0.1"),
    ({"num_steps": 0}, "`num_steps` is 0"),
    ({"keep": "first"}, "`keep` is 'first'"),
  ],
)
def test_bad_options_are_refused_before_there_is_a_model(options, message):
  with pytest.raises(ValueError, match=message):
    attacks.smia(0.1, **options)


def test_the_loss_asks_for_its_forward():
  with pytest.raises(ValueError, match="no feature 'smoothed_logits'"):
    losses.smoothed_agreement(helpers.sample([0.0, 1.0], 0))
