"""Adversarial attacks on medical image models, and defences against them, in JAX.

An attack is a pure function `attack(key, predict, x, y) -> AttackResult`; `predict`
maps images `(B, ..., C)` in [0, 1] to logits, or to `(logits, features)`.

    attack = jaxadv.attacks.pgd(4 / 255, step_size=1 / 255, num_steps=20)
    result = jax.jit(lambda key, x, y: attack(key, predict, x, y))(key, x, y)
"""

from jaxadv import attacks, combine, losses, targets, threats, transforms
from jaxadv.compaction import attack_dataset
from jaxadv.compiling import configure_cpu, keep_programs
from jaxadv.engine import Attack, Universal, gradient_attack, universal_attack
from jaxadv.freezing import freeze
from jaxadv.types import AttackResult, Objective, Sample, Threat

__version__ = "0.1.0"

__all__ = [
  "Attack",
  "AttackResult",
  "Objective",
  "Sample",
  "Threat",
  "Universal",
  "attack_dataset",
  "attacks",
  "combine",
  "configure_cpu",
  "freeze",
  "gradient_attack",
  "keep_programs",
  "losses",
  "targets",
  "threats",
  "transforms",
  "universal_attack",
]
