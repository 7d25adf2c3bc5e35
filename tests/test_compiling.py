"""Flags and kept programs: each in processes of their own, as JAX starts only once."""

import json
import os
import platform
import subprocess
import sys

import jax
import jaxlib
import pytest

from jaxadv import cli, compiling

WIDE, OTHER = "--xla_cpu_prefer_vector_width=512", "--xla_cpu_use_xnnpack=false"
# Every command of the application, imported.
IMPORTS = "import jax, json, os, jaxadv; from jaxadv import compiling, cli, job; "
IMPORTS += "from jaxadv import universal_job, defence_job, victim_job, analysis_job\n"
CONFIG = """
import optax
from jaxadv import training
from jaxadv.experiments import Recipe
from jaxadv.models import UNet

def get_config(*, quick=False):
  return Recipe(
    model=UNet(width=4, depth=1), optimizer=optax.sgd(0.01),
    data=("PACK",), loss=training.dice_cross_entropy, train_steps=2, batch_size=2,
  )
"""
# Seconds of a compilation, what the cache had and had not, and logits.
PROGRAM = """
import sys, time, jax, jax.numpy as jnp, jaxadv
from jax import monitoring
seen = []
monitoring.register_event_listener(lambda event, **_: seen.append(event))
jaxadv.keep_programs(sys.argv[1])
from jaxadv import models
model, x = models.ConvNet(width=4, depth=3), jnp.ones((1, 16, 16, 3))
variables = jax.jit(model.init)(jax.random.key(0), x)
attack = jaxadv.attacks.pgd(0.1, num_steps=2)
run = lambda v, k, x, y: attack(k, lambda x: model.apply(v, x), x, y).logits
lowered = jax.jit(run).lower(variables, jax.random.key(1), x, jnp.zeros(1, int))
start = time.process_time()
compiled = lowered.compile()
seconds = time.process_time() - start
found = compiled(variables, jax.random.key(1), x, jnp.zeros(1, int))
count = lambda what: seen.count(f"/jax/compilation_cache/cache_{what}")
print([seconds, count("hits"), count("misses"), found.tolist()])
"""


