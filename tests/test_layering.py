"""Who may import whom, how large things may grow, and what every public name owes."""

import ast
import functools
import importlib
import inspect
import pathlib
import statistics
import subprocess
import sys

import helpers
import pytest

import jaxadv
from jaxadv import attacks, threats

ROOT = pathlib.Path(jaxadv.__file__).parent

# From the bottom up. A module may import what its row names, nothing else of ours; a
# new module needs a row. Rows of the application name only what is above the library.
GROUND = {"masks", "inputs", "filters"}
PARTS = {"threats", "losses", "targets", "forwards", "apgd", "transforms"}
PARTS |= {"similarity"}
SIDE = {"synthetic", "lazy", "pictures", "builders", "sources", "tfds_source"}
SIDE |= {"streams", "pairing", "data"}
ALLOWED = {
  "masks": set(),
  "inputs": set(),
  "filters": {"inputs"},
  "types": {"masks"},
  **dict.fromkeys(PARTS, GROUND | {"types"}),
  "transforms": GROUND | {"types", "apgd"},  # which it offers as one of its own
  "losses": GROUND | {"types", "similarity", "pointwise"},  # the same
  "pointwise": GROUND | {"types"},
  "outer_losses": GROUND | {"types", "pointwise"},
  "stepping": {"types", "inputs", "reduction"},
  # the engine knows no concrete part
  "engine": {"types", "inputs", "stepping", "reduction"},
  "reduction": set(),
  "patches": set(),
  "convolving": {"patches"},
  "few_rows": set(),
  "winograd": {"canonical", "convolving", "patches"},
  "canonical": {"convolving", "patches"},
  "pooling": {"canonical", "patches"},
  "folding": set(),
  "frozen_rules": {
    "folding",
    "canonical",
    "convolving",
    "few_rows",
    "pooling",
    "winograd",
  },
  "narrowing": {"folding"},
  "freezing": {"folding", "frozen_rules", "narrowing"},
  # and this no concrete attack
  "combine": {"types", "inputs", "stepping", "engine", "freezing"},
  "line_search": {"types", "inputs"},
  "stability": {"types", "engine"},  # it runs any attack of the engine
  "compaction": {"types", "inputs", "stepping", "engine"},  # the same
  "attacks": GROUND | PARTS | {"types", "stepping", "engine", "attacks"},
  "training": {"types", "inputs", "outer_losses", "reduction"},
  "defences": GROUND | PARTS | {"types", "engine", "combine", "attacks", "training"},
  "free_training": {"types", "inputs", "training"},
  "generative": {"types", "inputs", "targets", "threats", "combine", "training"},
  "augment": {"types", "training"},
  "loops": {"types", "sharding"},
  "sharding": set(),
  "preemption": set(),
  "compiling": set(),
  "manifests": {"jaxadv"},
  "distributed": {"sharding"},
  "checkpoints": {"manifests", "distributed", "preemption", "sharding"},
  "metrics": GROUND | {"types"},
  "budgets": {"inputs"},
  "analysis": {"types", "inputs", "losses", "analysis"},
  "outcomes": set(),
  "scores": set(),
  "checks": GROUND | {"types"},
  "models": {"models", "patches", "canonical", "convolving", "pooling"},
  **dict.fromkeys(SIDE, SIDE),
}
LIBRARY = {*ALLOWED, "jaxadv"}  # `import jaxadv` reads the version
APPLICATION = {
  "__main__": {"cli"},
  "analysis_plots": {"analysis"},
  "building": LIBRARY | {"progress"},
  "cli": {"experiments", "progress", "records", "report", "jaxadv"}
  | {"distributed", "sharding"}
  | {"checkpoints", "preemption", "compiling"}
  | {"job", "universal_job", "universal_report", "victim_job"}
  | {"analysis_job", "defence_job", "defence_report", "builders", "building"},
  "analysis_job": LIBRARY
  | {"analysis_plots", "defence_job", "defence_report", "inspection", "records"}
  | {"report", "victim_job"},
  "assessment": LIBRARY,
  "crafting": LIBRARY | {"fingerprints", "subjects"},
  "defence_job": LIBRARY
  | {"config_files", "distributed"}
  | {"defence_report", "experiments", "fingerprints", "progress", "records"}
  | {"robustness", "summaries", "trust", "victim_job"},
  "defence_report": LIBRARY | {"analysis_plots", "report", "summaries"},
  "config_files": {"experiments"},
  "experiments": LIBRARY | {"robustness"},
  "fingerprints": {"data", "lazy"},
  "inspection": LIBRARY | {"analysis_plots"},
  "job": LIBRARY
  | {"config_files", "distributed"}
  | {"experiments", "progress", "records", "report", "summaries", "trials"}
  | {"assessment", "fingerprints", "victim_job"},
  "progress": set(),
  "records": {"distributed"},
  "report": LIBRARY | {"summaries", "records"},
  "robustness": LIBRARY | {"summaries"},
  "retraining": LIBRARY | {"crafting", "subjects"},
  "step_rules": LIBRARY,
  "subjects": LIBRARY,
  "studies": LIBRARY | {"experiments", "robustness", "step_rules"},
  "summaries": LIBRARY | {"records"},
  "trials": LIBRARY | {"experiments"},
  "trust": LIBRARY | {"robustness"},
  "universal_job": LIBRARY
  | {"config_files", "distributed", "subjects"}
  | {"crafting", "experiments", "progress", "records", "report", "summaries"}
  | {"fingerprints", "universal_report", "victim_job", "victims"},
  "universal_report": LIBRARY | {"report"},
  "victim_job": LIBRARY
  | {"config_files"}
  | {"assessment", "experiments", "progress", "records", "victims"},
  "victims": LIBRARY | {"assessment", "experiments", "fingerprints", "progress"},
}
# third-party packages that only some files may import
ONLY = {
  "flax": {"models"},
  "h5py": set(),  # these only by name, where a file needs them
  "safetensors": set(),
  "torch": set(),
  "keras": set(),
  "nibabel": {"builders"},
  "xlrd": {"builders"},
  "orbax": {"checkpoints"},
  "tensorflow": set(),
  "tensorflow_datasets": {"tfds_source", "builders", "building"},
  "grain": {"streams"},
  "dm_pix": {"metrics", "forwards", "augment"},
  "matplotlib": {"report", "analysis_plots"},
  "jinja2": {"report"},
  "sklearn": {"analysis"},
  "rich": {"progress", "summaries", "report", "cli"},
  "PIL": {"job", "report", "sources", "pictures", "builders", "building"},
}


