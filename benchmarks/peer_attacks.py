"""The same attack in every library, as functions without arguments, for `peers.py`.

A call takes `steps` gradient steps and judges the attacked images once: libraries that
do not judge by themselves are followed by one forward pass, and `bare` has one too.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peer_networks

import jaxadv
from jaxadv import attacks, combine, types

__all__ = ["CLASSES", "MASKS", "Program", "as_in_the_commands", "compiled", "radii"]

EPS, STEP = 8 / 255, 2 / 255


class Program(NamedTuple):
  """One attack of one library.

  Attributes:
    call: to the share of images, or of pixels, that it fooled; `bare` moves nothing.
    logits: of its model on the clean images, channels last, to be compared; `None`
      where they are of lower precision.
    costs: of a step outside of a loop, as XLA counts them.
  """

  call: Callable[[], float | None]
  logits: np.ndarray | None
  costs: Mapping[str, float] = {}


def _torch(form):
  """A plain loop in PyTorch."""

  def make(networks, steps):
    torch = peer_networks.import_torch()
    network = peer_networks.torch_form(networks.theirs(), form)
    x, y = peer_networks.for_torch(networks, form)

    def call():
      image = x
      for _ in range(steps):
        image = image.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(network(image), y)
        (gradient,) = torch.autograd.grad(loss, image)
        image = image.detach() + STEP * gradient.sign()
        image = image.clamp(x - EPS, x + EPS).clamp(0, 1)
      return _judged(network, image, y)

    return Program(call, None if form == "bf16" else _numpy(network, x))

  return make


def _judged(network, image, y):
  torch = peer_networks.import_torch()
  with torch.no_grad():
    return (network(image).argmax(1) != y).float().mean().item()


def _numpy(network, x):
  with peer_networks.import_torch().no_grad(), peer_networks.exact():
    return np.moveaxis(network(x).cpu().numpy(), 1, -1)


def _theirs(networks):
  network = peer_networks.torch_form(networks.theirs(), "plain")
  x, y = peer_networks.for_torch(networks)
  return network, x, y, _numpy(network, x)


def _torchattacks(networks, steps):
  library = importlib.import_module("torchattacks")
  network, x, y, logits = _theirs(networks)
  attack = library.PGD(network, EPS, STEP, steps, random_start=False)
  return Program(lambda: _judged(network, attack(x, y), y), logits)


def _foolbox_torch(networks, steps):
  library = importlib.import_module("foolbox")
  network, x, y, logits = _theirs(networks)
  model = library.PyTorchModel(network, (0, 1), device=peer_networks.device())
  return Program(_foolbox(library, model, x, y, steps), logits)


def _foolbox_jax(networks, steps):
  library = importlib.import_module("foolbox")
  predict, x = jax.jit(networks.ours), jnp.asarray(networks.x)
  model = library.JAXModel(predict, (0, 1))
  call = _foolbox(library, model, x, jnp.asarray(networks.y), steps)
  return Program(call, _logits(networks, "plain"))


def _foolbox(library, model, x, y, steps):
  attack = library.attacks.LinfPGD(steps=steps, abs_stepsize=STEP, random_start=False)

  def call():
    _, _, fooled = attack(model, x, y, epsilons=EPS)
    return float(np.mean(fooled.tolist()))

  return call


def _art(networks, steps):
  classification = importlib.import_module("art.estimators.classification")
  evasion = importlib.import_module("art.attacks.evasion")
  network, x, y, logits = _theirs(networks)
  loss = peer_networks.import_torch().nn.CrossEntropyLoss()
  model = classification.PyTorchClassifier(
    network,
    loss,
    tuple(x.shape[1:]),
    logits.shape[-1],
    clip_values=(0, 1),
    device_type="cpu" if peer_networks.device() == "cpu" else "gpu",
  )
  attack = evasion.ProjectedGradientDescent(
    model, eps=EPS, eps_step=STEP, max_iter=steps, batch_size=len(x), verbose=False
  )
  x, y = x.cpu().numpy(), y.cpu().numpy()

  def call():
    found = model.predict(attack.generate(x, y), batch_size=len(x))
    return float((found.argmax(1) != y).mean())

  return Program(call, logits)


def _pgd(form):
  """Our attack over our model, over the same on Flax, over that frozen, or bfloat16."""

  def make(networks, steps):
    logits = None if form == "bf16" else _logits(networks, form)
    return _ours(networks, compiled(networks, form, steps), networks.y, logits)

  return make


def compiled(networks: Any, form: str, steps: int, make: Callable | None = None) -> Any:
  """A jitted function of key, images and target, to the share of changed decisions."""
  attack = make(num_steps=steps) if make else _attack(steps)
  if form == "bf16":
    attack = combine.bf16(attack)
  predict, clean = _model(networks, form), jnp.asarray(networks.y)
  return jax.jit(
    lambda key, x, y: (attack(key, predict, x, y).logits.argmax(-1) != clean).mean()
  )


def as_in_the_commands(networks: Any, steps: int) -> Any:
  """PGD as `jaxadv attack` compiles it: frozen, with the weights as arguments."""

  def program(variables, key, x, y):
    predict = jaxadv.freeze(functools.partial(networks.apply, variables), x)
    return _attack(steps)(key, predict, x, y).image

  return functools.partial(jax.jit(program).lower, networks.variables)


def _attack(steps, eps=EPS):
  return attacks.pgd(eps, step_size=STEP, num_steps=steps, random_start=False)


def _ours(networks, run, y, logits):
  key, x, y = jax.random.key(0), jnp.asarray(networks.x), jnp.asarray(y)
  return Program(lambda: float(run(key, x, y)), logits)


def _logits(networks, form):
  predict = _model(networks, form)
  logits = peer_networks.once(lambda x: types.call(predict, x)[0])
  with peer_networks.exact():
    return np.asarray(logits(networks.x))


def _model(networks, form):
  if form == "frozen":
    return jaxadv.freeze(networks.flax, jnp.asarray(networks.x))
  return networks.flax if form == "flax" else networks.ours


def _bare(form):
  """The same gradients, one compiled call each, outside of any loop."""

  def make(networks, steps):
    x, y = jnp.asarray(networks.x), jnp.asarray(networks.y)
    predict = _model(networks, form)
    logits = jax.jit(lambda x: types.call(predict, x)[0])

    def cost(x):
      scores = nn.log_softmax(types.call(predict, x)[0])
      return jnp.take_along_axis(scores, y[..., None], -1).mean()

    gradient = jax.jit(jax.value_and_grad(cost)).lower(x).compile()

    def call():
      for _ in range(steps):
        found = gradient(x)
      jax.block_until_ready((found, logits(x)))

    return Program(call, _logits(networks, form), gradient.cost_analysis() or {})

  return make


def _on_masks(make, form):
  """An attack of ours towards the inverted mask."""

  def program(networks, steps):
    run = compiled(networks, form, steps, make)
    return _ours(networks, run, 1 - networks.y, _logits(networks, form))

  return program


def _advlib(form):
  """ASMA of adv-lib, towards the inverted mask."""

  def make(networks, steps):
    library = peer_networks.import_advlib()
    network = peer_networks.torch_form(networks.theirs(), form)
    x, y = peer_networks.for_torch(networks, form)

    def call():
      image = library.asma(network, x, 1 - y, targeted=True, num_steps=steps)
      return _judged(network, image, y)

    return Program(call, _numpy(network, x))

  return make


# name -> (networks, steps) -> Program; an error of a builder is listed in its place
CLASSES = {
  "bare": _bare("plain"),
  "plain": _pgd("plain"),
  "bare flax": _bare("flax"),
  "flax": _pgd("flax"),
  "frozen": _pgd("frozen"),
  "bf16": _pgd("bf16"),
  "torch": _torch("plain"),
  "torch channels-last": _torch("channels-last"),
  "torch folded": _torch("folded"),
  "torch compiled": _torch("compiled"),
  "torch graphs": _torch("graphs"),
  "torch bf16": _torch("bf16"),
  "torchattacks": _torchattacks,
  "foolbox torch": _foolbox_torch,
  "foolbox jax": _foolbox_jax,
  "art": _art,
}
MASKS = {
  "bare": _bare("plain"),
  "asma": _on_masks(attacks.asma, "plain"),
  "asma frozen": _on_masks(attacks.asma, "frozen"),
  "asma calibrated": _on_masks(attacks.asma_calibrated, "plain"),
  "asma calibrated frozen": _on_masks(attacks.asma_calibrated, "frozen"),
  "mafl": _on_masks(attacks.mafl, "plain"),
  "mafl frozen": _on_masks(attacks.mafl, "frozen"),
  "adv-lib asma": _advlib("plain"),
  "adv-lib asma folded": _advlib("folded"),
}


def radii(networks: Any, steps: int) -> tuple[Callable[[Any], Any], list[int]]:
  """PGD as one program of the radius, and a list that grows with every tracing."""
  traces: list[int] = []
  x, y = jnp.asarray(networks.x), jnp.asarray(networks.y)

  @jax.jit
  def run(eps):
    traces.append(1)
    result = _attack(steps, eps)(jax.random.key(0), networks.ours, x, y)
    return result.success.mean()

  return run, traces
