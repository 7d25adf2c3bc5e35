"""One good model passes every check, and each of five broken defences is noticed.

The defences stand in one model, chosen by a number among its variables: so they share
their compiled programs, as the models of a study do.
"""

import functools
import pathlib
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import data, losses, robustness, trust

EPS = 0.04
EFFORT = robustness.Effort(
  steps=10, restarts=3, long_steps=40, apgd_steps=15, queries=300
)


def dropout(x):
  """Drawn anew in every call, compiled or not: the host holds the generator."""

  def draw(_):
    return (GENERATOR.random(x.shape) < 0.8).astype(np.float32) / 0.8

  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return x * jax.pure_callback(draw, shape, jax.lax.stop_gradient(x[:, 0, 0, 0]))


@jax.custom_vjp
def wrong_sign(x):
  return x


wrong_sign.defvjp(lambda x: (x, None), lambda _, g: (-g,))
GENERATOR = np.random.default_rng(5)
IN_FRONT = {
  "nothing": lambda x: x,
  "gradient killer": jax.lax.stop_gradient,
  "quantiser": lambda x: jnp.round(7 * x) / 7,
  "dropout": dropout,
  "sign error": wrong_sign,
}


def model(variables, x):
  x = jax.lax.switch(variables["defence"], list(IN_FRONT.values()), x)
  flat = x.reshape(len(x), -1) - 0.5
  logits = (
    variables["scale"] * jnp.tanh(flat @ variables["first"]) @ variables["second"]
  )
  # how sure it is of class a where there are no images, in noise of the whole range
  far = jax.nn.relu(jnp.abs(flat).mean(1) - 0.2)
  return logits.at[:, 0].add(variables["sure"] * far)


PREDICT = helpers.Counter(lambda both: model(*both))


def predict(variables, x):
  return PREDICT((variables, x))


def variables(defence="nothing", scale=1.0, sure=0.0):
  rng = np.random.default_rng(0)
  return {
    "first": rng.normal(0, 0.25, (64, 24)).astype(np.float32),
    "second": rng.normal(0, 0.6, (24, 3)).astype(np.float32),
    "defence": np.int32(list(IN_FRONT).index(defence)),
    "scale": np.float32(scale),
    "sure": np.float32(sure),
  }


@functools.cache
def dataset(label_sets=False, n=60):
  """Labelled by the good model itself, but for three images."""
  x = np.random.default_rng(1).uniform(0.2, 0.8, (n, 8, 8, 1)).astype(np.float32)
  logits = np.asarray(model(variables(), x))
  y = (logits > 0).astype(np.int32) if label_sets else logits.argmax(1)
  y[:3] = 1 - y[:3] if label_sets else (y[:3] + 1) % 3
  return data.Dataset(x, y, np.arange(n), ["x"] * n, ("a", "b", "c"))


@functools.cache
def measured(*defence, eps=EPS, label_sets=False):
  return robustness.measure(
    predict,
    variables(*defence),
    dataset(label_sets),
    eps,
    batch_size=32,
    effort=EFFORT,
  )


def accuracy(found):
  return {k: rate["accuracy"] for k, rate in robustness.rates(found, dataset()).items()}


def test_a_good_model_is_trusted():
  found = measured("nothing")
  assert trust.judge(found, dataset()).failed == ()
  share = accuracy(found)
  assert share["clean"] == 0.95
  assert share["pgd"] <= share["pgd once"] < share["square"] < share["noise"]
  assert share["worst"] <= min(share["pgd"], share["apgd"], share["fgsm"]) < 0.2
  assert share["pgd large"] == 0
  clean = robustness.rates(found, dataset())["clean"]
  assert clean["low"] < clean["accuracy"] < clean["high"]
  assert clean["balanced_accuracy"] > 0.9


