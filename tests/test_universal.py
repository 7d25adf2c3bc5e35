"""Universal perturbations: published vectors, invariance, what is left out."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, engine, losses, targets, threats, transforms, types

KEY = jax.random.key(0)
OPEN = (-jnp.inf, jnp.inf)  # the published codes never clip
# z_0 = 0, z_1 = x_1 - 2 x_2 - 1
W, B = np.array([[0.0, 1.0], [0.0, -2.0]]), np.array([[0.0, -1.0]])
PAIR = np.array([[0.2, 0.0], [2.0, 0.1]])
FOUR = np.array([[0.2, 0.0], [2.0, 0.1], [0.5, 0.4], [-0.3, 0.2]])


def drive(uap, predict, batch, steps):
  state = uap.init(KEY, batch["image"][0])
  seen = []
  for _ in range(steps):
    state, metrics = uap.step(predict, state, batch)
    seen.append(metrics)
  return state, seen


def scores(delta, images):
  return (images + np.asarray(delta)) @ W[:, 1] + B[0, 1]


@pytest.mark.parametrize(
  ("norm", "eps", "target", "want", "rate"),
  [
    ("linf", 0.4, None, (0.4, -0.4), 0.5),
    ("l2", 0.5, None, (0.3535533406, -0.3535533406), 0.5),
    ("linf", 0.4, 1, (0.4, -0.4), 1.0),
    ("linf", 0.4, 0, (-0.4, 0.4), 1.0),
  ],
)
def test_the_sequential_vectors(norm, eps, target, want, rate):
  with helpers.x64():
    step = attacks.fgsm(0.5, targeted=target is not None, bounds=OPEN)
    uap = attacks.sequential_universal(
      eps, norm=norm, target=target, attack=step, bounds=OPEN
    )
    state, _ = drive(uap, helpers.linear(W, B), {"image": jnp.asarray(PAIR)}, 2)
    # the published projection divides by the norm plus 1e-7, ours by the norm
    published = np.sqrt(0.5) / (np.sqrt(0.5) + 1e-7) if norm == "l2" else 1
    np.testing.assert_allclose(state.delta * published, want, rtol=0, atol=1e-9)
    decided = scores(state.delta, PAIR) > 0
    wanted = (
      decided == target if target is not None else decided != (scores(0, PAIR) > 0)
    )
    assert wanted.mean() == rate


def test_a_step_that_does_not_work_is_not_taken():
  """The second image alone: one inner step cannot flip it."""
  with helpers.x64():
    step = attacks.fgsm(0.1, bounds=OPEN)
    uap = attacks.sequential_universal(0.4, attack=step, bounds=OPEN)
    batch = {"image": jnp.asarray(PAIR[1:])}
    state, (metrics,) = drive(uap, helpers.linear(W, B), batch, 1)
    assert (state.delta == 0).all()
    assert metrics["accepted"] == 0
    big = attacks.sequential_universal(
      0.9, attack=attacks.fgsm(0.9, bounds=OPEN), bounds=OPEN
    )
    state, (metrics,) = drive(big, helpers.linear(W, B), batch, 1)
    assert metrics["accepted"] == 1
    assert (state.delta != 0).all()


def test_only_a_step_that_reaches_the_target_is_taken():
  """The inner attack knows no target: what it calls success does not count."""
  with helpers.x64():
    away = attacks.fgsm(0.9, bounds=OPEN)  # from the target, of which it knows nothing
    uap = attacks.sequential_universal(0.9, target=1, attack=away, bounds=OPEN)
    batch = {"image": jnp.asarray(PAIR)}
    state, (metrics,) = drive(uap, helpers.linear(W, B), batch, 1)
    assert metrics["accepted"] == 0
    assert (state.delta == 0).all()


def test_padding_and_a_second_batch_of_the_published_step():
  """By default the inner step is 0.0012, and an image of weight 0 is not visited."""
  with helpers.x64():
    near = np.array([[1.001, 0.0], [1.005, 0.0]])  # z_1 of 0.001 and 0.005
    uap = attacks.sequential_universal(0.01, bounds=OPEN)
    both = {"image": jnp.asarray(near)}
    alone = both | {"weight": jnp.array([1.0, 0.0])}
    state, (metrics,) = drive(uap, helpers.linear(W, B), alone, 1)
    np.testing.assert_allclose(state.delta, [-0.0012, 0.0012], rtol=0, atol=1e-12)
    assert metrics["accepted"] == 1
    state, _ = uap.step(helpers.linear(W, B), state, {"image": jnp.asarray(near[1:])})
    # a step changes z_1 by 0.0036: the second needs one of its own, from where v is
    np.testing.assert_allclose(state.delta, [-0.0024, 0.0024], rtol=0, atol=1e-12)


def test_the_deepfool_vectors():
  with helpers.x64():
    model = helpers.linear(W, B)
    x, y = jnp.asarray(PAIR[:1]), jnp.array([0])
    for overshoot, want in ((0.0, (0.16, -0.32)), (0.02, (0.1632, -0.3264))):
      attack = attacks.deepfool(num_steps=1, overshoot=overshoot, bounds=OPEN)
      result = attack(KEY, model, x, y)
      np.testing.assert_allclose(result.delta[0], want, rtol=0, atol=1e-9)
    assert scores(result.delta, PAIR[:1]) == pytest.approx(0.016, abs=1e-9)
    three = helpers.linear(np.array([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]]))
    attack = attacks.deepfool(num_steps=1, overshoot=0.0, bounds=OPEN)
    result = attack(KEY, three, jnp.array([[2.0, 1.0]]), y)
    np.testing.assert_allclose(result.delta, [[-0.5, 0.5]], rtol=0, atol=1e-9)
    assert result.backwards == 2


def test_the_sequential_algorithm_takes_any_attack():
  """With DeepFool inside it flips what one fixed step could not."""
  with helpers.x64():
    inner = attacks.deepfool(num_steps=10, bounds=OPEN)
    uap = attacks.sequential_universal(2.0, attack=inner, norm="l2", bounds=OPEN)
    batch = {"image": jnp.asarray(PAIR)}
    state, (metrics,) = drive(uap, helpers.linear(W, B), batch, 1)
    assert metrics["accepted"] == 1
    assert 0 < np.linalg.norm(state.delta) <= 2


def test_the_minibatch_vector():
  with helpers.x64():
    batch = {"image": jnp.asarray(FOUR)}
    uap = attacks.universal(0.4, step_size=0.1, bounds=OPEN)
    state, seen = drive(uap, helpers.linear(W, B), batch, 5)
    want = [0.287749, 0.323773, 0.377269, 0.449075, 0.539604]
    np.testing.assert_allclose([m["loss"] for m in seen], want, rtol=0, atol=5e-7)
    np.testing.assert_allclose(state.delta, (0.4, -0.4), rtol=0, atol=1e-12)
    flipped = (scores(state.delta, FOUR) > 0) != (scores(0, FOUR) > 0)
    assert flipped.mean() == 0.25


def test_the_first_mean_gradient_of_the_minibatch_vector():
  with helpers.x64():
    uap = engine.universal_attack(
      types.Objective(losses.cross_entropy, prepare=targets.predictions),
      threats.linf(10.0, bounds=OPEN),
      optax.sgd(1.0),
    )
    state, _ = drive(uap, helpers.linear(W, B), {"image": jnp.asarray(FOUR)}, 1)
    np.testing.assert_allclose(state.delta, (0.092158, -0.184315), rtol=0, atol=5e-7)


def slopes(weight=None, **batch):
  """`sum_i g_i . v` as objective, with the gradients of the sharding vector."""
  image = jnp.asarray([[1.0, -1.0]] * 3 + [[-2.5, 2.0]])
  return {"image": image} | batch | ({} if weight is None else {"weight": weight})


def rise(axis_name=None, **options):
  return engine.universal_attack(
    types.Objective(
      lambda s: (s.clean * s.delta).sum(), success=lambda s: s.clean[0] > 0
    ),
    threats.linf(10.0, bounds=OPEN),
    optax.sgd(1.0),
    axis_name=axis_name,
    **options,
  )


def label(batch):
  return batch | {"label": jnp.zeros(batch["image"].shape[:-1], int)}


def test_the_sharding_vector_divides_by_the_global_count():
  """Three examples on one device, one on the other, padded: (0.125, -0.25)."""
  flat = label(slopes())
  state, (metrics,) = drive(rise(), lambda x: x, flat, 1)
  np.testing.assert_allclose(state.delta, (0.125, -0.25), atol=1e-7)
  assert metrics["success"] == 0.75
  image = flat["image"]
  split = {
    "image": jnp.stack([image[:3], jnp.stack([image[3]] * 3)]),
    "weight": jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
    "label": jnp.zeros((2, 3), int),
  }
  uap = rise(axis_name="device")
  start = uap.init(KEY, image[0])
  step = jax.pmap(
    lambda batch: uap.step(lambda x: x, start, batch), axis_name="device",
    devices=jax.devices()[:2],
  )  # fmt: skip
  state, metrics = step(split)
  np.testing.assert_allclose(state.delta, [(0.125, -0.25)] * 2, atol=1e-7)
  assert (metrics["success"] == 0.75).all()


def test_a_stateless_rule_per_example_comes_before_the_mean():
  state, _ = drive(
    rise(example=transforms.normalize(2)), lambda x: x, label(slopes()), 1
  )
  units = np.array([[1, -1]] * 3) / np.sqrt(2)
  other = np.array([-2.5, 2]) / np.linalg.norm([2.5, 2])
  np.testing.assert_allclose(state.delta, (units.sum(0) + other) / 4, atol=1e-6)


def test_the_cap_silences_what_is_fooled_already():
  """Cross-entropies 0.5 and 14 under a cap of 12: only the first has a gradient."""
  with helpers.x64():
    logits = np.array([[0.0, np.log(np.exp(0.5) - 1)], [0.0, np.log(np.exp(14.0) - 1)]])
    uap = engine.universal_attack(
      types.Objective(losses.cap(losses.cross_entropy, 12.0)),
      threats.linf(100.0, bounds=OPEN),
      optax.sgd(1.0),
    )
    batch = {"image": jnp.asarray(logits), "label": jnp.zeros(2, int)}
    alone = {"image": jnp.asarray(logits[:1]), "label": jnp.zeros(1, int)}
    both, (metrics,) = drive(uap, lambda x: x, batch, 1)
    first, _ = drive(uap, lambda x: x, alone, 1)
    np.testing.assert_allclose(metrics["loss"], (0.5 + 12) / 2, atol=1e-12)
    np.testing.assert_allclose(both.delta, first.delta / 2, atol=1e-12)
    assert (both.delta != 0).all()


def test_padding_changes_nothing_and_an_empty_batch_moves_nothing():
  flat, _ = drive(rise(), lambda x: x, label(slopes()), 1)
  image = jnp.concatenate([slopes()["image"], jnp.full((2, 2), 7.0)])
  weight = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
  padded = label({"image": image, "weight": weight})
  state, (metrics,) = drive(rise(), lambda x: x, padded, 1)
  np.testing.assert_array_equal(state.delta, flat.delta)
  assert metrics["success"] == 0.75
  nothing = label(slopes(weight=jnp.zeros(4)))
  state, _ = drive(rise(), lambda x: x, nothing, 1)
  assert (state.delta == 0).all()


def test_an_example_that_is_not_finite_is_left_out_and_counted():
  def breaks(image):
    return jnp.where(image[:, :1] < 0, jnp.nan, 1.0) * image

  uap = engine.universal_attack(
    types.Objective(lambda s: (s.logits * s.delta).sum()),
    threats.linf(10.0, bounds=OPEN),
    optax.sgd(1.0),
  )
  state, (metrics,) = drive(uap, breaks, label(slopes()), 1)
  np.testing.assert_allclose(state.delta, (1, -1), atol=1e-6)
  assert metrics["nonfinite"] == state.nonfinite == 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_sharded_batches_give_the_perturbation_of_one_device(norm):
  predict = helpers.convnet()
  batch = {"image": helpers.stripes(16), "id": jnp.arange(16)}
  uap = attacks.universal(0.1, norm=norm, num_steps=4)
  step = jax.jit(lambda state, batch: uap.step(predict, state, batch))
  mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
  spread = jax.device_put(
    batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  )
  alone = shared = uap.init(KEY, batch["image"][0])
  for _ in range(4):
    alone, _ = step(alone, batch)
    shared, metrics = step(shared, spread)
  np.testing.assert_allclose(shared.delta, alone.delta, atol=1e-5)
  assert metrics["success"].shape == ()


def test_the_radius_of_the_published_study():
  grey = jnp.full((2, 299, 299, 1), 128 / 255)
  unit = 255 / 128  # the study's images are (x - 128) / 128
  l2 = threats.share_of_norm(grey, 0.04, norm="l2")
  assert l2 * unit == pytest.approx(11.96, abs=1e-4)
  linf = threats.share_of_norm(grey, 0.04, norm="linf")
  assert linf * unit == pytest.approx(0.04, abs=1e-6)
  red = jnp.stack([jnp.ones((4, 4)), *[jnp.zeros((4, 4))] * 2], -1)[None]
  first = threats.share_of_norm(red, 0.5, norm="l2", norm_channels="first")
  assert first == pytest.approx(2.0)
  for share in (0.0, -0.1, float("nan")):
    with pytest.raises(ValueError, match="above 0"):
      threats.share_of_norm(grey, share, norm="l2")
  with pytest.raises(ValueError, match="Divide 8-bit images by 255"):
    threats.share_of_norm(255 * grey, 0.04, norm="l2")
  with pytest.raises(ValueError, match="not finite"):
    threats.share_of_norm(jnp.nan * grey, 0.04, norm="l2")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_universal_perturbation_fools_and_the_control_does_not(norm):
  predict = helpers.convnet()
  batch = {"image": helpers.stripes(32)}
  eps = 0.06 if norm == "linf" else 0.5
  crafted, seen = drive(
    attacks.universal(eps, norm=norm, num_steps=8), predict, batch, 9
  )
  control, random = drive(
    attacks.random_universal(eps, norm=norm, kind="sign"), predict, batch, 2
  )
  assert seen[-1]["success"] > random[-1]["success"] + 0.2
  order = np.inf if norm == "linf" else 2
  for state in (crafted, control):
    assert np.linalg.norm(np.ravel(state.delta), order) <= eps * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["ball", "sign"])
def test_a_control_is_the_same_whatever_image_it_is_started_with(kind):
  control = attacks.random_universal(0.2, kind=kind)
  starts = [control.init(KEY, jnp.full((4, 4, 3), level)).delta for level in (0.0, 1.0)]
  np.testing.assert_array_equal(*starts)
  assert starts[0].min() < 0 < starts[0].max()


def test_a_targeted_perturbation_leads_to_its_class():
  predict, batch = helpers.convnet(), {"image": helpers.stripes(32)}
  for target in range(3):
    _, seen = drive(
      attacks.targeted_universal(0.3, target=target, num_steps=8), predict, batch, 9
    )
    assert seen[-1]["success"] > 0.9


def test_bad_input_is_refused_before_a_step():
  predict, image = helpers.convnet(), helpers.stripes(4)
  for make, message in (
    (lambda: attacks.universal(-1.0), "eps"),
    (lambda: attacks.universal(0.1, norm="l3"), "norm"),
    (lambda: attacks.universal(0.1, num_steps=0), "num_steps"),
    (lambda: attacks.random_universal(0.1, kind="cube"), "kind"),
    (lambda: attacks.universal(0.1, decay=-1.0), "decay"),
    (lambda: attacks.universal(0.1, decay=float("nan")), "decay"),
  ):
    with pytest.raises(ValueError, match=message):
      make()
  for target in (1.5, True):
    with pytest.raises(TypeError, match="index of a class"):
      attacks.targeted_universal(0.1, target=target)
  uap = attacks.targeted_universal(0.1, target=3)
  state = uap.init(KEY, image[0])
  with pytest.raises(ValueError, match="outside the model's classes"):
    uap.step(predict, state, {"image": image})
  with pytest.raises(TypeError, match="uint8"):
    uap.step(predict, state, {"image": (255 * image).astype(jnp.uint8)})
  with pytest.raises(TypeError, match="typed key"):
    uap.init(jax.random.PRNGKey(0), image[0])
  with pytest.raises(TypeError, match="float32"):
    uap.init(KEY, np.zeros((4, 4, 1), np.uint8))


def test_the_state_keeps_its_types_in_double_precision():
  """A scan over the step, and a checkpoint, need that."""
  with helpers.x64():
    uap = attacks.universal(0.4, step_size=0.1, bounds=OPEN)
    batch = {"image": jnp.asarray(FOUR)}
    state = uap.init(KEY, batch["image"][0])
    moved, _ = uap.step(helpers.linear(W, B), state, batch)
  kinds = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
  assert kinds(moved) == kinds(state)


def test_a_batch_without_what_the_objective_compares_with_is_refused():
  uap = attacks.universal(0.1, prepare=types.labels)
  images = helpers.stripes(4)
  state = uap.init(KEY, images[0])
  with pytest.raises(TypeError, match='returned no "label"'):
    uap.step(helpers.convnet(), state, {"image": images})
  with pytest.raises(ValueError, match="class"):
    uap.step(helpers.convnet(), state, {"image": images, "label": jnp.full(4, 9)})


BOTH = {"batches": attacks.universal, "one by one": attacks.sequential_universal}


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"decision": jnp.full(4, 7)}, "label 7 is outside"),
    ({"decision": jnp.zeros(3, int)}, r"`y\['decision'\]` has shape \(3,\) but"),
    ({"decision": jnp.zeros((4, 5), int)}, r"labels have shape \(4, 5\)"),
    ({"id": jnp.arange(3)}, r"`y\['id'\]` has shape \(3,\) but"),
    ({"weight": jnp.ones(3)}, r"`weight` has shape \(3,\)"),
  ],
)
def test_what_does_not_fit_the_images_is_refused(make, change, message):
  uap, images = make(0.1), helpers.stripes(4)
  batch = {"image": images, "decision": jnp.zeros(4, int)} | change
  with pytest.raises(ValueError, match=message):
    uap.step(helpers.convnet(), uap.init(KEY, images[0]), batch)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("part", [np.s_[:, :, :1], np.s_[:1], np.s_[:4]])
def test_a_perturbation_of_another_shape_is_refused_and_not_broadcast(make, part):
  uap, images = make(0.1), helpers.stripes(4)
  state = uap.init(KEY, jnp.repeat(images, 3, -1)[0][part])
  with pytest.raises(ValueError, match=r"shape .*, and an image of the batch needs"):
    uap.step(helpers.convnet(), state, {"image": jnp.repeat(images, 3, -1)})


def test_the_state_of_another_rule_is_refused():
  images = helpers.stripes(4)
  state = attacks.universal(0.1, step_size=0.01).init(KEY, images[0])
  with pytest.raises(ValueError, match="the state is one of another attack"):
    attacks.universal(0.1, num_steps=3).step(
      helpers.convnet(), state, {"image": images}
    )


def moved(images, delta):
  return jnp.clip(images + delta[None], 0, 1)


def test_one_perturbation_flips_a_label_of_most_sets():
  images, model = helpers.stripes(32), helpers.convnet()
  clean = model(images)[0] > 0
  batch = {"image": images, "label": jnp.zeros((32, 3), int)}  # only its rank is read
  state, _ = drive(attacks.universal(0.25, num_steps=10), model, batch, 10)
  flipped = (model(moved(images, state.delta))[0] > 0) != clean
  noise = attacks.random_universal(0.25, kind="sign").init(KEY, images[0]).delta
  by_noise = (model(moved(images, noise))[0] > 0) != clean
  assert flipped.any(1).mean() > max(0.7, by_noise.any(1).mean() + 0.2)


def test_the_sequential_algorithm_takes_a_step_that_flips_a_label():
  image, model = helpers.stripes(1), helpers.convnet()
  label = {"label": jnp.zeros((1, 3), int)}
  strong = attacks.pgd(0.25, num_steps=5, random_start=False)
  for attack, taken in ((strong, 1), (attacks.fgsm(1e-4), 0)):
    uap = attacks.sequential_universal(0.25, attack=attack)
    state, (metrics,) = drive(uap, model, {"image": image} | label, 1)
    now, before = (model(x)[0] > 0 for x in (moved(image, state.delta), image))
    assert metrics["accepted"] == (now != before).any() == taken


def test_one_perturbation_hides_every_finding():
  images, model = helpers.stripes(32), helpers.convnet()
  uap = attacks.targeted_universal(0.5, target=jnp.zeros(3, int), num_steps=10)
  state, _ = drive(uap, model, {"image": images}, 10)
  before, after = (
    (model(moved(images, delta))[0] > 0).any(1).mean()
    for delta in (jnp.zeros_like(state.delta), state.delta)
  )
  assert before > 0.8
  assert after < 0.2


def test_labels_that_do_not_count_are_not_fooled():
  images, model = helpers.stripes(8), helpers.convnet()
  batch = {"image": images, "label": jnp.zeros((8, 3), int)}
  masked = batch | {"mask": jnp.zeros((8, 3), bool).at[:, 0].set(True)}
  uap = attacks.universal(0.3, num_steps=5)
  state, metrics = drive(uap, model, masked, 5)
  first = (model(images)[0] > 0)[:, 0]
  now = (model(moved(images, state.delta))[0] > 0)[:, 0]
  assert 0 <= metrics[-1]["success"] <= 1
  _, last = uap.step(model, state, masked)
  assert last["success"] == (first != now).mean()


def test_a_set_of_labels_for_a_model_of_classes_is_refused():
  images = helpers.stripes(4)
  uap = attacks.targeted_universal(0.1, target=jnp.zeros(5, int))
  with pytest.raises(ValueError, match=r"target has labels \(5,\), and the logits are"):
    uap.step(helpers.convnet(), uap.init(KEY, images[0]), {"image": images})


def test_adam_and_the_masked_rule_in_place_of_the_step():
  """One linear step each, by hand."""
  batch = {"image": jnp.asarray([[0.5, 0.5]]), "decision": jnp.zeros(1, int)}
  model = helpers.linear(np.array([[1.0, -1.0], [0.5, -0.5]]))
  uap = attacks.universal(1.0, transform=optax.adam(0.25), bounds=OPEN)
  state, _ = uap.step(model, uap.init(KEY, batch["image"][0]), batch)
  np.testing.assert_allclose(state.delta, [-0.25, -0.25], rtol=1e-5)
  masked = losses.until_reached(losses.cross_entropy)
  for target, moved in ((0, 0.0), (1, 0.1)):  # the first is reached already
    uap = attacks.targeted_universal(
      1.0, target=target, step_size=0.1, loss=masked, bounds=OPEN
    )
    state, _ = uap.step(model, uap.init(KEY, batch["image"][0]), batch)
    assert abs(state.delta).max() == pytest.approx(moved)


@pytest.mark.parametrize("option", ["step_size", "decay"])
def test_what_a_transform_replaces_is_refused_beside_it(option):
  with pytest.raises(ValueError, match="`transform` replaces `step_size` and `decay`"):
    attacks.universal(0.1, transform=optax.adam(1e-3), **{option: 0.1})


def test_the_sequential_algorithm_counts_what_is_not_finite_and_moves_nothing():
  def breaks(image):
    return jnp.where(image[:, :1] < 0.5, jnp.nan, image @ jnp.asarray(-W) + B)

  images = np.array([[0.5, 0.5], [0.4, 0.5], [0.6, 0.5]])
  uap = attacks.sequential_universal(0.3, attack=attacks.fgsm(0.2))
  state, (metrics,) = drive(uap, breaks, {"image": jnp.asarray(images)}, 1)
  assert metrics["nonfinite"] == state.nonfinite >= 1
  assert np.isfinite(state.delta).all()
  none = lambda image: jnp.full((len(image), 2), jnp.nan)
  for target in (None, 0):
    uap = attacks.sequential_universal(0.3, target=target)
    state, (metrics,) = drive(uap, none, {"image": jnp.asarray(images)}, 1)
    assert (state.delta == 0).all()
    assert metrics["success"] == metrics["accepted"] == 0
    assert metrics["nonfinite"] == state.nonfinite == 3


def test_the_state_of_the_sequential_algorithm_keeps_its_types_in_double_precision():
  with helpers.x64():
    uap = attacks.sequential_universal(0.4, bounds=OPEN)
    batch = {"image": jnp.asarray(PAIR)}
    start = uap.init(KEY, batch["image"][0])
    state, _ = uap.step(helpers.linear(W, B), start, batch)
    types_of = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)
    assert types_of(state) == types_of(start)


def test_a_class_that_the_model_rules_out_is_no_rival():
  """A logit of minus infinity: DeepFool goes to the other boundary."""
  with helpers.x64():
    three = helpers.linear(np.array([[1.0, 0.0], [0.0, 1.0]]))

    def model(image):
      logits = three(image)
      return jnp.concatenate([logits, jnp.full((len(image), 1), -jnp.inf)], -1)

    attack = attacks.deepfool(num_steps=1, overshoot=0.0, bounds=OPEN)
    result = attack(KEY, model, jnp.array([[2.0, 1.0]]), jnp.array([0]))
    np.testing.assert_allclose(result.delta, [[-0.5, 0.5]], rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", [attacks.universal, attacks.sequential_universal])
def test_weights_are_one_number_per_image(make):
  predict, image = helpers.convnet(), helpers.stripes(4)
  uap = make(0.1)

  def step(weight):
    state = uap.init(KEY, image[0])
    batch = {"image": image} if weight is None else {"image": image, "weight": weight}
    return uap.step(predict, state, batch)[0].delta

  want = step(jnp.array([1.0, 1.0, 0.0, 0.0]))
  for kind in (int, bool, np.uint8):
    np.testing.assert_array_equal(step(np.array([1, 1, 0, 0], kind)), want)
  assert (step(None) != 0).any()
  assert (step(np.zeros(4, int)) == 0).all()
  for wrong in (jnp.ones((4, 1)), jnp.ones(3)):
    with pytest.raises(ValueError, match="one number per image"):
      step(wrong)
  for wrong in (-jnp.ones(4), jnp.full(4, jnp.nan)):
    with pytest.raises(ValueError, match="`weight` is"):
      step(wrong)


@pytest.mark.parametrize("label", [jnp.zeros((4, 8, 8), int), jnp.zeros((4, 3), int)])
def test_deepfool_is_an_attack_on_classes(label):
  images, model = helpers.stripes(4), helpers.convnet(classes=3, dense=label.ndim == 3)
  with pytest.raises(ValueError, match=r"rivals are those of classes: labels \(B,\)"):
    attacks.deepfool()(KEY, model, images, label)


def test_labels_of_equal_rank_and_another_shape_are_refused():
  """`(B, 1)`, as some packs store classes, is no label set of a model of 3 classes."""
  images = helpers.stripes(4)
  batch = {"image": images, "label": jnp.zeros((4, 1), int)}
  for make in BOTH.values():
    uap = make(0.1)
    with pytest.raises(ValueError, match=r"labels have shape \(4, 1\)"):
      uap.step(helpers.convnet(), uap.init(KEY, images[0]), batch)


def test_the_mask_of_a_target_counts():
  weights = jnp.array([[1.0, 0.0], [1.0, 0.0]])
  model = lambda x: x @ weights + jnp.array([[-1.0, 5.0]])  # the second never changes
  batch = {"image": jnp.full((3, 2), 0.9), "label": jnp.ones((3, 2), int)}
  batch["mask"] = jnp.zeros((3, 2), bool).at[:, 0].set(True)
  uap = attacks.targeted_universal(0.5, target=jnp.zeros(2, int), num_steps=3)
  state, _ = drive(uap, model, batch, 3)
  assert uap.step(model, state, batch)[1]["success"] == 1


def test_the_controls_run_on_label_sets():
  images = helpers.stripes(4)
  uap = attacks.random_universal(0.1)
  batch = {"image": images, "label": jnp.zeros((4, 3), int)}
  state, _ = uap.step(helpers.convnet(), uap.init(KEY, images[0]), batch)
  np.testing.assert_array_equal(state.delta, uap.init(KEY, images[0]).delta)


def test_an_inner_attack_gets_plain_labels():
  seen = []

  def inner(key, predict, x, y):
    seen.append(y.shape)
    return attacks.fgsm(0.1)(key, predict, x, 1 - y)

  images = helpers.stripes(2)
  uap = attacks.sequential_universal(0.1, attack=inner)
  uap.step(helpers.convnet(classes=2), uap.init(KEY, images[0]), {"image": images})
  assert seen
  assert set(seen) == {(1,)}
