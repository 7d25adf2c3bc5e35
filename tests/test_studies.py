import jax
import jax.numpy as jnp

from jaxadv import studies
from jaxadv.models.unet import UNet


def test_every_attack_of_the_contest_spends_the_same_gradients():
  """MSA takes the gradients of its ten scales before its first step."""
  model = UNet(width=2, norm="none")
  x = jnp.full((1, 16, 16, 1), 0.4).at[:, 4:9, 4:9].set(0.8)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  y = {"label": jnp.zeros((1, 16, 16), jnp.int32).at[:, 8:, 8:].set(1), "image": 1 - x}
  spent = {}
  for name, attack in studies.minimum_distortion(14, scales=(1e-3,)).items():
    run = jax.jit(
      lambda variables, attack=attack: (
        attack(jax.random.key(1), lambda x: model.apply(variables, x), x, y).backwards
      )
    )
    spent[name] = int(run(variables)[0])
  assert spent == {"asma 0.001": 14, "msa": 14 - 10, "mafl": 14}
  scales = 1 + len(jax.eval_shape(model.apply, variables, x)[1])
  assert spent["msa"] + scales == 14