def test_a_good_model_that_is_sure_of_noise_is_trusted_too():
  found = measured("nothing", 1.0, 1e4)
  assert trust.judge(found, dataset()).failed == ()
  np.testing.assert_array_equal(found["clean"], measured("nothing")["clean"])


@pytest.mark.parametrize(
  ("defence", "failed"),
  [
    (("gradient killer",), ("gradient", "radius", "square")),
    (("quantiser",), ("gradient", "radius", "square")),
    (("sign error",), ("radius", "noise", "square")),
    # cross-entropy is softplus(z_k - z_y) here, and sigmoid(-104) is 0 in float32
    (("nothing", 3e3), ("gradient", "radius")),
  ],
  ids=str,
)
def test_a_broken_defence_is_noticed(defence, failed):
  verdict = trust.judge(measured(*defence), dataset())
  assert not verdict.reliable
  assert verdict.failed == failed


def test_a_defence_that_draws_at_random_is_noticed():
  verdict = trust.judge(measured("dropout"), dataset())
  assert not verdict.reliable
  # what else fails is chance: the counts of every other view are drawn anew as well
  assert "repeat" in verdict.failed


def test_saturation_hides_the_gradient_of_cross_entropy_but_not_of_the_ratio():
  good, saturated = accuracy(measured("nothing")), accuracy(measured("nothing", 3e3))
  for view in ("fgsm", "pgd", "pgd long"):
    assert saturated[view] > good[view] + 0.5
  # half of `apgd` raises the difference of logits ratio, which knows no scale
  assert saturated["apgd"] <= good["apgd"] + 0.02
  assert saturated["square"] == good["square"]


def test_the_page_of_the_docs_runs(monkeypatch, capsys):
  page = pathlib.Path(__file__).parents[1] / "docs/robustness.md"
  names = {"predict": predict, "dataset": dataset(), "eps": EPS}
  names |= {"studied": {"plain": variables(), "defended": variables("quantiser")}}
  monkeypatch.setattr(robustness, "Effort", lambda: EFFORT)
  for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
    exec(block, names)
  said = capsys.readouterr().out.splitlines()
  assert said[0].startswith("plain 0.04 {'accuracy': 0.0")
  assert said[0].endswith("True")
  assert said[1].startswith("plain 0.08")
  assert "of 60 images FGSM changes no logit." in said[3]


def test_nothing_is_compiled_for_other_weights_and_radii():
  measured("nothing")
  traces = PREDICT.traces
  other = measured("quantiser", 0.9, eps=2 * EPS)
  assert PREDICT.traces == traces
  assert accuracy(other)["fgsm"] != accuracy(measured("nothing"))["fgsm"]


def test_an_image_is_measured_alike_in_any_batch_and_order():
  names, turned = ("noise", "pgd once", "square"), np.arange(60)[::-1]
  whole = measured("nothing")
  small = data.take(dataset(), turned[:20])
  found = robustness.measure(
    predict, variables(), small, EPS, batch_size=32, names=names, effort=EFFORT
  )
  for name in names:
    np.testing.assert_allclose(found[name], whole[name][turned[:20]], atol=2e-4)
  other = robustness.measure(
    predict, variables(), small, EPS, batch_size=32, names=names, effort=EFFORT, seed=1
  )
  assert np.abs(other["noise"] - found["noise"]).max() > 1e-3


def test_label_sets_are_judged_by_their_labels():
  found = measured("nothing", label_sets=True)
  judged = trust.judge(found, dataset(label_sets=True))
  assert judged.failed == ()
  assert "of 180 decisions" in judged.checks[2].evidence
  rates = robustness.rates(found, dataset(label_sets=True))
  assert rates["clean"]["accuracy"] == rates["clean"]["exact_match"] == 0.95
  assert rates["worst"]["accuracy"] < rates["noise"]["accuracy"]
  assert rates["pgd"]["auroc"] < rates["clean"]["auroc"]
  assert rates["worst"]["auroc"] == min(rates[n]["auroc"] for n in robustness.WHITE_BOX)
  assert rates["pgd"]["fooling"] > 0 == rates["clean"]["fooling"]
  masked = measured("gradient killer", label_sets=True)
  verdict = trust.judge(masked, dataset(label_sets=True))
  assert verdict.failed == ("gradient", "radius", "noise", "square")


