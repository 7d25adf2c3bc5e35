"""Settings of every test and doctest; read by pytest before jax is imported.

Eight simulated CPU devices, so that sharding is tested on any machine, and no silent
rank promotion, so that `(B,)` against `(B, 1)` is an error and not a `(B, B)` array.
Compiled programs are kept until the tests end: many tests, and the processes they
start, compile the same ones.
"""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# The workers of pytest-xdist inherit the folder, and leave it to the first process.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxadv-compiled-")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