def run(code, *words, flags="", fails=False):
  """What a new process prints; its cache is not that of the tests."""
  environment = os.environ | {"XLA_FLAGS": flags}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  command = [sys.executable, "-c", code, *map(str, words)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert (done.returncode != 0) == fails, done.stderr
  return done


def told(code, *words, **how):
  return json.loads(run(code, *words, **how).stdout)


def test_importing_everything_does_not_start_jax():
  code = IMPORTS + "states = [compiling._has_started(), jax.config.jax_num_cpu_devices]"
  code += "\njax.devices(); print(json.dumps([*states, compiling._has_started()]))"
  assert told(code) == [False, jax.config.jax_num_cpu_devices, True]


CONFIGURE = f"""
compiling._MEASURED = (((0, 0), (99, 0), ("{WIDE}", "{OTHER}")),)
done = jaxadv.configure_cpu()
jax.devices()
print(json.dumps([done, os.environ["XLA_FLAGS"]]))
"""


@pytest.mark.parametrize(
  ("given", "added"),
  [
    ("", [WIDE, OTHER]),
    ("--xla_cpu_prefer_vector_width=128", [OTHER]),
    (f" {OTHER}  {WIDE} ", []),
  ],
)
def test_what_the_user_set_stays(given, added):
  (version, measured, flags, _), environment = told(IMPORTS + CONFIGURE, flags=given)
  assert (version, measured, flags) == (jaxlib.__version__, True, added)
  assert environment.split() == given.split() + added


def test_xla_reads_the_flags():
  code = IMPORTS + CONFIGURE.replace(OTHER, "--xla_no_such_flag=1")
  assert "xla_no_such_flag" in run(code, fails=True).stderr


def test_the_flags_of_this_version_are_known_to_it():
  code = IMPORTS + "done = jaxadv.configure_cpu(); jax.jit(abs)(-1.0)\n"
  version, measured, flags, _ = told(code + "print(json.dumps(done))")
  assert version == jaxlib.__version__
  expected = compiling._flags_of(version, platform.machine())
  assert (tuple(flags), measured) == (expected or (), expected is not None)


@pytest.mark.parametrize(
  ("version", "machine"),
  [
    ("0.9.4", "x86_64"),
    ("0.99.0", "x86_64"),
    ("1.0.0.dev20300101", "x86_64"),
    ("0.12.0.1", "arm64"),
  ],
)
def test_what_was_not_measured_gets_no_flags(version, machine, monkeypatch):
  assert compiling._flags_of("0.12.0.1", "AMD64")
  monkeypatch.setattr(platform, "machine", lambda: machine)
  monkeypatch.setattr(compiling, "_has_started", lambda: False)
  monkeypatch.setattr(jaxlib, "__version__", version)
  monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # of this very process
  before = dict(os.environ)
  assert compiling.configure_cpu() == (version, False, (), False)
  assert os.environ == before


def test_it_is_too_late_once_jax_has_started(monkeypatch):
  jax.devices()
  before = dict(os.environ)
  with pytest.raises(RuntimeError, match=r"call jaxadv\.configure_cpu\(\) right after"):
    compiling.configure_cpu()
  assert os.environ == before
  monkeypatch.setattr(compiling, "_has_started", lambda: False)
  monkeypatch.setenv("XLA_FLAGS", "flags.txt")
  with pytest.raises(compiling.FlagsError, match=r"is the file 'flags\.txt'; write"):
    compiling.configure_cpu()
  assert os.environ["XLA_FLAGS"] == "flags.txt"


FAULTS = """
import resource, statistics, jax.numpy as jnp
double, x, faults = jax.jit(lambda x: 2 * x), jnp.zeros(2**24), []
for _ in range(60):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  double(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(statistics.median(faults[30:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_program_gets_its_memory_back_without_page_faults():
  """In the long run: remainders that threads keep split free blocks at first."""
  kept, given_back = (
    told(IMPORTS + first + FAULTS) for first in ("jaxadv.configure_cpu()", "")
  )
  assert kept < given_back / 16


def files(folder):
  return {path.name: path.stat().st_size for path in folder.glob("*-cache")}


def test_the_next_process_compiles_nothing_and_a_torn_file_only_that_program(tmp_path):
  folder = tmp_path / "new" / "programs"
  cold, hits, misses, logits = told(PROGRAM, folder)
  before = files(folder)
  assert len(before) == misses > 1
  assert hits == 0
  warm, hits, misses, again = told(PROGRAM, folder)
  assert again == logits
  assert files(folder) == before
  assert (hits, misses) == (len(before), 0)
  assert warm <= 0.5 * cold
  largest = max(before, key=before.get)
  torn = folder / largest
  torn.write_bytes(torn.read_bytes()[:-20])
  done = run(PROGRAM, folder)
  assert json.loads(done.stdout)[3] == logits
  assert "Error reading persistent compilation cache entry" in done.stderr


def test_the_oldest_programs_beyond_the_bound_go(tmp_path, monkeypatch):
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  monkeypatch.setattr(compiling.compilation_cache, "reset_cache", lambda: None)
  for age in range(4):
    path = tmp_path / f"{age}-cache"
    path.write_bytes(bytes(10))
    os.utime(path, (1e9 - age, 1e9 - age))
  (tmp_path / "notes").write_bytes(bytes(99))
  compiling.keep_programs(tmp_path, max_bytes=25)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["0-cache", "1-cache", "notes"]
  with pytest.raises(ValueError, match="`max_bytes` is -1; write 0 or more"):
    compiling.keep_programs(tmp_path, max_bytes=-1)


def train(folder, *words):
  command = [sys.executable, "-m", "jaxadv", "train", str(folder / "small.py"), *words]
  environment = os.environ | {"XLA_FLAGS": ""}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done


@pytest.fixture
def config(tmp_path, discs):
  path = tmp_path / "small.py"
  path.write_text(CONFIG.replace("PACK", str(discs)))
  return path


def test_the_command_keeps_its_programs(tmp_path, config):
  cache = tmp_path / "programs"
  words = ["--cache", str(cache), "--cpu-flags", "--out"]
  train(tmp_path, *words, str(tmp_path / "first"))
  before = files(cache)
  assert len(before) > 1
  train(tmp_path, *words, str(tmp_path / "second"))
  assert files(cache) == before


def test_the_command_refuses_what_it_cannot_do(tmp_path, config, capsys):
  for words, message in (
    (["--cache", str(config)], f"cannot keep programs in {config}: File exists"),
    (["--cache", str(config / "in")], "Not a directory; choose another folder"),
    (["--cpu-flags"], "JAX has started"),
  ):
    out = tmp_path / "out"
    assert cli.main(["train", str(config), "--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()