def findings(variables, x):
  """14 findings, the odd function of the image; the first ones without a gradient."""
  rng = np.random.default_rng(7)
  logits = (x.reshape(len(x), -1) - 0.5) @ rng.normal(0, 1, (64, 14)).astype(np.float32)
  masked = jnp.arange(14) < variables["masked"]
  return jnp.where(masked, jax.lax.stop_gradient(logits), logits)


def test_a_label_set_that_hides_three_labels_of_fourteen_is_noticed():
  x = dataset().images
  labels = (np.asarray(findings({"masked": 0}, x)) > 0).astype(np.int32)
  sets = dataset()._replace(labels=labels, class_names=tuple("abcdefghijklmn"))
  names = ("clean", "fgsm", "pgd large")
  failed = {}
  for masked in (0, 3):
    part = robustness.measure(
      findings, {"masked": np.int32(masked)}, sets, EPS, names=names, effort=EFFORT
    )
    # the other views leave all labels right, against which no check has anything
    found = dict.fromkeys(robustness.VIEWS, part["clean"]) | part
    found |= {"pgd": part["fgsm"]}
    # no image is wholly right in either: what counts is each label
    assert not robustness.right(part["pgd large"], labels).all(1).any()
    failed[masked] = trust.judge(found, sets).failed
  assert failed == {0: (), 3: ("radius",)}


def test_square_on_label_sets_is_compared_by_images():
  labels = np.zeros((100, 14), int)
  right = np.full((100, 14), -1.0)
  one, three = right.copy(), right.copy()
  one[:, 0] = 1
  three[:40, :3] = 1
  white = dict.fromkeys(("fgsm", "pgd once", "pgd", "pgd long", "apgd"), three)
  found = dict.fromkeys(robustness.VIEWS, right) | white | {"pgd large": -right}
  sets = data.Dataset(
    labels, labels, np.arange(100), ["x"] * 100, tuple("abcdefghijklmn")
  )
  found["fgsm"] = three * 1.1
  assert trust.judge(found, sets).failed == ()
  verdict = trust.judge(found | {"square": one}, sets)
  assert verdict.failed == ("square",)
  assert verdict.checks[-1].evidence == (
    "Square leaves 0 of 100 images without a wrong decision, "
    "the worst white-box attack of each image 60."
  )
  few = right.copy()
  few[:42, 0] = 1  # 2 of 100 may speak against it
  assert trust.judge(found | {"square": few}, sets).failed == ()


def test_rates_compare_with_the_clean_decisions():
  y = np.array([0, 1, 2, 2])
  classes = data.Dataset(np.zeros((4, 2, 2, 1)), y, y, ["x"] * 4, tuple("abc"))
  found = {"clean": np.eye(3)[[0, 1, 2, 1]], "pgd": np.eye(3)[[0, 1, 1, 1]]}
  rates = robustness.rates(found, classes)
  assert rates["pgd"]["fooling"] == 0.25  # the last was wrong before
  assert rates["clean"]["fooling"] == 0
  assert rates["pgd"]["quadratic_kappa"] == pytest.approx(1 - 2 / 4.5)
  assert "fooling" not in robustness.rates({"pgd": found["pgd"]}, classes)["pgd"]
  alone = robustness.rates({"clean": np.eye(3)[[0]]}, data.take(classes, [0]))
  assert alone["clean"]["auroc"] is alone["clean"]["quadratic_kappa"] is None

  labels = np.array([[1, 0], [1, 0]])
  sets = data.Dataset(np.zeros((2, 2, 2, 1)), labels, y[:2], ["x"] * 2, ("a", "b"))
  clean, pgd = np.array([[1.0, -1], [1, 1]]), np.array([[-1.0, -1], [1, 1]])
  rates = robustness.rates({"clean": clean, "pgd": pgd}, sets)["pgd"]
  assert (rates["fooling"], rates["hidden"], rates["invented"]) == (0.25, 0.5, 0.0)


