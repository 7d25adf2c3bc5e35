"""Settings of every test and doctest; read by pytest before jax is imported.

Eight simulated CPU devices, so that sharding is tested on any machine, and no silent
rank promotion, so that `(B,)` against `(B, 1)` is an error and not a `(B, B)` array.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