def files():
  return sorted(ROOT.rglob("*.py"))


def name_of(path):
  """`models/unet.py` belongs to `models`, `losses.py` is `losses`."""
  relative = path.relative_to(ROOT)
  return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@functools.cache
def tree(path):
  return ast.parse(path.read_text())


def imports(path):
  """Dotted names a file imports anywhere, also inside functions."""
  for node in ast.walk(tree(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path.name}: relative import"
      assert node.names[0].name != "*", f"{path.name}: star import"
      if node.module == "jaxadv":
        yield from (f"jaxadv.{alias.name}" for alias in node.names)
      else:
        yield node.module


def ours(path):
  """Modules of ours a file imports; names from the package itself are `jaxadv`."""
  for dotted in imports(path):
    first, *rest = dotted.split(".")
    if first == "jaxadv":
      known = rest and ((ROOT / rest[0]).is_dir() or (ROOT / f"{rest[0]}.py").exists())
      yield rest[0] if known else "jaxadv"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path):
  name = name_of(path)
  if name == "__init__":
    assert set(ours(path)) <= set(ALLOWED)
    return
  table = ALLOWED | APPLICATION
  assert name in table, f"{name} has no row in the table of layers"
  assert set(ours(path)) <= table[name]


def test_there_are_no_cycles():
  graph = {}
  for path in files():
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    graph[dotted.removesuffix(".__init__")] = set(full(path)) - {dotted}
  graph.pop("__init__")
  assert "types" in graph["engine"]
  assert "attacks.parts" in graph["attacks.msa"]
  assert sum(map(len, graph.values())) > 50
  for start in graph:
    seen, stack = set(), [start]
    while stack:
      for module in graph.get(stack.pop(), ()):
        assert module != start, f"{start} imports itself in a circle"
        if module not in seen:
          seen.add(module)
          stack.append(module)


def full(path):
  """Files of ours a file imports, with their folder: `attacks.parts`."""
  package = path.parent if path.name == "__init__.py" else None
  for node in ast.walk(tree(path)):
    if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "jaxadv":
      base = node.module.split(".")[1:]
      for alias in node.names:
        for parts in ([*base, alias.name], base):
          if parts and ROOT.joinpath(*parts).with_suffix(".py").exists():
            yield ".".join(parts)
            break
          if parts and ROOT.joinpath(*parts).is_dir() and package is None:
            yield ".".join(parts)
            break