def test_the_auroc_of_the_worst_is_that_of_one_attack():
  labels = np.array([[1, 1], [0, 1]])
  sets = data.Dataset(np.zeros((2, 2, 2, 1)), labels, labels[0], ["x"] * 2, ("a", "b"))
  # PGD has more wrong labels on both images, FGSM the wrong order of them in "a"
  found = {
    "fgsm": np.array([[1.0, 1.0], [2.0, 1.0]]),
    "pgd": np.array([[4.0, -1.0], [3.0, -1.0]]),
  }
  rates = robustness.rates(found, sets)
  assert (rates["fgsm"]["auroc"], rates["pgd"]["auroc"]) == (0.0, 1.0)
  np.testing.assert_array_equal(robustness.worst(found, labels), found["pgd"])
  assert rates["worst"]["auroc"] == 0.0
  assert rates["worst"]["accuracy"] == rates["pgd"]["accuracy"] == 0.25


def test_quantised_are_the_images_of_pgd_in_8_bits():
  # a model that sees what is between two grey levels, and nothing else
  between = lambda gain, x: (
    gain
    * jnp.stack(
      [x[:, 0, 0, 0] * 255 - jnp.round(x[:, 0, 0, 0] * 255), 0 * x[:, 0, 0, 0]], 1
    )
  )
  whole = dataset()._replace(
    images=np.full((60, 8, 8, 1), 100, np.uint8), labels=np.zeros(60, int)
  )
  names = ("pgd", "quantised")
  found = robustness.measure(
    between, 1.0, whole, 0.3 / 255, names=names, effort=EFFORT._replace(steps=2)
  )
  np.testing.assert_allclose(found["pgd"][:, 0], -0.3, atol=1e-3)
  np.testing.assert_allclose(found["quantised"], 0, atol=1e-4)


def test_the_second_loss_of_apgd_is_one_that_the_labels_allow():
  assert robustness.hard_loss(True, 2) is losses.label_margin
  assert robustness.hard_loss(False, 2) is losses.margin
  assert robustness.hard_loss(False, 3) is losses.dlr