@pytest.mark.parametrize("package", sorted(ONLY))
def test_a_third_party_package_stays_in_its_file(package):
  users = {
    name_of(p) for p in files() if package in {d.split(".")[0] for d in imports(p)}
  }
  assert users <= ONLY[package]


def test_the_library_does_not_know_the_application():
  for row, allowed in ALLOWED.items():
    assert not allowed & set(APPLICATION), row


def test_importing_the_package_is_light_and_brings_no_heavy_neighbour():
  heavy = ("flax", "orbax", "tensorflow", "tensorflow_datasets", "grain")
  heavy += ("matplotlib", "PIL")
  loaded = run(f"import jaxadv, sys; print([m for m in {heavy} if m in sys.modules])")
  assert loaded == "[]"

  def seconds(module):  # of this process alone: other load on the machine is no matter
    return float(
      run(
        "import time; t = time.process_time(); "
        f"import {module}; print(time.process_time() - t)"
      )
    )

  pairs = [(seconds("jax"), seconds("jaxadv")) for _ in range(5)]
  extra = statistics.median(ours - jax for jax, ours in pairs)
  assert extra <= 0.3, f"import jaxadv takes {extra:.2f} s more than import jax"


def run(code):
  done = subprocess.run(
    [sys.executable, "-c", code],
    check=True,
    capture_output=True,
    text=True,
    cwd=ROOT.parent,
  )
  return done.stdout.strip()


def functions():
  """`(where, code lines)`; docstrings are free, inner functions count."""
  for path in files():
    for node in ast.walk(tree(path)):
      if isinstance(node, ast.FunctionDef):
        length = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node):
          text = node.body[0]
          length -= text.end_lineno - text.lineno + 1
        yield f"{path.relative_to(ROOT)}:{node.name}", length


def test_files_stay_within_400_lines():
  sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files()}
  assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_functions_stay_small():
  lengths = dict(functions())
  assert {where: n for where, n in lengths.items() if n > 60} == {}
  ordered = sorted(lengths.values())
  assert statistics.median(ordered) <= 12
  assert ordered[int(0.9 * len(ordered))] <= 35


MODULES = [
  ".".join(("jaxadv", *path.relative_to(ROOT).with_suffix("").parts))
  for path in files()
  if path.stem not in ("__main__", "__init__")
]


@pytest.mark.parametrize("dotted", MODULES)
def test_public_names_are_listed_documented_and_typed(dotted):
  module = importlib.import_module(dotted)
  assert module.__doc__
  assert sorted(set(module.__all__)) == sorted(module.__all__)
  for name in module.__all__:
    value = getattr(module, name)
    if inspect.isfunction(value):
      assert value.__doc__, f"{dotted}.{name} has no docstring"
      check_signature(f"{dotted}.{name}", value)
    elif inspect.isclass(value):
      assert value.__doc__, f"{dotted}.{name} has no docstring"
      assert not value.__doc__.startswith(f"{name}("), f"{dotted}.{name}: default one"
  defined = {
    node.name
    for node in ast.parse(inspect.getsource(module)).body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
  }
  private = {name for name in defined if name.startswith("_")}
  assert not private & set(module.__all__)


def check_signature(where, function):
  signature = inspect.signature(function)
  assert signature.return_annotation is not inspect.Signature.empty, where
  for parameter in signature.parameters.values():
    assert parameter.annotation is not inspect.Parameter.empty, f"{where}: {parameter}"
  listed = helpers.positional(function)
  assert len(listed) <= 4, f"{where}: more than 4 positional arguments {listed}"


@pytest.mark.parametrize("name", attacks.__all__)
def test_attacks_take_the_radius_first_and_the_rest_by_name(name):
  assert helpers.positional(getattr(attacks, name)) in ([], ["eps"])


def test_threats_take_the_radius_first_and_the_rest_by_name():
  for name in ("linf", "l2", "l1"):
    assert helpers.positional(getattr(threats, name)) == ["eps"]
  assert helpers.positional(threats.box) == []


def test_the_package_exports_what_it_lists():
  for name in jaxadv.__all__:
    assert hasattr(jaxadv, name)
  for name in attacks.__all__:
    assert callable(getattr(attacks, name))