def test_the_worst_is_taken_per_image():
  labels = np.array([0, 0, 1])
  found = {
    "clean": np.array([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0]]),
    "pgd": np.array([[0.0, 1.0], [2.0, 0.0], [0.0, 4.0]]),
    "square": np.array([[0.0, 9.0], [0.0, 9.0], [9.0, 0.0]]),
  }
  worst = robustness.worst(found, labels)
  np.testing.assert_array_equal(worst, [[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
  # of label sets more wrong labels come before a larger loss
  sets = {"clean": np.array([[-9.0, 1.0]]), "pgd": np.array([[-0.1, -0.1]])}
  worst = robustness.worst(sets, np.array([[1, 1]]))
  np.testing.assert_array_equal(worst, sets["pgd"])
  with pytest.raises(ValueError, match="no white-box view"):
    robustness.worst({"square": found["square"]}, labels)


def views(**wrong):
  """Logits of 100 images, of which so many per view are decided wrongly."""
  labels = np.zeros(100, int)
  found = {}
  for n, name in enumerate(robustness.VIEWS):
    logits = np.tile([1.0, 0.0], (100, 1)) * (1 if name in ("clean", "again") else n)
    logits[: wrong.get(name.replace(" ", "_"), 0)] *= -1
    found[name] = logits
  names = ["x"] * 100
  return found, data.Dataset(labels, labels, labels, names, ("a", "b"))


HEALTHY = {"fgsm": 30, "pgd_once": 40, "pgd": 50, "pgd_long": 40, "apgd": 50}
HEALTHY |= {"pgd_large": 100, "noise": 5, "square": 45}


@pytest.mark.parametrize(
  ("change", "failed"),
  [
    ({}, ()),
    ({"fgsm": 52}, ()),  # 2 of 100 may speak against it
    ({"fgsm": 53}, ("fgsm",)),
    ({"pgd_long": 38}, ()),
    ({"pgd_long": 37}, ("steps",)),
    ({"pgd_large": 98}, ()),
    ({"pgd_large": 97}, ("radius",)),
    ({"noise": 52}, ()),
    ({"noise": 53}, ("noise",)),
    ({"square": 52}, ()),
    ({"square": 53}, ("square",)),
    ({"square": 53, "apgd": 51}, ()),
  ],
  ids=str,
)
def test_each_check_has_its_own_edge(change, failed):
  assert trust.judge(*views(**HEALTHY | change)).failed == failed


def test_repeat_and_gradient_forgive_a_rounding_and_no_more():
  found, dataset = views(**HEALTHY)
  found["again"] = found["clean"] + 1e-5
  assert trust.judge(found, dataset).failed == ()
  found["again"] = found["clean"] + 1e-4
  assert trust.judge(found, dataset).failed == ("repeat",)
  found, dataset = views(**HEALTHY)
  found["fgsm"][:2] = found["clean"][:2] + 1e-6
  assert trust.judge(found, dataset).failed == ()
  found["fgsm"][:3] = found["clean"][:3] + 1e-6
  verdict = trust.judge(found, dataset)
  assert verdict.failed == ("gradient",)
  assert verdict.checks[1].evidence == "On 3 of 100 images FGSM changes no logit."


def test_a_check_without_its_views_is_refused():
  found, dataset = views(**HEALTHY)
  del found["quantised"]  # of which no check reads
  assert trust.judge(found, dataset).failed == ()
  del found["square"]
  with pytest.raises(ValueError, match="views are missing: square"):
    trust.judge(found, dataset)
  with pytest.raises(ValueError, match="`slack` is 2"):
    trust.judge(found, dataset, slack=2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"eps": 0.0}, "`eps` is 0.0; it must be a number > 0"),
    ({"eps": -0.1}, "`eps` is -0.1"),
    ({"names": ["pgd", "cw"]}, "`names` is 'cw'; write one of clean"),
    ({"batch_size": 0}, "`batch_size` is 0"),
    ({"effort": EFFORT._replace(restarts=0)}, "`restarts` of the effort is 0"),
    ({"effort": EFFORT._replace(queries=1.5)}, "`queries` of the effort is 1.5"),
    (
      {"effort": EFFORT._replace(long_steps=True)},
      "`long_steps` of the effort is True",
    ),
    ({"effort": EFFORT._replace(radius=0)}, "`radius` is 0"),
    ({"dataset": data.phantoms(2, size=16)}, "labels are masks"),
    ({"dataset": dataset()._replace(images=np.zeros((0, 8, 8, 1)))}, "no images"),
    (
      {"dataset": dataset()._replace(labels=np.full(60, 3))},
      "label 3 is outside the model's classes 0..2",
    ),
    (
      {"dataset": dataset()._replace(labels=np.zeros((60, 2), int))},
      "labels have shape",
    ),
    (
      {"variables": variables() | {"scale": np.float32(np.nan)}},
      "on 60 of 60 images the logits are not finite",
    ),
  ],
)
def test_bad_input_is_refused(change, message):
  given = {"variables": variables(), "dataset": dataset(), "eps": EPS} | change
  options = {
    name: given.pop(name) for name in ("names", "batch_size", "effort") if name in given
  }
  with pytest.raises(ValueError, match=message):
    robustness.measure(predict, *given.values(), **{"names": ["clean"]} | options)
